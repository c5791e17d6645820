//! What a `CheckRequest` tells of a request, in one reading only.

use std::net::IpAddr;

use envoy_types::ext_authz::v3::pb::{Address, CheckRequest};
use envoy_types::pb::envoy::config::core::v3::HeaderValue as Header;
use envoy_types::pb::envoy::service::auth::v3::AttributeContext;
use envoy_types::pb::envoy::service::auth::v3::attribute_context::HttpRequest;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::api::authz::{Denied, Told};
use crate::config::HeaderNames;
use crate::credentials::spells;

/// `:method`, `:scheme`, `:authority`, `:path`, `:protocol`.
const PSEUDO_HEADERS: usize = 5;

/// A request as Envoy describes it.
pub(super) struct Description<'a> {
    http: &'a HttpRequest,
    headers: HeaderMap,
    /// Who sent it to Envoy; `None`: somebody on a Unix socket.
    sender: Option<IpAddr>,
}

impl<'a> Description<'a> {
    /// Reads a description; `names` are those of the credential headers.
    ///
    /// # Errors
    /// If it lacks what Envoy always says, or contradicts itself.
    pub(super) fn read(
        request: &'a CheckRequest,
        names: &HeaderNames,
        max_headers: usize,
    ) -> Result<Self, Denied> {
        let attributes = request.attributes.as_ref().ok_or(Denied::Missing)?;
        let http = attributes.request.as_ref().and_then(|request| request.http.as_ref());
        let http = http.ok_or(Denied::Missing)?;
        if [&http.method, &http.host, &http.path].iter().any(|text| text.is_empty()) {
            return Err(Denied::Missing);
        }
        let headers = headers(http, names, max_headers)?;
        Ok(Self { http, headers, sender: sender(attributes)? })
    }

    /// What is to be decided about.
    pub(super) fn told(&self) -> Told<'_> {
        Told {
            method: &self.http.method,
            authority: &self.http.host,
            target: &self.http.path,
            headers: &self.headers,
            sender: self.sender,
        }
    }
}

fn sender(attributes: &AttributeContext) -> Result<Option<IpAddr>, Denied> {
    let peer = attributes.source.as_ref();
    match peer.and_then(|peer| peer.address.as_ref()?.address.as_ref()) {
        Some(Address::SocketAddress(socket)) => {
            let address = socket.address.parse::<IpAddr>().map_err(|_| Denied::Unclear)?;
            Ok(Some(address.to_canonical()))
        }
        Some(Address::Pipe(_)) => Ok(None),
        Some(Address::EnvoyInternalAddress(_)) | None => Err(Denied::Missing),
    }
}

/// Envoy gives headers in one of two forms: raw, in `header_map` (its `encode_raw_headers`), or in `headers`,
/// where the values of one name are joined by commas.
fn headers(
    http: &HttpRequest,
    names: &HeaderNames,
    max_headers: usize,
) -> Result<HeaderMap, Denied> {
    let raw = http.header_map.as_ref().map_or(&[][..], |raw| &raw.headers);
    if !raw.is_empty() && !http.headers.is_empty() {
        return Err(Denied::Unclear);
    }
    if raw.len() + http.headers.len() > max_headers + PSEUDO_HEADERS {
        return Err(Denied::TooManyHeaders);
    }
    let mut headers = HeaderMap::new();
    for header in raw {
        add(&mut headers, http, &header.key, raw_value(header)?)?;
    }
    for (name, value) in &http.headers {
        if is_credential(name, names) {
            // A comma may stand between two of them: nobody can say.
            for part in value.split(',') {
                add(&mut headers, http, name, part.as_bytes())?;
            }
        } else {
            add(&mut headers, http, name, value.as_bytes())?;
        }
    }
    Ok(headers)
}

fn is_credential(name: &str, names: &HeaderNames) -> bool {
    HeaderName::from_bytes(name.as_bytes())
        .is_ok_and(|name| names.credentials().iter().any(|own| spells(&name, own)))
}

fn raw_value(header: &Header) -> Result<&[u8], Denied> {
    match (header.value.as_bytes(), header.raw_value.as_slice()) {
        (b"", raw) => Ok(raw),
        (text, b"") => Ok(text),
        (text, raw) if text == raw => Ok(raw),
        _ => Err(Denied::Unclear),
    }
}

/// Adds a header. One that tells what `http` tells too must tell the same.
fn add(
    headers: &mut HeaderMap,
    http: &HttpRequest,
    name: &str,
    value: &[u8],
) -> Result<(), Denied> {
    let told = match name {
        ":method" => Some(&http.method),
        ":path" => Some(&http.path),
        ":authority" | "host" => Some(&http.host),
        _ => None,
    };
    if told.is_some_and(|told| told.as_bytes() != value) {
        return Err(Denied::Unclear);
    }
    if told.is_none() && !name.starts_with(':') {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| Denied::Unclear)?;
        let value = HeaderValue::from_bytes(value).map_err(|_| Denied::Unclear)?;
        headers.append(name, value);
    }
    Ok(())
}

