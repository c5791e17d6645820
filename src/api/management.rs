//! Creating, showing, changing and deleting entries.
//!
//! A write is answered once it is durable and in force on this gate. What handlers put into the note's
//! `subject` stands in the request's audit event.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use percent_encoding::percent_decode_str;

use super::audit::Subject;
use super::edge::Note;
use super::entry::{Change, View};
use super::error::{ApiError, json_response};
use super::value::{Value, check_bool};
use super::{Api, Call};
use crate::entry::{Entry, EntryId, Seed};
use crate::store::{StoreError, Stored, Version};

/// Longest wait until a write is in force here; it is durable before.
const APPLY_LIMIT: Duration = Duration::from_secs(2);
/// How often a change is tried against concurrent ones.
pub(super) const ATTEMPTS: usize = 5;

impl Api {
    /// `POST /ungleichotp/`.
    pub(super) async fn create(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        self.require_admin(call)?;
        let full = wants_full(call)?;
        let change = Change::read(&call.fields, false)?;
        let principal = change.principal().expect("read demands name and realm");
        note.subject =
            Subject { principal: Some(principal.clone()), seeds: Some(true), ..Subject::default() };
        let now = self.clock.now().unix;
        let created = call
            .entries
            .store
            .create(|id| change.apply(&Entry::new(id, principal.clone(), Seed::random(), now), now))
            .await
            .map_err(|error| match error {
                StoreError::Conflict => not_unique(),
                other => other.into(),
            });
        let (entry, version) = created?;
        note.subject.id = Some(entry.id);
        self.in_force(call, version).await;
        let view = View { seed: true, full, rules: call.entries.directory.rules() };
        Ok(json_response(StatusCode::CREATED, &view.of(&entry)))
    }

    /// `GET /ungleichotp/{id}/`.
    pub(super) async fn show(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        self.require_admin(call)?;
        let view = self.view(call)?;
        let stored = self.stored(call, note).await?;
        note.subject.seeds = Some(view.seed);
        Ok(json_response(StatusCode::OK, &view.stored(&stored)))
    }

    /// `PUT` and, with `partial`, `PATCH /ungleichotp/{id}/`.
    pub(super) async fn update(
        &self,
        call: &Call<'_>,
        partial: bool,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        self.require_admin(call)?;
        let view = self.view(call)?;
        let mut old = self.stored(call, note).await?;
        let change = Change::read(&call.fields, partial)?;
        for _ in 0..ATTEMPTS {
            let entry = old.entry.as_ref().map_err(Clone::clone)?;
            let new = change.apply(entry, self.clock.now().unix);
            let changed = changed_fields(entry, &new);
            note.subject.changed = Some(changed).filter(|fields| !fields.is_empty());
            note.subject.renamed =
                (new.principal != entry.principal).then(|| new.principal.clone());
            note.subject.seeds = Some(view.seed);
            if new == *entry {
                return Ok(json_response(StatusCode::OK, &view.of(&new)));
            }
            let written = self.write(call, &old, &new).await;
            if matches!(written, Err(ApiError::Store(StoreError::Conflict))) {
                old = self.stored(call, note).await?;
                continue;
            }
            self.in_force(call, written?).await;
            return Ok(json_response(StatusCode::OK, &view.of(&new)));
        }
        Err(ApiError::Conflict)
    }

