//! Verification of somebody's token on behalf of a trusted service.

use axum::response::Response;
use http::StatusCode;
use serde_json::json;

use super::edge::Note;
use super::error::{ApiError, FieldErrors, json_response};
use super::value::{LABEL, check_text};
use super::{Api, Call, auth};
use crate::verifier::Refusal;

impl Api {
    /// `POST /verify`.
    pub(super) fn verify(&self, call: &Call<'_>, note: &mut Note) -> Result<Response, ApiError> {
        if call.permit.principal().realm != self.realms.auth {
            return Err(ApiError::Forbidden);
        }
        call.fields.require_object()?;
        let [name, realm, token] =
            ["name", "realm", "token"].map(|f| (f, check_text(call.fields.get(f), LABEL)));
        match (name.1, realm.1, token.1) {
            (Ok(name), Ok(realm), Ok(token)) => {
                auth::prove(self, name, realm, token, note).map_err(|refusal| match refusal {
                    None | Some(Refusal::Denied(_)) => ApiError::Forbidden,
                    Some(Refusal::Unavailable(_)) => ApiError::Unavailable,
                })?;
                Ok(json_response(StatusCode::OK, &json!({ "status": "OK" })))
            }
            checked => {
                let errors = [(name.0, checked.0), (realm.0, checked.1), (token.0, checked.2)];
                let bad = errors.into_iter().filter_map(|(f, c)| Some((f, c.err()?)));
                Err(ApiError::Fields(FieldErrors::from_iter(bad)))
            }
        }
    }
}
