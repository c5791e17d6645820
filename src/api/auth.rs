//! Who calls: the triple in the body or in the headers, proven by the verifier, the only way in.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, request};

use super::body::Fields;
use super::edge::Note;
use super::error::ApiError;
use super::value::{LABEL, Value, check_text};
use super::{Api, request_id};
use crate::config::HeaderNames;
use crate::credentials::{Ambiguous, one_of_each};
use crate::entry::PrincipalRef;
use crate::net::{Connection, client_address};
use crate::otp::Token;
use crate::throttle::Source;
use crate::verifier::{Attempt, Permit, Refusal};

/// Proves the caller of a request.
///
/// # Errors
/// If it is not proven, or nobody can say.
pub(super) async fn authenticate(
    api: &Api,
    head: &request::Parts,
    fields: &Fields,
    note: &mut Note,
) -> Result<Permit, ApiError> {
    let from_headers;
    let triple = if fields.any("auth_") {
        ["auth_name", "auth_realm", "auth_token"].map(|name| fields.get(name))
    } else {
        from_headers = triple_of(&head.headers, api.decider.names())?;
        [0, 1, 2].map(|i| from_headers[i].as_ref())
    };
    let [Ok(name), Ok(realm), Ok(token)] = triple.map(|value| check_text(value, LABEL)) else {
        note.reason = Some("malformed");
        return Err(ApiError::Unproven);
    };
    let claim = Claim { name, realm, token, source: source_of(api, head) };
    prove(api, head, claim, note).await.map_err(|refusal| refused(refusal, ApiError::Unproven))
}

/// Where the caller of a request is.
fn source_of(api: &Api, head: &request::Parts) -> Source {
    let peer = head.extensions.get::<Arc<Connection>>().and_then(|connection| connection.peer());
    Source::of(client_address(&head.headers, peer, &api.config.trusted_proxies))
}

/// What a caller hears; `denied` stands for all that is wrong with a claim.
pub(super) fn refused(refusal: Option<Refusal>, denied: ApiError) -> ApiError {
    match refusal {
        None | Some(Refusal::Denied(_)) => denied,
        Some(Refusal::Throttled(throttled)) => ApiError::Throttled(throttled.retry_after_seconds()),
        Some(Refusal::Unavailable(_) | Refusal::NoMarks) => ApiError::Unavailable,
    }
}

/// A triple to be proven.
pub(super) struct Claim<'a> {
    pub(super) name: &'a str,
    pub(super) realm: &'a str,
    pub(super) token: &'a str,
    pub(super) source: Source,
}

/// Checks a triple. The refusal is `None` if no entry can have such a name and realm.
///
/// # Errors
/// If it is not proven, or nobody can say.
pub(super) async fn prove(
    api: &Api,
    head: &request::Parts,
    claim: Claim<'_>,
    note: &mut Note,
) -> Result<Permit, Option<Refusal>> {
    let proven = match PrincipalRef::parse(claim.name, claim.realm) {
        Ok(who) => {
            let token = Token::parse(claim.token);
            let attempt = Attempt {
                who,
                token: token.as_ref(),
                source: claim.source,
                request: request_id(head),
                reuse: None,
            };
            api.verifier.verify(attempt, api.clock.now()).await.map_err(Some)
        }
        Err(_) => Err(None),
    };
    if let Err(refusal) = &proven {
        note.reason = Some(refusal.map_or("malformed", Refusal::reason));
    }
    proven
}

/// The triple in the headers; all parts are missing if all headers are.
fn triple_of(headers: &HeaderMap, names: &HeaderNames) -> Result<[Option<Value>; 3], ApiError> {
    let found = one_of_each(headers, names.credentials());
    let found = found.map_err(|ambiguous| {
        let text = match ambiguous {
            Ambiguous::Alias => "A credential header is spelled in an ambiguous way.",
            Ambiguous::Duplicate => "A credential header is given twice.",
        };
        ApiError::Malformed(text.into())
    })?;
    let value_of = |value: &HeaderValue| match std::str::from_utf8(value.as_bytes()) {
        Ok(text) => Value::text(text.to_owned()),
        Err(_) => Value::Other,
    };
    Ok(found.map(|value| value.map(value_of)))
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    #[test]
    fn credential_headers_are_unambiguous() {
        let names = HeaderNames::default();
        let mut headers = HeaderMap::new();
        assert!(triple_of(&headers, &names).unwrap().iter().all(Option::is_none));
        headers.insert("x-auth-name", "ü".parse().unwrap());
        headers.insert("x-auth-realm", http::HeaderValue::from_bytes(b"\xff").unwrap());
        let [name, realm, token] = triple_of(&headers, &names).unwrap();
        assert!(name == Some(Value::text("ü".into())));
        assert!(realm == Some(Value::Other));
        assert!(token.is_none());
        headers.append("x-auth-name", "b".parse().unwrap());
        assert!(triple_of(&headers, &names).is_err());
        for alias in ["x_auth_name", "x-auth_token", "x.auth.realm"] {
            let mut headers = HeaderMap::new();
            headers.insert(HeaderName::from_static(alias), "a".parse().unwrap());
            assert!(triple_of(&headers, &names).is_err(), "{alias}");
        }
    }
}
