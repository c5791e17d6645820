//! Who asks, and the bytes of the requests.

use std::fs;
use std::path::Path;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::Seed;
use otpgate::otp::{Generator, TokenParams};
use serde_json::{Value, json};

/// Entries of the store, each of which asks; the service that verifies them is one more.
pub(crate) const CALLERS: u64 = 10_000;
/// As in the gates' settings: an hour instead of 30 seconds, so that tokens last as long as a run. A right token is
/// computed once in a window, so that this is seldomer here.
pub(crate) const STEP_SECONDS: u32 = 3600;

const REALM: &str = "bench";

/// An entry.
pub(crate) struct Caller {
    name: String,
    realm: &'static str,
    seed: Seed,
}

impl Caller {
    /// A right token of now.
    fn token(&self) -> String {
        self.generator().token_at(SystemClock.now().unix)
    }

    /// Digits that are no right token.
    fn wrong_token(&self) -> String {
        let (generator, step) = (self.generator(), u64::from(STEP_SECONDS));
        let now = SystemClock.now().unix;
        let right = [now - step, now, now + step, now + 2 * step].map(|at| generator.token_at(at));
        (0..).map(|n| format!("{n:06}")).find(|t| !right.contains(t)).expect("most are wrong")
    }

    fn generator(&self) -> Generator {
        let params = TokenParams { step_seconds: STEP_SECONDS, ..TokenParams::default() };
        Generator::new(&self.seed, params)
    }
}

/// All entries.
pub(crate) struct Callers {
    all: Vec<Caller>,
    verifier: Caller,
}

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Right,
    /// With `Connection: close`.
    Once,
    /// For 100 kB.
    Large,
    Wrong,
    Verify,
}

impl Callers {
    /// Makes them.
    pub(crate) fn new() -> Self {
        let caller = |name, realm| Caller { name, realm, seed: Seed::random() };
        Self {
            all: (1..=CALLERS).map(|n| caller(format!("service-{n}"), REALM)).collect(),
            verifier: caller("verifier".to_owned(), "ungleich-auth"),
        }
    }

    /// All of them, as `otpgate store import` takes them.
    pub(crate) fn dump(&self) -> Value {
        let record = |(caller, pk): (&Caller, u64)| {
            let (name, realm, seed) = (&caller.name, caller.realm, caller.seed.expose());
            let fields = json!({ "name": name, "realm": realm, "seed": seed });
            json!({ "model": "otpauth.otpseed", "pk": pk, "fields": fields })
        };
        self.all.iter().chain([&self.verifier]).zip(1..).map(record).collect()
    }

    /// The headers of the first one's right claim.
    pub(crate) fn claim(&self) -> [String; 3] {
        let caller = &self.all[0];
        let token = caller.token();
        [("name", caller.name.as_str()), ("realm", caller.realm), ("token", &token)]
            .map(|(what, value)| format!("X-Auth-{what}: {value}"))
    }

    /// One request of the first caller, on a connection that ends with it.
    pub(crate) fn once(&self, kind: Kind) -> Vec<u8> {
        let token = match kind {
            Kind::Wrong => self.all[0].wrong_token(),
            _ => self.all[0].token(),
        };
        let kind = if kind == Kind::Verify { kind } else { Kind::Once };
        self.request(&self.all[0], kind, &token, &self.verifier.token())
    }

    /// Writes a request of each, with tokens of now, one after the other with a NUL between them.
    pub(crate) fn write(&self, kind: Kind, file: &Path) {
        let verifiers = self.verifier.token();
        let request = |caller: &Caller| match kind {
            Kind::Wrong => self.request(caller, kind, &caller.wrong_token(), &verifiers),
            _ => self.request(caller, kind, &caller.token(), &verifiers),
        };
        let requests: Vec<_> = self.all.iter().map(request).collect();
        fs::write(file, requests.join(&0)).expect("the folder takes files");
    }

    fn request(&self, caller: &Caller, kind: Kind, token: &str, verifiers: &str) -> Vec<u8> {
        let (name, realm) = (&caller.name, caller.realm);
        let usual = "Host: gate.example\r\nUser-Agent: billing/2.4\r\nAccept: application/json\r\n";
        let target = if kind == Kind::Large { "/large" } else { "/items/1" };
        let close = if kind == Kind::Once { "Connection: close\r\n" } else { "" };
        let text = if kind == Kind::Verify {
            let body = json!({
                "auth_name": self.verifier.name, "auth_realm": self.verifier.realm,
                "auth_token": verifiers, "name": name, "realm": realm, "token": token,
            });
            let (body, length) = (body.to_string(), body.to_string().len());
            format!(
                "POST /verify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\n\r\n{body}"
            )
        } else {
            format!(
                "GET {target} HTTP/1.1\r\n{usual}{close}X-Auth-Name: {name}\r\n\
                 X-Auth-Realm: {realm}\r\nX-Auth-Token: {token}\r\n\r\n"
            )
        };
        text.into_bytes()
    }
}
