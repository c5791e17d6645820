//! Request bodies: JSON, forms and multipart become the same few [`Fields`].
//!
//! Owns limits and the reading of texts. Unknown fields are skipped, never kept; a known field that
//! comes twice makes the request ambiguous and is refused. No message quotes the body: it holds
//! tokens.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tokio::sync::{Semaphore, SemaphorePermit};
use zeroize::{Zeroize as _, Zeroizing};

use super::error::ApiError;
use super::value::Value;
use super::{json, value};

/// What a body has to itself; no entry's fields need more. Callers need not be proven to send one, so
/// all bytes beyond it, of all bodies together, share [`BUDGET`]: without it, every connection might
/// fill the limit of one.
const SMALL_BYTES: usize = 16 << 10;
/// Bytes of larger bodies that are held at once: a dozen of the largest.
const LARGE_BYTES: u32 = 32 << 20;
static BUDGET: Semaphore = Semaphore::const_new(LARGE_BYTES as usize);

/// Every field that any request reads.
pub(super) const KNOWN: [&str; 15] = [
    "auth_name",
    "auth_realm",
    "auth_token",
    "name",
    "realm",
    "token",
    "algorithm",
    "digits",
    "period",
    "enabled",
    "expires_at",
    "comment",
    "overlap",
    "keep",
    "source",
];

/// The known fields of a body.
#[derive(Debug, Default)]
pub(super) struct Fields {
    values: Vec<(&'static str, Value)>,
    /// What the body is, if it is JSON but no object; it then has no fields.
    not_an_object: Option<&'static str>,
}

impl Fields {
    /// JSON of another kind than an object.
    pub(super) fn other(kind: &'static str) -> Self {
        Self { not_an_object: Some(kind), ..Self::default() }
    }

    /// The value of a known field.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.values.iter().find(|(other, _)| *other == name).map(|(_, value)| value)
    }

    /// As [`Self::get`], for fields that may be null. An empty text is too: forms cannot say null.
    pub(super) fn get_nullable(&self, name: &str) -> Option<&Value> {
        self.get(name).map(|value| if value.is_empty_text() { &Value::Null } else { value })
    }

    /// Whether any field is there whose name starts so.
    pub(super) fn any(&self, prefix: &str) -> bool {
        self.values.iter().any(|(name, _)| name.starts_with(prefix))
    }

    /// Refuses a body that is JSON but no object.
    pub(super) fn require_object(&self) -> Result<(), ApiError> {
        self.not_an_object.map_or(Ok(()), |kind| {
            let text = format!("Invalid data. Expected a dictionary, but got {kind}.");
            Err(ApiError::field("non_field_errors", &text))
        })
    }

    /// Adds a field; unknown ones are skipped without being made. Twice the same is refused.
    pub(super) fn add(
        &mut self,
        name: &str,
        value: impl FnOnce() -> Result<Value, ApiError>,
    ) -> Result<(), ApiError> {
        let Some(name) = KNOWN.iter().find(|known| **known == name) else { return Ok(()) };
        let value = value()?;
        if self.get(name).is_some() {
            return Err(ApiError::Malformed(format!("The field \"{name}\" is given twice.")));
        }
        self.values.push((name, value));
        Ok(())
    }
}

enum Kind {
    Json(Charset),
    Form,
    Multipart(String),
}

/// Encodings of JSON that are read. RFC 8259 allows UTF-8 alone; ungleich-otp honours the parameter.
#[derive(Clone, Copy)]
enum Charset {
    Utf8,
    Utf16,
}

/// What a body may take.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Its length.
    pub(super) bytes: usize,
    /// From its first byte to its last, however they are spread: meanwhile it takes memory.
    pub(super) time: Duration,
}

/// Bytes of a body, wiped when dropped. Those beyond [`SMALL_BYTES`] are a share of [`BUDGET`] meanwhile.
pub(super) struct Held {
    bytes: Zeroizing<Vec<u8>>,
    share: SemaphorePermit<'static>,
}

impl Held {
    fn nothing() -> Result<Self, ApiError> {
        let share = BUDGET.try_acquire_many(0).map_err(|_| ApiError::Busy)?;
        Ok(Self { bytes: Zeroizing::new(Vec::new()), share })
    }

    fn add(&mut self, part: Bytes, limit: usize) -> Result<(), ApiError> {
        let length = self.bytes.len() + part.len();
        if length > limit {
            return Err(ApiError::TooLarge);
        }
        let beyond = length.saturating_sub(SMALL_BYTES.max(self.bytes.len()));
        let beyond = u32::try_from(beyond).map_err(|_| ApiError::TooLarge)?;
        self.share.merge(BUDGET.try_acquire_many(beyond).map_err(|_| ApiError::Busy)?);
        append(&mut self.bytes, part);
        Ok(())
    }
}