    /// `DELETE /ungleichotp/{id}/`.
    pub(super) async fn delete(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        self.require_admin(call)?;
        for _ in 0..ATTEMPTS {
            let stored = self.stored(call, note).await?;
            let deleted = call.entries.store.delete(&stored).await;
            if matches!(deleted, Err(StoreError::Conflict)) {
                continue;
            }
            self.in_force(call, deleted?).await;
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        Err(ApiError::Conflict)
    }

    /// The entry that the path names.
    pub(super) async fn stored(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Stored, ApiError> {
        let id = id_of(call)?;
        note.subject.id = Some(id);
        let stored = call.entries.store.get_by_id(id).await?.ok_or(ApiError::NoEntry)?;
        note.subject.principal = Some(stored.principal.clone());
        Ok(stored)
    }

    /// Writes a change; a conflict means that `old` is no longer what is stored.
    async fn write(&self, call: &Call<'_>, old: &Stored, new: &Entry) -> Result<Version, ApiError> {
        let written = call.entries.store.update(old, new).await;
        let renamed = old.principal != new.principal;
        if matches!(written, Err(StoreError::Conflict))
            && renamed
            && call.entries.store.get((&new.principal).into()).await?.is_some()
        {
            return Err(not_unique());
        }
        Ok(written?)
    }

    /// Refuses callers without the capability.
    pub(super) fn require_admin(&self, call: &Call<'_>) -> Result<(), ApiError> {
        let is_admin = call.permit.principal().realm == self.realms.admin;
        if is_admin { Ok(()) } else { Err(ApiError::Forbidden) }
    }

    /// How entries are shown to this call.
    pub(super) fn view(&self, call: &Call<'_>) -> Result<View, ApiError> {
        let full = wants_full(call)?;
        Ok(View { seed: self.config.reveal_seeds, full, rules: call.entries.directory.rules() })
    }

    /// Waits until a write is in force here, so that the caller can use its result at once.
    pub(super) async fn in_force(&self, call: &Call<'_>, version: Version) {
        let start = self.clock.monotonic();
        if call.entries.directory.wait_for(version, APPLY_LIMIT).await {
            let lag = self.clock.monotonic().saturating_duration_since(start);
            self.metrics.directory_apply_lag.observe(lag.as_secs_f64());
        } else {
            tracing::warn!(version = version.0, "a write is durable, but not yet in force here");
        }
    }
}

/// The value of a query parameter.
///
/// # Errors
/// If it is given twice.
pub(super) fn parameter(call: &Call<'_>, name: &'static str) -> Result<Option<String>, ApiError> {
    let query = call.head.uri.query().unwrap_or_default();
    let mut given = form_urlencoded::parse(query.as_bytes()).filter(|(key, _)| key == name);
    let value = given.next().map(|(_, value)| value.into_owned());
    if given.next().is_some() {
        return Err(ApiError::field(name, "Give this parameter once."));
    }
    Ok(value)
}

fn wants_full(call: &Call<'_>) -> Result<bool, ApiError> {
    let Some(given) = parameter(call, "full")? else { return Ok(false) };
    check_bool(&Value::text(given)).map_err(|m| ApiError::Fields([("full", m)].into()))
}

/// The number in the path, read as generously as Python's `int`, within reason.
fn id_of(call: &Call<'_>) -> Result<EntryId, ApiError> {
    let id = call.head.uri.path().split('/').nth(2).unwrap_or_default();
    let id = percent_decode_str(id).decode_utf8().map_err(|_| ApiError::NotFound)?;
    let digits = id.strip_prefix(['+', '-']).unwrap_or(&id);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ApiError::NotFound);
    }
    id.parse().ok().map(EntryId).filter(|id| *id <= EntryId::MAX).ok_or(ApiError::NoEntry)
}

fn not_unique() -> ApiError {
    ApiError::field("non_field_errors", "The fields name, realm must make a unique set.")
}

/// Names of the fields that differ, for the audit trail; whether the entry may prove anybody with its
/// value.
fn changed_fields(old: &Entry, new: &Entry) -> String {
    let enabled = if new.enabled { "enabled=true" } else { "enabled=false" };
    [
        ("name", old.principal.name != new.principal.name),
        ("realm", old.principal.realm != new.principal.realm),
        ("algorithm", old.overrides.algorithm != new.overrides.algorithm),
        ("digits", old.overrides.digits != new.overrides.digits),
        ("period", old.overrides.period != new.overrides.period),
        (enabled, old.enabled != new.enabled),
        ("expires_at", old.expires_at != new.expires_at),
        ("comment", old.comment != new.comment),
    ]
    .into_iter()
    .filter_map(|(field, differs)| differs.then_some(field))
    .collect::<Vec<_>>()
    .join(" ")
}
