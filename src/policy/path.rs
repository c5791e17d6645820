//! Request paths: normalised once, so that the policy decides on what the upstream receives.
//!
//! What cannot be read in one way only is refused: dot segments, empty segments, backslashes,
//! encoded delimiters, control characters, invalid escapes or UTF-8, also behind repeated decoding. For
//! upstreams that mean something by such paths there are raw ones, which are not read at all.

use std::borrow::Cow;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

/// All but RFC 3986's `pchar` and `/`.
const NOT_PCHAR: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// How often a path may be encoded in itself: nobody means more.
const MAX_DECODINGS: usize = 4;

/// Why a path is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It does not start with `/`.
    #[error("the path does not start with `/`")]
    NotAbsolute,
    /// `.` or `..`, plain or encoded.
    #[error("the path contains a dot segment")]
    DotSegment,
    /// `//`.
    #[error("the path contains an empty segment")]
    EmptySegment,
    /// `\`, `#`, a control character, or an encoded `/ \ ? # ; %`-escape.
    #[error("the path contains a character that servers read differently")]
    Ambiguous,
    /// `%` without two hexadecimal digits.
    #[error("the path contains an invalid percent escape")]
    BadEscape,
    /// Bytes that are not UTF-8.
    #[error("the path is not UTF-8")]
    NotUtf8,
}

/// A path that is read in one way only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormalPath {
    decoded: String,
    encoded: String,
}

impl NormalPath {
    /// Normalises the path of a request target, without its query: unreserved escapes are decoded,
    /// the others written in one way.
    ///
    /// # Errors
    /// Why it is ambiguous.
    pub fn parse(raw: &str) -> Result<Self, PathError> {
        if !raw.starts_with('/') {
            return Err(PathError::NotAbsolute);
        }
        check_escapes(raw)?;
        let decoded = decode(raw)?;
        // Somebody behind the upstream may decode once more: what would become dangerous is refused.
        if decoded.contains('%') {
            check_repeated_decoding(&decoded)?;
        }
        Ok(Self { decoded, encoded: encode(raw) })
    }

    /// What policies match on.
    #[must_use]
    pub fn decoded(&self) -> &str {
        &self.decoded
    }

    /// What is forwarded.
    #[must_use]
    pub fn encoded(&self) -> &str {
        &self.encoded
    }

    /// What those read who decode it: once, as they should, and then, where they decode again, each other
    /// thing that comes of it.
    pub fn decodings(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let once = Cow::Borrowed(self.decoded.as_str());
        std::iter::successors(Some(once), |path| {
            // `parse` has seen that this goes well, and that it ends.
            let again = path.contains('%').then(|| decode(path).ok()).flatten()?;
            (again != **path).then_some(Cow::Owned(again))
        })
    }
}

/// A decoded path without the `;parameters` of its segments, if it has any.
pub(super) fn without_parameters(path: &str) -> Option<String> {
    path.contains(';').then(|| {
        let bare: Vec<_> =
            path.split('/').map(|segment| segment.split(';').next().unwrap_or_default()).collect();
        bare.join("/")
    })
}

/// A path that nobody reads before the upstream does: it is forwarded byte for byte. What governs it must
/// not depend on its meaning; see [`super::Policy::raw_conflict`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawPath(String);

impl RawPath {
    /// Takes a path as it came.
    ///
    /// # Errors
    /// If it cannot stand in a request line, or if servers may read the name of another host in it: what
    /// follows `//` at its beginning.
    pub fn parse(raw: &str) -> Result<Self, PathError> {
        if !raw.starts_with('/') {
            return Err(PathError::NotAbsolute);
        }
        if raw.chars().any(|c| c.is_control() || matches!(c, ' ' | '#' | '?')) {
            return Err(PathError::Ambiguous);
        }
        if raw[1..].starts_with(['/', '\\']) {
            return Err(PathError::EmptySegment);
        }
        Ok(Self(raw.to_owned()))
    }
}

/// The path of a request, as it is decided on and forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestPath {
    /// In its one reading.
    Normal(NormalPath),
    /// As it came.
    Raw(RawPath),
}

impl RequestPath {
    /// What is forwarded.
    #[must_use]
    pub fn forwarded(&self) -> &str {
        match self {
            Self::Normal(path) => path.encoded(),
            Self::Raw(RawPath(path)) => path,
        }
    }

    /// What logs show: nothing but ASCII.
    #[must_use]
    pub fn shown(&self) -> Cow<'_, str> {
        match self {
            Self::Normal(path) => Cow::Borrowed(path.encoded()),
            Self::Raw(RawPath(path)) => utf8_percent_encode(path, CONTROLS).into(),
        }
    }
}

