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

/// The bytes of paths that need no closer look; see [`NormalPath::take`].
const BYTES: [Byte; 256] = {
    let mut bytes = [Byte { stands: false, stays_escaped: true }; 256];
    // Begins the escapes of further control characters.
    bytes[0xc2].stays_escaped = false;
    let mut byte = 0_u8;
    while byte.is_ascii() {
        let unreserved = byte.is_ascii_alphanumeric() || is_one_of(byte, b"-._~");
        bytes[byte as usize] = Byte {
            stands: unreserved || is_one_of(byte, b"!$&'()*+,=:@"),
            stays_escaped: !unreserved && !byte.is_ascii_control() && !is_one_of(byte, b"/\\;?#%"),
        };
        byte += 1;
    }
    bytes
};

/// What a byte is in a path.
#[derive(Clone, Copy)]
struct Byte {
    /// It may stand in a name as it is.
    stands: bool,
    /// Its escape is left as it is, and hides nothing.
    stays_escaped: bool,
}

const fn is_one_of(byte: u8, list: &[u8]) -> bool {
    let mut at = 0;
    while at < list.len() && list[at] != byte {
        at += 1;
    }
    at < list.len()
}

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

/// A path that is read in one way only. It borrows what came in that way already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormalPath<'a> {
    decoded: Cow<'a, str>,
    encoded: Cow<'a, str>,
    /// Whether those may read another path who decode it once more, or drop parameters.
    has_more_readings: bool,
}

impl<'a> NormalPath<'a> {
    /// Normalises the path of a request target, without its query: unreserved escapes are decoded,
    /// the others written in one way.
    ///
    /// # Errors
    /// Why it is ambiguous.
    pub fn parse(raw: &'a str) -> Result<Self, PathError> {
        Self::take(raw).map_or_else(|| Self::normalise(raw), Ok)
    }

    /// Takes in one pass a path that is normal already, and has nothing that [`Self::normalise`] looks at
    /// closely: no dot at the beginning of a segment, no parameters, no escape but of what needs one. `None`:
    /// another path, good or bad.
    fn take(raw: &'a str) -> Option<Self> {
        let bytes = raw.as_bytes();
        let (mut decoded, mut at, mut copied) = (Vec::new(), 0, 0);
        if !raw.starts_with('/') {
            return None;
        }
        while let Some(name) = bytes[at..].iter().position(|byte| !BYTES[usize::from(*byte)].stands)
        {
            at += name;
            match bytes[at..] {
                [b'/', b'/' | b'.', ..] => return None,
                [b'/', ..] => at += 1,
                [b'%', high, low, ..] => {
                    let escaped = capital_hex(high)? << 4 | capital_hex(low)?;
                    if !BYTES[usize::from(escaped)].stays_escaped {
                        return None;
                    }
                    decoded.reserve(bytes.len() - decoded.len());
                    decoded.extend_from_slice(&bytes[copied..at]);
                    decoded.push(escaped);
                    at += 3;
                    copied = at;
                }
                _ => return None,
            }
        }
        let decoded = if copied == 0 {
            Cow::Borrowed(raw)
        } else {
            decoded.extend_from_slice(&bytes[copied..]);
            Cow::Owned(String::from_utf8(decoded).ok()?)
        };
        Some(Self { decoded, encoded: Cow::Borrowed(raw), has_more_readings: false })
    }

    fn normalise(raw: &str) -> Result<Self, PathError> {
        if !raw.starts_with('/') {
            return Err(PathError::NotAbsolute);
        }
        check_escapes(raw)?;
        let decoded = decode(raw)?;
        // Somebody behind the upstream may decode once more: what would become dangerous is refused.
        if decoded.contains('%') {
            check_repeated_decoding(&decoded)?;
        }
        let has_more_readings = decoded.contains(['%', ';']);
        Ok(Self { decoded: decoded.into(), encoded: encode(raw).into(), has_more_readings })
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

    /// Whether those may read another path who decode it once more, or drop parameters.
    pub(super) fn has_more_readings(&self) -> bool {
        self.has_more_readings
    }

    /// What those read who decode it: once, as they should, and then, where they decode again, each other
    /// thing that comes of it.
    pub fn decodings(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let once = Cow::Borrowed(&*self.decoded);
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
pub struct RawPath<'a>(&'a str);

impl<'a> RawPath<'a> {
    /// Takes a path as it came.
    ///
    /// # Errors
    /// If it cannot stand in a request line, or if servers may read the name of another host in it: what
    /// follows `//` at its beginning.
    pub fn parse(raw: &'a str) -> Result<Self, PathError> {
        if !raw.starts_with('/') {
            return Err(PathError::NotAbsolute);
        }
        if raw.chars().any(|c| c.is_control() || matches!(c, ' ' | '#' | '?')) {
            return Err(PathError::Ambiguous);
        }
        if raw[1..].starts_with(['/', '\\']) {
            return Err(PathError::EmptySegment);
        }
        Ok(Self(raw))
    }
}

/// The path of a request, as it is decided on and forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestPath<'a> {
    /// In its one reading.
    Normal(NormalPath<'a>),
    /// As it came.
    Raw(RawPath<'a>),
}

impl RequestPath<'_> {
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
        shown(self.forwarded())
    }
}

/// A path that is forwarded, as logs show it: nothing but ASCII, which a normal one is.
pub(crate) fn shown(path: &str) -> Cow<'_, str> {
    utf8_percent_encode(path, CONTROLS).into()
}

