//! Which principals may pass which route. Pure decisions on a normalised path; no I/O.

use std::time::Duration;

use crate::entry::{Principal, Realm};
use crate::otp::Reuse;

pub mod host;
pub mod path;
pub mod raw;

pub use host::Authority;
pub use path::{NormalPath, PathError, RawPath, RequestPath};

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
        let no_laxer = self.mode == other.mode
            || self.mode == Some(Mode::Enforce)
            || other.mode == Some(Mode::Report);
        let access = match (&self.access, &other.access) {
            (_, Access::Public) => true,
            (Access::Public, Access::Allow(_)) => false,
            (Access::Allow(own), Access::Allow(others)) => {
                own.iter().all(|grant| others.iter().any(|other| other.includes(grant)))
            }
        };
        no_laxer && access
    }

    fn governs_path(&self, path: &str) -> bool {
        is_below(path, &self.prefix)
    }

    fn governs_host(&self, host: &str) -> bool {
        self.hosts.is_empty() || self.hosts.iter().any(|h| h == host)
    }

    fn governs_method(&self, method: &str) -> bool {
        self.methods.is_empty() || self.methods.iter().any(|m| m == method)
    }

    /// Routes of one scope are alternatives of each other; a wider scope is never fallen back to.
    fn same_scope(&self, other: &Self) -> bool {
        self.prefix == other.prefix && self.hosts.is_empty() == other.hosts.is_empty()
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
    /// Most specific first.
    routes: Vec<Route>,
    /// The prefix of each route, as [`path::fold`] leaves it.
    folded: Vec<String>,
    similar: SimilarPaths,
}

impl Policy {
    /// Sorts `routes`: longest path first, of one path those for certain hosts first, then in the
    /// order of the configuration. Without routes, everything needs a proven principal.
    #[must_use]
    pub fn new(mut routes: Vec<Route>) -> Self {
        if routes.is_empty() {
            routes.push(Route::new("/", Access::Allow(vec![Grant::Anybody])));
        }
        routes.sort_by_key(|r| (std::cmp::Reverse(r.prefix.len()), r.hosts.is_empty()));
        let folded = routes.iter().map(|route| path::fold(&route.prefix)).collect();
        Self { routes, folded, similar: SimilarPaths::default() }
    }

    /// The same, with what happens to paths that are similar to a route's.
    #[must_use]
    pub fn with_similar_paths(self, similar: SimilarPaths) -> Self {
        Self { similar, ..self }
    }

    /// Reads the path of a request target, without its query: as it came, if its very bytes lie below a
    /// raw route, otherwise normalised. `host` is spelled as [`Authority::host`] does.
    ///
    /// # Errors
    /// Why it cannot be taken.
    pub fn read(&self, method: &str, host: &str, raw: &str) -> Result<RequestPath, PathError> {
        if self.find(method, host, raw).is_some_and(|route| route.raw_path) {
            return RawPath::parse(raw).map(RequestPath::Raw);
        }
        NormalPath::parse(raw).map(RequestPath::Normal)
    }

