//! Which principals may pass which route. Pure decisions on a normalised path; no I/O.

use std::time::Duration;

use crate::entry::{Principal, Realm};
use crate::otp::Reuse;

pub mod host;
pub mod path;
pub mod raw;
mod tree;

pub use host::Authority;
pub use path::{NormalPath, PathError, RawPath, RequestPath};

use tree::{Node, Tree};

/// What happens to requests that should be refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// They are refused.
    #[default]
    Enforce,
    /// They are forwarded without identity, logged and counted: for roll-outs.
    Report,
}

/// Whom a route lets pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Any proven principal.
    Anybody,
    /// Every principal of a realm.
    Realm(Realm),
    /// One principal.
    Principal(Principal),
}

impl Grant {
    /// Whether it covers everybody whom `other` covers.
    fn includes(&self, other: &Self) -> bool {
        match other {
            Self::Anybody => *self == Self::Anybody,
            Self::Realm(realm) => match self {
                Self::Realm(own) => own == realm,
                _ => *self == Self::Anybody,
            },
            Self::Principal(who) => self.covers(who),
        }
    }

    fn covers(&self, who: &Principal) -> bool {
        match self {
            Self::Anybody => true,
            Self::Realm(realm) => *realm == who.realm,
            Self::Principal(principal) => principal == who,
        }
    }
}

/// What a route asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: identity is neither checked nor passed on.
    Public,
    /// A proven principal that one of these covers.
    Allow(Vec<Grant>),
}

/// What happens to a path that differs from a route's only in what some servers do not look at: the case
/// of letters, dots and spaces at the end of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SimilarPaths {
    /// It is refused if that route is stricter than the one that governs it.
    #[default]
    Refuse,
    /// The upstream tells them apart, so it is another path.
    Distinct,
}

/// Time-outs of a route that differ from the proxy's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteTimeouts {
    /// Longest wait for the upstream's next bytes.
    pub read: Option<Duration>,
    /// Longest wait for the upstream to take bytes.
    pub write: Option<Duration>,
}

/// One `[[route]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Decoded path prefix without trailing slash; empty for `/`.
    pub prefix: String,
    /// Methods that it covers; empty: all.
    pub methods: Vec<String>,
    /// Hosts that it covers, as [`Authority::host`] spells them; empty: all.
    pub hosts: Vec<String>,
    /// Whether paths below it are forwarded as they come; see [`Policy::raw_conflict`].
    pub raw_path: bool,
    /// What it asks for.
    pub access: Access,
    /// `None`: the proxy's.
    pub mode: Option<Mode>,
    /// Name of an upstream group of its own; `None`: the proxy's.
    pub upstream: Option<usize>,
    /// How often a token may be used here; `None`: as its realm says.
    pub reuse: Option<Reuse>,
    /// Its own time-outs.
    pub timeouts: RouteTimeouts,
}

impl Route {
    /// A route for everything below `path`, a decoded path, with nothing of its own.
    #[must_use]
    pub fn new(path: &str, access: Access) -> Self {
        Self {
            prefix: path.trim_end_matches('/').to_owned(),
            methods: Vec::new(),
            hosts: Vec::new(),
            raw_path: false,
            access,
            mode: None,
            upstream: None,
            reuse: None,
            timeouts: RouteTimeouts::default(),
        }
    }

    /// Whether `who` may pass.
    #[must_use]
    pub fn permits(&self, who: &Principal) -> bool {
        match &self.access {
            Access::Public => true,
            Access::Allow(grants) => grants.iter().any(|grant| grant.covers(who)),
        }
    }

    /// Whether requests pass without proof.
    #[must_use]
    pub fn is_public(&self) -> bool {
        self.access == Access::Public
    }

