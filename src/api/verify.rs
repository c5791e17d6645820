//! Verification of somebody's token on behalf of a trusted service.

use std::net::IpAddr;

use axum::response::Response;
use http::{HeaderValue, StatusCode};

use super::auth::{self, Claim};
use super::edge::Note;
use super::error::{ApiError, FieldErrors, json_text};
use super::value::{LABEL, Value, check_text};
use super::{Api, Call};
use crate::client::{COUNTED, USES};
use crate::throttle::Source;

impl Api {
    /// `POST /verify`.
    pub(super) async fn verify(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        if call.permit.principal().realm != self.realms.auth {
            return Err(ApiError::Forbidden);
        }
        call.fields.require_object()?;
        let [name, realm, token] =
            ["name", "realm", "token"].map(|f| check_text(call.fields.get(f), LABEL));
        let source = check_source(call.fields.get("source"));
        let (name, realm, token, address) = match (name, realm, token, source) {
            (Ok(name), Ok(realm), Ok(token), Ok(address)) => (name, realm, token, address),
            (name, realm, token, source) => {
                let errors = [
                    ("name", name.err()),
                    ("realm", realm.err()),
                    ("token", token.err()),
                    ("source", source.err()),
                ];
                let bad = errors.into_iter().filter_map(|(field, error)| Some((field, error?)));
                return Err(ApiError::Fields(FieldErrors::from_iter(bad)));
            }
        };
        let service = call.permit.id().ok_or(ApiError::NotFound)?;
        let source = match address {
            Some(address) => Source::told_by(service, address),
            None => Source::Service(service),
        };
        let claim = Claim { name, realm, token, source };
        let permit = auth::prove(self, call.head, claim, note)
            .await
            .map_err(|refusal| auth::refused(refusal, ApiError::Forbidden))?;
        let mut response = json_text(StatusCode::OK, r#"{"status":"OK"}"#);
        if permit.is_counted() {
            response.headers_mut().insert(USES, HeaderValue::from_static(COUNTED));
        }
        Ok(response)
    }
}

/// The address of the service's own client, if it says one.
fn check_source(value: Option<&Value>) -> Result<Option<IpAddr>, Vec<String>> {
    let Some(value) = value else { return Ok(None) };
    let address = match value {
        Value::Text { text, surrogate: None } => text.trim().parse().ok(),
        _ => None,
    };
    address.map(Some).ok_or_else(|| vec!["Enter a valid IPv4 or IPv6 address.".to_owned()])
}