/// A message: no header of it goes unseen.
///
/// # Panics
/// If that does not hold.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let Ok(request) = <CheckRequest as prost::Message>::decode(data) else { return };
    let names = HeaderNames::default();
    let Ok(description) = Description::read(&request, &names, 100) else { return };
    let told = description.told();
    assert!(![told.method, told.authority, told.target].contains(&""));
    let seen = |name: &str| told.headers.get_all(name).iter().count();
    let is_own = |name: &str| name == "host" || name.starts_with(':');
    let raw = description.http.header_map.iter().flat_map(|raw| &raw.headers);
    let raw =
        raw.map(|header| header.key.as_str()).filter(|name| !is_own(name)).collect::<Vec<_>>();
    for name in &raw {
        let given = raw.iter().filter(|other| other.eq_ignore_ascii_case(name)).count();
        assert_eq!(seen(name), given, "{name}");
    }
    for (name, value) in description.http.headers.iter().filter(|(name, _)| !is_own(name)) {
        let least = if is_credential(name, &names) { value.split(',').count() } else { 1 };
        assert!(seen(name) >= least, "{name}");
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::HeaderMap as Headers;

    use super::*;

    fn read(http: &HttpRequest) -> Result<HeaderMap, Denied> {
        headers(http, &HeaderNames::default(), 8)
    }

    fn joined(list: &[(&str, &str)]) -> HttpRequest {
        let headers = list.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        HttpRequest { headers: headers.collect(), ..told() }
    }

    fn raw(list: &[(&str, &str, &[u8])]) -> HttpRequest {
        let headers = list.iter().map(|(name, value, raw)| Header {
            key: (*name).into(),
            value: (*value).into(),
            raw_value: raw.to_vec(),
        });
        HttpRequest { header_map: Some(Headers { headers: headers.collect() }), ..told() }
    }

    fn told() -> HttpRequest {
        let [method, host, path] = ["GET", "h", "/a"].map(str::to_owned);
        HttpRequest { method, host, path, ..HttpRequest::default() }
    }

    fn all(headers: &HeaderMap, name: &str) -> Vec<Vec<u8>> {
        headers.get_all(name).iter().map(|value| value.as_bytes().to_vec()).collect()
    }

    #[test]
    fn joined_credentials_are_taken_apart_and_others_are_not() {
        let headers = read(&joined(&[("x-auth-name", "a,a"), ("accept", "a,b")])).unwrap();
        assert_eq!(all(&headers, "x-auth-name"), [b"a", b"a"]);
        assert_eq!(all(&headers, "accept"), [b"a,b"]);
        let headers = read(&joined(&[("x_auth_token", "1,")])).unwrap();
        assert_eq!(all(&headers, "x_auth_token").len(), 2);
    }

    #[test]
    fn raw_headers_are_taken_as_they_are() {
        let list: &[(&str, &str, &[u8])] =
            &[("x-auth-name", "", b"a,b\xff"), ("a", "1", b""), ("a", "2", b"2"), ("b", "", b"")];
        let headers = read(&raw(list)).unwrap();
        assert_eq!(all(&headers, "x-auth-name"), [b"a,b\xff"]);
        assert_eq!(all(&headers, "a"), [b"1", b"2"]);
        assert_eq!(all(&headers, "b"), [b""]);
        assert!(matches!(read(&raw(&[("a", "1", b"2")])), Err(Denied::Unclear)));
    }

    #[test]
    fn what_is_told_twice_is_told_alike() {
        let pseudo = [(":method", "GET"), (":path", "/a"), (":authority", "h"), ("host", "h")];
        assert_eq!(read(&joined(&pseudo)).unwrap().len(), 0);
        assert_eq!(read(&joined(&[(":scheme", "https"), (":protocol", "x")])).unwrap().len(), 0);
        for other in [(":method", "PUT"), (":path", "/b"), (":authority", "i"), ("host", "h,h")] {
            assert!(matches!(read(&joined(&[other])), Err(Denied::Unclear)), "{other:?}");
            let raw = raw(&[(other.0, "", other.1.as_bytes())]);
            assert!(matches!(read(&raw), Err(Denied::Unclear)), "{other:?}");
        }
        let both =
            HttpRequest { headers: joined(&[("a", "1")]).headers, ..raw(&[("a", "1", b"")]) };
        assert!(matches!(read(&both), Err(Denied::Unclear)));
    }

    #[test]
    fn no_header_is_left_out() {
        for bad in [("a b", "1"), ("", "1"), ("a", "1\n"), ("a", "\0")] {
            assert!(matches!(read(&joined(&[bad])), Err(Denied::Unclear)), "{bad:?}");
        }
        let many = [("a", "", &b"1"[..]); 13];
        assert_eq!(read(&raw(&many)).unwrap().len(), 13);
        assert!(matches!(read(&raw(&[many[0]; 14])), Err(Denied::TooManyHeaders)));
    }
}
