//! Management of entries and verification of tokens, as ungleich-otp's REST API answers; and `authz`, which
//! other proxies ask whether a request may pass.
//!
//! Every request of the REST API goes the same way: `edge` → `negotiate` → `body` → `auth` → method → capability →
//! `management`, `list`, `enrol` or `verify`. The order is part of the behaviour.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any};
use http::{Method, StatusCode, header, request};
use serde_json::json;

use crate::clock::Clock;
use crate::config::{API_MAX_BODY_BYTES, ApiConfig, ReservedRealms};
use crate::decision::Decider;
use crate::metrics::Metrics;
use crate::net::Connection;
use crate::policy::Policy;
use crate::verifier::{Entries, Permit, Verifier};

mod audit;
mod auth;
mod authz;
mod body;
mod edge;
mod enrol;
mod entry;
mod error;
mod json;
mod list;
mod management;
mod negotiate;
mod options;
mod rotate;
mod value;
mod verify;

use authz::Dialect;
#[cfg(any(test, fuzzing))]
pub use authz::grpc::fuzz as fuzz_call;
use body::Fields;
#[cfg(any(test, fuzzing))]
pub use body::fuzz;
use edge::{Note, RequestId};
use error::{ApiError, json_response};

/// The description of the API, OpenAPI 3.1.
pub const OPENAPI: &str = include_str!("api/openapi.json");

/// The API and all it works with.
pub struct Api {
    /// Proves callers, with the entries that are managed; where a remote server has them, nothing is managed
    /// or verified here.
    pub verifier: Arc<Verifier>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Counts requests.
    pub metrics: Arc<Metrics>,
    /// Which realms have powers.
    pub realms: ReservedRealms,
    /// Decides for other proxies.
    pub decider: Decider,
    /// Who may pass where.
    pub policy: Arc<Policy>,
    /// `[api]`.
    pub config: ApiConfig,
}

/// What the API serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Where to find entries.
    Root,
    /// All entries.
    Entries,
    /// One entry.
    Entry,
    /// A new seed for one entry.
    Rotate,
    /// What an authenticator app takes over, as a URI.
    Uri,
    /// The same as a QR code.
    Qr,
    /// Verification.
    Verify,
}

impl Resource {
    /// Its methods, as in `Allow`.
    #[must_use]
    pub const fn allow(self) -> &'static str {
        match self {
            Self::Root | Self::Uri | Self::Qr => "GET, HEAD, OPTIONS",
            Self::Entries => "GET, POST, HEAD, OPTIONS",
            Self::Entry => "GET, PUT, PATCH, DELETE, HEAD, OPTIONS",
            Self::Rotate | Self::Verify => "POST, OPTIONS",
        }
    }
}

/// Every authenticated path; each but `/` works with and without its last slash.
pub const ROUTES: [(&str, Resource); 8] = [
    ("/", Resource::Root),
    ("/ungleichotp/", Resource::Entries),
    ("/ungleichotp/{id}/", Resource::Entry),
    ("/ungleichotp/{id}/rotate/", Resource::Rotate),
    ("/ungleichotp/{id}/uri/", Resource::Uri),
    ("/ungleichotp/{id}/qr.svg", Resource::Qr),
    ("/ungleichotp/verify/", Resource::Verify),
    ("/verify", Resource::Verify),
];

/// Where other proxies ask.
const DECISIONS: [(&str, Dialect); 5] = [
    ("/authz/auth-request", Dialect::AuthRequest),
    ("/authz/forward-auth", Dialect::ForwardAuth),
    (authz::EXT_AUTHZ, Dialect::ExtAuthz),
    ("/authz/ext-authz/", Dialect::ExtAuthz),
    ("/authz/ext-authz/{*path}", Dialect::ExtAuthz),
];

impl Api {
    /// The routes.
    pub fn router(self) -> Router {
        let api = Arc::new(self);
        let nothing = inside(None, |_, _| async { ApiError::NotFound.into_response() });
        let mut router = Router::new()
            .route("/openapi.json", inside(None, |_, request| async move { openapi(&request) }))
            .route(authz::grpc::CHECK, any(call))
            .fallback_service(nothing.with_state(api.clone()));
        for (path, resource) in ROUTES {
            let serve = move || {
                inside(Some(resource), move |api, request| async move {
                    api.serve(resource, request).await
                })
            };
            let bare = path.trim_end_matches('/');
            if !bare.is_empty() {
                router = router.route(bare, serve());
            }
            router = router.route(&format!("{bare}/"), serve());
        }
        for (path, dialect) in DECISIONS {
            let authorize =
                inside(
                    None,
                    move |api, request| async move { api.authorize(dialect, request).await },
                );
            router = router.route(path, authorize);
        }
        router.with_state(api)
    }

    async fn serve(&self, resource: Resource, request: Request) -> Response {
        let mut note = Note::default();
        let (head, body) = request.into_parts();
        let mut response = self
            .answer(resource, &head, body, &mut note)
            .await
            .unwrap_or_else(|refusal| self.refuse(refusal, &head, &note));
        response.extensions_mut().insert(note);
        response
    }

