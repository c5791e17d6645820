//! Starts the real program and talks to it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::Seed;
use otpgate::otp::{Generator, TokenParams};
use serde_json::{Value, json};

/// Longest wait for anything that should happen at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Seeds of the entries that [`Sandbox::with_entries`] makes.
pub(crate) const ADMIN: &str = "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP";
pub(crate) const VERIFIER: &str = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ";
pub(crate) const ALICE: &str = "MFRGGZDFMZTWQ2LKMFRGGZDFMZTWQ2LK";
pub(crate) const BOB: &str = "NBSWY3DPO5XXE3DENBSWY3DPO5XXE3DE";

/// The program, with an environment of its own.
pub(crate) fn otpgate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_otpgate"));
    command.env_clear().stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    otpgate().args(args).output().expect("the program runs")
}

/// What a finished program wrote.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// What a finished program complained about.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// The current token of a seed.
pub(crate) fn token(seed: &str) -> String {
    let generator = Generator::new(&Seed::parse(seed).expect("a seed"), TokenParams::default());
    generator.token_at(SystemClock.now().unix)
}

/// A token that no step around now has.
pub(crate) fn wrong_token(seed: &str) -> String {
    let generator = Generator::new(&Seed::parse(seed).expect("a seed"), TokenParams::default());
    let now = SystemClock.now().unix;
    let good: Vec<_> =
        (-4..=4_i64).map(|n| generator.token_at(now.saturating_add_signed(n * 30))).collect();
    // Not 000000: a log may hold that by chance.
    (918_273..)
        .map(|n| format!("{n:06}"))
        .find(|t| !good.contains(t))
        .expect("most tokens are wrong")
}

/// Whether a token stands in a text as a number of its own: within longer ones, such as fractions of
/// seconds, every six digits turn up sooner or later.
pub(crate) fn shows_token(text: &str, token: &str) -> bool {
    text.split(|c: char| !c.is_ascii_digit()).any(|number| number == token)
}

/// An HTTP client that follows nothing and knows no proxy.
pub(crate) fn http() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(PATIENCE)
        .build()
        .expect("a client")
}

/// Where a base URL leads.
pub(crate) fn address(base: &str) -> SocketAddr {
    base.trim_start_matches("http://").parse().expect("an address")
}

/// Waits until `done` gives something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut done: impl FnMut() -> F,
) -> T {
    #[allow(clippy::disallowed_methods, reason = "tests run against real time")]
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done().await {
            return value;
        }
        #[allow(clippy::disallowed_methods, reason = "tests run against real time")]
        let late = Instant::now() > deadline;
        assert!(!late, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A folder with a configuration and a store, before and while gates run on it.
pub(crate) struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary folder") }
    }

    /// One whose SQLite store holds admin@ungleich-admin (id 1), verifier@ungleich-auth (2),
    /// alice@shop (3) and bob@lab (4), taken in by `store import`.
    pub(crate) fn with_entries() -> Self {
        let sandbox = Self::new();
        let refused = sandbox.import(&[
            (1, "admin", "ungleich-admin", ADMIN),
            (2, "verifier", "ungleich-auth", VERIFIER),
            (3, "alice", "shop", ALICE),
            (4, "bob", "lab", BOB),
        ]);
        assert_eq!(refused, [""; 0]);
        sandbox
    }

    /// Takes entries (id, name, realm, seed) into its store, as ungleich-otp dumps them; the records
    /// that were refused.
    pub(crate) fn import(&self, entries: &[(u64, &str, &str, &str)]) -> Vec<String> {
        let dump: Vec<_> = entries
            .iter()
            .map(|(pk, name, realm, seed)| {
                let fields = json!({ "name": name, "realm": realm, "seed": seed });
                json!({ "model": "otpauth.otpseed", "pk": pk, "fields": fields })
            })
            .collect();
        let file = self.write("dump.json", &Value::from(dump).to_string());
        let file = file.to_str().expect("UTF-8");
        let output = run(&["store", "import", "--json", "--store", &self.store(), file]);
        let report: Value = serde_json::from_str(&stdout(&output))
            .unwrap_or_else(|e| panic!("{e}: {}{}", stdout(&output), stderr(&output)));
        let refused = report["refused"].as_array().expect("a list");
        assert_eq!(output.status.success(), refused.is_empty());
        refused.iter().map(|one| one["record"].as_str().expect("a text").to_owned()).collect()
    }

    /// Its SQLite store's URL.
    pub(crate) fn store(&self) -> String {
        format!("sqlite:{}", self.path("otpgate.db").display())
    }

    /// A file's path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file into it.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).expect("the folder takes files");
        path
    }

    /// Starts a gate with these settings on free ports; its store, unless `settings` names one, is this
    /// folder's.
    pub(crate) fn serve(&self, settings: &str) -> Gate {
        self.try_serve(settings).unwrap_or_else(|output| panic!("no gate: {}", stderr(&output)))
    }

    /// As [`Self::serve`]; what the program wrote if it ends instead of serving.
    pub(crate) fn try_serve(&self, settings: &str) -> Result<Gate, Output> {
        let config = self.write("otpgate.toml", settings);
        let mut command = otpgate();
        command.args(["serve", "--log-format", "json", "--config"]).arg(&config);
        for (variable, key) in
            [("PROXY", "[proxy]"), ("API", "[api]"), ("OPS", "[ops]")].map(|(v, k)| (v, k))
        {
            let section = settings.split(key).nth(1).map(|s| s.split("\n[").next().unwrap_or(s));
            if !section.is_some_and(|s| s.contains("listen")) {
                command.env(format!("OTPGATE_{variable}__LISTEN"), "127.0.0.1:0");
            }
        }
        let names_store = settings.contains("[store]") && settings.contains("url");
        if !names_store && !settings.contains("[remote]") {
            command.env("OTPGATE_STORE__URL", self.store());
        }
        Gate::spawn(command)
    }
}

