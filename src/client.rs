//! For services: [`TokenSource`] makes the headers of calls through a gate, and [`Client`] calls the
//! management and verify API, here or of ungleich-otp itself.
//!
//! Owns the calls and their time-outs. The triple is sent in the JSON body, also on `GET` and
//! `DELETE`, as ungleichotpclient does. Nothing here prints a secret.
//!
//! A service that calls others through gates:
//!
//! ```no_run
//! use otpgate::client::TokenSource;
//!
//! # fn call(mut request: http::Request<()>) -> Result<(), Box<dyn std::error::Error>> {
//! let alice = TokenSource::from_file("alice", "ops", "alice.seed")?;
//! // For every request anew: a token is good for a short time.
//! alice.sign(request.headers_mut());
//! # Ok(())
//! # }
//! ```
//!
//! One that gets tokens itself, and may verify them:
//!
//! ```no_run
//! use otpgate::client::{Client, ClientTls, TokenSource};
//!
//! # async fn login(name: &str, realm: &str, token: &str, peer: std::net::IpAddr)
//! # -> Result<bool, Box<dyn std::error::Error>> {
//! let shop = TokenSource::from_file("shop", "ungleich-auth", "shop.seed")?;
//! let client = Client::new("https://otp.example", shop, &ClientTls::default())?;
//! match client.verify(name, realm, token, Some(peer)).await {
//!     Ok(_) => Ok(true),
//!     Err(refusal) if refusal.is_denial() => Ok(false),
//!     Err(nobody_can_say) => Err(nobody_can_say.into()),
//! }
//! # }
//! ```
//!
//! An administrator, of the realm `ungleich-admin`:
//!
//! ```no_run
//! # use otpgate::client::{Client, ClientTls, Filter, TokenSource};
//! # async fn manage() -> Result<(), Box<dyn std::error::Error>> {
//! let client =
//!     Client::new("unix:/run/otpgate/api.sock", TokenSource::from_env()?, &ClientTls::default())?;
//! let fields = serde_json::json!({ "name": "printer", "realm": "office" });
//! let printer = client.create(fields.as_object().unwrap().clone()).await?;
//! println!("{}", printer.seed.as_ref().map_or("hidden", |seed| seed.expose()));
//! for entry in client.list(&Filter::default()).await? {
//!     println!("{}@{}", entry.name, entry.realm);
//! }
//! # Ok(())
//! # }
//! ```

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use crate::entry::{Name, Realm, is_unprintable};
use crate::secret::Secret;

mod elements;
mod token_source;

use elements::{Elements, NoList};
pub use token_source::{TokenSource, TokenSourceError, read_seed};

/// Longest time to connect, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that idle for longer are not used again: shorter than servers keep theirs (nginx 60 seconds).
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// Longest silence of the server.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer but a list, which is read entry by entry.
const MAX_ANSWER: usize = 1 << 20;
/// Most of a server's words that are repeated.
const MAX_DETAIL_CHARS: usize = 500;
/// What servers say to callers whose own triple is not accepted.
const UNPROVEN: &str = "Incorrect authentication credentials.";
/// What they say to callers who may not do this, and of claims that are not true.
const DENIED: &str = "You do not have permission to perform this action.";
/// The header in which a server says that it counts uses of the verified token, and its value.
pub const USES: HeaderName = HeaderName::from_static("x-otpgate-uses");
/// See [`USES`].
pub const COUNTED: &str = "counted";
/// What servers on Unix sockets are called in requests.
const UNIX_BASE: &str = "http://localhost";

/// The caller's triple.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// A fresh token is made for every call.
    Source(TokenSource),
    /// A token made elsewhere; good for the calls of its time step.
    Token {
        /// Who calls.
        name: Name,
        /// In which realm.
        realm: Realm,
        /// The token.
        token: Secret,
    },
}

impl From<TokenSource> for Credentials {
    fn from(source: TokenSource) -> Self {
        Self::Source(source)
    }
}

