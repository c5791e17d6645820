//! What authenticator apps take over of an entry: reading it is reading its seed.

use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue};
use serde_json::json;
use zeroize::Zeroizing;

use super::edge::Note;
use super::error::{ApiError, json_response};
use super::{Api, Call};
use crate::enrolment::{self, Code};

/// A browser that shows the image does nothing else for it.
const NOTHING_ELSE: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'none'; frame-ancestors 'none'; sandbox",
);

impl Api {
    /// `GET /ungleichotp/{id}/uri/`.
    pub(super) async fn uri(&self, call: &Call<'_>, note: &mut Note) -> Result<Response, ApiError> {
        let uri = self.enrolment(call, note).await?;
        note.subject.seeds = Some(true);
        Ok(json_response(StatusCode::OK, &json!({ "uri": *uri })))
    }

    /// `GET /ungleichotp/{id}/qr.svg`.
    pub(super) async fn qr(&self, call: &Call<'_>, note: &mut Note) -> Result<Response, ApiError> {
        let uri = self.enrolment(call, note).await?;
        let code = Code::new(&uri).map_err(|_| {
            ApiError::Malformed("Name and realm are too long for a QR code: use the URI.".into())
        })?;
        note.subject.seeds = Some(true);
        let headers = [
            (CONTENT_TYPE, HeaderValue::from_static("image/svg+xml")),
            (CONTENT_SECURITY_POLICY, NOTHING_ELSE),
        ];
        Ok((headers, code.svg().to_string()).into_response())
    }

    /// The URI of the entry that the path names, for those who may see its seed.
    async fn enrolment(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Zeroizing<String>, ApiError> {
        self.require_admin(call)?;
        if !self.config.reveal_seeds {
            return Err(ApiError::SeedsHidden);
        }
        let stored = self.stored(call, note).await?;
        let entry = stored.entry.as_ref().map_err(Clone::clone)?;
        let params = call.entries.directory.rules().params_of(entry);
        let who = &entry.principal;
        Ok(enrolment::uri(who.name.as_str(), who.realm.as_str(), &entry.seed, params))
    }
}
