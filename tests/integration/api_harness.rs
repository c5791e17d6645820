//! A gate with the API on a free loopback port and its entries in a temporary SQLite file.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use otpgate::api::Api;
use otpgate::clock::{Clock, SystemClock};
use otpgate::config::{
    Address, ApiConfig, HeaderNames, Limits, Listen, ReservedRealms, ThrottleConfig,
};
use otpgate::decision::Decider;
use otpgate::directory::follower::Follower;
use otpgate::directory::{Directory, Hold, RealmRules, TokenRules};
use otpgate::entry::{Entry, EntryId, Principal, Realm, Seed};
use otpgate::metrics::Metrics;
use otpgate::net::Listener;
use otpgate::net::service::TowerApp;
use otpgate::otp::{Generator, TokenParams};
use otpgate::policy::Policy;
use otpgate::seal::Sealer;
use otpgate::store::Store;
use otpgate::store::sqlite::Sqlite;
use otpgate::throttle::Throttle;
use otpgate::verifier::{Basis, Entries, Verifier};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub(crate) const ADMIN_SEED: &str = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ";
pub(crate) const AUTH_SEED: &str = "MFRGGZDFMZTWQ2LKNNWG23TPOBYXE43U";
pub(crate) const USER_SEED: &str = "JBSWY3DPEHPK3PXP";

