//! Who we are, and the tokens that prove it.

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use zeroize::Zeroizing;

use crate::clock::{Clock, SystemClock};
use crate::entry::{Name, Realm, Seed};
use crate::otp::{Generator, TokenParams};

/// The most bytes read of a file with a seed; a longer one holds none.
const MAX_SEED_FILE: u64 = 4096;

/// Variables for a seed and for the name of its file; the first pair of which one is set counts.
const SEED_VARIABLES: [[&str; 2]; 2] =
    [["OTPGATE_AUTH_SEED", "OTPGATE_AUTH_SEED_FILE"], ["OTPGATE_SEED", "OTPGATE_SEED_FILE"]];

/// Why there is no [`TokenSource`]; never quotes a seed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TokenSourceError(String);

/// The triple of a service, and fresh tokens made from it.
///
/// It prints no seed, and wipes it when dropped.
///
/// ```
/// use otpgate::client::TokenSource;
///
/// let alice = TokenSource::parse("alice", "ops", "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP")?;
/// let mut request = http::Request::get("http://127.0.0.1:8080/orders").body(())?;
/// // For every request anew: a token is good for a short time.
/// alice.sign(request.headers_mut());
/// assert_eq!(request.headers()["X-Auth-Name"], "alice");
/// assert_eq!(request.headers()["X-Auth-Token"].len(), 6);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct TokenSource {
    name: Name,
    realm: Realm,
    seed: Seed,
    params: TokenParams,
    clock: Arc<dyn Clock>,
    header_names: [HeaderName; 3],
}

impl TokenSource {
    /// Tokens of this machine's clock: SHA1, 6 digits, 30 seconds.
    #[must_use]
    pub fn new(name: Name, realm: Realm, seed: Seed) -> Self {
        Self {
            name,
            realm,
            seed,
            params: TokenParams::default(),
            clock: Arc::new(SystemClock),
            header_names: ["x-auth-name", "x-auth-realm", "x-auth-token"]
                .map(HeaderName::from_static),
        }
    }

    /// The same, from texts; the seed is base32.
    ///
    /// # Errors
    /// What is wrong with which.
    pub fn parse(name: &str, realm: &str, seed: &str) -> Result<Self, TokenSourceError> {
        let seed = Seed::parse(seed).map_err(|e| TokenSourceError(format!("the seed {e}")))?;
        Self::with_seed(name, realm, seed)
    }

    /// The same, with the seed from a file; `-` is standard input.
    ///
    /// # Errors
    /// If the file cannot be read, or what is wrong with which.
    pub fn from_file(
        name: &str,
        realm: &str,
        path: impl AsRef<Path>,
    ) -> Result<Self, TokenSourceError> {
        Self::with_seed(name, realm, read_seed(path.as_ref())?)
    }

    /// From the variables of `otpgate client`: `OTPGATE_AUTH_NAME`, `OTPGATE_AUTH_REALM`, and
    /// `OTPGATE_AUTH_SEED_FILE` or `OTPGATE_AUTH_SEED`; without these two `OTPGATE_SEED_FILE` or
    /// `OTPGATE_SEED`. Empty ones count as not set.
    ///
    /// # Errors
    /// If one is missing, a seed and a file are both set, or what is wrong with which.
    pub fn from_env() -> Result<Self, TokenSourceError> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, TokenSourceError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let needed =
            |name: &str| set(name).ok_or_else(|| TokenSourceError(format!("missing {name}")));
        let (name, realm) = (needed("OTPGATE_AUTH_NAME")?, needed("OTPGATE_AUTH_REALM")?);
        for [seed_name, file_name] in SEED_VARIABLES {
            match (set(seed_name).map(Zeroizing::new), set(file_name)) {
                (None, None) => {}
                (Some(_), Some(_)) => {
                    let text = format!("both {seed_name} and {file_name} are set");
                    return Err(TokenSourceError(text));
                }
                (None, Some(file)) => return Self::from_file(&name, &realm, PathBuf::from(file)),
                (Some(seed), None) => {
                    let seed = Seed::parse(&seed)
                        .map_err(|e| TokenSourceError(format!("the seed in {seed_name} {e}")))?;
                    return Self::with_seed(&name, &realm, seed);
                }
            }
        }
        let [[seed, file], _] = SEED_VARIABLES;
        Err(TokenSourceError(format!("no seed: set {file} or {seed}")))
    }

    fn with_seed(name: &str, realm: &str, seed: Seed) -> Result<Self, TokenSourceError> {
        let name = Name::parse(name).map_err(|e| TokenSourceError(format!("the name {e}")))?;
        let realm = Realm::parse(realm).map_err(|e| TokenSourceError(format!("the realm {e}")))?;
        Ok(Self::new(name, realm, seed))
    }

    /// With tokens of another kind: they must be those of the entry.
    #[must_use]
    pub fn with_params(self, params: TokenParams) -> Self {
        Self { params, ..self }
    }

    /// With tokens of another clock.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// With other headers, as in `[headers]` of the gate: for name, realm and token.
    #[must_use]
    pub fn with_header_names(self, header_names: [HeaderName; 3]) -> Self {
        Self { header_names, ..self }
    }

    /// Our name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Our realm.
    #[must_use]
    pub fn realm(&self) -> &Realm {
        &self.realm
    }

    /// The token of now.
    #[must_use]
    pub fn token(&self) -> String {
        Generator::new(&self.seed, self.params).token_at(self.clock.now().unix)
    }

    /// The three headers that prove who sends a request now, for any HTTP client. The token's value is
    /// marked as sensitive.
    ///
    /// # Panics
    /// Never: what is no header's value is no name either.
    #[must_use]
    pub fn headers(&self) -> [(HeaderName, HeaderValue); 3] {
        let value = |text: &str| {
            HeaderValue::from_bytes(text.as_bytes()).expect("names hold no control characters")
        };
        let mut token = value(&self.token());
        token.set_sensitive(true);
        let [name, realm, of_token] = self.header_names.clone();
        [(name, value(self.name.as_str())), (realm, value(self.realm.as_str())), (of_token, token)]
    }

    /// Sets these headers, in place of any that are there.
    pub fn sign(&self, headers: &mut HeaderMap) {
        for (name, value) in self.headers() {
            headers.insert(name, value);
        }
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenSource")
            .field("name", &self.name)
            .field("realm", &self.realm)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}

