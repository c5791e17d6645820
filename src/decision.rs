//! Decides about requests: what is asked for, who asks, and whether that may pass. The proxy forwards by
//! it; the API answers other proxies with it.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderName};

use crate::clock::Moment;
use crate::config::HeaderNames;
use crate::entry::Principal;
use crate::policy::{Governing, Mode, Policy, Route};
use crate::throttle::Source;
use crate::verifier::{Attempt, Permit, Verifier};

mod claim;
mod head;
mod refusal;

use claim::Claim;
pub use claim::Unclear;
#[cfg(any(test, fuzzing))]
pub use claim::fuzz;
pub use head::{BadHead, Head, KeptHead, MethodName, split_url};
pub use refusal::Refusal;

/// A request to decide about.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its method.
    pub method: MethodName<'a>,
    /// Its host and path.
    pub head: &'a Head<'a>,
    /// Its headers, which may carry a claim.
    pub headers: &'a HeaderMap,
    /// Where it comes from; `None`: a Unix socket.
    pub client: Option<IpAddr>,
    /// Names it; see [`Attempt::request`].
    pub request_id: &'a str,
    /// When it came.
    pub at: Moment,
}

/// How a request may pass.
#[derive(Debug)]
pub enum Passage {
    /// With the principal's identity.
    Proven(Permit),
    /// Without identity.
    Public,
    /// Without identity, though it should be refused.
    Reported(Refusal),
}

/// A request may not pass.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub why: Refusal,
    /// If it was proven at all: for logs.
    pub permit: Option<Permit>,
}

impl From<Refusal> for Refused {
    /// Nothing is proven.
    fn from(why: Refusal) -> Self {
        Self { why, permit: None }
    }
}

/// What was decided.
#[derive(Debug)]
pub struct Decision<'p> {
    /// Which route governs; `None`: none of the policy's, or more than one.
    pub route: Option<&'p Route>,
    /// Whether it passes.
    pub outcome: Result<Passage, Refused>,
}

/// The headers that say who a proven principal is. Names are UTF-8, which header values may carry (RFC
/// 9110 section 5.5, `obs-text`): they go out as these very bytes.
pub fn identity<'a>(
    names: &'a HeaderNames,
    who: &'a Principal,
) -> impl Iterator<Item = (&'a HeaderName, Cow<'a, str>)> {
    let principal = names.identity_principal.as_ref();
    [(&names.identity_name, who.name.as_str()), (&names.identity_realm, who.realm.as_str())]
        .map(|(name, text)| (name, Cow::Borrowed(text)))
        .into_iter()
        .chain(principal.map(|name| (name, Cow::Owned(who.to_string()))))
}

/// Decides.
pub struct Decider {
    verifier: Arc<Verifier>,
    names: HeaderNames,
}

impl Decider {
    /// Proves claims in the headers of `names`.
    #[must_use]
    pub fn new(verifier: Arc<Verifier>, names: HeaderNames) -> Self {
        Self { verifier, names }
    }

    /// Names of headers.
    #[must_use]
    pub fn names(&self) -> &HeaderNames {
        &self.names
    }

    /// Decides about a request.
    ///
    /// What makes the request itself ambiguous is refused in every mode. What is wrong with who sent
    /// it is only reported where the mode says so.
    pub async fn decide<'p>(&self, policy: &'p Policy, asked: Asked<'_>) -> Decision<'p> {
        let (method, head) = (asked.method.as_str(), asked.head);
        let route = match policy.govern(method, head.authority.host(), &head.path) {
            Governing::Ambiguous => {
                return Decision { route: None, outcome: Err(Refusal::AmbiguousRoute.into()) };
            }
            Governing::Nothing => None,
            Governing::Route(route) => Some(route),
        };
        if route.is_some_and(Route::is_public) {
            return Decision { route, outcome: Ok(Passage::Public) };
        }
        let proven = self.prove(asked, route).await.map_err(Refused::from);
        let outcome = proven.and_then(|permit| match route {
            None => Err(Refused { why: Refusal::NoRoute, permit: Some(permit) }),
            Some(route) if route.permits(permit.principal()) => Ok(Passage::Proven(permit)),
            Some(_) => Err(Refused { why: Refusal::Forbidden, permit: Some(permit) }),
        });
        let outcome = match outcome {
            Err(Refused { why, .. }) if policy.mode_of(route) == Mode::Report => {
                Ok(Passage::Reported(why))
            }
            outcome => outcome,
        };
        Decision { route, outcome }
    }

    async fn prove(&self, asked: Asked<'_>, route: Option<&Route>) -> Result<Permit, Refusal> {
        let (who, token) = match claim::read(asked.headers, &self.names)? {
            Claim::Missing => return Err(Refusal::Missing),
            Claim::Complete { who, token } => (who, token),
        };
        let attempt = Attempt {
            who,
            token: token.as_ref(),
            source: Source::of(asked.client),
            request: asked.request_id,
            reuse: route.and_then(|route| route.reuse),
        };
        self.verifier.verify(attempt, asked.at).await.map_err(Refusal::Unproven)
    }
}
