//! `otpgate demo`: the gate at work. A temporary SQLite store, a gate in front of a small upstream, real
//! calls through real sockets.

use std::fmt::Write as _;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use clap::Args;
use http::{HeaderMap, Method, StatusCode, Uri};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::serve::{End, Server};
use crate::cli::Failure;
use crate::client::{Client, ClientTls, TokenSource};
use crate::clock::{Clock, SystemClock};
use crate::config::load::{Flag, load};
use crate::config::{Address, Config, Limits, Listen};
use crate::entry::{Entry, Principal, Seed};
use crate::logging::Logging;
use crate::metrics::Metrics;
use crate::net::Listener;
use crate::net::service::TowerApp;
use crate::otp::{Generator, TokenParams};
use crate::store::Store;

/// The gate's configuration, beside its addresses and its store.
const SETTINGS: &str = r#"
[log]
level = "warn"

[shutdown]
grace = "1s"

[[route]]
path = "/"
allow = ["shop"]

[[route]]
path = "/public"
public = true
"#;

/// Longest wait for any answer here.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Arguments of `otpgate demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// End after the calls instead of serving until Ctrl-C
    #[arg(long)]
    once: bool,
}

/// Shows the main job.
///
/// # Errors
/// If anything does not go as it should: a call gets another answer than it must.
pub fn run(args: &DemoArgs) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let (mut int, mut term) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let stopped = pin!(async {
            tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
        });
        demonstrate(args, stopped).await
    });
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Shows everything, and goes on until `stopped` unless told otherwise; in any case it cleans up.
async fn demonstrate(
    args: &DemoArgs,
    mut stopped: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), Failure> {
    let demo = tokio::select! {
        () = &mut stopped => return Ok(()),
        demo = Demo::start() => demo?,
    };
    let shown = tokio::select! {
        () = &mut stopped => Ok(()),
        shown = demo.show(args.once) => shown,
    };
    demo.server.stop(End::Stopped).await;
    shown
}

/// A principal of the demo and its seed.
struct Caller {
    principal: Principal,
    seed: Seed,
    seed_file: PathBuf,
}

impl Caller {
    /// Keeps the seed in a file, as a service would.
    fn keep(folder: &Path, principal: Principal, seed: Seed) -> Result<Self, Failure> {
        let seed_file = folder.join(format!("{}.seed", principal.name.as_str()));
        std::fs::write(&seed_file, seed.expose())?;
        println!("created {principal}, seed in {}", seed_file.display());
        Ok(Self { principal, seed, seed_file })
    }

    /// A shell's words for its current token.
    fn token_command(&self) -> String {
        format!("$({} token --seed-file {})", program(), quoted(&self.seed_file))
    }

    fn token(&self) -> String {
        Generator::new(&self.seed, TokenParams::default()).token_at(SystemClock.now().unix)
    }

    /// A token that is not valid now: one of ten minutes ago.
    fn stale_token(&self) -> String {
        let at = SystemClock.now().unix - 600;
        Generator::new(&self.seed, TokenParams::default()).token_at(at)
    }
}

struct Demo {
    _logging: Logging,
    /// Removed with everything in it at the end.
    folder: tempfile::TempDir,
    server: Server,
    gate: String,
    api: String,
    ops: String,
    admin: Caller,
    verifier: Caller,
    alice: Caller,
    bob: Caller,
}

impl Demo {
    async fn start() -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("otpgate-demo-").tempdir()?;
        let upstream = start_upstream()?;
        let config = settings(folder.path(), &upstream)?;
        let (logging, _) = crate::logging::init(&config.log)?;
        let store = Store::open(&config.store)?;
        store.init().await?;
        let admin = Principal::parse("admin", config.realms.admin.as_str())?;
        let seed = Seed::random();
        let make = |id| Entry::new(id, admin.clone(), seed.clone(), SystemClock.now().unix);
        store.create(make).await?;
        let server = Server::start(config, Arc::new(SystemClock)).await?;
        let base = |addresses: &[Address]| format!("http://{}", addresses[0]);
        let (gate, api, ops) = (base(&server.proxy), base(&server.api), base(&server.ops));
        wait_until_ready(&ops).await?;

