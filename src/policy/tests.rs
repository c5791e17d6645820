//! Who may pass where, by examples and for any routes and paths; what the tree finds, found route by route.

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
    let policy =
        Policy::new(vec![Route::new("/", Access::Public), Route::new("/admin", realm("staff"))]);
    let govern = |path: &str| policy.govern("GET", "h", &policy.read("GET", "h", path).unwrap());
    assert!(matches!(govern("/admin;x/y"), Governing::Ambiguous));
    assert!(matches!(govern("/admin/y;x=1"), Governing::Route(r) if !r.is_public()));
    assert!(matches!(govern("/items;x"), Governing::Route(r) if r.is_public()));
    // An upstream that tells similar paths apart may drop parameters all the same.
    let distinct = policy.with_similar_paths(SimilarPaths::Distinct);
    assert_eq!(access(&distinct, "GET", "h", "/admin;x/y"), None);
}

#[test]
fn repeated_encoding_never_leads_around_a_route() {
    let policy =
        Policy::new(vec![Route::new("/", Access::Public), Route::new("/admin", realm("staff"))]);
    let govern = |path: &str| policy.govern("GET", "h", &policy.read("GET", "h", path).unwrap());
    for path in
        ["/%2561dmin", "/%252561dmin/x", "/%2541dmin", "/admin%252e", "/%2561dmin;x", "/admin%2520"]
    {
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
    let govern = |path: &str| policy.govern("GET", "h", &policy.read("GET", "h", path).unwrap());
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
        let [mut wider, mut narrower] = ["/", "/a"].map(|path| Route::new(path, realm("staff")));
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
    let read = |path: &str| policy.read("GET", "h", path).map(|path| path.forwarded().to_owned());
    for path in
        ["/raw", "/raw/", "/raw//a/../%2f%zz", "/raw/%70lain", "/raw/plain2", "/raw/x/plain/..;"]
    {
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
    proptest::collection::vec(segment, 1..5).prop_map(|segments| format!("/{}", segments.join("/")))
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
        let mut bare = path.decodings().filter_map(|reading| path::without_parameters(&reading));
        if !again.all(|reading| is_same(&reading)) || !bare.all(|reading| is_same(&reading)) {
            return Governing::Ambiguous;
        }
        match found {
            None => Governing::Nothing,
            Some(route) if route.raw_path => Governing::Ambiguous,
            Some(route) if self.may_be_stricter(method, host, path, route) => Governing::Ambiguous,
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
