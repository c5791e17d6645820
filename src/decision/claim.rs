//! Credentials of a request: who it claims to be, in exactly one reading.

use http::{HeaderMap, HeaderValue};

use crate::config::HeaderNames;
use crate::credentials::{Ambiguous, one_of_each};
use crate::entry::PrincipalRef;
use crate::otp::Token;

/// What a request's headers claim.
#[derive(Debug)]
pub(super) enum Claim<'a> {
    /// All three headers are there.
    Complete {
        /// The claimed principal.
        who: PrincipalRef<'a>,
        /// `None`: of wrong form, so it proves nothing.
        token: Option<Token>,
    },
    /// At least one is missing.
    Missing,
}

/// Why a request claims nothing that could be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unclear {
    /// There is more than one reading of its headers.
    Ambiguous(Ambiguous),
    /// A name or realm is empty, too long, not UTF-8, or has control characters.
    Malformed,
}

impl Unclear {
    /// A bounded word for logs and metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Ambiguous(Ambiguous::Duplicate) => "credential_duplicate",
            Self::Ambiguous(Ambiguous::Alias) => "credential_alias",
            Self::Malformed => "credential_malformed",
        }
    }
}

/// Reads the credentials. Exactly one of each header, in its exact spelling; names and realms are
/// UTF-8, tokens are not trimmed.
///
/// # Errors
/// If there is more than one reading, or none.
pub(super) fn read<'a>(headers: &'a HeaderMap, names: &HeaderNames) -> Result<Claim<'a>, Unclear> {
    let found = one_of_each(headers, names.credentials()).map_err(Unclear::Ambiguous)?;
    let [Some(name), Some(realm), Some(token)] = found else {
        return Ok(Claim::Missing);
    };
    let who = PrincipalRef::parse(exact(name)?, exact(realm)?).map_err(|_| Unclear::Malformed)?;
    let token = text(token).ok().and_then(Token::parse);
    Ok(Claim::Complete { who, token })
}

fn text(value: &HeaderValue) -> Result<&str, Unclear> {
    std::str::from_utf8(value.as_bytes()).map_err(|_| Unclear::Malformed)
}

/// A name or realm without anything around it: the white space that HTTP allows there is gone by now, and
/// other kinds, such as no-break spaces, are not trimmed here, or one name would have many spellings.
fn exact(value: &HeaderValue) -> Result<&str, Unclear> {
    text(value)
        .and_then(|text| if text.trim() == text { Ok(text) } else { Err(Unclear::Malformed) })
}