impl std::ops::Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads the body of a request as it is.
pub(super) async fn read_bytes(mut body: Body, limits: Limits) -> Result<Held, ApiError> {
    let read = async {
        let mut held = Held::nothing()?;
        while let Some(frame) = body.frame().await {
            if let Ok(part) = frame.map_err(|e| broken_body(&e))?.into_data() {
                held.add(part, limits.bytes)?;
            }
        }
        Ok(held)
    };
    tokio::time::timeout(limits.time, read).await.unwrap_or(Err(ApiError::TooSlow))
}

/// Reads the body of a request.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Body,
    limits: Limits,
) -> Result<Fields, ApiError> {
    let read = read_in_time(headers, body, limits.bytes);
    tokio::time::timeout(limits.time, read).await.unwrap_or(Err(ApiError::TooSlow))
}

async fn read_in_time(
    headers: &HeaderMap,
    mut body: Body,
    limit: usize,
) -> Result<Fields, ApiError> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared == Some(0) || body.is_end_stream() {
        return Ok(Fields::default());
    }
    // Chunked: without a first part there is no body, and its type does not count.
    let mut read = Held::nothing()?;
    let kind = match kind_of(headers) {
        Err(refusal) if declared.is_some() => return Err(refusal),
        kind => kind,
    };
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(ApiError::TooLarge);
    }
    while let Some(frame) = body.frame().await {
        let Ok(part) = frame.map_err(|e| broken_body(&e))?.into_data() else { continue };
        read.add(part, limit)?;
        if let (Err(_), false) = (&kind, read.is_empty()) {
            break;
        }
    }
    if read.is_empty() {
        return Ok(Fields::default());
    }
    match kind? {
        Kind::Json(Charset::Utf8) => json::parse(utf8(&read)?),
        Kind::Json(Charset::Utf16) => json::parse(&utf16(&read)?),
        Kind::Form => read_form(&read),
        Kind::Multipart(boundary) => {
            // The share is held until all is read.
            let Held { bytes, share: _share } = read;
            read_multipart(Bytes::from_owner(bytes), boundary).await
        }
    }
}

/// Adds a part to what was read, and leaves no copy of either behind.
fn append(read: &mut Zeroizing<Vec<u8>>, part: Bytes) {
    if read.capacity() < read.len() + part.len() {
        let room = (read.len() + part.len()).max(2 * read.capacity());
        let mut larger = Zeroizing::new(Vec::with_capacity(room));
        larger.extend_from_slice(read);
        *read = larger;
    }
    read.extend_from_slice(&part);
    // Unless others hold it too, such as HTTP/2's buffer.
    if let Ok(mut part) = part.try_into_mut() {
        part.as_mut().zeroize();
    }
}

fn broken_body(error: &axum::Error) -> ApiError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|e| e.kind() == std::io::ErrorKind::TimedOut) {
            return ApiError::TooSlow;
        }
        cause = error.source();
    }
    ApiError::Malformed("The request's body is broken.".into())
}

fn kind_of(headers: &HeaderMap) -> Result<Kind, ApiError> {
    if headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .any(|v| !v.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        return Err(ApiError::Encoded);
    }
    let mut given = headers.get_all(CONTENT_TYPE).iter();
    let text = given.next().map_or(Ok(""), |v| v.to_str()).unwrap_or("?");
    let refusal = || ApiError::MediaType(text.chars().take(128).collect());
    if given.next().is_some() {
        return Err(refusal());
    }
    let essence = text.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        let charset = charset_of(text).to_ascii_lowercase();
        match charset.as_str() {
            "" | "utf-8" | "utf8" | "us-ascii" => Ok(Kind::Json(Charset::Utf8)),
            "utf-16" | "utf16" => Ok(Kind::Json(Charset::Utf16)),
            _ => Err(refusal()),
        }
    } else if essence.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
        Ok(Kind::Form)
    } else if essence.eq_ignore_ascii_case("multipart/form-data") {
        multer::parse_boundary(text).map(Kind::Multipart).map_err(|_| {
            let text = "Multipart form parse error - Invalid boundary in multipart: None";
            ApiError::Malformed(text.into())
        })
    } else {
        Err(refusal())
    }
}

fn charset_of(content_type: &str) -> &str {
    content_type
        .split(';')
        .skip(1)
        .filter_map(|parameter| parameter.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("charset"))
        .map_or("", |(_, value)| value.trim().trim_matches('"'))
}

fn badly_encoded() -> ApiError {
    ApiError::Malformed("JSON parse error - the text is wrongly encoded".into())
}