impl Credentials {
    /// Name, realm and the token of now.
    fn triple(&self) -> (&Name, &Realm, Zeroizing<String>) {
        match self {
            Self::Source(source) => (source.name(), source.realm(), source.token().into()),
            Self::Token { name, realm, token } => (name, realm, token.expose().to_owned().into()),
        }
    }
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address of the server, or its certificates.
    #[error("{0}")]
    Setup(String),
    /// The server says no.
    #[error("the server refuses with {status}: {detail}")]
    #[non_exhaustive]
    Refused {
        /// Its status.
        status: StatusCode,
        /// Its words.
        detail: String,
        /// When it may be asked again, if it says so.
        retry_after: Option<Duration>,
    },
    /// No connection, or a time-out.
    #[error("the server cannot be reached: {0}")]
    Unreachable(String),
    /// Something answers, but not as this API does.
    #[error("the server's answer makes no sense: {0}")]
    BadAnswer(String),
}

impl ClientError {
    /// Whether the caller may not do this, or, from [`Client::verify`], the claim is not true: the server says
    /// the same of a wrong token and of a caller whose realm may not verify.
    #[must_use]
    pub fn is_denial(&self) -> bool {
        self.is_forbidden_with(DENIED)
    }

    /// Whether the caller's own triple is not accepted: its name, realm, seed or clock.
    #[must_use]
    pub fn is_about_caller(&self) -> bool {
        self.is_forbidden_with(UNPROVEN)
    }

    fn is_forbidden_with(&self, words: &str) -> bool {
        matches!(self, Self::Refused { status, detail, .. }
            if *status == StatusCode::FORBIDDEN && detail == words)
    }
}

/// An entry as a server shows it; ungleich-otp shows name, realm and seed alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownEntry {
    /// Its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Its name.
    pub name: String,
    /// Its realm.
    pub realm: String,
    /// Its seed; some servers hide it.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "shown_secret")]
    pub seed: Option<Secret>,
    /// Further fields.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// Serialising is what callers who asked for the entry want; `Debug` stays blind.
mod shown_secret {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::secret::Secret;

    pub(super) fn serialize<S: Serializer>(
        secret: &Option<Secret>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        secret.as_ref().map(Secret::expose).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Secret>, D::Error> {
        Ok(Option::<String>::deserialize(deserializer)?.map(Secret::new))
    }
}

/// A server accepted somebody's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The server counts uses of this token, and this was one. ungleich-otp never does.
    pub is_counted: bool,
}

/// Which entries to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// With this name.
    pub name: Option<Name>,
    /// In this realm.
    pub realm: Option<Realm>,
}

/// TLS towards a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// Certificates (PEM) that may have signed the server's; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// What is shown to servers that ask: a certificate with its chain, and its key, both PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Calls one server as one caller.
pub struct Client {
    base: Url,
    http: reqwest::Client,
    credentials: Credentials,
}

impl Client {
    /// A client of the server at `server_url`, such as `https://otp.example` (ungleichotpclient's
    /// form with `/ungleichotp/verify/` at the end is taken too) or `unix:/run/otpgate/api.sock`.
    ///
    /// # Errors
    /// If the URL or the certificates are unusable.
    pub fn new(
        server_url: &str,
        credentials: impl Into<Credentials>,
        tls: &ClientTls,
    ) -> Result<Self, ClientError> {
        Self::connecting_within(CONNECT_TIMEOUT, server_url, credentials, tls)
    }

    /// As [`Self::new`]; `connect_timeout` is for all addresses of the server together, TLS included.
    pub(crate) fn connecting_within(
        connect_timeout: Duration,
        server_url: &str,
        credentials: impl Into<Credentials>,
        tls: &ClientTls,
    ) -> Result<Self, ClientError> {
        let socket = server_url.trim().strip_prefix("unix:");
        let base = parse_base(if socket.is_some() { UNIX_BASE } else { server_url })?;
        // Whoever comes first installs it; both are the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .connect_timeout(connect_timeout)
            .read_timeout(READ_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            // A token goes to the server that was named, nowhere else.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .user_agent(concat!("otpgate/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = socket {
            builder = builder.unix_socket(Path::new(path));
        }
        if base.scheme() == "http" {
            // Plain connections must work where the system has no certificates.
            builder = builder.tls_certs_only([]);
        } else {
            builder = with_tls(builder, tls)?;
        }
        let http = builder.build().map_err(|e| ClientError::Setup(chain(&e)))?;
        Ok(Self { base, http, credentials: credentials.into() })
    }