    /// The route that governs a request. `host` is spelled as [`Authority::host`] does, `path` is what
    /// [`Self::read`] made of the request's.
    #[must_use]
    pub fn govern(&self, method: &str, host: &str, path: &RequestPath) -> Governing<'_> {
        match path {
            RequestPath::Raw(_) => {
                let found = self.find(method, host, path.forwarded());
                found.map_or(Governing::Nothing, Governing::Route)
            }
            RequestPath::Normal(path) => self.govern_normal(method, host, path),
        }
    }

    fn govern_normal(&self, method: &str, host: &str, path: &NormalPath) -> Governing<'_> {
        let found = self.find(method, host, path.decoded());
        if let Some(bare) = path.without_parameters() {
            let same = match (found, self.find(method, host, &bare)) {
                (Some(a), Some(b)) => std::ptr::eq(a, b),
                (None, None) => true,
                _ => false,
            };
            if !same {
                return Governing::Ambiguous;
            }
        }
        match found {
            None => Governing::Nothing,
            // Only another spelling of its path: as it came, the path is not the raw route's.
            Some(route) if route.raw_path => Governing::Ambiguous,
            Some(route) if self.may_be_stricter(method, host, path, route) => Governing::Ambiguous,
            Some(route) => Governing::Route(route),
        }
    }

    /// The most specific path decides; if none of its routes covers the method, nothing does: a
    /// wider route must not open what a narrower one closes.
    fn find(&self, method: &str, host: &str, path: &str) -> Option<&Route> {
        let mut here =
            self.routes.iter().filter(|r| r.governs_host(host) && r.governs_path(path)).peekable();
        let scope = *here.peek()?;
        here.take_while(|r| r.same_scope(scope)).find(|r| r.governs_method(method))
    }

    /// Whether a server that tells fewer paths apart may take `path`, which `found` governs, for one below
    /// a narrower route that is stricter. All narrower routes count, not only the narrowest: a server may
    /// fold a part of what [`path::fold`] does.
    fn may_be_stricter(&self, method: &str, host: &str, path: &NormalPath, found: &Route) -> bool {
        if self.similar == SimilarPaths::Distinct {
            return false;
        }
        let folded = path::fold(path.decoded());
        let own = path::fold(&found.prefix).len();
        let narrower = self.routes.iter().zip(&self.folded).filter(|(route, prefix)| {
            prefix.len() > own && route.governs_host(host) && is_below(&folded, prefix)
        });
        narrower
            .map(|(route, _)| self.find(method, host, &route.prefix))
            .any(|rule| rule.is_none_or(|rule| !found.is_as_strict_as(rule)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn realm(name: &str) -> Access {
        Access::Allow(vec![Grant::Realm(Realm::parse(name).unwrap())])
    }

    /// The access of the governing route; `None`: nothing governs.
    fn access(policy: &Policy, method: &str, host: &str, path: &str) -> Option<Access> {
        match policy.govern(method, host, &policy.read(method, host, path).unwrap()) {
            Governing::Route(route) => Some(route.access.clone()),
            Governing::Nothing | Governing::Ambiguous => None,
        }
    }

    #[test]
    fn without_routes_everything_needs_proof() {
        let policy = Policy::new(Vec::new());
        let anybody = Access::Allow(vec![Grant::Anybody]);
        assert_eq!(access(&policy, "GET", "h", "/x"), Some(anybody));
    }

    #[test]
    fn the_longest_prefix_on_a_segment_boundary_governs() {
        let policy = Policy::new(vec![
            Route::new("/", realm("any")),
            Route::new("/admin/", realm("staff")),
            Route::new("/admin/public", Access::Public),
        ]);
        for (path, expected) in [
            ("/", realm("any")),
            ("/administrator", realm("any")),
            ("/admin", realm("staff")),
            ("/admin/", realm("staff")),
            ("/%61dmin/x", realm("staff")),
            ("/admin/publicity", realm("staff")),
            ("/admin/public", Access::Public),
            ("/admin/public/x", Access::Public),
        ] {
            assert_eq!(access(&policy, "GET", "h", path), Some(expected), "{path}");
        }
    }

    #[test]
    fn a_wider_route_never_opens_what_a_narrower_one_closes() {
        let mut narrow = Route::new("/admin", realm("staff"));
        narrow.methods = vec!["GET".into()];
        let policy = Policy::new(vec![Route::new("/", Access::Public), narrow]);
        assert_eq!(access(&policy, "GET", "h", "/admin/x"), Some(realm("staff")));
        assert_eq!(access(&policy, "POST", "h", "/admin/x"), None);
        assert_eq!(access(&policy, "POST", "h", "/x"), Some(Access::Public));
    }

    #[test]
    fn routes_of_one_path_are_alternatives_by_method() {
        let mut read = Route::new("/items", realm("readers"));
        read.methods = vec!["GET".into(), "HEAD".into()];
        let mut write = Route::new("/items", realm("writers"));
        write.methods = vec!["POST".into()];
        let policy = Policy::new(vec![read, write]);
        assert_eq!(access(&policy, "HEAD", "h", "/items"), Some(realm("readers")));
        assert_eq!(access(&policy, "POST", "h", "/items"), Some(realm("writers")));
        assert_eq!(access(&policy, "DELETE", "h", "/items"), None);
    }

    #[test]
    fn a_route_for_a_host_comes_before_one_for_all() {
        let mut special = Route::new("/", realm("special"));
        special.hosts = vec!["a.example".into()];
        let policy = Policy::new(vec![Route::new("/", realm("any")), special]);
        assert_eq!(access(&policy, "GET", "a.example", "/"), Some(realm("special")));
        assert_eq!(access(&policy, "GET", "b.example", "/"), Some(realm("any")));
    }

    #[test]
    fn parameters_never_lead_around_a_route() {
        let policy = Policy::new(vec![
            Route::new("/", Access::Public),
            Route::new("/admin", realm("staff")),
        ]);
        let govern =
            |path: &str| policy.govern("GET", "h", &policy.read("GET", "h", path).unwrap());
        assert!(matches!(govern("/admin;x/y"), Governing::Ambiguous));
        assert!(matches!(govern("/admin/y;x=1"), Governing::Route(r) if !r.is_public()));
        assert!(matches!(govern("/items;x"), Governing::Route(r) if r.is_public()));
    }

    #[test]
    fn grants_cover_whom_they_name() {
        let who = Principal::parse("alice", "staff").unwrap();
        let covers = |grant| Route::new("/", Access::Allow(vec![grant])).permits(&who);
        assert!(covers(Grant::Anybody));
        assert!(covers(Grant::Realm(Realm::parse("staff").unwrap())));
        assert!(!covers(Grant::Realm(Realm::parse("Staff").unwrap())));
        assert!(covers(Grant::Principal(who.clone())));
        assert!(!covers(Grant::Principal(Principal::parse("staff", "alice").unwrap())));
        assert!(!Route::new("/", Access::Allow(Vec::new())).permits(&who));
    }
}