pub(crate) type Triple = (&'static str, &'static str, &'static str);
/// Name, realm and seed of the entries that every gate has.
pub(crate) const ADMIN: Triple = ("admin", "ungleich-admin", ADMIN_SEED);
pub(crate) const AUTH: Triple = ("auth", "ungleich-auth", AUTH_SEED);
pub(crate) const USER: Triple = ("user", "users", USER_SEED);

pub(crate) fn now() -> u64 {
    SystemClock.now().unix
}

pub(crate) fn token(seed: &str) -> String {
    Generator::new(&Seed::parse(seed).unwrap(), TokenParams::default()).token_at(now())
}

pub(crate) fn entry(id: u64, (name, realm, seed): (&str, &str, &str)) -> Entry {
    let principal = Principal::parse(name, realm).unwrap();
    Entry::new(EntryId(id), principal, Seed::parse(seed).unwrap(), now())
}

/// The authenticating fields of a caller, joined with `more`.
pub(crate) fn body_of((name, realm, seed): (&str, &str, &str), more: Value) -> Value {
    let mut body = json!({ "auth_name": name, "auth_realm": realm, "auth_token": token(seed) });
    if let Value::Object(more) = more {
        body.as_object_mut().unwrap().extend(more);
    }
    body
}

/// A verifier that never lets anybody wait: tests fail on purpose, from one address.
pub(crate) fn unthrottled_verifier(
    directory: Arc<Directory>,
    store: Store,
    metrics: Arc<Metrics>,
) -> Arc<Verifier> {
    let config = ThrottleConfig { enabled: false, ..ThrottleConfig::default() };
    let throttle = Throttle::new(config, Some(store.clone()), metrics.clone(), SystemClock.now());
    let basis = Basis::Entries(Box::new(Entries::new(directory, store)));
    Arc::new(Verifier::new(basis, Arc::new(throttle), metrics))
}

pub(crate) struct Setup {
    pub(crate) api: ApiConfig,
    pub(crate) skew_steps: u8,
    /// Without it the directory is never loaded.
    pub(crate) follow: bool,
}

impl Default for Setup {
    fn default() -> Self {
        let address = Address::Tcp(([127, 0, 0, 1], 0).into());
        let api = ApiConfig {
            listen: vec![Listen { h2c: true, ..Listen::at(address) }],
            trusted_proxies: Vec::new(),
            allowed_hosts: Vec::new(),
            reveal_seeds: true,
            rotate_overlap: Duration::from_secs(3600),
            limits: Limits::default(),
        };
        Self { api, skew_steps: 1, follow: true }
    }
}

pub(crate) struct Gate {
    pub(crate) base: String,
    pub(crate) address: std::net::SocketAddr,
    pub(crate) store: Store,
    pub(crate) file: PathBuf,
    pub(crate) metrics: Arc<Metrics>,
    http: reqwest::Client,
    _stop: watch::Sender<bool>,
    _tasks: JoinSet<()>,
    _folder: tempfile::TempDir,
}

impl Gate {
    pub(crate) async fn start() -> Self {
        Self::start_with(Setup::default()).await
    }

    /// Starts a gate and waits until it knows its entries.
    pub(crate) async fn start_with(setup: Setup) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("entries.db");
        let sealer = Sealer::new(&Sealer::random_key(), &[]).unwrap();
        let store = Store::new(Arc::new(Sqlite::new(&file)), sealer);
        store.init().await.unwrap();
        let version =
            store.insert(&[entry(1, ADMIN), entry(2, AUTH), entry(3, USER)]).await.unwrap();

        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let metrics = Arc::new(Metrics::new(["users".to_owned()]));
        let rules = TokenRules {
            default: RealmRules { skew_steps: setup.skew_steps, ..RealmRules::default() },
            ..TokenRules::default()
        };
        let (hold, max_stale) = (Hold::default(), Duration::from_secs(15));
        let (of, now) = (store.clone(), clock.now());
        let directory = Directory::new(of, &hold, rules, max_stale, metrics.clone(), now);
        let directory = Arc::new(directory);
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        if setup.follow {
            let follower = Follower::new(directory.clone(), clock.clone());
            tasks.spawn(async { follower.run().await });
            assert!(
                directory.wait_for(version, Duration::from_secs(10)).await,
                "entries are loaded"
            );
        }

        let listener =
            Listener::bind("api", &setup.api.listen, setup.api.limits, metrics.clone()).unwrap();
        let Address::Tcp(address) = listener.addresses().remove(0) else { panic!("TCP") };
        let verifier = unthrottled_verifier(directory, store.clone(), metrics.clone());
        let api = Api {
            decider: Decider::new(verifier.clone(), HeaderNames::default()),
            policy: Arc::new(Policy::new(Vec::new())),
            verifier,
            clock,
            metrics: metrics.clone(),
            realms: ReservedRealms {
                admin: Realm::parse("ungleich-admin").unwrap(),
                auth: Realm::parse("ungleich-auth").unwrap(),
            },
            config: setup.api,
        };
        tasks.spawn(listener.run(Arc::new(TowerApp::new(api.router())), stopped));
        Self {
            base: format!("http://{address}"),
            address,
            store,
            file,
            metrics,
            http: http_client(),
            _stop: stop,
            _tasks: tasks,
            _folder: folder,
        }
    }

    /// A request to a path.
    pub(crate) fn request(&self, method: &str, path: &str) -> RequestBuilder {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// Sends a JSON body.
    pub(crate) async fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        Answer::of(self.request(method, path).json(body).send().await.unwrap()).await
    }

    /// Sends a JSON body with the triple of `caller`.
    pub(crate) async fn call(
        &self,
        caller: Triple,
        method: &str,
        path: &str,
        more: Value,
    ) -> Answer {
        self.send(method, path, &body_of(caller, more)).await
    }

    /// Verifies the current token of `seed` for somebody.
    pub(crate) async fn verify(&self, name: &str, realm: &str, seed: &str) -> StatusCode {
        let more = json!({ "name": name, "realm": realm, "token": token(seed) });
        self.call(AUTH, "POST", "/verify", more).await.status
    }

    /// Makes an entry.
    pub(crate) async fn create(&self, more: Value) -> Map<String, Value> {
        let answer = self.call(ADMIN, "POST", "/ungleichotp/", more).await;
        assert_eq!(answer.status, 201, "{}", answer.json);
        answer.json.as_object().unwrap().clone()
    }
}

pub(crate) fn http_client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .tls_certs_only([])
        .timeout(Duration::from_secs(60))
        .build()
        .unwrap()
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
    /// Null if it is empty.
    pub(crate) json: Value,
}

impl Answer {
    pub(crate) async fn of(response: Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        let json = match text.as_str() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}")),
        };
        assert_eq!(headers["cache-control"], "no-store");
        assert!(headers.contains_key("date"));
        Self { status, headers, text, json }
    }

    /// Asserts a refusal with a `detail`.
    #[track_caller]
    pub(crate) fn refuses(&self, status: u16, detail: &str) {
        assert_eq!((self.status.as_u16(), &self.json), (status, &json!({ "detail": detail })));
    }
}

pub(crate) const UNPROVEN: &str = "Incorrect authentication credentials.";
pub(crate) const FORBIDDEN: &str = "You do not have permission to perform this action.";
