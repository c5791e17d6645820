//! What the gate does for every request, each part alone, without sockets: the table [`HOT`]. Time stands
//! still in it, so that tokens stay right and nothing happens beside what is measured.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::Body;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use otpgate::api::Api;
use otpgate::clock::{Clock as _, ManualClock, Moment};
use otpgate::config::{ApiConfig, HeaderNames, ThrottleConfig, TrustedPeer};
use otpgate::credentials::one_of_each;
use otpgate::decision::{Asked, Decider, Head, MethodName, Passage};
use otpgate::directory::{Directory, Hold};
use otpgate::entry::{Entry, EntryId, Principal, PrincipalRef, Seed};
use otpgate::metrics::Metrics;
use otpgate::otp::{Generator, Token, TokenParams};
use otpgate::policy::{Access, Governing, Grant, NormalPath, Policy, RequestPath, Route};
use otpgate::proxy::{self, Regime, Upstreams};
use otpgate::seal::Sealer;
use otpgate::store::sqlite::Sqlite;
use otpgate::store::{Quota, Store};
use otpgate::throttle::{Source, Throttle};
use otpgate::verifier::{Attempt, Basis, Entries, Verifier};
use pingora::proxy::HttpProxy;
use tower::ServiceExt as _;

use crate::filled::{Gate, entry, fill};

/// Does it once; the number says for which of the callers.
pub(crate) type Run = fn(&Rig, usize);

/// What is measured.
pub(crate) const HOT: [(&str, Run); 12] = [
    ("a right token", Rig::right_token),
    ("a wrong token", Rig::wrong_token),
    ("an unknown name", Rig::unknown_name),
    ("credential headers", Rig::credential_headers),
    ("a path made normal", Rig::path),
    ("policy of 1 route", |rig, i| rig.policy(0, i)),
    ("policy of 100 routes", |rig, i| rig.policy(1, i)),
    ("policy of 10,000 routes", |rig, i| rig.policy(2, i)),
    ("look-up of a name", Rig::look_up),
    ("a decision: head, route, token", Rig::decision),
    ("`/verify`, two tokens, without sockets", Rig::verify_call),
    ("`/authz/auth-request`, without sockets", Rig::auth_request),
];

/// Entries of the store, besides the service that asks about them.
const ENTRIES: u64 = 500;
/// Those of them that ask: more than branch predictors learn by heart.
const CALLERS: usize = 500;
const ROUTES: [usize; 3] = [1, 100, 10_000];
/// A time step's first second.
const NOW: u64 = 1_800_000_000;
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

struct Caller {
    who: Principal,
    token: Token,
    wrong: Token,
    headers: HeaderMap,
    /// Where it goes, and what the policies say there.
    target: &'static str,
    path: RequestPath<'static>,
    /// A question of the verifying service about it.
    question: String,
}