        println!("a gate at      {gate}  in front of a small upstream at {upstream}");
        println!("its API at     {api}");
        println!("its health at  {ops}/readyz, its metrics at {ops}/metrics\n");
        let admin = Caller::keep(folder.path(), admin, seed)?;
        let Principal { name, realm } = admin.principal.clone();
        let source = TokenSource::new(name, realm, admin.seed.clone());
        let client = Client::new(&api, source, &ClientTls::default())?;
        let caller = |name, realm| Self::create(&client, folder.path(), name, realm);
        let verifier = caller("verifier", "ungleich-auth").await?;
        let alice = caller("alice", "shop").await?;
        let bob = caller("bob", "lab").await?;
        println!();
        Ok(Self { server, gate, api, ops, admin, verifier, alice, bob, _logging: logging, folder })
    }

    /// Creates an entry through the API.
    async fn create(
        client: &Client,
        folder: &Path,
        name: &str,
        realm: &str,
    ) -> Result<Caller, Failure> {
        let principal = Principal::parse(name, realm)?;
        let fields = [("name".into(), name.into()), ("realm".into(), realm.into())];
        let entry = client.create(fields.into_iter().collect()).await?;
        let seed = entry.seed.ok_or("the API shows the seed of a new entry")?;
        Caller::keep(folder, principal, Seed::parse(seed.expose())?)
    }

    /// The calls, each with its answer; then, unless `once`, lines to try, for ever.
    async fn show(&self, once: bool) -> Result<(), Failure> {
        self.calls().await?;
        if !once {
            self.invite();
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn calls(&self) -> Result<(), Failure> {
        let (alice, bob) = (&self.alice, &self.bob);
        self.call("an authorised call", "/orders", Some((alice, alice.token())), 200).await?;
        self.call("a wrong token", "/orders", Some((alice, alice.stale_token())), 401).await?;
        let proven = Some((bob, bob.token()));
        self.call("proven, but not allowed on this route", "/orders", proven, 403).await?;
        self.call("no credentials", "/orders", None, 401).await?;
        self.call("no credentials on a public route", "/public", None, 200).await?;
        self.verify(alice, alice.token(), 200).await?;
        self.verify(alice, alice.stale_token(), 403).await?;
        let metrics =
            http_client()?.get(format!("{}/metrics", self.ops)).send().await?.text().await?;
        println!("── what Prometheus sees of it");
        for line in metrics.lines().filter(|l| l.starts_with("otpgate_verifications_total")) {
            println!("{line}");
        }
        println!();
        Ok(())
    }

    async fn call(
        &self,
        title: &str,
        path: &str,
        credentials: Option<(&Caller, String)>,
        expected: u16,
    ) -> Result<(), Failure> {
        println!("── {title}\nGET {path}");
        let mut request = http_client()?.get(format!("{}{path}", self.gate));
        if let Some((caller, token)) = credentials {
            let Principal { name, realm } = &caller.principal;
            for (header, value) in [
                ("X-Auth-Name", name.as_str()),
                ("X-Auth-Realm", realm.as_str()),
                ("X-Auth-Token", &token),
            ] {
                println!("{header}: {value}");
                request = request.header(header, value);
            }
        }
        print_answer(request.send().await?, expected).await
    }

    async fn verify(&self, whom: &Caller, token: String, expected: u16) -> Result<(), Failure> {
        let kind = if expected == 200 { "a right" } else { "a wrong" };
        println!("── a service asks the API about {kind} token\nPOST /verify");
        let body = serde_json::json!({
            "auth_name": self.verifier.principal.name,
            "auth_realm": self.verifier.principal.realm,
            "auth_token": self.verifier.token(),
            "name": whom.principal.name, "realm": whom.principal.realm, "token": token,
        });
        println!("{body}");
        let answer = http_client()?.post(format!("{}/verify", self.api)).json(&body).send().await?;
        print_answer(answer, expected).await
    }

    /// Lines to copy and paste.
    fn invite(&self) {
        println!("The gate goes on until Ctrl-C. Try, in another terminal:\n");
        for caller in [&self.alice, &self.bob] {
            let Principal { name, realm } = &caller.principal;
            println!(
                "curl -i -H 'X-Auth-Name: {name}' -H 'X-Auth-Realm: {realm}' \\\n     \
                 -H \"X-Auth-Token: {}\" {}/orders\n",
                caller.token_command(),
                self.gate
            );
        }
        println!(
            "curl -i -H 'Content-Type: application/json' {}/verify -d '{{\n  \
             \"auth_name\": \"verifier\", \"auth_realm\": \"ungleich-auth\", \
             \"auth_token\": \"'\"{}\"'\",\n  \
             \"name\": \"alice\", \"realm\": \"shop\", \"token\": \"'\"{}\"'\" }}'\n",
            self.api,
            self.verifier.token_command(),
            self.alice.token_command(),
        );
        println!(
            "{} client list --server-url {} \\\n    \
             --auth-name admin --auth-realm {} --auth-seed-file {}\n",
            program(),
            self.api,
            self.admin.principal.realm,
            quoted(&self.admin.seed_file),
        );
        println!("cat {}\n", quoted(&self.folder.path().join("audit.json")));
        println!("Everything lies in {} until then.", self.folder.path().display());
    }
}

/// This program, as a word for a shell.
fn program() -> String {
    quoted(&std::env::current_exe().unwrap_or_else(|_| "otpgate".into()))
}

/// A path as one word for a shell; plain ones stay readable.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

async fn print_answer(answer: reqwest::Response, expected: u16) -> Result<(), Failure> {
    let status = answer.status();
    let body = answer.text().await?;
    println!("→ {status}\n{}\n", body.trim_end());
    if status == expected { Ok(()) } else { Err(format!("expected {expected}").into()) }
}

fn settings(folder: &Path, upstream: &Address) -> Result<Config, Failure> {
    let file = folder.join("otpgate.toml");
    std::fs::write(&file, SETTINGS)?;
    let any_port = "127.0.0.1:0".to_owned();
    let flags = [
        ("proxy.listen", any_port.clone()),
        ("api.listen", any_port.clone()),
        ("ops.listen", any_port),
        ("proxy.upstream", upstream.to_string()),
        ("store.url", format!("sqlite:{}", folder.join("otpgate.db").display())),
        ("log.audit", format!("file:{}", folder.join("audit.json").display())),
    ]
    .map(|(key, value)| Flag { name: "demo", key, value });
    let config = load(Some(&file), [], &flags)?;
    Ok(config)
}

/// A service that answers with what it is told about its caller.
fn start_upstream() -> Result<Address, Failure> {
    async fn echo(method: Method, uri: Uri, headers: HeaderMap) -> String {
        let mut answer = format!("the upstream got {method} {uri}");
        for name in ["X-Auth-Name", "X-Auth-Realm", "X-Auth-Token"] {
            let value = headers
                .get(name)
                .map_or("(none)".into(), |v| String::from_utf8_lossy(v.as_bytes()));
            let _ = write!(answer, "\n  {name}: {value}");
        }
        answer
    }
    let listen = [Listen::at(Address::Tcp(([127, 0, 0, 1], 0).into()))];
    let limits = Limits { max_body_bytes: Some(1 << 20), ..Limits::default() };
    let listener = Listener::bind("demo", &listen, limits, Arc::new(Metrics::new([])))
        .map_err(|errors| errors[0].to_string())?;
    let address = listener.addresses().remove(0);
    let app = Arc::new(TowerApp::new(Router::new().fallback(echo)));
    let (open, stop) = watch::channel(false);
    tokio::spawn(async move {
        listener.run(app, stop).await;
        drop(open);
    });
    Ok(address)
}

async fn wait_until_ready(ops: &str) -> Result<(), Failure> {
    let client = http_client()?;
    for _ in 0..500 {
        if let Ok(answer) = client.get(format!("{ops}/readyz")).send().await
            && answer.status() == StatusCode::OK
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("the gate did not become ready".into())
}

fn http_client() -> Result<reqwest::Client, Failure> {
    Ok(reqwest::Client::builder().no_proxy().tls_certs_only([]).timeout(CALL_TIMEOUT).build()?)
}