    /// Whether it lets nobody pass whom `other` refuses.
    fn is_as_strict_as(&self, other: &Self) -> bool {
        let (Access::Allow(others), None | Some(Mode::Enforce)) = (&other.access, other.mode)
        else {
            return true;
        };
        let Access::Allow(own) = &self.access else { return false };
        // What a route leaves open is said elsewhere, and may be either.
        let mode = self.mode == other.mode || self.mode == Some(Mode::Enforce);
        let reuse = match (self.reuse, other.reuse) {
            (own, others) if own == others => true,
            (Some(own), others) => !own.is_looser_than(others.unwrap_or(Reuse::ONCE)),
            (None, others) => others == Some(Reuse::Window),
        };
        let covered = |grant| others.iter().any(|other: &Grant| other.includes(grant));
        mode && reuse && own.iter().all(covered)
    }

    fn governs_host(&self, host: &str) -> bool {
        self.hosts.is_empty() || self.hosts.iter().any(|h| h == host)
    }

    fn governs_method(&self, method: &str) -> bool {
        self.methods.is_empty() || self.methods.iter().any(|m| m == method)
    }
}

/// Whether `path` is `prefix`, which ends in no slash, or below it.
fn is_below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Which route governs a request.
#[derive(Clone, Copy, Debug)]
pub enum Governing<'a> {
    /// This one.
    Route(&'a Route),
    /// None of the configured ones: refused.
    Nothing,
    /// Two different ones, depending on how the upstream reads the path: refused.
    Ambiguous,
}

/// All routes.
#[derive(Clone, Debug)]
pub struct Policy {
    routes: Vec<Route>,
    tree: Tree,
    /// Whether any route takes paths as they come.
    has_raw: bool,
    similar: SimilarPaths,
    mode: Mode,
}

impl Policy {
    /// The longest path comes first, of one path the routes for certain hosts, then the order of the
    /// configuration. Without routes, everything needs a proven principal.
    #[must_use]
    pub fn new(mut routes: Vec<Route>) -> Self {
        if routes.is_empty() {
            routes.push(Route::new("/", Access::Allow(vec![Grant::Anybody])));
        }
        Self {
            tree: Tree::new(&routes),
            has_raw: routes.iter().any(|route| route.raw_path),
            routes,
            similar: SimilarPaths::default(),
            mode: Mode::default(),
        }
    }

    /// The same, with the mode of routes without their own.
    #[must_use]
    pub fn with_mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// The same, with what happens to paths that are similar to a route's.
    #[must_use]
    pub fn with_similar_paths(self, similar: SimilarPaths) -> Self {
        Self { similar, ..self }
    }

    /// The mode under `route`, or where none governs.
    #[must_use]
    pub fn mode_of(&self, route: Option<&Route>) -> Mode {
        route.and_then(|route| route.mode).unwrap_or(self.mode)
    }