fn utf8(bytes: &[u8]) -> Result<&str, ApiError> {
    std::str::from_utf8(bytes).map_err(|_| badly_encoded())
}

fn utf16(bytes: &[u8]) -> Result<Zeroizing<String>, ApiError> {
    let (big, bytes) = match bytes {
        [0xfe, 0xff, rest @ ..] => (true, rest),
        [0xff, 0xfe, rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    if bytes.len() % 2 == 1 {
        return Err(badly_encoded());
    }
    let units = bytes.chunks_exact(2).map(|pair| {
        let pair = [pair[0], pair[1]];
        if big { u16::from_be_bytes(pair) } else { u16::from_le_bytes(pair) }
    });
    // Room for all of it: two bytes become at most three.
    let mut text = Zeroizing::new(String::with_capacity(bytes.len() / 2 * 3));
    for unit in char::decode_utf16(units) {
        text.push(unit.map_err(|_| badly_encoded())?);
    }
    Ok(text)
}

fn read_form(bytes: &[u8]) -> Result<Fields, ApiError> {
    let mut fields = Fields::default();
    for (name, value) in form_urlencoded::parse(bytes) {
        fields.add(&name, || Ok(Value::text(value.into_owned())))?;
    }
    Ok(fields)
}

async fn read_multipart(bytes: Bytes, boundary: String) -> Result<Fields, ApiError> {
    let bad = |_| ApiError::Malformed("Multipart form parse error".into());
    let once = futures_util::stream::iter([Ok::<_, std::convert::Infallible>(bytes)]);
    let mut parts = multer::Multipart::new(once, boundary);
    let mut fields = Fields::default();
    while let Some(part) = parts.next_field().await.map_err(bad)? {
        let name = part.name().unwrap_or_default().to_owned();
        let is_file = part.file_name().is_some();
        let bytes = part.bytes().await.map_err(bad)?;
        fields.add(&name, || {
            Ok(if is_file { Value::Other } else { value::from_utf8_lossy(&bytes) })
        })?;
    }
    Ok(fields)
}

/// A body of any type: the first line is its `Content-Type`. Whatever is read has been given once, under
/// a known name, and does not print itself.
///
/// # Panics
/// If that does not hold.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let line = data.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (kind, body) = (&data[..line], data.get(line + 1..).unwrap_or_default());
    let mut headers = HeaderMap::new();
    let Ok(kind) = http::HeaderValue::from_bytes(kind) else { return };
    headers.insert(CONTENT_TYPE, kind);
    let limits = Limits { bytes: 1 << 16, time: Duration::from_secs(60) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let read = read(&headers, Body::from(body.to_vec()), limits);
    if let Ok(fields) = runtime.expect("a runtime").block_on(read) {
        assert!(fields.values.iter().all(|(name, _)| KNOWN.contains(name)));
        let shown = format!("{fields:?}").replace("[value]", "");
        let names: usize = fields.values.iter().map(|(name, _)| name.len() + 12).sum();
        assert!(shown.len() < 100 + names, "{shown}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::API_MAX_BODY_BYTES;

    const MAX_BYTES: usize = API_MAX_BODY_BYTES as usize;

    #[tokio::test]
    async fn large_bodies_share_their_memory() {
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, "application/json".parse().unwrap())]);
        let read_spaces = async |bytes: usize| {
            let json = format!("{}{{}}", " ".repeat(bytes));
            let limits = Limits { bytes: MAX_BYTES, time: Duration::from_secs(60) };
            read(&headers, Body::from(json), limits).await
        };
        assert!(read_spaces(SMALL_BYTES).await.is_ok());
        let all = BUDGET.acquire_many(LARGE_BYTES).await.unwrap();
        assert!(matches!(read_spaces(SMALL_BYTES).await, Err(ApiError::Busy)));
        assert!(read_spaces(SMALL_BYTES - 2).await.is_ok());
        drop(all);
        assert!(read_spaces(MAX_BYTES - 2).await.is_ok());
        assert_eq!(BUDGET.available_permits(), LARGE_BYTES as usize);
    }

    #[test]
    fn utf_16_has_either_order() {
        for (bytes, text) in [
            (b"\xff\xfe{\0}\0" as &[u8], Some("{}")),
            (b"\xfe\xff\0{\0}", Some("{}")),
            (b"{\0}\0", Some("{}")),
            (b"{\0}", None),
            (b"\0\xd8", None),
        ] {
            assert_eq!(utf16(bytes).ok().as_ref().map(|t| t.as_str()), text, "{bytes:?}");
        }
        assert!(utf8(b"\xff").is_err());
    }
}