/// The parts of a gate, loaded.
pub(crate) struct Rig {
    directory: Arc<Directory>,
    verifier: Arc<Verifier>,
    decider: Decider,
    policies: [Policy; 3],
    names: HeaderNames,
    router: Router,
    callers: Vec<Caller>,
    unknown: Vec<Principal>,
    metrics: Arc<Metrics>,
    clock: Arc<ManualClock>,
    now: Moment,
    /// The API's time-outs need one.
    runtime: tokio::runtime::Runtime,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// Fills a store and loads it.
    pub(crate) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let backend = Sqlite::new(&folder.path().join("otpgate.db"));
        let store = Store::new(Arc::new(backend), Sealer::off());
        let clock = Arc::new(ManualClock::at(NOW));
        let service = service();
        let entries: Vec<_> =
            (1..=ENTRIES).map(entry).chain(std::iter::once(service.clone())).collect();
        let directory = runtime.block_on(async {
            store.init().await.expect("a new store");
            let version = fill(&store, entries.iter().cloned()).await;
            let gate = Gate::start(store.clone(), &Hold::default(), clock.clone());
            gate.has(version).await;
            gate.directory.clone()
        });
        let metrics = Arc::new(Metrics::new([]));
        let now = clock.now();
        let throttle = Throttle::new(patient(), Some(store.clone()), metrics.clone(), now);
        let basis = Basis::Entries(Box::new(Entries::new(directory.clone(), store)));
        let verifier = Arc::new(Verifier::new(basis, Arc::new(throttle), metrics.clone()));
        let config = otpgate::config::load::load(None, [], &[]).expect("defaults");
        let names = HeaderNames::default();
        let api = Api {
            verifier: verifier.clone(),
            clock: clock.clone(),
            metrics: metrics.clone(),
            realms: config.realms,
            decider: Decider::new(verifier.clone(), names.clone()),
            policy: Arc::new(policy(ROUTES[0])),
            // Who asks without a connection asks on a Unix socket.
            config: ApiConfig { trusted_proxies: vec![TrustedPeer::Unix], ..config.api },
        };
        let callers = entries.iter().take(CALLERS).map(|entry| Caller::new(entry, &service));
        Self {
            callers: callers.collect(),
            unknown: (0..CALLERS as u64)
                .map(|n| crate::filled::principal(ENTRIES + 1 + n))
                .collect(),
            decider: Decider::new(verifier.clone(), names.clone()),
            policies: ROUTES.map(policy),
            router: api.router(),
            directory,
            verifier,
            names,
            metrics,
            clock,
            now,
            runtime,
            _folder: folder,
        }
    }

    /// The proxy in front of `upstream`; nothing follows the store any more, and nobody checks the upstream.
    pub(crate) async fn proxy(&self, upstream: SocketAddr) -> Arc<HttpProxy<proxy::Gate>> {
        let variable = ("OTPGATE_PROXY__UPSTREAM".into(), upstream.to_string().into());
        let config = otpgate::config::load::load(None, [variable], &[]).expect("good settings");
        let upstreams = Upstreams::new(&config.proxy, self.metrics.clone()).expect("plain HTTP");
        upstreams.resolve().await;
        let regime = Regime::new(proxy::Parts {
            verifier: self.verifier.clone(),
            policy: Arc::new(self.policies[0].clone()),
            headers: self.names.clone(),
            config: config.proxy,
            upstreams: Arc::new(upstreams),
            access_log: false,
        });
        let regime = Arc::new(ArcSwap::from_pointee(regime));
        proxy::app(regime, self.metrics.clone(), self.clock.clone(), 1)
    }

    /// The bytes of a request of each caller.
    pub(crate) fn requests(&self) -> Vec<Vec<u8>> {
        let request = |caller: &Caller| {
            let mut bytes = format!("GET {} HTTP/1.1\r\n", caller.target).into_bytes();
            for (name, value) in &caller.headers {
                bytes.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
            }
            bytes.extend(b"\r\n");
            bytes
        };
        self.callers.iter().map(request).collect()
    }

    fn caller(&self, number: usize) -> &Caller {
        &self.callers[number % CALLERS]
    }

    fn verify(&self, who: PrincipalRef<'_>, token: &Token) -> bool {
        let attempt = Attempt {
            who,
            token: Some(token),
            source: Source::of(Some(CLIENT)),
            request: "0123456789abcdef",
            reuse: None,
        };
        let verified = self.verifier.verify(attempt, self.now).now_or_never();
        verified.expect("nothing is waited for").is_ok()
    }

    fn right_token(&self, number: usize) {
        let caller = self.caller(number);
        assert!(self.verify((&caller.who).into(), &caller.token));
    }

    fn wrong_token(&self, number: usize) {
        let caller = self.caller(number);
        assert!(!self.verify((&caller.who).into(), &caller.wrong));
    }

    fn unknown_name(&self, number: usize) {
        let who = &self.unknown[number % CALLERS];
        assert!(!self.verify(who.into(), &self.caller(number).token));
    }

    fn credential_headers(&self, number: usize) {
        let names = [&self.names.name, &self.names.realm, &self.names.token];
        let found = one_of_each(&self.caller(number).headers, names).expect("one of each");
        assert!(found.iter().all(Option::is_some));
    }

    fn path(&self, number: usize) {
        let path = NormalPath::parse(self.caller(number).target).expect("a path");
        std::hint::black_box(path);
    }

    fn policy(&self, which: usize, number: usize) {
        let path = &self.caller(number).path;
        let governing = self.policies[which].govern("GET", "gate.example", path);
        assert!(matches!(governing, Governing::Route(_)));
    }

    fn look_up(&self, number: usize) {
        let who = &self.caller(number).who;
        assert!(look_up(&self.directory, who, self.now));
    }

    fn decision(&self, number: usize) {
        let caller = self.caller(number);
        let policy = &self.policies[0];
        let method = MethodName::parse("GET").expect("a method");
        let head = Head::read(policy, method, "gate.example", caller.target).expect("a head");
        let asked = Asked {
            method,
            head: &head,
            headers: &caller.headers,
            client: Some(CLIENT),
            request_id: "0123456789abcdef",
            at: self.now,
        };
        let decision = self.decider.decide(policy, asked).now_or_never();
        let outcome = decision.expect("nothing is waited for").outcome;
        assert!(matches!(outcome, Ok(Passage::Proven(_))));
    }

    fn verify_call(&self, number: usize) {
        let request = Request::post("/verify")
            .header("host", "127.0.0.1:8081")
            .header("content-type", "application/json")
            .body(Body::from(self.caller(number).question.clone()))
            .expect("a request");
        self.call(request);
    }

    /// As nginx asks.
    fn auth_request(&self, number: usize) {
        let caller = self.caller(number);
        let mut request = Request::get("/authz/auth-request")
            .header("host", "otpgate")
            .header("x-original-method", "GET")
            .header("x-original-uri", caller.target)
            .header("x-forwarded-host", "gate.example")
            .header("x-forwarded-for", "127.0.0.1")
            .body(Body::empty())
            .expect("a request");
        for (name, value) in &caller.headers {
            request.headers_mut().insert(name, value.clone());
        }
        self.call(request);
    }

    fn call(&self, request: Request<Body>) {
        let answered = self.runtime.block_on(self.router.clone().oneshot(request));
        let Ok(response) = answered;
        assert_eq!(response.status(), StatusCode::OK);
    }
}