    /// Makes an entry; `fields` holds `name`, `realm` and further fields of the API.
    ///
    /// # Errors
    /// See [`ClientError`]; so below.
    pub async fn create(&self, fields: Map<String, Value>) -> Result<ShownEntry, ClientError> {
        decode(&self.call(Method::POST, "ungleichotp/?full=1", fields).await?)
    }

    /// The entries that `filter` takes, in order of creation.
    pub async fn list(&self, filter: &Filter) -> Result<Vec<ShownEntry>, ClientError> {
        let mut entries = Vec::new();
        let take = |entry| {
            entries.push(entry);
            Ok::<_, ClientError>(())
        };
        self.each(filter, take).await?;
        Ok(entries)
    }

    /// Hands the entries that `filter` takes to `take`, in order of creation, while they arrive: in bounded
    /// memory, however many there are.
    ///
    /// # Errors
    /// Also after some were handed over; and what `take` says.
    pub async fn each<E: From<ClientError>>(
        &self,
        filter: &Filter,
        mut take: impl FnMut(ShownEntry) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("full", "1");
        if let Some(name) = &filter.name {
            query.append_pair("name", name.as_str());
        }
        if let Some(realm) = &filter.realm {
            query.append_pair("realm", realm.as_str());
        }
        let path = format!("ungleichotp/?{}", query.finish());
        let mut answer = self.send(Method::GET, &path, Map::new()).await?;
        let mut list = Elements::new();
        while let Some(part) = chunk(&mut answer).await? {
            list.push(&part, |element| {
                let entry = decode(element).map_err(Unlisted::Entry)?;
                // ungleich-otp knows no filters.
                if filter.takes(&entry) { take(entry).map_err(Unlisted::Taker) } else { Ok(()) }
            })
            .map_err(Unlisted::into_error)?;
        }
        if list.is_complete() { Ok(()) } else { Err(no_list().into()) }
    }

    /// The entry with that number.
    pub async fn show(&self, id: u64) -> Result<ShownEntry, ClientError> {
        let path = format!("ungleichotp/{id}/?full=1");
        decode(&self.call(Method::GET, &path, Map::new()).await?)
    }

    /// Changes the given fields of an entry.
    pub async fn update(
        &self,
        id: u64,
        fields: Map<String, Value>,
    ) -> Result<ShownEntry, ClientError> {
        let path = format!("ungleichotp/{id}/?full=1");
        decode(&self.call(Method::PATCH, &path, fields).await?)
    }

    /// Gives an entry a new seed; see `overlap` and `keep` of the API.
    pub async fn rotate(
        &self,
        id: u64,
        fields: Map<String, Value>,
    ) -> Result<ShownEntry, ClientError> {
        let path = format!("ungleichotp/{id}/rotate/?full=1");
        decode(&self.call(Method::POST, &path, fields).await?)
    }

    /// Deletes an entry.
    pub async fn delete(&self, id: u64) -> Result<(), ClientError> {
        self.call(Method::DELETE, &format!("ungleichotp/{id}/"), Map::new()).await.map(drop)
    }

    /// Checks somebody's token; `source` is the address of whoever gave it, so that wrong ones count against
    /// that address and not against the caller (ungleich-otp counts nothing).
    ///
    /// # Errors
    /// If it is not accepted, for whatever reason: [`ClientError::is_denial`] tells a wrong token from a
    /// failure.
    pub async fn verify(
        &self,
        name: &str,
        realm: &str,
        token: &str,
        source: Option<IpAddr>,
    ) -> Result<Verified, ClientError> {
        let fields = [("name", name), ("realm", realm), ("token", token)]
            .map(|(field, value)| (field.to_owned(), json!(value)));
        let source = source.map(|address| ("source".to_owned(), json!(address)));
        let fields = fields.into_iter().chain(source).collect();
        let mut answer = self.send(Method::POST, "ungleichotp/verify/", fields).await?;
        let is_counted = answer.headers().contains_key(USES);
        let answer: Map<String, Value> = decode(&body_of(&mut answer).await?)?;
        if answer.get("status") == Some(&json!("OK")) {
            return Ok(Verified { is_counted });
        }
        Err(ClientError::BadAnswer("the status is not `OK`".into()))
    }

    /// As [`Self::send`]; the whole answer.
    async fn call(
        &self,
        method: Method,
        path: &str,
        fields: Map<String, Value>,
    ) -> Result<Vec<u8>, ClientError> {
        body_of(&mut self.send(method, path, fields).await?).await
    }

