//! Credential headers: found in exactly one reading, by everyone who takes them.
//!
//! Servers that make variables of header names fold `x_auth_name` and `x.auth.name` into
//! `x-auth-name`; whoever compares names in only one spelling lets the other ones through.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Why headers have more than one reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ambiguous {
    /// A header is there more than once.
    Duplicate,
    /// A header's name is spelled in a way that an upstream may read as the right one.
    Alias,
}

/// How such servers may read a byte of a header's name, which is in lower case: what is not a letter
/// or digit is a hyphen.
#[must_use]
pub fn folded(byte: u8) -> u8 {
    if byte.is_ascii_alphanumeric() { byte } else { b'-' }
}

/// A header's name as such servers may read it.
#[must_use]
pub fn fold(name: &HeaderName) -> String {
    name.as_str().bytes().map(|byte| char::from(folded(byte))).collect()
}

/// Whether a server may read `name` as `protected`.
#[must_use]
pub fn spells(name: &HeaderName, protected: &HeaderName) -> bool {
    reads_as(name.as_str(), protected.as_str())
}

fn reads_as(name: &str, protected: &str) -> bool {
    let mut bytes = name.bytes().zip(protected.bytes());
    name.len() == protected.len() && bytes.all(|(a, b)| a == b || folded(a) == folded(b))
}

/// The one value of each of `names`, `None` for those that are not there.
///
/// # Errors
/// If any of them has more than one reading.
pub fn one_of_each<'a, const N: usize>(
    headers: &'a HeaderMap,
    names: [&HeaderName; N],
) -> Result<[Option<&'a HeaderValue>; N], Ambiguous> {
    let mut found = [None; N];
    let names = names.map(HeaderName::as_str);
    for (name, value) in headers {
        let name = name.as_str();
        for (wanted, found) in names.iter().zip(&mut found) {
            if name == *wanted {
                if found.replace(value).is_some() {
                    return Err(Ambiguous::Duplicate);
                }
            } else if reads_as(name, wanted) {
                return Err(Ambiguous::Alias);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Name by name: all headers that a server may take for it are one, in the right spelling.
        #[test]
        fn one_of_each_is_what_is_found_name_by_name(
            present in proptest::collection::vec("(x[-_.]a|x[-_.]ab|X-A|content-length|x-c|host)", 0..6),
        ) {
            let wanted = ["x-a", "x-ab", "content-length"].map(|name| name.parse().unwrap());
            let headers: HeaderMap = present
                .iter()
                .enumerate()
                .map(|(i, name)| (name.to_ascii_lowercase().parse().unwrap(), HeaderValue::from(i)))
                .collect();
            let alone = |wanted: &HeaderName| {
                let all: Vec<_> = headers.iter().filter(|(name, _)| spells(name, wanted)).collect();
                match all[..] {
                    [] => Some(None),
                    [(name, value)] if name == wanted => Some(Some(value)),
                    _ => None,
                }
            };
            let found = one_of_each(&headers, wanted.each_ref());
            let each = wanted.each_ref().map(alone);
            let expected = each.iter().copied().collect::<Option<Vec<_>>>();
            prop_assert_eq!(found.ok().map(Vec::from), expected);
        }
    }
}