    /// Reads the path of a request target, without its query: as it came, if its very bytes lie below a
    /// raw route, otherwise normalised. `host` is spelled as [`Authority::host`] does.
    ///
    /// # Errors
    /// Why it cannot be taken.
    pub fn read<'a>(
        &self,
        method: &str,
        host: &str,
        raw: &'a str,
    ) -> Result<RequestPath<'a>, PathError> {
        if self.has_raw && self.find(method, host, raw).is_some_and(|route| route.raw_path) {
            return RawPath::parse(raw).map(RequestPath::Raw);
        }
        NormalPath::parse(raw).map(RequestPath::Normal)
    }

    /// The route that governs a request. `host` is spelled as [`Authority::host`] does, `path` is what
    /// [`Self::read`] made of the request's.
    #[must_use]
    pub fn govern(&self, method: &str, host: &str, path: &RequestPath<'_>) -> Governing<'_> {
        match path {
            RequestPath::Raw(_) => {
                let found = self.find(method, host, path.forwarded());
                found.map_or(Governing::Nothing, Governing::Route)
            }
            RequestPath::Normal(path) => self.govern_normal(method, host, path),
        }
    }

    fn govern_normal(&self, method: &str, host: &str, path: &NormalPath<'_>) -> Governing<'_> {
        let Way { found, narrowest } = self.go(host, path.decoded());
        let rule = found.and_then(|found| self.choose(method, found.scope));
        if path.has_more_readings() && !self.is_governed_alike(method, host, path, rule) {
            return Governing::Ambiguous;
        }
        let (Some(found), Some(rule)) = (found, rule) else { return Governing::Nothing };
        let own = found.node.folded_len;
        // Only another spelling of its path: as it came, the path is not the raw route's.
        if rule.raw_path {
            return Governing::Ambiguous;
        }
        let has_narrower = narrowest.folded_len > own || path.has_more_readings();
        if has_narrower && self.may_be_stricter(method, host, path, rule, own) {
            return Governing::Ambiguous;
        }
        Governing::Route(rule)
    }

    /// Whether `rule`, or nothing, governs all readings of `path`: some servers drop parameters, some decode
    /// a path that is decoded already.
    fn is_governed_alike(
        &self,
        method: &str,
        host: &str,
        path: &NormalPath<'_>,
        rule: Option<&Route>,
    ) -> bool {
        let is_same = |reading: &str| match (rule, self.find(method, host, reading)) {
            (Some(a), Some(b)) => std::ptr::eq(a, b),
            (None, None) => true,
            _ => false,
        };
        let mut again = path.decodings().skip(1);
        let mut bare = path.decodings().filter_map(|reading| path::without_parameters(&reading));
        again.all(|reading| is_same(&reading)) && bare.all(|reading| is_same(&reading))
    }

    /// The most specific path decides; if none of its routes covers the method, nothing does: a
    /// wider route must not open what a narrower one closes.
    fn find(&self, method: &str, host: &str, path: &str) -> Option<&Route> {
        self.choose(method, self.go(host, path).found?.scope)
    }

    fn choose(&self, method: &str, scope: &[usize]) -> Option<&Route> {
        scope.iter().map(|place| &self.routes[*place]).find(|route| route.governs_method(method))
    }

    /// Goes along `path` as far as there are routes.
    fn go(&self, host: &str, path: &str) -> Way<'_> {
        let mut way = Way { found: None, narrowest: self.tree.root() };
        for node in self.tree.along(path) {
            way.narrowest = node;
            if let Some(scope) = node.scope(host, path) {
                way.found = Some(Found { node, scope });
            }
        }
        way
    }

    /// Whether a server that tells fewer paths apart may take `path`, which `found` governs, for one below
    /// a narrower route that is stricter: one whose path is longer than `own` when folded. All narrower routes
    /// count, not only the narrowest: a server may fold a part of what [`path::fold`] does.
    fn may_be_stricter(
        &self,
        method: &str,
        host: &str,
        path: &NormalPath<'_>,
        found: &Route,
        own: usize,
    ) -> bool {
        let is_stricter = |prefix: &str| {
            let rule = self.find(method, host, prefix);
            rule.is_none_or(|rule| !found.is_as_strict_as(rule))
        };
        let is_stricter_below = |node: &Node| {
            let mut narrower = node.prefixes.iter().filter(|prefix| prefix.scope(host).is_some());
            node.folded_len > own && narrower.any(|prefix| is_stricter(&prefix.path))
        };
        let mut readings = path.decodings();
        self.similar == SimilarPaths::Refuse
            && readings.any(|reading| self.tree.along(&reading).any(is_stricter_below))
    }
}

/// What lies along a path.
struct Way<'a> {
    /// The narrowest routes that govern it.
    found: Option<Found<'a>>,
    /// Where it ends: also what only servers that tell fewer paths apart take it to be below.
    narrowest: &'a Node,
}

#[derive(Clone, Copy)]
struct Found<'a> {
    node: &'a Node,
    /// Which of them governs depends on the method.
    scope: &'a [usize],
}

#[cfg(test)]
mod tests;
