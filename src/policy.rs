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
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn repeated_encoding_never_leads_around_a_route() {
        let policy = Policy::new(vec![
            Route::new("/", Access::Public),
            Route::new("/admin", realm("staff")),
        ]);
        let govern =
            |path: &str| policy.govern("GET", "h", &policy.read("GET", "h", path).unwrap());
        for path in [
            "/%2561dmin",
            "/%252561dmin/x",
            "/%2541dmin",
            "/admin%252e",
            "/%2561dmin;x",
            "/admin%2520",
        ] {
            assert!(matches!(govern(path), Governing::Ambiguous), "{path}");
        }
        for path in ["/100%25", "/%2561", "/x/%2561dmin"] {
            assert!(matches!(govern(path), Governing::Route(r) if r.is_public()), "{path}");
        }
        assert!(matches!(govern("/admin/%2561"), Governing::Route(r) if !r.is_public()));
        // An upstream that tells case apart may still decode twice.
        let distinct = policy.with_similar_paths(SimilarPaths::Distinct);
        assert_eq!(access(&distinct, "GET", "h", "/%2561dmin"), None);
        assert_eq!(access(&distinct, "GET", "h", "/%2541dmin"), Some(Access::Public));
    }

    #[test]
    fn similar_paths_never_lead_around_a_stricter_route() {
        let routes = || {
            vec![
                Route::new("/", Access::Public),
                Route::new("/admin", realm("staff")),
                Route::new("/admin/api", Access::Public),
                Route::new("/Users", realm("people")),
                Route::new("/users", realm("services")),
            ]
        };
        let policy = Policy::new(routes());
        let govern =
            |path: &str| policy.govern("GET", "h", &policy.read("GET", "h", path).unwrap());
        for path in [
            "/Admin",
            "/ADMIN/x",
            "/admin.",
            "/admin%20/x",
            "/ADMIN;x",
            "/%41dmin",
            "/adm\u{131}n",
            "/.../admin",
            "/%20/admin",
            "/USERS",
            "/users./x",
            // For a server that looks at dots, but not at case, this is not below `/admin/api`.
            "/ADMIN/api./x",
            "/Admin/api",
        ] {
            assert!(matches!(govern(path), Governing::Ambiguous), "{path}");
        }
        for path in [
            "/x",
            "/X",
            "/admins",
            "/ad-min",
            "/admin/API",
            "/admin/api",
            "/Users/x",
            "/users/X",
            "/x.",
        ] {
            assert!(matches!(govern(path), Governing::Route(_)), "{path}");
        }
        let distinct = Policy::new(routes()).with_similar_paths(SimilarPaths::Distinct);
        assert_eq!(access(&distinct, "GET", "h", "/Admin"), Some(Access::Public));
        assert_eq!(access(&distinct, "GET", "h", "/admin./x"), Some(Access::Public));
    }

    #[test]
    fn similar_paths_pass_where_the_narrower_route_is_no_stricter() {
        let principal = |name: &str| {
            Access::Allow(vec![Grant::Principal(Principal::parse(name, "staff").unwrap())])
        };
        let both = Access::Allow(vec![
            Grant::Realm(Realm::parse("staff").unwrap()),
            Grant::Realm(Realm::parse("guests").unwrap()),
        ]);
        for (wide, narrow, passes) in [
            (realm("staff"), Access::Public, true),
            (realm("staff"), realm("staff"), true),
            (realm("staff"), both.clone(), true),
            (principal("alice"), realm("staff"), true),
            (realm("staff"), Access::Allow(vec![Grant::Anybody]), true),
            (both, realm("staff"), false),
            (realm("staff"), principal("alice"), false),
            (Access::Allow(vec![Grant::Anybody]), realm("staff"), false),
            (Access::Public, Access::Allow(vec![Grant::Anybody]), false),
        ] {
            let policy =
                Policy::new(vec![Route::new("/", wide.clone()), Route::new("/a", narrow.clone())]);
            let got = access(&policy, "GET", "h", "/A");
            assert_eq!(got, passes.then_some(wide), "{narrow:?}");
        }
        for (wide, narrow, passes) in [
            (None, None, true),
            (None, Some(Reuse::Window), true),
            (None, Some(Reuse::ONCE), false),
            (Some(Reuse::ONCE), None, true),
            (Some(Reuse::Window), None, false),
            (Some(Reuse::Window), Some(Reuse::ONCE), false),
            (Some(Reuse::ONCE), Some(Reuse::ONCE), true),
        ] {
            let [mut wider, mut narrower] =
                ["/", "/a"].map(|path| Route::new(path, realm("staff")));
            (wider.reuse, narrower.reuse) = (wide, narrow);
            let got = access(&Policy::new(vec![wider, narrower]), "GET", "h", "/A");
            assert_eq!(got.is_some(), passes, "{wide:?} {narrow:?}");
        }
        // A method that the narrower route does not cover is refused there; a report lets everybody pass.
        let mut reads = Route::new("/a", Access::Public);
        reads.methods = vec!["GET".into()];
        let mut reported = Route::new("/", realm("staff"));
        reported.mode = Some(Mode::Report);
        let policy = Policy::new(vec![Route::new("/", Access::Public), reads]);
        assert_eq!(access(&policy, "GET", "h", "/A"), Some(Access::Public));
        assert_eq!(access(&policy, "POST", "h", "/A"), None);
        let policy = Policy::new(vec![reported, Route::new("/a", realm("staff"))]);
        assert_eq!(access(&policy, "GET", "h", "/A"), None);
    }

    #[test]
    fn raw_routes_take_what_literally_lies_below_them() {
        let raw = |path: &str| Route { raw_path: true, ..Route::new(path, Access::Public) };
        let policy = Policy::new(vec![
            Route::new("/", realm("any")),
            raw("/raw"),
            Route::new("/raw/plain", realm("any")),
        ]);
        let read =
            |path: &str| policy.read("GET", "h", path).map(|path| path.forwarded().to_owned());
        for path in [
            "/raw",
            "/raw/",
            "/raw//a/../%2f%zz",
            "/raw/%70lain",
            "/raw/plain2",
            "/raw/x/plain/..;",
        ] {
            assert_eq!(read(path).as_deref(), Ok(path));
            assert_eq!(access(&policy, "GET", "h", path), Some(Access::Public), "{path}");
        }
        for path in ["/rawest/%7e", "/raw/plain/%7e"] {
            assert_eq!(access(&policy, "GET", "h", path), Some(realm("any")), "{path}");
            assert!(read(path).unwrap().ends_with("/~"));
        }
        for path in ["/rawest//x", "/raw/plain//x", "/x/../raw", "//raw", "/raw%2fx", "/raw\\x"] {
            assert!(read(path).is_err(), "{path}");
        }
        // What becomes the raw route's path only by being read is not its.
        for path in ["/%72aw/x", "/raw;x", "/raw;x/y", "/%72%61%77"] {
            assert_eq!(access(&policy, "GET", "h", path), None, "{path}");
        }
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

    /// Few names, so that they meet: in case, in dots, one below the other.
    fn paths() -> impl Strategy<Value = String> {
        let segment = "(a|A|b|a\\.|%61|%41|%2561|%252541|a;x|b |\\.\\.|\\.|%2e%2e|%2f|)";
        proptest::collection::vec(segment, 1..5)
            .prop_map(|segments| format!("/{}", segments.join("/")))
    }

    fn routes() -> impl Strategy<Value = Vec<Route>> {
        let prefix = "(/(a|A|b)){0,3}";
        let access = prop_oneof![
            Just(Access::Public),
            Just(Access::Allow(vec![Grant::Anybody])),
            Just(realm("staff")),
            Just(realm("guests")),
        ];
        let methods = prop_oneof![3 => Just(Vec::new()), 1 => Just(vec!["GET".to_owned()])];
        let hosts = prop_oneof![3 => Just(Vec::new()), 1 => Just(vec!["h".to_owned()])];
        let mode = prop_oneof![4 => Just(None), 1 => Just(Some(Mode::Report))];
        let route = (prefix, access, methods, hosts, mode, proptest::bool::weighted(0.2)).prop_map(
            |(prefix, access, methods, hosts, mode, raw)| {
                let raw_path = raw && matches!(&access, Access::Public);
                Route { methods, hosts, mode, raw_path, ..Route::new(&prefix, access) }
            },
        );
        proptest::collection::vec(route, 1..5)
    }

    /// What a server makes of a path that reads all of it: escapes, also behind escapes, dots, empty
    /// segments, case.
    fn reading(path: &str) -> String {
        let mut decoded = path.to_owned();
        for _ in 0..4 {
            let again = percent_encoding::percent_decode_str(&decoded).decode_utf8_lossy();
            decoded = again.into_owned();
        }
        let mut segments: Vec<&str> = Vec::new();
        for segment in decoded.split('/') {
            match segment {
                "" | "." => {}
                ".." => drop(segments.pop()),
                name => segments.push(name),
            }
        }
        segments.iter().fold(String::new(), |all, segment| format!("{all}/{segment}"))
    }

    /// What govern says, found out route by route.
    struct Linear<'a> {
        policy: &'a Policy,
        /// Most specific first.
        routes: Vec<&'a Route>,
    }

    impl<'a> Linear<'a> {
        fn new(policy: &'a Policy) -> Self {
            let mut routes: Vec<_> = policy.routes.iter().collect();
            routes.sort_by_key(|r| (std::cmp::Reverse(r.prefix.len()), r.hosts.is_empty()));
            Self { policy, routes }
        }

        fn find(&self, method: &str, host: &str, path: &str) -> Option<&'a Route> {
            let here = |r: &&&Route| r.governs_host(host) && is_below(path, &r.prefix);
            let mut here = self.routes.iter().filter(here).peekable();
            let scope = here.peek()?;
            let (prefix, for_all) = (&scope.prefix, scope.hosts.is_empty());
            here.take_while(|r| r.prefix == *prefix && r.hosts.is_empty() == for_all)
                .find(|r| r.governs_method(method))
                .copied()
        }

        fn govern(&self, method: &str, host: &str, path: &RequestPath<'_>) -> Governing<'a> {
            let RequestPath::Normal(path) = path else {
                let found = self.find(method, host, path.forwarded());
                return found.map_or(Governing::Nothing, Governing::Route);
            };
            let found = self.find(method, host, path.decoded());
            let is_same = |reading: &str| {
                let other = self.find(method, host, reading);
                found.map(std::ptr::from_ref) == other.map(std::ptr::from_ref)
            };
            let mut again = path.decodings().skip(1);
            let mut bare =
                path.decodings().filter_map(|reading| path::without_parameters(&reading));
            if !again.all(|reading| is_same(&reading)) || !bare.all(|reading| is_same(&reading)) {
                return Governing::Ambiguous;
            }
            match found {
                None => Governing::Nothing,
                Some(route) if route.raw_path => Governing::Ambiguous,
                Some(route) if self.may_be_stricter(method, host, path, route) => {
                    Governing::Ambiguous
                }
                Some(route) => Governing::Route(route),
            }
        }

        fn may_be_stricter(
            &self,
            method: &str,
            host: &str,
            path: &NormalPath<'_>,
            found: &Route,
        ) -> bool {
            let readings: Vec<_> = path.decodings().map(|reading| path::fold(&reading)).collect();
            let own = path::fold(&found.prefix).len();
            let narrower = self.routes.iter().filter(|route| {
                let prefix = path::fold(&route.prefix);
                prefix.len() > own
                    && route.governs_host(host)
                    && readings.iter().any(|reading| is_below(reading, &prefix))
            });
            self.policy.similar == SimilarPaths::Refuse
                && narrower
                    .map(|route| self.find(method, host, &route.prefix))
                    .any(|rule| rule.is_none_or(|rule| !found.is_as_strict_as(rule)))
        }
    }

    /// To compare: routes may be equal and still be two.
    fn which(governing: Governing<'_>) -> Result<*const Route, &'static str> {
        match governing {
            Governing::Route(route) => Ok(std::ptr::from_ref(route)),
            Governing::Nothing => Err("nothing"),
            Governing::Ambiguous => Err("ambiguous"),
        }
    }

    /// Routes of all kinds, also with paths that no configuration can have.
    fn any_routes() -> impl Strategy<Value = Vec<Route>> {
        let name = "(a|a|A|b|B\\.|a | | |b;x|\u{17f}|s|%61|)";
        let prefix = proptest::collection::vec(name, 0..4)
            .prop_map(|names| names.iter().map(|name| format!("/{name}")).collect::<String>());
        let subset = |of: &'static [&'static str]| {
            let some = proptest::sample::subsequence(of, 0..=of.len());
            prop_oneof![Just(Vec::new()), some]
                .prop_map(|some| some.into_iter().map(str::to_owned).collect::<Vec<_>>())
        };
        let access = prop_oneof![
            Just(Access::Public),
            Just(Access::Allow(vec![Grant::Anybody])),
            Just(realm("staff")),
        ];
        let mode = prop_oneof![4 => Just(None), 1 => Just(Some(Mode::Report))];
        let reuse = prop_oneof![4 => Just(None), 1 => Just(Some(Reuse::ONCE))];
        let raw = proptest::bool::weighted(0.2);
        let (methods, hosts) = (subset(&["GET", "POST"]), subset(&["h", "i"]));
        let route = (prefix, access, methods, hosts, mode, reuse, raw).prop_map(
            |(prefix, access, methods, hosts, mode, reuse, raw_path)| {
                let route = Route::new(&prefix, access);
                Route { methods, hosts, mode, reuse, raw_path, ..route }
            },
        );
        proptest::collection::vec(route, 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever the routes are, also where the path begins with none of them.
        #[test]
        fn the_tree_says_what_all_routes_say(
            routes in any_routes(),
            below in prop_oneof![Just(usize::MAX), 0..8_usize],
            path in paths(),
            method in "(GET|POST|PUT)",
            host in "(h|i|j)",
            is_distinct in proptest::bool::weighted(0.2),
        ) {
            let similar = if is_distinct { SimilarPaths::Distinct } else { SimilarPaths::Refuse };
            let policy = Policy::new(routes).with_similar_paths(similar);
            let linear = Linear::new(&policy);
            let prefix = policy.routes.get(below).map_or("", |route| &route.prefix);
            let path = format!("{prefix}{path}");
            let found = |route: Option<&Route>| route.map(std::ptr::from_ref);
            for path in [path.as_str(), prefix] {
                prop_assert_eq!(
                    found(policy.find(&method, &host, path)),
                    found(linear.find(&method, &host, path))
                );
                let readings = [
                    NormalPath::parse(path).map(RequestPath::Normal),
                    RawPath::parse(path).map(RequestPath::Raw),
                ];
                for path in readings.into_iter().flatten() {
                    prop_assert_eq!(
                        which(policy.govern(&method, &host, &path)),
                        which(linear.govern(&method, &host, &path))
                    );
                }
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_forwarded_is_decided_on_as_what_came(routes in routes(), path in paths()) {
            let policy = Policy::new(routes);
            if let Ok(read) = policy.read("GET", "h", &path) {
                let again = policy.read("GET", "h", read.forwarded()).unwrap();
                prop_assert_eq!(again.forwarded(), read.forwarded());
                if let Governing::Route(route) = policy.govern("GET", "h", &read) {
                    let Governing::Route(same) = policy.govern("GET", "h", &again) else {
                        return Err(TestCaseError::fail("governed no more"));
                    };
                    prop_assert_eq!(same, route);
                }
            }
        }

        /// By the path, or by what a server makes of it that is less exact.
        #[test]
        fn no_path_is_governed_by_a_laxer_route_than_its_readings(
            routes in routes(),
            path in paths(),
            method in "(GET|POST)",
        ) {
            let routes: Vec<_> =
                routes.into_iter().map(|route| Route { raw_path: false, ..route }).collect();
            let policy = Policy::new(routes);
            let Ok(read) = policy.read(&method, "h", &path) else { return Ok(()) };
            let Governing::Route(route) = policy.govern(&method, "h", &read) else { return Ok(()) };
            // Folded onto the spelling of each route in turn: that is where a server may take it.
            let folded = path::fold(&reading(read.forwarded()));
            for other in &policy.routes {
                let prefix = path::fold(&other.prefix);
                if prefix.len() > path::fold(&route.prefix).len() && is_below(&folded, &prefix) {
                    let there = policy.find(&method, "h", &other.prefix);
                    prop_assert!(there.is_some_and(|there| route.is_as_strict_as(there)));
                }
            }
        }

        /// Who may pass nowhere else than below the new route, also as servers may read it, may still not.
        #[test]
        fn a_narrower_route_changes_nothing_elsewhere(
            routes in routes(),
            path in paths(),
            method in "(GET|POST)",
        ) {
            let (narrow, rest) = routes.split_last().unwrap();
            let before = Policy::new(rest.to_vec());
            let after = Policy::new(routes.clone());
            let Ok(read) = after.read(&method, "h", &path) else { return Ok(()) };
            let folded = path::fold(&reading(read.forwarded()));
            if is_below(&folded, &path::fold(&narrow.prefix)) {
                return Ok(());
            }
            let open = |policy: &Policy| match policy.govern(&method, "h", &read) {
                Governing::Route(route) => Some(route.clone()),
                Governing::Nothing | Governing::Ambiguous => None,
            };
            // With no route at all there is one that is not configured.
            let elsewhere = open(&after).filter(|route| !rest.is_empty() && route != narrow);
            if let Some(route) = elsewhere {
                prop_assert_eq!(open(&before), Some(route));
            }
        }

        /// Whatever the upstream makes of a raw path, no stricter rule is for that.
        #[test]
        fn raw_paths_lead_nowhere_that_is_stricter(
            mut routes in routes(),
            proven in any::<bool>(),
            below in paths(),
            method in "(GET|POST)",
            host in "(h|i)",
        ) {
            routes.iter_mut().for_each(|route| route.raw_path = false);
            routes[0].raw_path = true;
            routes[0].access = if proven { Access::Allow(vec![Grant::Anybody]) } else { Access::Public };
            let path = format!("{}{below}", routes[0].prefix);
            let policy = Policy::new(routes.clone());
            if policy.raw_conflict(&routes[0], false).is_some() {
                return Ok(());
            }
            let Ok(read @ RequestPath::Raw(_)) = policy.read(&method, &host, &path) else { return Ok(()) };
            let Governing::Route(route) = policy.govern(&method, &host, &read) else {
                return Err(TestCaseError::fail("a raw path without a route"));
            };
            prop_assert!(route.raw_path);
            prop_assert_eq!(read.forwarded(), path.as_str());
            for reading in [reading(&path), reading(&path).to_lowercase(), path::fold(&path)] {
                let there = policy.find(&method, &host, &reading);
                prop_assert!(there.is_some_and(|there| route.is_as_strict_as(there)), "{}", reading);
            }
        }
    }
}