/// Log lines of a running program.
#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    grew: Condvar,
}

/// A running gate; killed when dropped.
pub(crate) struct Gate {
    child: Child,
    log: Arc<Log>,
    /// `http://` and the address of the proxy listener; empty if off.
    pub(crate) proxy: String,
    /// The same of the API.
    pub(crate) api: String,
    /// The same of ops.
    pub(crate) ops: String,
}

impl Gate {
    /// A gate with an `/etc/hosts` of its own, in a mount namespace of its own.
    pub(crate) fn with_hosts(hosts: &Path, config: &Path) -> Self {
        let mut command = Command::new("unshare");
        command
            .args(["--map-root-user", "--mount", "sh", "-c"])
            .arg("mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"")
            .args(["sh".as_ref(), hosts.as_os_str()])
            .args([env!("CARGO_BIN_EXE_otpgate"), "serve", "--log-format", "json", "--config"])
            .arg(config);
        Self::spawn(command).unwrap_or_else(|output| panic!("no gate: {}", stderr(&output)))
    }

    /// Starts `command`, which must log as JSON, and waits until it serves.
    pub(crate) fn spawn(mut command: Command) -> Result<Self, Output> {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let log = Arc::new(Log::default());
        let stderr = child.stderr.take().expect("piped");
        std::thread::spawn({
            let log = log.clone();
            move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    log.lines.lock().expect("no panic").0.push(line);
                    log.grew.notify_all();
                }
                log.lines.lock().expect("no panic").1 = true;
                log.grew.notify_all();
            }
        });
        let mut gate =
            Self { child, log, proxy: String::new(), api: String::new(), ops: String::new() };
        match gate.wait_for_log(|line| line["message"] == "serving") {
            Some(line) => {
                let base = |key: &str| match line[key].as_str() {
                    Some("off") | None => String::new(),
                    Some(address) => format!("http://{address}"),
                };
                (gate.proxy, gate.api, gate.ops) = (base("proxy"), base("api"), base("ops"));
                Ok(gate)
            }
            None => {
                let status = gate.child.wait().expect("it ended");
                let stderr = gate.log_text().into_bytes();
                Err(Output { status, stdout: Vec::new(), stderr })
            }
        }
    }

    /// The first log line, past or future, that `is` it; `None` if the program ends without one.
    pub(crate) fn wait_for_log(&self, is: impl Fn(&Value) -> bool) -> Option<Value> {
        let parse = |line: &String| serde_json::from_str::<Value>(line).ok().filter(&is);
        let mut state = self.log.lines.lock().expect("no panic");
        loop {
            if let Some(found) = state.0.iter().find_map(parse) {
                return Some(found);
            }
            if state.1 {
                return None;
            }
            let (next, waited) = self.log.grew.wait_timeout(state, PATIENCE).expect("no panic");
            assert!(!waited.timed_out(), "no such log line in:\n{}", next.0.join("\n"));
            state = next;
        }
    }

    /// All log lines so far.
    pub(crate) fn log_text(&self) -> String {
        self.log.lines.lock().expect("no panic").0.join("\n")
    }

    /// The process id.
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are small")
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: kill takes two integers; the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> std::process::ExitStatus {
        self.child.wait().expect("it is our child")
    }

    /// Waits until `/readyz` is green.
    pub(crate) async fn ready(self) -> Self {
        let (client, url) = (http(), format!("{}/readyz", self.ops));
        eventually("the gate is ready", || async {
            client.get(&url).send().await.ok().filter(|r| r.status() == 200).map(|_| ())
        })
        .await;
        self
    }

    /// A request through the proxy with credentials.
    pub(crate) fn call(
        &self,
        path: &str,
        name: &str,
        realm: &str,
        token: &str,
    ) -> reqwest::RequestBuilder {
        http()
            .get(format!("{}{path}", self.proxy))
            .header("X-Auth-Name", name)
            .header("X-Auth-Realm", realm)
            .header("X-Auth-Token", token)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that is none of ours, killed when dropped.
pub(crate) struct Server(Child);

impl Server {
    /// Starts it, its output into `log`.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Self {
        let out = std::fs::File::create(log).expect("a log file");
        let err = out.try_clone().expect("a log file");
        Self(command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().expect("it is installed"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Feeds `input` to a program.
pub(crate) fn run_with_input(mut command: Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it is installed");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends")
}

/// Runs a program to its end, at most for `limit`, without blocking the runtime.
pub(crate) async fn output_within(limit: Duration, mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("it is installed");
    let pid = i32::try_from(child.id()).expect("process ids are small");
    let mut running = tokio::task::spawn_blocking(|| child.wait_with_output());
    let Ok(ended) = tokio::time::timeout(limit, &mut running).await else {
        // SAFETY: kill takes two integers; the process is our child and not yet waited for.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        panic!("not done within {limit:?}: {:?}", running.await);
    };
    ended.expect("no panic").expect("it is our child")
}

/// The interpreter of the tests' Python tools.
pub(crate) async fn python() -> PathBuf {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/venv");
    let made = output_within(Duration::from_secs(600), Command::new(venv)).await;
    assert!(made.status.success(), "{}", stderr(&made));
    PathBuf::from(stdout(&made).trim())
}

/// A free loopback port, for programs that cannot tell which one they took.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}