/// Headers, one a line: whoever is claimed, it is by one header of each kind, and no other one could be
/// read as such.
///
/// # Panics
/// If that does not hold.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n') {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = (&line[..colon], line.get(colon + 1..).unwrap_or_default());
        let name = http::HeaderName::from_bytes(name);
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    let names = HeaderNames::default();
    let Ok(claim) = read(&headers, &names) else { return };
    for protected in names.credentials() {
        let is_it = |name: &&http::HeaderName| crate::credentials::spells(name, protected);
        let found = headers.iter().filter(|(name, _)| is_it(name)).count();
        assert_eq!(found, headers.get_all(protected).iter().count(), "an alias is left");
        assert!(found <= 1 && (found == 1 || matches!(claim, Claim::Missing)));
    }
    if let Claim::Complete { who, .. } = claim {
        assert_eq!(PrincipalRef::parse(who.name(), who.realm()), Ok(who));
        assert!(!who.name().chars().chain(who.realm().chars()).any(char::is_control));
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;
    use proptest::prelude::*;

    fn headers(list: &[(&str, &[u8])]) -> HeaderMap {
        list.iter()
            .map(|(name, value)| {
                let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
                (name, HeaderValue::from_bytes(value).unwrap())
            })
            .collect()
    }

    /// `name@realm`, and whether the token has the right form.
    fn claimed(list: &[(&str, &[u8])]) -> Result<Option<(String, bool)>, Unclear> {
        let headers = headers(list);
        Ok(match read(&headers, &HeaderNames::default())? {
            Claim::Missing => None,
            Claim::Complete { who, token } => {
                Some((format!("{}@{}", who.name(), who.realm()), token.is_some()))
            }
        })
    }

    const NAME: (&str, &[u8]) = ("X-Auth-Name", b"alice");
    const REALM: (&str, &[u8]) = ("x-auth-realm", b"staff");
    const TOKEN: (&str, &[u8]) = ("X-AUTH-TOKEN", b"123456");

    #[test]
    fn one_of_each_is_a_claim() {
        assert_eq!(claimed(&[NAME, REALM, TOKEN]), Ok(Some(("alice@staff".into(), true))));
        let utf8 = ("x-auth-name", "\u{fc}nal".as_bytes());
        assert_eq!(claimed(&[utf8, REALM, TOKEN]), Ok(Some(("\u{fc}nal@staff".into(), true))));
    }

    #[test]
    fn a_token_of_wrong_form_is_a_claim_that_fails() {
        for token in ["", "12345", "123456789", "12 3456", "１２３４５６", "abcdef"] {
            let got = claimed(&[NAME, REALM, ("x-auth-token", token.as_bytes())]);
            assert_eq!(got, Ok(Some(("alice@staff".into(), false))), "{token}");
        }
        let got = claimed(&[NAME, REALM, ("x-auth-token", b"\xff\xfe")]);
        assert_eq!(got, Ok(Some(("alice@staff".into(), false))));
    }

    #[test]
    fn a_missing_header_is_no_claim() {
        for list in [&[][..], &[NAME], &[NAME, REALM], &[REALM, TOKEN], &[NAME, TOKEN]] {
            assert_eq!(claimed(list), Ok(None));
        }
    }

    #[test]
    fn two_of_one_are_refused_even_if_equal_or_others_miss() {
        for twice in [NAME, REALM, TOKEN] {
            assert_eq!(
                claimed(&[NAME, REALM, TOKEN, twice]),
                Err(Unclear::Ambiguous(Ambiguous::Duplicate))
            );
            assert_eq!(claimed(&[twice, twice]), Err(Unclear::Ambiguous(Ambiguous::Duplicate)));
        }
    }

    #[test]
    fn other_spellings_are_refused_alone_or_beside_the_right_one() {
        for alias in [
            "x_auth_name",
            "X_Auth_Name",
            "x.auth.name",
            "x-auth_name",
            "x-auth.realm",
            "x_auth-realm",
            "x~auth~token",
            "x!auth'token",
            "x-auth|token",
            "x*auth^name",
        ] {
            let alias: (&str, &[u8]) = (alias, b"alice");
            assert_eq!(claimed(&[alias]), Err(Unclear::Ambiguous(Ambiguous::Alias)), "{alias:?}");
            assert_eq!(
                claimed(&[NAME, REALM, TOKEN, alias]),
                Err(Unclear::Ambiguous(Ambiguous::Alias)),
                "{alias:?}"
            );
        }
        for other in ["x-auth-names", "xauthname", "auth-name", "x--auth-name"] {
            assert!(claimed(&[NAME, REALM, TOKEN, (other, b"x")]).is_ok(), "{other}");
        }
    }

    #[test]
    fn malformed_names_are_refused() {
        let long = "n".repeat(129);
        let [bidi, no_break, ideographic, next_line] =
            ["ali\u{202e}ce", "alice\u{a0}", "\u{3000}alice", "alice\u{85}"].map(str::as_bytes);
        let long = long.as_bytes();
        let unicode = [bidi, no_break, ideographic, next_line];
        for bad in [&b""[..], b"   ", b" alice", b"a\tb", b"\xff", b"\xc3", long]
            .into_iter()
            .chain(unicode)
        {
            assert_eq!(claimed(&[("x-auth-name", bad), REALM, TOKEN]), Err(Unclear::Malformed));
            assert_eq!(claimed(&[NAME, ("x-auth-realm", bad), TOKEN]), Err(Unclear::Malformed));
        }
    }

    proptest! {
        /// However a protected name is respelled, it is never taken for somebody else's header.
        #[test]
        fn no_respelling_slips_through(
            which in 0..3_usize,
            separators in proptest::collection::vec("[-_.!#$%&'*+^`|~]", 2),
            upper in any::<u16>(),
        ) {
            let words = [["x", "auth", "name"], ["x", "auth", "realm"], ["x", "auth", "token"]][which];
            let spelled = format!(
                "{}{}{}{}{}", words[0], separators[0], words[1], separators[1], words[2]
            );
            let cased: String = spelled.chars().enumerate()
                .map(|(i, c)| if upper >> (i % 16) & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            let exact = spelled == words.join("-");
            let got = claimed(&[NAME, REALM, TOKEN, (&cased, b"x")]);
            let expected = if exact { Unclear::Ambiguous(Ambiguous::Duplicate) } else { Unclear::Ambiguous(Ambiguous::Alias) };
            prop_assert_eq!(got, Err(expected));
        }

        #[test]
        fn any_value_gets_an_answer(value in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                let mut map = HeaderMap::new();
                for name in ["x-auth-name", "x-auth-realm", "x-auth-token"] {
                    map.insert(name, value.clone());
                }
                let _ = read(&map, &HeaderNames::default());
            }
        }
    }
}
