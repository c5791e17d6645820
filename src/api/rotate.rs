//! Giving an entry a new seed while callers still use the old one.

use axum::response::Response;
use http::StatusCode;

use super::body::Fields;
use super::edge::Note;
use super::entry::View;
use super::error::{ApiError, FieldErrors, json_response};
use super::management::ATTEMPTS;
use super::value::{Value, check_integer};
use super::{Api, Call};
use crate::entry::{Keep, MAX_OVERLAP_SECONDS, Seed};
use crate::store::StoreError;

/// What a request asks for.
struct Rotation {
    /// Seconds; `None`: as configured.
    overlap: Option<u64>,
    keep: Option<Keep>,
}

impl Rotation {
    fn read(fields: &Fields) -> Result<Self, ApiError> {
        fields.require_object()?;
        let mut errors = FieldErrors::new();
        let mut overlap = None;
        match fields.get("overlap").map(|v| check_integer(v, 0, MAX_OVERLAP_SECONDS)).transpose() {
            Ok(seconds) => overlap = seconds,
            Err(messages) => drop(errors.insert("overlap", messages)),
        }
        let mut keep = None;
        match fields.get_nullable("keep").map(check_keep).transpose() {
            Ok(which) => keep = which.flatten(),
            Err(messages) => drop(errors.insert("keep", messages)),
        }
        if errors.is_empty() { Ok(Self { overlap, keep }) } else { Err(ApiError::Fields(errors)) }
    }
}

fn check_keep(value: &Value) -> Result<Option<Keep>, Vec<String>> {
    let is = |word: &str| *value == Value::text(word.to_owned());
    match value {
        Value::Null => Ok(None),
        _ if is("current") => Ok(Some(Keep::Current)),
        _ if is("previous") => Ok(Some(Keep::Previous)),
        _ => Err(vec!["Must be current or previous.".to_owned()]),
    }
}

impl Api {
    /// `POST /ungleichotp/{id}/rotate/`.
    pub(super) async fn rotate(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        self.require_admin(call)?;
        let view = View { seed: true, ..self.view(call)? };
        let mut old = self.stored(call, note).await?;
        let Rotation { overlap, keep } = Rotation::read(&call.fields)?;
        let overlap = overlap.unwrap_or(self.config.rotate_overlap.as_secs());
        for _ in 0..ATTEMPTS {
            let entry = old.entry.as_ref().map_err(Clone::clone)?;
            let new = entry.rotate(Seed::random(), overlap, keep, self.clock.now().unix)?;
            note.subject.changed = Some("seed".to_owned());
            note.subject.seeds = Some(true);
            match call.entries.store.update(&old, &new).await {
                Ok(version) => {
                    self.in_force(call, version).await;
                    return Ok(json_response(StatusCode::OK, &view.of(&new)));
                }
                Err(StoreError::Conflict) => old = self.stored(call, note).await?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(ApiError::Conflict)
    }
}