    /// Sends the triple and `fields` as JSON. Anything but 2xx is refused.
    async fn send(
        &self,
        method: Method,
        path: &str,
        mut fields: Map<String, Value>,
    ) -> Result<Response, ClientError> {
        let (name, realm, token) = self.credentials.triple();
        fields.insert("auth_name".into(), json!(name.as_str()));
        fields.insert("auth_realm".into(), json!(realm.as_str()));
        fields.insert("auth_token".into(), json!(token.as_str()));
        let url = self.base.join(path).map_err(|e| ClientError::Setup(e.to_string()))?;
        let request = self
            .http
            .request(method, url)
            .header(ACCEPT, HeaderValue::from_static("application/json"))
            .json(&fields);
        let mut response = request.send().await.map_err(|e| ClientError::Unreachable(chain(&e)))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = response.headers().get(RETRY_AFTER).and_then(seconds_of);
        let detail = detail_of(&body_of(&mut response).await?);
        Err(ClientError::Refused { status, detail, retry_after })
    }
}

impl Filter {
    fn takes(&self, entry: &ShownEntry) -> bool {
        self.name.as_ref().is_none_or(|name| name.as_str() == entry.name)
            && self.realm.as_ref().is_none_or(|realm| realm.as_str() == entry.realm)
    }
}

/// Why a list ended early.
enum Unlisted<E> {
    NoList,
    Entry(ClientError),
    Taker(E),
}

impl<E> From<NoList> for Unlisted<E> {
    fn from(_: NoList) -> Self {
        Self::NoList
    }
}

impl<E: From<ClientError>> Unlisted<E> {
    fn into_error(self) -> E {
        match self {
            Self::NoList => no_list().into(),
            Self::Entry(error) => error.into(),
            Self::Taker(error) => error,
        }
    }
}

fn no_list() -> ClientError {
    ClientError::BadAnswer("it is not a whole list of entries".into())
}

async fn chunk(answer: &mut Response) -> Result<Option<Bytes>, ClientError> {
    answer.chunk().await.map_err(|e| ClientError::Unreachable(chain(&e)))
}

async fn body_of(answer: &mut Response) -> Result<Vec<u8>, ClientError> {
    let mut body = Vec::new();
    while let Some(part) = chunk(answer).await? {
        if body.len() + part.len() > MAX_ANSWER {
            return Err(ClientError::BadAnswer("it is too large".into()));
        }
        body.extend_from_slice(&part);
    }
    Ok(body)
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("base", &self.base.as_str())
            .field("credentials", &self.credentials)
            .finish_non_exhaustive()
    }
}

fn with_tls(
    mut builder: reqwest::ClientBuilder,
    tls: &ClientTls,
) -> Result<reqwest::ClientBuilder, ClientError> {
    let bad = |path: &Path, why: String| ClientError::Setup(format!("`{}`: {why}", path.display()));
    let read = |path: &Path| std::fs::read(path).map_err(|e| bad(path, e.to_string()));
    if let Some(path) = &tls.ca_file {
        let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?)
            .map_err(|e| bad(path, e.to_string()))?;
        builder = builder.tls_certs_only(certificates);
    }
    if let Some((certificate, key)) = &tls.identity {
        let mut pem = Zeroizing::new(read(key)?);
        pem.push(b'\n');
        pem.extend(read(certificate)?);
        let identity = reqwest::Identity::from_pem(&pem).map_err(|_| {
            bad(certificate, format!("no certificate with the key in `{}`", key.display()))
        })?;
        builder = builder.identity(identity);
    }
    Ok(builder)
}

/// Whether `server_url` can be the URL of a server, for settings: one without password, since it is shown.
///
/// # Errors
/// If it cannot.
pub fn check_url(server_url: &str) -> Result<(), ClientError> {
    if let Some(path) = server_url.trim().strip_prefix("unix:") {
        let text = format!("`{server_url}`: the path of a socket begins with `/`");
        return if path.starts_with('/') { Ok(()) } else { Err(ClientError::Setup(text)) };
    }
    let base = parse_base(server_url)?;
    if base.username().is_empty() && base.password().is_none() {
        return Ok(());
    }
    Err(ClientError::Setup("holds a user or password, which logs would show".into()))
}