/// A path as servers read it that look neither at the case of letters, nor at parameters, nor at dots and
/// spaces at the end of a segment.
pub(super) fn fold(path: &str) -> String {
    let mut folded = String::with_capacity(path.len());
    for segment in path.split('/') {
        let name = segment.split(';').next().unwrap_or_default().trim_end_matches(['.', ' ']);
        if name.is_empty() {
            continue;
        }
        folded.push('/');
        // To upper case first: it brings together what has one capital, such as `s` and the long `s`.
        folded.extend(name.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase));
    }
    folded
}

/// Decodes until nothing changes, but not for ever: each escape of a `%` in front of the next one
/// costs another pass over the whole path.
fn check_repeated_decoding(decoded: &str) -> Result<(), PathError> {
    let mut path = decode(decoded)?;
    for _ in 0..MAX_DECODINGS {
        let next = decode(&path)?;
        if next == path {
            return Ok(());
        }
        path = next;
    }
    Err(PathError::Ambiguous)
}

/// Every `%` starts an escape.
fn check_escapes(text: &str) -> Result<(), PathError> {
    let good = text.split('%').skip(1).all(|rest| {
        rest.as_bytes().get(..2).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit))
    });
    good.then_some(()).ok_or(PathError::BadEscape)
}

/// Decodes all escapes once; refuses those of delimiters, and what they uncover.
fn decode(text: &str) -> Result<String, PathError> {
    let delimiter = text.split('%').skip(1).any(|rest| {
        matches!(
            rest.as_bytes().get(..2).map(<[u8]>::to_ascii_lowercase).as_deref(),
            Some(b"2f" | b"5c" | b"3b" | b"3f" | b"23")
        )
    });
    if delimiter {
        return Err(PathError::Ambiguous);
    }
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| PathError::NotUtf8)?;
    check_segments(&decoded)?;
    Ok(decoded.into_owned())
}

/// RFC 3986 section 6.2.2: escapes of unreserved characters decoded, the others in upper case; what
/// may not stand in a path is escaped. Escapes of reserved characters stay: `%2B` is not `+`.
fn encode(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((plain, escape)) = rest.split_once('%') {
        out.extend(utf8_percent_encode(plain, NOT_PCHAR));
        let (hex, tail) = escape.split_at(2);
        match u8::from_str_radix(hex, 16).map(char::from) {
            Ok(c) if c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~') => out.push(c),
            _ => {
                out.push('%');
                out.push_str(&hex.to_ascii_uppercase());
            }
        }
        rest = tail;
    }
    out.extend(utf8_percent_encode(rest, NOT_PCHAR));
    out
}