    async fn answer(
        &self,
        resource: Resource,
        head: &request::Parts,
        body: Body,
        note: &mut Note,
    ) -> Result<Response, ApiError> {
        if head.uri.path().contains("//") {
            // The router takes an empty segment for an id.
            return Err(ApiError::NotFound);
        }
        let entries = self.verifier.entries().ok_or(ApiError::NotFound)?;
        note.action = action(resource, &head.method);
        negotiate::negotiate(head, resource)?;
        let max_bytes = self.config.limits.max_body_bytes.unwrap_or(API_MAX_BODY_BYTES);
        let limits = body::Limits {
            bytes: usize::try_from(max_bytes).unwrap_or(usize::MAX),
            time: self.config.limits.body_timeout,
        };
        let fields = body::read(&head.headers, body, limits).await?;
        let permit = auth::authenticate(self, head, &fields, note).await?;
        note.caller = Some(permit.principal().clone());
        let call = Call { head, fields, permit, entries };
        match (resource, &head.method) {
            (_, &Method::OPTIONS) => Ok(options::describe(resource)),
            (Resource::Root, &Method::GET | &Method::HEAD) => Ok(root(head)),
            (Resource::Verify, &Method::POST) => self.verify(&call, note).await,
            (Resource::Entries, &Method::GET | &Method::HEAD) => self.list(&call, note).await,
            (Resource::Entries, &Method::POST) => self.create(&call, note).await,
            (Resource::Entry, &Method::GET | &Method::HEAD) => self.show(&call, note).await,
            (Resource::Entry, &Method::PUT) => self.update(&call, false, note).await,
            (Resource::Entry, &Method::PATCH) => self.update(&call, true, note).await,
            (Resource::Entry, &Method::DELETE) => self.delete(&call, note).await,
            (Resource::Rotate, &Method::POST) => self.rotate(&call, note).await,
            (Resource::Uri, &Method::GET | &Method::HEAD) => self.uri(&call, note).await,
            (Resource::Qr, &Method::GET | &Method::HEAD) => self.qr(&call, note).await,
            (_, method) => Err(ApiError::Method(method.clone(), resource.allow())),
        }
    }

    /// Logs what callers are not told.
    fn refuse(&self, refusal: ApiError, head: &request::Parts, note: &Note) -> Response {
        if let ApiError::Store(error) = &refusal {
            tracing::error!(%error, action = note.action, request_id = request_id(head), "the store failed a request");
        }
        refusal.into_response()
    }
}

/// A route whose requests pass the edge on their way in and out. Middleware would do the same for all routes,
/// at the price of several allocations for each request.
fn inside<F, R>(resource: Option<Resource>, handle: F) -> MethodRouter<Arc<Api>>
where
    F: Fn(Arc<Api>, Request) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response> + Send + 'static,
{
    any(move |State(api): State<Arc<Api>>, request: Request| {
        edge::edge(api, resource, request, handle)
    })
}

/// Answers calls in gRPC.
async fn call(State(api): State<Arc<Api>>, request: Request) -> Response {
    let check = |api: Arc<Api>, request| async move { api.check(request).await };
    authz::grpc::pack(request, |request| edge::edge(api, None, request, check)).await
}

/// A request whose caller is proven.
struct Call<'a> {
    head: &'a request::Parts,
    fields: Fields,
    permit: Permit,
    entries: &'a Entries,
}

fn request_id(head: &request::Parts) -> &str {
    head.extensions.get::<RequestId>().map_or("", RequestId::as_str)
}

/// A bounded word for what is asked for.
fn action(resource: Resource, method: &Method) -> &'static str {
    match (resource, method) {
        (_, &Method::OPTIONS) => "options",
        (Resource::Root, _) => "root",
        (Resource::Verify, _) => "verify",
        (Resource::Rotate, _) => "rotate",
        (Resource::Uri | Resource::Qr, _) => "enrol",
        (Resource::Entries, &Method::POST) => "create",
        (Resource::Entries, _) => "list",
        (Resource::Entry, &Method::PUT | &Method::PATCH) => "update",
        (Resource::Entry, &Method::DELETE) => "delete",
        (Resource::Entry, _) => "show",
    }
}

fn root(head: &request::Parts) -> Response {
    let tls =
        head.extensions.get::<Arc<Connection>>().is_some_and(|connection| connection.is_tls());
    let base = edge::host_of(&head.uri, &head.headers)
        .map(|host| format!("{}://{}", if tls { "https" } else { "http" }, host.as_str()))
        .unwrap_or_default();
    json_response(StatusCode::OK, &json!({ "ungleichotp": format!("{base}/ungleichotp/") }))
}

fn openapi(request: &Request) -> Response {
    let note = Note { action: "openapi", ..Note::default() };
    let mut response = match *request.method() {
        Method::GET | Method::HEAD => {
            ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
        }
        ref method => ApiError::Method(method.clone(), "GET, HEAD").into_response(),
    };
    response.extensions_mut().insert(note);
    response
}