/// Reads a seed from a file; `-` is standard input.
///
/// # Errors
/// If the file cannot be read or holds no seed.
pub fn read_seed(path: &Path) -> Result<Seed, TokenSourceError> {
    // Room for all of it: growing would leave copies behind.
    let mut text = Zeroizing::new(String::with_capacity(2 * MAX_SEED_FILE as usize));
    let read = if path == Path::new("-") {
        std::io::stdin().take(MAX_SEED_FILE).read_to_string(&mut text)
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_SEED_FILE).read_to_string(&mut text))
    };
    let path = path.display();
    read.map_err(|e| TokenSourceError(format!("cannot read the seed from `{path}`: {e}")))?;
    Seed::parse(&text).map_err(|e| TokenSourceError(format!("the seed in `{path}` {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::entry::Algorithm;

    /// RFC 6238 appendix B, seed of SHA1.
    const SEED: &str = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ";

    #[test]
    fn a_token_is_made_for_every_request() {
        let clock = Arc::new(ManualClock::at(59));
        let source = TokenSource::parse("a", "b", SEED).unwrap().with_clock(clock.clone());
        assert_eq!(source.token(), "287082");
        clock.advance(std::time::Duration::from_secs(1_111_111_109 - 59));
        assert_eq!(source.token(), "081804");
        let params =
            TokenParams { digits: 8, algorithm: Algorithm::Sha1, ..TokenParams::default() };
        assert_eq!(source.with_params(params).token(), "07081804");
    }

    #[test]
    fn headers_replace_those_of_before_and_show_no_token() {
        let source = TokenSource::parse(" ü ", "b", SEED).unwrap();
        let mut headers = HeaderMap::new();
        headers.append("x-auth-name", HeaderValue::from_static("mallory"));
        headers.append("x-auth-name", HeaderValue::from_static("eve"));
        source.sign(&mut headers);
        assert_eq!(headers.get_all("x-auth-name").iter().count(), 1);
        assert_eq!(headers["x-auth-name"].as_bytes(), "ü".as_bytes());
        assert_eq!(headers["x-auth-token"].to_str().unwrap(), source.token());
        let printed = format!("{headers:?} {source:?}");
        assert!(!printed.contains(&source.token()) && !printed.contains("GEZD"), "{printed}");
        let named = ["n", "r", "t"].map(HeaderName::from_static);
        let [(name, _), ..] = source.with_header_names(named).headers();
        assert_eq!(name, "n");
    }

    #[test]
    fn the_environment_says_who_we_are() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("{SEED}\n")).unwrap();
        let path = file.path().to_str().unwrap();
        let who = [("OTPGATE_AUTH_NAME", "a"), ("OTPGATE_AUTH_REALM", "b")];
        let made = |more: &[(&str, &str)]| {
            let all = [&who, more].concat();
            let find =
                |name: &str| all.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
            TokenSource::from_variables(find).map(|s| s.token()).map_err(|e| e.to_string())
        };
        for good in [
            &[("OTPGATE_AUTH_SEED", SEED)] as &[_],
            &[("OTPGATE_AUTH_SEED_FILE", path), ("OTPGATE_AUTH_SEED", "")],
            &[("OTPGATE_AUTH_SEED", SEED), ("OTPGATE_SEED", "1!")],
            &[("OTPGATE_SEED_FILE", path)],
            &[("OTPGATE_SEED", SEED)],
        ] {
            assert!(made(good).is_ok_and(|token| token.len() == 6), "{good:?}");
        }
        for (bad, text) in [
            (&[] as &[_], "no seed: set OTPGATE_AUTH_SEED_FILE or OTPGATE_AUTH_SEED"),
            (&[("OTPGATE_SEED", "hunter2!")], "the seed in OTPGATE_SEED is not base32"),
            (
                &[("OTPGATE_SEED", SEED), ("OTPGATE_SEED_FILE", path)],
                "both OTPGATE_SEED and OTPGATE_SEED_FILE are set",
            ),
        ] {
            assert_eq!(made(bad).unwrap_err(), text);
        }
        let nobody = TokenSource::from_variables(|_| None).unwrap_err();
        assert_eq!(nobody.to_string(), "missing OTPGATE_AUTH_NAME");
    }
}