fn parse_base(server_url: &str) -> Result<Url, ClientError> {
    let bad = |why: &str| ClientError::Setup(format!("`{server_url}` is no server's URL: {why}"));
    let text = server_url.trim().trim_end_matches('/');
    let text = text.strip_suffix("/verify").unwrap_or(text);
    let text = text.strip_suffix("/ungleichotp").unwrap_or(text);
    let url = Url::parse(&format!("{text}/")).map_err(|e| bad(&e.to_string()))?;
    match url.scheme() {
        "http" | "https" if url.query().is_none() && url.fragment().is_none() => Ok(url),
        "http" | "https" => Err(bad("it has a query")),
        _ => Err(bad("it begins with none of `http://`, `https://` and `unix:/`")),
    }
}

/// An error with all its causes; reqwest's own words hide them. The URL holds no secret.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn decode<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    // serde's message may quote the answer, which may hold seeds.
    serde_json::from_slice(body).map_err(|e| {
        let (line, column) = (e.line(), e.column());
        ClientError::BadAnswer(format!("not the expected JSON (line {line}, column {column})"))
    })
}

/// `Retry-After` in its form of seconds.
fn seconds_of(value: &HeaderValue) -> Option<Duration> {
    value.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

/// What a refusal says, for people.
fn detail_of(body: &[u8]) -> String {
    let words = match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => fields
            .iter()
            .map(|(field, value)| match value {
                Value::String(text) if field == "detail" => text.clone(),
                Value::Array(texts) => {
                    let texts: Vec<_> = texts.iter().filter_map(Value::as_str).collect();
                    format!("{field}: {}", texts.join(" "))
                }
                other => format!("{field}: {other}"),
            })
            .collect::<Vec<_>>()
            .join("; "),
        _ => "(no explanation)".to_owned(),
    };
    printable(&words).chars().take(MAX_DETAIL_CHARS).collect()
}

/// Text from a server, safe for a terminal.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if is_unprintable(c) { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_every_form_have_one_base() {
        for url in [
            "http://127.0.0.1:8081",
            " http://127.0.0.1:8081/ ",
            "http://127.0.0.1:8081/ungleichotp",
            "http://127.0.0.1:8081/ungleichotp/",
            "http://127.0.0.1:8081/ungleichotp/verify/",
            "http://127.0.0.1:8081/verify",
        ] {
            assert_eq!(parse_base(url).unwrap().as_str(), "http://127.0.0.1:8081/", "{url}");
        }
        assert_eq!(
            parse_base("https://otp.example/a/ungleichotp/").unwrap().as_str(),
            "https://otp.example/a/"
        );
        for bad in ["", "otp.example", "ftp://otp.example", "http://otp.example/?a=b"] {
            assert!(parse_base(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn refusals_are_told_without_control_characters() {
        assert_eq!(detail_of(br#"{"detail":"No."}"#), "No.");
        assert_eq!(
            detail_of(br#"{"name":["Too long.","Null."],"realm":["Blank."]}"#),
            "name: Too long. Null.; realm: Blank."
        );
        assert_eq!(detail_of(b"<html>"), "(no explanation)");
        assert_eq!(detail_of(br#"{"detail":"\u001b[2Ja\u202e"}"#), "\\u{1b}[2Ja\\u{202e}");
        assert_eq!(
            detail_of(format!("{{\"detail\":\"{}\"}}", "x".repeat(999)).as_bytes()).len(),
            500
        );
    }

    #[test]
    fn nothing_prints_a_secret() {
        let entry: ShownEntry =
            serde_json::from_str(r#"{"name":"a","realm":"b","seed":"JBSWY3DPEHPK3PXP"}"#).unwrap();
        let credentials = Credentials::Token {
            name: Name::parse("a").unwrap(),
            realm: Realm::parse("b").unwrap(),
            token: Secret::new("123456".into()),
        };
        let client = Client::new("http://127.0.0.1", credentials, &ClientTls::default()).unwrap();
        let printed = format!("{entry:?} {client:?}");
        assert!(!printed.contains("JBSWY3DPEHPK3PXP") && !printed.contains("123456"), "{printed}");
        assert!(serde_json::to_string(&entry).unwrap().contains("JBSWY3DPEHPK3PXP"));
    }
}