/// A path as servers read it that look neither at the case of letters, nor at parameters, nor at dots and
/// spaces at the end of a segment.
pub(super) fn fold(path: &str) -> String {
    let mut folded = String::with_capacity(path.len());
    for name in folded_segments(path) {
        folded.push('/');
        folded.push_str(&name);
    }
    folded
}

/// The segments of such a path.
pub(super) fn folded_segments(path: &str) -> impl Iterator<Item = Cow<'_, str>> {
    let mut rest = Some(path);
    // `split` takes longer, since most segments are short.
    let segments = std::iter::from_fn(move || {
        let path = rest?;
        let end = path.bytes().position(|byte| byte == b'/');
        rest = end.map(|end| &path[end + 1..]);
        Some(&path[..end.unwrap_or(path.len())])
    });
    segments.map(fold_segment).filter(|name| !name.is_empty())
}

fn fold_segment(segment: &str) -> Cow<'_, str> {
    let is_folded = |byte: u8| byte.is_ascii() && !byte.is_ascii_uppercase() && byte != b';';
    let may_end = |byte: Option<&u8>| !matches!(byte, Some(b'.' | b' '));
    if segment.bytes().all(is_folded) && may_end(segment.as_bytes().last()) {
        return Cow::Borrowed(segment);
    }
    let name = segment.split(';').next().unwrap_or_default().trim_end_matches(['.', ' ']);
    // To upper case first: it brings together what has one capital, such as `s` and the long `s`.
    Cow::Owned(name.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase).collect())
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

/// The value of a hexadecimal digit as it is written here.
fn capital_hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
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
    fn ordinary_paths_are_taken_as_they_came() {
        for (raw, copies) in
            [("/", 0), ("/a/b.c/d-e_f~g/", 0), ("/a:b@c!$&'()*+,=", 0), ("/caf%C3%A9/a%20b%2B", 1)]
        {
            let path = NormalPath::take(raw).unwrap();
            assert!(matches!(path.encoded, Cow::Borrowed(_)), "{raw}");
            assert_eq!(i32::from(matches!(path.decoded, Cow::Owned(_))), copies, "{raw}");
        }
        for raw in [
            "", "a", "//", "/a//", "/.a", "/a/..", "/a;b", "/a%", "/a%2", "/a%2F", "/a%00", "/a%61",
        ] {
            assert_eq!(NormalPath::take(raw), None, "{raw}");
        }
        for raw in ["/%c3%bc", "/%25", "/%FF", "/%C2%80", "/ ", "/\\", "/\u{fc}"] {
            assert_eq!(NormalPath::take(raw), None, "{raw}");
        }
    }

    #[test]
    fn no_path_takes_long() {
        let nested = format!("/%{}61", "25".repeat(30_000));
        let started = SystemClock.monotonic();
        assert_eq!(NormalPath::parse(&nested), Err(PathError::Ambiguous));
        let took = SystemClock.monotonic().duration_since(started);
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
                prop_assert_eq!(&twice, &once);
            }
        }

        /// Of whatever bytes a path is made.
        #[test]
        fn what_is_taken_in_one_pass_is_what_normalising_makes_of_it(
            raw in "(/|\\.|;|%25|%[0-9A-Fa-f]{2}|%C3%[89ABab].|%C2%[89A].|[ -~]|[a-z]{1,3}|\u{fc}){0,8}",
            slash in any::<bool>(),
        ) {
            let raw = if slash { format!("/{raw}") } else { raw };
            if let Some(taken) = NormalPath::take(&raw) {
                prop_assert_eq!(Ok(taken), NormalPath::normalise(&raw));
            }
        }

        #[test]
        fn any_text_gets_an_answer(raw in ".*") {
            let _ = NormalPath::parse(&raw);
        }
    }
}