fn check_segments(path: &str) -> Result<(), PathError> {
    if path.chars().any(|c| c.is_control() || matches!(c, '\\' | '#' | '?')) {
        return Err(PathError::Ambiguous);
    }
    let mut segments = path[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        let name = segment.split(';').next().unwrap_or_default();
        if matches!(name, "." | "..") {
            return Err(PathError::DotSegment);
        }
        if name.is_empty() && (segments.peek().is_some() || !segment.is_empty()) {
            return Err(PathError::EmptySegment);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::{Clock as _, SystemClock};
    use proptest::prelude::*;

    #[test]
    fn one_way_paths_are_normalised() {
        for (raw, decoded, encoded) in [
            ("/", "/", "/"),
            ("/a/b/", "/a/b/", "/a/b/"),
            ("/%61dmin", "/admin", "/admin"),
            ("/a%2bb%40", "/a+b@", "/a%2Bb%40"),
            ("/a b", "/a b", "/a%20b"),
            ("/\u{fc}", "/\u{fc}", "/%C3%BC"),
            ("/%c3%bc", "/\u{fc}", "/%C3%BC"),
            ("/100%25", "/100%", "/100%25"),
            ("/a;v=1/b", "/a;v=1/b", "/a;v=1/b"),
            ("/a:b@c!$&'()*+,=", "/a:b@c!$&'()*+,=", "/a:b@c!$&'()*+,="),
        ] {
            let path = NormalPath::parse(raw).unwrap();
            assert_eq!((path.decoded(), path.encoded()), (decoded, encoded), "{raw}");
        }
    }

    #[test]
    fn ambiguous_paths_are_refused() {
        use PathError::{Ambiguous, BadEscape, DotSegment, EmptySegment, NotAbsolute, NotUtf8};
        for (raw, why) in [
            ("", NotAbsolute),
            ("*", NotAbsolute),
            ("admin", NotAbsolute),
            ("/..", DotSegment),
            ("/a/../b", DotSegment),
            ("/a/./b", DotSegment),
            ("/%2e%2E/b", DotSegment),
            ("/..;x/b", DotSegment),
            ("/a/..;/b", DotSegment),
            ("/%252e%252e/b", DotSegment),
            ("//a", EmptySegment),
            ("/a//b", EmptySegment),
            ("/a/;x/b", EmptySegment),
            ("/a//", EmptySegment),
            ("/a%2fb", Ambiguous),
            ("/a%5Cb", Ambiguous),
            ("/a%3bb", Ambiguous),
            ("/a%3fb", Ambiguous),
            ("/a%23b", Ambiguous),
            ("/a%252fb", Ambiguous),
            ("/a%25252fb", Ambiguous),
            ("/100%25/%252f", Ambiguous),
            ("/%252525252525252561", Ambiguous),
            ("/a\\b", Ambiguous),
            ("/a#b", Ambiguous),
            ("/a%00b", Ambiguous),
            ("/a%0d%0ab", Ambiguous),
            ("/a%7f", Ambiguous),
            ("/a%", BadEscape),
            ("/a%4", BadEscape),
            ("/a%zz", BadEscape),
            ("/a%+1", BadEscape),
            ("/%ff", NotUtf8),
            ("/%c0%ae%c0%ae/", NotUtf8),
        ] {
            assert_eq!(NormalPath::parse(raw), Err(why), "{raw}");
        }
    }

    #[test]
    fn no_path_takes_long() {
        let nested = format!("/%{}61", "25".repeat(30_000));
        let started = SystemClock.now().monotonic;
        assert_eq!(NormalPath::parse(&nested), Err(PathError::Ambiguous));
        let took = SystemClock.now().monotonic.duration_since(started);
        assert!(took < Duration::from_secs(1), "{took:?}");
    }

    #[test]
    fn parameters_can_be_left_out() {
        assert_eq!(without_parameters("/admin;x=1/y;z").as_deref(), Some("/admin/y"));
        assert_eq!(without_parameters("/admin/y"), None);
    }

    #[test]
    fn all_decodings_are_known() {
        for (raw, decodings) in [
            ("/a", &["/a"][..]),
            ("/%61", &["/a"]),
            ("/100%25", &["/100%"]),
            ("/%2561", &["/%61", "/a"]),
            ("/%252561;x", &["/%2561;x", "/%61;x", "/a;x"]),
        ] {
            let path = NormalPath::parse(raw).unwrap();
            assert_eq!(path.decodings().collect::<Vec<_>>(), decodings, "{raw}");
        }
    }

    #[test]
    fn raw_paths_stay_as_they_are() {
        for raw in ["/", "/a%2fb//../%zz\\x", "/\u{fc}", "/a;/..;/", "/%00%ff"] {
            let path = RequestPath::Raw(RawPath::parse(raw).unwrap());
            assert_eq!(path.forwarded(), raw);
            assert!(path.shown().is_ascii());
        }
        for (raw, why) in [
            ("", PathError::NotAbsolute),
            ("a", PathError::NotAbsolute),
            ("//host/x", PathError::EmptySegment),
            ("/\\host/x", PathError::EmptySegment),
            ("/a b", PathError::Ambiguous),
            ("/a\r\nb", PathError::Ambiguous),
            ("/a\0", PathError::Ambiguous),
            ("/a#b", PathError::Ambiguous),
            ("/a?b", PathError::Ambiguous),
        ] {
            assert_eq!(RawPath::parse(raw), Err(why), "{raw:?}");
        }
    }

    #[test]
    fn folding_leaves_what_every_server_tells_apart() {
        for (path, folded) in [
            ("/", ""),
            ("/Admin/X", "/admin/x"),
            ("/admin./x . .", "/admin/x"),
            ("/admin;x/y", "/admin/y"),
            ("/.../ /x", "/x"),
            ("/\u{17f}taff/\u{212a}", "/staff/k"),
            ("/\u{dc}", "/\u{fc}"),
            ("/a.b", "/a.b"),
        ] {
            assert_eq!(fold(path), folded, "{path}");
        }
    }

    proptest! {
        #[test]
        fn folding_twice_changes_nothing(path in "(/[ -~\u{fc}\u{17f}]{0,6}){0,4}") {
            prop_assert_eq!(fold(&fold(&path)), fold(&path));
        }

        #[test]
        fn normalising_twice_changes_nothing(raw in "/[ -~\u{fc}]{0,40}") {
            if let Ok(once) = NormalPath::parse(&raw) {
                let twice = NormalPath::parse(once.encoded()).unwrap();
                prop_assert_eq!(twice, once);
            }
        }

        #[test]
        fn any_text_gets_an_answer(raw in ".*") {
            let _ = NormalPath::parse(&raw);
        }
    }
}