/// Whether there is an entry.
pub(crate) fn look_up(directory: &Directory, who: &Principal, now: Moment) -> bool {
    let found = directory.look_up(who.into(), now, |found| found.is_some()).now_or_never();
    found.expect("all entries are in memory").expect("it is current")
}

impl Caller {
    fn new(entry: &Entry, service: &Entry) -> Self {
        let number = entry.id.0;
        let token = token_of(&entry.seed);
        let (name, realm) = (entry.principal.name.as_str(), entry.principal.realm.as_str());
        let question = serde_json::json!({
            "auth_name": service.principal.name.as_str(),
            "auth_realm": service.principal.realm.as_str(),
            "auth_token": token_of(&service.seed),
            "name": name, "realm": realm, "token": token,
        });
        // Borrowed by its path for as long as the program runs.
        let target = format!("/route-{}/items/caf%C3%A9/{number}", number % 10_000);
        let target: &'static str = target.leak();
        Self {
            who: entry.principal.clone(),
            wrong: Token::parse(&wrong(&entry.seed)).expect("digits"),
            headers: headers(name, realm, &token),
            token: Token::parse(&token).expect("digits"),
            path: RequestPath::Normal(NormalPath::parse(target).expect("a path")),
            target,
            question: question.to_string(),
        }
    }
}

fn service() -> Entry {
    let who = Principal::parse("verifier", "ungleich-auth").expect("a name");
    Entry::new(EntryId(ENTRIES + 1), who, Seed::random(), NOW)
}

fn token_of(seed: &Seed) -> String {
    Generator::new(seed, TokenParams::default()).token_at(NOW)
}

/// Six digits that no accepted time step has.
fn wrong(seed: &Seed) -> String {
    let generator = Generator::new(seed, TokenParams::default());
    let right = [NOW - 30, NOW, NOW + 30].map(|at| generator.token_at(at));
    (0..).map(|n| format!("{n:06}")).find(|t| !right.contains(t)).expect("most are wrong")
}

/// A client's usual ones, and its claim.
fn headers(name: &str, realm: &str, token: &str) -> HeaderMap {
    let headers = [
        ("host", "gate.example"),
        ("user-agent", "billing/2.4 (+https://billing.example)"),
        ("accept", "application/json"),
        ("accept-encoding", "gzip"),
        ("x-auth-name", name),
        ("x-auth-realm", realm),
        ("x-auth-token", token),
    ];
    let value = |text| HeaderValue::from_str(text).expect("a value");
    headers.map(|(name, text)| (HeaderName::from_static(name), value(text))).into_iter().collect()
}

/// `/`, and so many routes but one below it.
fn policy(routes: usize) -> Policy {
    let open = || Access::Allow(vec![Grant::Anybody]);
    let below = (1..routes).map(|n| Route::new(&format!("/route-{n}"), open()));
    Policy::new(std::iter::once(Route::new("/", open())).chain(below).collect())
}

/// Failures are counted as ever, but nobody has to wait.
fn patient() -> ThrottleConfig {
    let quota = Quota { failures: 1 << 30, per: Duration::from_secs(1 << 30) };
    let (per_source, per_entry, per_address) = (quota, quota, quota);
    ThrottleConfig { per_source, per_entry, per_address, ..ThrottleConfig::default() }
}
