//! Lists of entries, in order of creation, page by page in bounded memory.

use std::io;
use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode};
use serde_json::json;

use super::edge::Note;
use super::entry::View;
use super::error::{ApiError, json_response};
use super::management::parameter;
use super::value::{Value, check_integer};
use super::{Api, Call};
use crate::directory::Directory;
use crate::entry::{EntryId, PrincipalRef};
use crate::store::{Store, Stored};

/// Entries read from the store at once.
const PAGE: usize = 500;

/// Which entries a list shows.
#[derive(Debug, Default)]
struct Filter {
    name: Option<String>,
    realm: Option<String>,
    after: Option<EntryId>,
    limit: Option<u64>,
}

impl Filter {
    fn read(call: &Call<'_>) -> Result<Self, ApiError> {
        let text =
            |name| parameter(call, name).map(|given| given.map(|text| text.trim().to_owned()));
        let number = |name, min| {
            parameter(call, name)?
                .map(|text| check_integer(&Value::text(text), min, EntryId::MAX.0))
                .transpose()
                .map_err(|m| ApiError::Fields([(name, m)].into()))
        };
        Ok(Self {
            name: text("name")?,
            realm: text("realm")?,
            after: number("after", 0)?.map(EntryId),
            limit: number("limit", 1)?,
        })
    }

    fn takes(&self, stored: &Stored) -> bool {
        let is = |wanted: &Option<String>, text: &str| wanted.as_ref().is_none_or(|w| w == text);
        is(&self.name, stored.principal.name.as_str())
            && is(&self.realm, stored.principal.realm.as_str())
            && self.after.is_none_or(|after| stored.id > after)
    }
}

impl Api {
    /// `GET /ungleichotp/`.
    pub(super) async fn list(
        &self,
        call: &Call<'_>,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        self.require_admin(call)?;
        let view = self.view(call)?;
        note.subject.seeds = Some(view.seed);
        let filter = Filter::read(call)?;
        if let (Some(name), Some(realm)) = (&filter.name, &filter.realm) {
            // At most one entry: no need to go through all.
            let found = match PrincipalRef::parse(name, realm) {
                Ok(principal) => call.entries.store.get(principal).await?,
                Err(_) => None,
            };
            let found = found.filter(|stored| filter.takes(stored));
            let shown: Vec<_> = found.iter().map(|stored| view.stored(stored)).collect();
            return Ok(json_response(StatusCode::OK, &json!(shown)));
        }
        // Read before the status is sent, so that an unreachable store gives 503.
        let page = call.entries.store.list(filter.after, PAGE).await?;
        let pages = Pages {
            store: call.entries.store.clone(),
            directory: call.entries.directory.clone(),
            seed: view.seed,
            full: view.full,
            left: filter.limit.unwrap_or(u64::MAX),
            filter,
            next: Some(page),
            empty: true,
        };
        let body = if call.head.method == Method::HEAD {
            Body::empty()
        } else {
            Body::from_stream(stream::try_unfold(Some(pages), Pages::advance))
        };
        Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
    }
}

/// A list under way.
struct Pages {
    store: Store,
    directory: Arc<Directory>,
    seed: bool,
    full: bool,
    filter: Filter,
    /// How many entries may still be shown.
    left: u64,
    /// The first page, read ahead.
    next: Option<Vec<Stored>>,
    /// Nothing was written yet.
    empty: bool,
}

impl Pages {
    /// The next piece of the JSON array; `None` as state when the array is closed.
    async fn advance(pages: Option<Self>) -> io::Result<Option<(Bytes, Option<Self>)>> {
        let Some(mut pages) = pages else { return Ok(None) };
        let page = match pages.next.take() {
            Some(page) => page,
            None => pages.store.list(pages.filter.after, PAGE).await.map_err(|error| {
                // The connection is cut, so that the caller sees that the list is not whole.
                tracing::error!(%error, "the store failed in the middle of a list");
                io::Error::other("the list is not whole")
            })?,
        };
        let is_last = page.len() < PAGE;
        let mut text = String::new();
        pages.write(&page, &mut text);
        if is_last || pages.left == 0 {
            text.push_str(if pages.empty { "[]" } else { "]" });
            return Ok(Some((text.into(), None)));
        }
        pages.filter.after = page.last().map(|stored| stored.id);
        Ok(Some((text.into(), Some(pages))))
    }

    fn write(&mut self, page: &[Stored], text: &mut String) {
        let view = View { seed: self.seed, full: self.full, rules: self.directory.rules() };
        for stored in page.iter().filter(|stored| self.filter.takes(stored)) {
            if self.left == 0 {
                return;
            }
            self.left -= 1;
            text.push(if self.empty { '[' } else { ',' });
            self.empty = false;
            text.push_str(&view.stored(stored).to_string());
        }
    }
}
