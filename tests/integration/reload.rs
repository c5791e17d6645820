//! Settings that change while the gate runs.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::Seed;
use otpgate::otp::{Generator, TokenParams};
use otpgate::seal::Sealer;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;

use crate::harness::{
    ADMIN, ALICE, BOB, Gate, Sandbox, address, eventually, http, otpgate, stderr, token,
    wrong_token,
};
use crate::peers::bounded;
use crate::peers::echo::Echo;
use crate::peers::h2peer;
use crate::peers::tls::Pki;
use crate::peers::wire::Connection;
use crate::redis_server::{Options, RedisServer};

mod settings;

/// Files are looked at often, and nobody has to wait for wrong tokens.
const QUICK: &str = "[reload]\nwatch = '100ms'\n[throttle]\nenabled = false\n";
/// Only signals count.
const UNWATCHED: &str = "[reload]\nwatch = 'off'\n[throttle]\nenabled = false\n";

/// How many reloads have ended, well or not.
fn reloads(gate: &Gate) -> usize {
    gate.log_text().lines().filter(|line| line.contains(r#""action":"settings""#)).count()
}

/// Waits for the end of the reload that `cause` causes, and tells how it ended.
async fn reloaded(gate: &Gate, cause: impl FnOnce()) -> String {
    let before = reloads(gate);
    cause();
    eventually("settings are reloaded", || async { (reloads(gate) > before).then_some(()) }).await;
    let log = gate.log_text();
    let last = log.lines().rfind(|line| line.contains(r#""action":"settings""#)).unwrap();
    serde_json::from_str::<Value>(last).unwrap()["outcome"].as_str().unwrap().to_owned()
}

/// As editors and tools do it: no reader ever sees half a file.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

async fn replaced(sandbox: &Sandbox, gate: &Gate, settings: &str) -> String {
    reloaded(gate, || replace(&sandbox.path("otpgate.toml"), settings)).await
}

async fn hung_up(gate: &Gate) -> String {
    reloaded(gate, || gate.signal(libc::SIGHUP)).await
}

async fn status(gate: &Gate, path: &str, seed: &str) -> u16 {
    let (name, realm) = if seed == BOB { ("bob", "lab") } else { ("alice", "shop") };
    gate.call(path, name, realm, &token(seed)).send().await.unwrap().status().as_u16()
}

async fn metric(gate: &Gate, line: &str) -> Option<f64> {
    let text = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let text = text.text().await.unwrap();
    text.lines().find_map(|l| l.strip_prefix(line)).map(|value| value.trim().parse().unwrap())
}

fn proxy_to(echo: &Echo) -> String {
    format!("[proxy]\nupstream = '{}'\n", echo.address)
}

/// Callers who go on and on.
struct Load {
    stop: Arc<AtomicBool>,
    callers: Vec<JoinHandle<usize>>,
    answers: Arc<AtomicUsize>,
}

impl Load {
    /// `fits` tells whether a caller, its status and the upstream that answered fit together.
    fn start(gate: &Gate, fits: fn(&str, u16, &str) -> bool) -> Self {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = http();
        let one = |name: &'static str, realm, seed| {
            let (stop, answers) = (stop.clone(), answers.clone());
            let (client, url) = (client.clone(), format!("{}/x", gate.proxy));
            tokio::spawn(async move {
                let mut count = 0;
                while !stop.load(Ordering::SeqCst) {
                    let call = client.get(&url).header("X-Auth-Name", name);
                    let call = call.header("X-Auth-Realm", realm);
                    let answer = call.header("X-Auth-Token", token(seed)).send().await;
                    let answer = answer.unwrap_or_else(|e| panic!("after {count}: {e:?}"));
                    let upstream = answer.headers().get("x-upstream");
                    let upstream = upstream.map_or("", |name| name.to_str().unwrap());
                    let status = answer.status().as_u16();
                    assert!(fits(name, status, upstream), "{name} {status} {upstream:?}");
                    answer.bytes().await.unwrap();
                    answers.fetch_add(1, Ordering::SeqCst);
                    count += 1;
                }
                count
            })
        };
        let callers = [("alice", "shop", ALICE), ("bob", "lab", BOB)];
        let callers = callers.iter().cycle().take(6).map(|(n, r, s)| one(n, *r, *s)).collect();
        Self { stop, callers, answers }
    }

    /// Until so many more have their answer.
    async fn more(&self, count: usize) {
        let enough = self.answers.load(Ordering::SeqCst) + count;
        eventually("callers go on", || async {
            let broken = self.callers.iter().any(JoinHandle::is_finished);
            (broken || self.answers.load(Ordering::SeqCst) >= enough).then_some(())
        })
        .await;
    }

    /// Ends it; how many answers there were.
    async fn stop(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        let mut total = 0;
        for caller in self.callers {
            total += caller.await.unwrap();
        }
        total
    }
}

/// Each policy goes with an upstream of its own: whoever sees one with the other's was misjudged.
#[tokio::test(flavor = "multi_thread")]
async fn routes_and_upstreams_change_together_under_load() {
    let (one, two) = (Echo::named("one").await, Echo::named("two").await);
    let sandbox = Sandbox::with_entries();
    let settings = |realm: &str, echo: &Echo, extra: &str| {
        let upstream = proxy_to(echo);
        format!(
            "{QUICK}{upstream}{extra}[[route]]\npath = '/'\nallow = '{realm}'\n\
             [[route]]\npath = '/x'\nallow = '{realm}'\nupstream = '{}'\n",
            echo.address
        )
    };
    let (first, second) = (settings("shop", &one, ""), settings("lab", &two, "threads = 2\n"));

    // As Kubernetes mounts a ConfigMap: the file leads through `..data`, which is exchanged.
    let mount = sandbox.path("mount");
    std::fs::create_dir(&mount).unwrap();
    let publish = |version: &str, text: &str| {
        let (folder, link) = (mount.join(version), mount.join("..tmp"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("otpgate.toml"), text).unwrap();
        std::os::unix::fs::symlink(version, &link).unwrap();
        std::fs::rename(link, mount.join("..data")).unwrap();
    };
    publish("..v0", &first);
    let config = mount.join("otpgate.toml");
    std::os::unix::fs::symlink("..data/otpgate.toml", &config).unwrap();
    let mut command = otpgate();
    command.args(["serve", "--log-format", "json", "--store", &sandbox.store(), "--config"]);
    command.arg(&config);
    for section in ["PROXY", "API", "OPS"] {
        command.env(format!("OTPGATE_{section}__LISTEN"), "127.0.0.1:0");
    }
    let gate = Gate::spawn(command).unwrap().ready().await;

    let load = Load::start(&gate, |name, status, upstream| {
        matches!((name, status, upstream), ("alice" | "bob", 403, ""))
            || (name, status, upstream) == ("alice", 200, "one")
            || (name, status, upstream) == ("bob", 200, "two")
    });
    load.more(50).await;
    for round in 1..=4 {
        let (text, allowed) = if round % 2 == 0 { (&first, ALICE) } else { (&second, BOB) };
        let publish = || publish(&format!("..v{round}"), text);
        assert_eq!(reloaded(&gate, publish).await, "reloaded");
        assert_eq!(status(&gate, "/x", allowed).await, 200, "round {round}");
        load.more(50).await;
    }
    let real = mount.join("..v4/otpgate.toml");
    for round in 5..=8 {
        let (text, allowed) = if round % 2 == 0 { (&first, ALICE) } else { (&second, BOB) };
        assert_eq!(reloaded(&gate, || replace(&real, text)).await, "reloaded");
        assert_eq!(status(&gate, "/x", allowed).await, 200, "round {round}");
        load.more(50).await;
    }
    for round in 0..20 {
        gate.signal(libc::SIGHUP);
        load.more(5 + round).await;
    }
    let total = load.stop().await;
    assert!(total > 500, "{total}");
    let needs = gate.wait_for_log(|line| line["message"] == "needs a restart: `proxy.threads`");
    assert_eq!(needs.unwrap()["key"], "proxy.threads");
    let failed = metric(&gate, "otpgate_config_reloads_total{outcome=\"failed\"}").await;
    assert_eq!(failed, Some(0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_settings_change_nothing_and_show() {
    let echo = Echo::start().await;
    let sandbox = Sandbox::with_entries();
    let good = format!("{QUICK}{}[log]\nlevel = 'debug'\n", proxy_to(&echo));
    let gate = sandbox.serve(&good).ready().await;
    let last = "otpgate_config_last_reload_successful";
    let loaded_at = "otpgate_config_last_reload_success_timestamp_seconds";
    assert_eq!(metric(&gate, last).await, Some(1.0));
    let started = metric(&gate, loaded_at).await.unwrap();
    assert!(started > 1e9);

    let bad = format!("{good}[api]\nreveal_seed = 1\n[totp]\nskew = 99\n[[route]]\npath = '/x'\n");
    assert_eq!(replaced(&sandbox, &gate, &bad).await, "refused");
    for key in ["api.reveal_seed", "totp.skew", "route[0].allow"] {
        let line = gate.wait_for_log(|line| line["key"] == key).unwrap();
        let text = line["message"].as_str().unwrap();
        assert!(text.starts_with("settings not reloaded, the old ones stay: "), "{line}");
        assert_eq!((&line["level"], &line["trigger"]), (&json!("ERROR"), &json!("files")));
    }
    assert_eq!(metric(&gate, last).await, Some(0.0));
    let failed = "otpgate_config_reloads_total{outcome=\"failed\"}";
    assert_eq!(metric(&gate, failed).await, Some(1.0));
    assert_eq!(status(&gate, "/x", ALICE).await, 200);

    // What only opening files shows is found before anything changes, too.
    let useless = sandbox.write("useless.pem", "s3cr3t-junk");
    let useless = useless.display();
    let closed = "[[route]]\npath = '/'\nallow = 'nobody'\n";
    for bad in [
        format!("{good}[api]\ntls_cert_file = '{useless}'\ntls_key_file = '{useless}'\n{closed}"),
        format!("{good}[store]\nkey_file = '{useless}'\n{closed}"),
        format!(
            "{QUICK}[proxy]\nupstream = {{ url = 'https://h', ca_file = '{useless}' }}\n{closed}"
        ),
        "[proxy\nlisten = 's3cr3t-junk'".to_owned(),
        format!("{good}[store]\npassword_file = '/absent/password'\n{closed}"),
    ] {
        assert_eq!(replaced(&sandbox, &gate, &bad).await, "refused", "{bad}");
        assert_eq!(status(&gate, "/x", ALICE).await, 200);
    }
    assert!(!gate.log_text().contains("s3cr3t"), "{}", gate.log_text());

    // The file may be away for longer than it takes to replace it.
    let gone = reloaded(&gate, || std::fs::remove_file(sandbox.path("otpgate.toml")).unwrap());
    assert_eq!(gone.await, "refused");
    assert_eq!(metric(&gate, last).await, Some(0.0));
    assert_eq!(status(&gate, "/x", ALICE).await, 200);

    assert_eq!(replaced(&sandbox, &gate, &format!("{good}{closed}")).await, "reloaded");
    assert_eq!(status(&gate, "/x", ALICE).await, 403);
    assert_eq!(metric(&gate, last).await, Some(1.0));
    assert!(metric(&gate, loaded_at).await.unwrap() >= started);
}

/// Settings that come through a pipe are there once; without them the gate would have those of nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_is_read_once() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = format!(
        "{}listen = '127.0.0.1:0'\n[api]\nlisten = 'off'\n[ops]\nlisten = '127.0.0.1:0'\n\
         [store]\nurl = '{}'\n[[route]]\npath = '/'\nallow = 'shop'\n",
        proxy_to(&echo),
        sandbox.store()
    );
    let (pipe, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, settings.as_bytes()).unwrap();
    drop(writer);
    let mut command = otpgate();
    command.args(["serve", "--log-format", "json", "--config", "/dev/stdin"]).stdin(pipe);
    let gate = Gate::spawn(command).unwrap_or_else(|output| panic!("{}", stderr(&output)));
    let gate = gate.ready().await;
    assert_eq!(gate.api, "", "off");
    assert_eq!((status(&gate, "/", ALICE).await, status(&gate, "/", BOB).await), (200, 403));
    // There is nothing to read again.
    assert_eq!(hung_up(&gate).await, "refused");
    assert_eq!((status(&gate, "/", ALICE).await, status(&gate, "/", BOB).await), (200, 403));
}

/// What is no file of settings is not opened, however it is named: it might be waited for until the end, or fill
/// the memory.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_again_is_no_file_of_settings() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = format!("{QUICK}{}", proxy_to(&echo));
    let gate = sandbox.serve(&settings).ready().await;
    let (pipe, huge) = (sandbox.path("pipe"), sandbox.path("huge"));
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    for (number, (file, why)) in [
        (pipe.as_path(), "no regular file"),
        (huge.as_path(), "larger than 16 MiB"),
        (Path::new("/dev/zero"), "no regular file"),
        (sandbox.path("").as_path(), "no regular file"),
    ]
    .into_iter()
    .enumerate()
    {
        for key in ["key_file", "password_file", "ca_file"] {
            let bad = format!("{settings}[store]\n{key} = '{}' # {number}\n", file.display());
            assert_eq!(replaced(&sandbox, &gate, &bad).await, "refused");
            let is_it = |line: &Value| {
                let text = line["message"].as_str().unwrap_or_default();
                let about = format!("`{}` is {why}", file.display());
                line["key"] == format!("store.{key}") && text.contains(&about)
            };
            gate.wait_for_log(is_it).unwrap();
        }
        // What it names, and is unfit, does not stand in the way of better settings.
        let better = format!("{settings}# {number}\n");
        assert_eq!(replaced(&sandbox, &gate, &better).await, "reloaded", "{}", file.display());
    }
    assert_eq!(status(&gate, "/", ALICE).await, 200);
}

/// A file that a bad configuration names for the first time is watched, too.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_missing_is_found_when_it_comes() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let gate = sandbox.serve(&format!("{QUICK}{}", proxy_to(&echo))).ready().await;
    let url = sandbox.path("url");
    let better = format!(
        "{QUICK}{}mode = 'report'\n[store]\nurl_file = '{}'\n",
        proxy_to(&echo),
        url.display()
    );
    assert_eq!(replaced(&sandbox, &gate, &better).await, "refused");
    let audit = reloaded(&gate, || std::fs::write(&url, "sqlite:other.db").unwrap()).await;
    // The environment names the store, and a file does as well.
    assert_eq!(audit, "refused");
    assert!(gate.log_text().contains("`url` and `url_file` are both set"));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_contents_count_but_a_signal_always_does() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = format!("{QUICK}{}", proxy_to(&echo));
    let gate = sandbox.serve(&settings).ready().await;
    let file = sandbox.path("otpgate.toml");
    // The same, by another file; then a change, which ends the wait.
    replace(&file, &settings);
    std::fs::File::open(&file).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let marker = format!("{settings}[log]\nlevel = 'debug'\n");
    gate.wait_for_log(|line| line["message"] == "serving");
    assert_eq!(hung_up(&gate).await, "reloaded");
    assert_eq!(replaced(&sandbox, &gate, &marker).await, "reloaded");
    let triggers: Vec<_> = gate
        .log_text()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["message"] == "settings reloaded")
        .map(|line| line["trigger"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(triggers, ["SIGHUP", "files"]);

    // The watch itself can be turned off, and on again by a signal.
    assert_eq!(
        replaced(&sandbox, &gate, &format!("{UNWATCHED}{}", proxy_to(&echo))).await,
        "reloaded"
    );
    let closed = format!("{QUICK}{}[[route]]\npath = '/'\nallow = 'nobody'\n", proxy_to(&echo));
    let before = reloads(&gate);
    replace(&file, &closed);
    assert_eq!(status(&gate, "/x", ALICE).await, 200);
    assert_eq!(hung_up(&gate).await, "reloaded");
    assert_eq!(reloads(&gate), before + 1);
    assert_eq!(status(&gate, "/x", ALICE).await, 403);
    assert_eq!(replaced(&sandbox, &gate, &settings).await, "reloaded");
    assert_eq!(status(&gate, "/x", ALICE).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_signals_are_few_reloads_and_the_last_word_counts() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = |allow: &str| {
        format!("{UNWATCHED}{}[[route]]\npath = '/'\nallow = '{allow}'\n", proxy_to(&echo))
    };
    let gate = sandbox.serve(&settings("nobody")).ready().await;
    let file = sandbox.path("otpgate.toml");
    for n in 0..200 {
        replace(&file, &settings(if n == 199 { "shop" } else { "nobody" }));
        gate.signal(libc::SIGHUP);
    }
    eventually("the last settings are in force", || async {
        (status(&gate, "/", ALICE).await == 200).then_some(())
    })
    .await;
    assert!((1..=200).contains(&reloads(&gate)));
    let failed = metric(&gate, "otpgate_config_reloads_total{outcome=\"failed\"}").await;
    assert_eq!(failed, Some(0.0));
}

/// A connection that waits for its next request since before a reload is no way around it.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_have_no_old_rules() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = |more: &str| format!("{UNWATCHED}{}h2c = true\n{more}", proxy_to(&echo));
    let gate = sandbox.serve(&settings("")).ready().await;
    let one = tokio::net::TcpStream::connect(address(&gate.proxy)).await.unwrap();
    let two =
        h2peer::client(tokio::net::TcpStream::connect(address(&gate.proxy)).await.unwrap()).await;
    let mut one = Connection::over(one);
    let mut api = Connection::to(address(&gate.api)).await;
    let secret = token(ALICE);
    let mut ask = async || {
        let proof =
            format!("X-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {secret}\r\n");
        let first = one.ask(format!("GET / HTTP/1.1\r\nHost: g\r\n{proof}\r\n")).await.unwrap();
        let request = http::Request::get("http://g/").header("x-auth-name", "alice");
        let request = request.header("x-auth-realm", "shop").header("x-auth-token", &secret);
        let second = h2peer::ask(&two, request.body(()).unwrap()).await.0.status().as_u16();
        let third = format!("GET /ungleichotp/ HTTP/1.1\r\nHost: g\r\n{proof}\r\n");
        [first.status, second, api.ask(third).await.unwrap().status]
    };
    assert_eq!(ask().await, [200, 200, 403]);
    let other = settings("[[route]]\npath = '/'\nallow = 'lab'\n[realms]\nadmin = 'shop'\n");
    for _ in 0..3 {
        sandbox.write("otpgate.toml", &other);
        assert_eq!(hung_up(&gate).await, "reloaded");
        assert_eq!(ask().await, [403, 403, 200]);
        sandbox.write("otpgate.toml", &settings(""));
        assert_eq!(hung_up(&gate).await, "reloaded");
        assert_eq!(ask().await, [200, 200, 403]);
    }
}

/// What is under way goes on as it began: a tunnel to an upstream that no setting names any more.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_begun_goes_on() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (sandbox, two) = (Sandbox::with_entries(), Echo::named("two").await);
    let one = format!("[proxy]\nupstream = '{}'\n", listener.local_addr().unwrap());
    // Connecting as a check would take the place of the caller's connection.
    let gate = sandbox.serve(&format!("{QUICK}{one}[proxy.health]\ninterval = 'off'\n"));
    let gate = gate.ready().await;
    let mut client = Connection::to(address(&gate.proxy)).await;
    let upgrade = format!(
        "GET /ws HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         X-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {}\r\n\r\n",
        token(ALICE)
    );
    client.send(upgrade).await;
    let (stream, _) = bounded("the upstream is asked", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    upstream.request_head().await.unwrap();

    // Before the answer, and once more in the tunnel.
    let other = format!("{QUICK}{}[[route]]\npath = '/'\nallow = 'nobody'\n", proxy_to(&two));
    assert_eq!(replaced(&sandbox, &gate, &other).await, "reloaded");
    let switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                    Upgrade: websocket\r\n\r\n";
    upstream.send(switched).await;
    assert_eq!(client.answer_to_head().await.unwrap().status, 101);
    assert_eq!(hung_up(&gate).await, "reloaded");
    let (_, mut stream) = upstream.into_parts();
    client.send("ping").await;
    let mut four = [0; 4];
    bounded("the client's bytes", stream.read_exact(&mut four)).await.unwrap();
    stream.write_all(&four).await.unwrap();
    bounded("the upstream's bytes", client.stream.read_exact(&mut four)).await.unwrap();
    assert_eq!(&four, b"ping");
    assert_eq!(status(&gate, "/", ALICE).await, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_replaced_and_a_bad_pair_is_not() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let (old, new) = (Pki::new(), Pki::new());
    let files = &old.files;
    let settings = format!(
        "{QUICK}{}tls_cert_file = '{}'\ntls_key_file = '{}'\n",
        proxy_to(&echo),
        files.cert_file.display(),
        files.key_file.display()
    );
    let gate = sandbox.serve(&settings).ready().await;
    let at = address(&gate.proxy);
    let proven = || {
        let request = http::Request::get("https://localhost/").header("x-auth-name", "alice");
        let request = request.header("x-auth-realm", "shop").header("x-auth-token", token(ALICE));
        request.body(()).unwrap()
    };
    let before = h2peer::tls_client(at, &old).await;
    assert_eq!(h2peer::ask(&before, proven()).await.0.status(), 200);
    let expiry = "otpgate_certificate_expiry_timestamp_seconds{listener=\"proxy\"}";
    let ends = metric(&gate, expiry).await.unwrap();

    // Half of a pair: told, and the old one stays.
    let short = new.odd_identity("localhost", |params| {
        params.not_after = rcgen::date_time_ymd(2999, 1, 1);
    });
    let cert = std::fs::read_to_string(&short.cert_file).unwrap();
    assert_eq!(reloaded(&gate, || replace(&files.cert_file, &cert)).await, "refused");
    let told = gate.wait_for_log(|line| line["key"] == "proxy.listen").unwrap();
    assert!(told["message"].as_str().unwrap().contains("does not belong"), "{told}");
    let still = h2peer::tls_client(at, &old).await;
    assert_eq!(h2peer::ask(&still, proven()).await.0.status(), 200);
    assert_eq!(metric(&gate, expiry).await, Some(ends));

    let key = std::fs::read_to_string(&short.key_file).unwrap();
    assert_eq!(reloaded(&gate, || replace(&files.key_file, &key)).await, "reloaded");
    for connection in [before, still, h2peer::tls_client(at, &new).await] {
        assert_eq!(h2peer::ask(&connection, proven()).await.0.status(), 200);
    }
    assert!(metric(&gate, expiry).await.unwrap() < ends);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_level_changes() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let level = |log: &str| format!("{QUICK}{}[log]\n{log}\n", proxy_to(&echo));
    let gate = sandbox.serve(&level("level = 'info'")).ready().await;
    for (n, (log, is_written)) in [
        ("level = 'info'\naccess = true", true),
        ("level = 'error'", false),
        ("level = 'warn,otpgate::access=info'", true),
        ("access = false", false),
        ("access = true", true),
    ]
    .into_iter()
    .enumerate()
    {
        if n > 0 {
            assert_eq!(replaced(&sandbox, &gate, &level(log)).await, "reloaded");
        }
        assert_eq!(status(&gate, &format!("/{n}"), ALICE).await, 200);
        // Lines come in order: what is not there before this one will not come.
        assert_eq!(hung_up(&gate).await, "reloaded");
        let found = gate.log_text().contains(&format!("\"path\":\"/{n}\""));
        assert_eq!(found, is_written, "{log}: {}", gate.log_text());
    }
}

/// The token of a realm with hours for time steps, so that none ends in the middle of a test.
fn hourly(digits: u8, steps_ago: u64) -> String {
    let params = TokenParams { digits, step_seconds: 3600, ..TokenParams::default() };
    let generator = Generator::new(&Seed::parse(ALICE).unwrap(), params);
    generator.token_at(SystemClock.now().unix - steps_ago * 3600)
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_of_tokens_change() {
    for hold in ["all", "index"] {
        let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
        let rules = |rules: &str| {
            let hold = format!("[store]\nurl = '{}'\nhold = '{hold}'\n", sandbox.store());
            format!("{QUICK}{hold}{}[realms.shop]\nperiod = 3600\n{rules}\n", proxy_to(&echo))
        };
        let gate = sandbox.serve(&rules("skew = 1")).ready().await;
        let ask = async |token: &str| {
            let answer = gate.call("/", "alice", "shop", token).send().await.unwrap();
            answer.status().as_u16()
        };
        assert_eq!((ask(&hourly(6, 0)).await, ask(&hourly(6, 1)).await), (200, 200));
        assert_eq!(replaced(&sandbox, &gate, &rules("skew = 0")).await, "reloaded");
        assert_eq!((ask(&hourly(6, 0)).await, ask(&hourly(6, 1)).await), (200, 401));
        assert_eq!(replaced(&sandbox, &gate, &rules("reuse = 'once'")).await, "reloaded");
        assert_eq!((ask(&hourly(6, 0)).await, ask(&hourly(6, 0)).await), (200, 401));
        // Of other realms nothing has changed.
        assert_eq!(status(&gate, "/", BOB).await, 200);

        // How tokens are made: entries are loaded again, and meanwhile each is as before or as after.
        assert_eq!(replaced(&sandbox, &gate, &rules("digits = 8")).await, "reloaded");
        eventually("8 digits are asked for", || async {
            (ask(&hourly(8, 0)).await == 200).then_some(())
        })
        .await;
        assert_eq!(ask(&hourly(6, 0)).await, 401);
        assert_eq!(status(&gate, "/", BOB).await, 200);
        let loads = || metric(&gate, "otpgate_directory_full_loads_total");
        eventually("the load is proven", || async { (loads().await == Some(2.0)).then_some(()) })
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn realms_become_labels_of_metrics() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let gate = sandbox.serve(&format!("{QUICK}{}", proxy_to(&echo))).ready().await;
    let count = async |realm: &str| {
        metric(&gate, &format!("otpgate_verifications_total{{realm=\"{realm}\",reason=\"ok\"}}"))
            .await
    };
    assert_eq!(status(&gate, "/", ALICE).await, 200);
    assert_eq!((count("other").await, count("shop").await), (Some(1.0), None));
    let named = format!("{QUICK}{}[realms.shop]\n", proxy_to(&echo));
    assert_eq!(replaced(&sandbox, &gate, &named).await, "reloaded");
    assert_eq!(status(&gate, "/", ALICE).await, 200);
    assert_eq!((count("other").await, count("shop").await), (Some(1.0), Some(1.0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_and_trust_change_also_on_open_connections() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = |more: &str| format!("{QUICK}{}{more}\n", proxy_to(&echo));
    let gate = sandbox.serve(&settings("")).ready().await;
    let mut open = Connection::to(address(&gate.proxy)).await;
    let request = || {
        format!(
            "POST / HTTP/1.1\r\nHost: g\r\nX-Request-Id: mine\r\nContent-Length: 5\r\n\
             X-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {}\r\n\r\nhello",
            token(ALICE)
        )
    };
    let first = open.ask(request()).await.unwrap();
    assert_eq!(first.status, 200);
    assert!(!first.text().to_lowercase().contains("x-request-id: mine"), "{}", first.text());

    let trusting = settings("trusted_proxies = ['127.0.0.1']\n");
    assert_eq!(replaced(&sandbox, &gate, &trusting).await, "reloaded");
    let second = open.ask(request()).await.unwrap();
    assert!(second.text().to_lowercase().contains("x-request-id: mine"), "{}", second.text());

    assert_eq!(replaced(&sandbox, &gate, &settings("")).await, "reloaded");
    let third = open.ask(request()).await.unwrap();
    assert!(!third.text().to_lowercase().contains("x-request-id: mine"), "{}", third.text());

    let small = settings("[proxy.limits]\nmax_body_bytes = 4\nmax_head_bytes = '1KiB'\n");
    assert_eq!(replaced(&sandbox, &gate, &small).await, "reloaded");
    let fourth = open.ask(request()).await.unwrap();
    assert_eq!(fourth.status, 413);
    let mut open = Connection::to(address(&gate.proxy)).await;
    let large = format!("GET /{} HTTP/1.1\r\nHost: g\r\n\r\n", "x".repeat(2000));
    assert_eq!(open.ask(large).await.unwrap().status, 431);

    let gone = async || {
        eventually("earlier connections are gone", || async {
            (metric(&gate, "otpgate_connections{listener=\"proxy\"}").await == Some(0.0))
                .then_some(())
        })
        .await;
    };

    // How many of one source, unless it brings everybody's requests.
    let each =
        |more: &str| settings(&format!("{more}[proxy.limits]\nmax_connections_per_source = 1\n"));
    let proxies = each("trusted_proxies = ['127.0.0.1']\n");
    assert_eq!(replaced(&sandbox, &gate, &proxies).await, "reloaded");
    gone().await;
    let mut two =
        [Connection::to(address(&gate.proxy)).await, Connection::to(address(&gate.proxy)).await];
    for one in &mut two {
        assert_eq!(one.ask(request()).await.unwrap().status, 200);
    }
    assert_eq!(replaced(&sandbox, &gate, &each("")).await, "reloaded");
    let mut open = Connection::to(address(&gate.proxy)).await;
    assert_eq!(open.ask(request()).await.unwrap().status, 200);
    assert!(Connection::to(address(&gate.proxy)).await.ends().await);
    drop((open, two));

    // Who may connect, and how many at once.
    let one = settings("allow_from = ['127.0.0.1']\n[proxy.limits]\nmax_connections = 1\n");
    assert_eq!(replaced(&sandbox, &gate, &one).await, "reloaded");
    gone().await;
    let mut open = Connection::to(address(&gate.proxy)).await;
    assert_eq!(open.ask(request()).await.unwrap().status, 200);
    assert!(Connection::to(address(&gate.proxy)).await.ends().await);
    let closed = settings("allow_from = ['192.0.2.1']\n");
    assert_eq!(replaced(&sandbox, &gate, &closed).await, "reloaded");
    assert!(Connection::to(address(&gate.proxy)).await.ends().await);
    assert_eq!(open.ask(request()).await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_changes_too() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = |more: &str| format!("{QUICK}{}[api]\n{more}\n", proxy_to(&echo));
    let gate = sandbox.serve(&settings("")).ready().await;
    let list = async || {
        let request = http().get(format!("{}/ungleichotp/", gate.api));
        let request = request.header("X-Auth-Name", "admin").header("X-Auth-Token", token(ADMIN));
        let answer = request.header("X-Auth-Realm", "ungleich-admin").send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    assert!(list().await.1.contains(ADMIN));
    assert_eq!(replaced(&sandbox, &gate, &settings("reveal_seeds = false")).await, "reloaded");
    let (status, shown) = list().await;
    assert!(status == 200 && shown.contains("alice") && !shown.contains(ADMIN), "{shown}");
    let other = settings("[realms]\nadmin = 'shop'");
    assert_eq!(replaced(&sandbox, &gate, &other).await, "reloaded");
    assert_eq!(list().await.0, 403);
    let hosts = settings("allowed_hosts = ['otpgate.internal']");
    assert_eq!(replaced(&sandbox, &gate, &hosts).await, "reloaded");
    assert_ne!(list().await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_password_of_redis_is_used_from_the_next_connection_on() {
    let options = Options { password: Some("first".into()), ..Options::default() };
    let mut redis = RedisServer::start(options);
    let (echo, sandbox) = (Echo::start().await, Sandbox::new());
    let password = sandbox.write("password", "first\n");
    let settings = format!(
        "{QUICK}{}[store]\nurl = 'redis://127.0.0.1:{}'\npassword_file = '{}'\nsealing = 'off'\n\
         max_stale = '2s'\n",
        proxy_to(&echo),
        redis.port,
        password.display()
    );
    let config = sandbox.write("bootstrap.toml", &settings);
    let mut bootstrap = otpgate();
    let output = bootstrap.args(["store", "bootstrap", "--config"]).arg(config).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let gate = sandbox.serve(&settings).ready().await;

    redis.change_password("second");
    redis.run::<()>(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let ready = async || http().get(format!("{}/readyz", gate.ops)).send().await.unwrap();
    eventually("the old password is of no use", || async {
        (ready().await.status() == 503).then_some(())
    })
    .await;
    assert_eq!(reloaded(&gate, || replace(&password, "second")).await, "reloaded");
    eventually("the new one is", || async { (ready().await.status() == 200).then_some(()) }).await;
    let log = gate.log_text();
    assert!(!log.contains("first") && !log.contains("second\""), "{log}");

    // How long the gate goes on without it.
    let patient = settings.replace("'2s'", "'1h'");
    assert_eq!(replaced(&sandbox, &gate, &patient).await, "reloaded");
    redis.kill();
    gate.wait_for_log(|line| line["error"].as_str().is_some_and(|why| why.contains("refused")));
    let stale = "otpgate_directory_staleness_seconds";
    eventually("entries are older than before allowed", || async {
        (metric(&gate, stale).await.unwrap() > 2.5).then_some(())
    })
    .await;
    assert_eq!(ready().await.status(), 200);
    assert_eq!(replaced(&sandbox, &gate, &settings).await, "reloaded");
    assert_eq!(ready().await.status(), 503);
}

/// Entries that another gate has sealed with a key that this one learns later.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_opens_what_could_not_be_opened() {
    for hold in ["all", "index"] {
        let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
        let new = sandbox.write("new.key", &Sealer::random_key());
        let old = sandbox.path("otpgate.db.key");
        let (new, old) = (new.display(), old.display());
        let keys = |keys: &str| {
            let store = format!("[store]\nurl = '{}'\nhold = '{hold}'\n{keys}\n", sandbox.store());
            format!("{QUICK}{}{store}", proxy_to(&echo))
        };
        let gate = sandbox.serve(&keys("")).ready().await;
        assert_eq!(status(&gate, "/", ALICE).await, 200);
        let both = keys(&format!("key_file = '{new}'\nold_key_files = ['{old}']"));
        let config = sandbox.write("rekey.toml", &both);
        let output = otpgate().args(["store", "rekey", "--config"]).arg(config).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        eventually("the gate cannot open entries", || async {
            (status(&gate, "/", ALICE).await == 503).then_some(())
        })
        .await;
        assert_eq!(replaced(&sandbox, &gate, &both).await, "reloaded");
        eventually("the gate can open entries", || async {
            (status(&gate, "/", ALICE).await == 200).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_a_restart_is_named_and_the_rest_is_taken_over() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let gate = sandbox.serve(&format!("{QUICK}{}", proxy_to(&echo))).ready().await;
    let settings = format!(
        "{QUICK}{}threads = 3\nunix_mode = '0660'\n[store]\nprefix = 'other'\n\
         [[route]]\npath = '/'\nallow = 'lab'\n[process]\ncore_dumps = true\n",
        proxy_to(&echo)
    );
    for _ in 0..2 {
        // It stays true until a restart, so it is said again.
        let before = gate.log_text().matches("needs a restart").count();
        assert_eq!(replaced(&sandbox, &gate, &settings).await, "reloaded");
        let log = gate.log_text();
        assert_eq!(log.matches("needs a restart").count() - before, 4, "{log}");
        for key in ["proxy.threads", "proxy.unix_mode", "store.prefix", "process.core_dumps"] {
            assert!(log.contains(&format!("needs a restart: `{key}`")), "{log}");
        }
        assert_eq!((status(&gate, "/", ALICE).await, status(&gate, "/", BOB).await), (403, 200));
        assert_eq!(
            replaced(&sandbox, &gate, &format!("{QUICK}{}", proxy_to(&echo))).await,
            "reloaded"
        );
        assert_eq!(status(&gate, "/", ALICE).await, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_gate_takes_settings_over_and_still_stops() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sandbox = Sandbox::with_entries();
    let settings = |more: &str| {
        let upstream = listener.local_addr().unwrap();
        format!("{QUICK}[proxy]\nupstream = '{upstream}'\n[proxy.health]\ninterval = 'off'\n{more}")
    };
    let gate = sandbox.serve(&settings("")).ready().await;
    let call = tokio::spawn(gate.call("/", "alice", "shop", &token(ALICE)).send());
    let (stream, _) = bounded("the upstream is asked", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    upstream.request_head().await.unwrap();
    gate.signal(libc::SIGTERM);
    gate.wait_for_log(|line| line["message"] == "SIGTERM: draining").unwrap();
    assert_eq!(hung_up(&gate).await, "reloaded");
    assert_eq!(
        replaced(&sandbox, &gate, &settings("[shutdown]\ngrace = '1m'\n")).await,
        "reloaded"
    );
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    assert_eq!(call.await.unwrap().unwrap().status(), 200);
    assert!(gate.wait().success());
}

/// A port that answers to nobody, as a machine that is off, as long as the rest lives.
fn silent() -> (std::net::SocketAddr, impl Sized) {
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let connect = || {
        std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_millis(100)).ok()
    };
    let queue: Vec<_> = std::iter::from_fn(connect).collect();
    (address, (listener, queue))
}

/// Servers of a new group that are down are known before the first request meets them.
/// A server that counts who connects.
async fn counting() -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::<AtomicUsize>::default();
    let counted = count.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    (address, count)
}

/// Nobody looks after servers that are not used any more, however many reloads there are.
#[tokio::test(flavor = "multi_thread")]
async fn servers_of_old_settings_are_left_alone() {
    let sandbox = Sandbox::with_entries();
    let [(one, old), (two, new)] = [counting().await, counting().await];
    let settings = |upstream: std::net::SocketAddr| {
        format!("{QUICK}[proxy]\nupstream = '{upstream}'\n[proxy.health]\ninterval = '20ms'\n")
    };
    let gate = sandbox.serve(&settings(one)).ready().await;
    let checks = async |count: &AtomicUsize, more: usize| {
        let before = count.load(Ordering::Relaxed);
        eventually("it is checked", || async {
            (count.load(Ordering::Relaxed) >= before + more).then_some(())
        })
        .await;
    };
    checks(&old, 2).await;
    assert_eq!(replaced(&sandbox, &gate, &settings(two)).await, "reloaded");
    // One that had begun may end meanwhile.
    checks(&new, 3).await;
    let left = old.load(Ordering::Relaxed);
    checks(&new, 20).await;
    assert_eq!(old.load(Ordering::Relaxed), left);
    let healthy = "otpgate_upstream_backends{state=\"healthy\"}";
    assert_eq!(metric(&gate, healthy).await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_down_are_known_at_once() {
    let (one, two, sandbox) =
        (Echo::named("one").await, Echo::named("two").await, Sandbox::with_entries());
    let gate = sandbox.serve(&format!("{QUICK}{}", proxy_to(&one))).ready().await;
    let (silent, _rest) = silent();
    let group = format!(
        "{QUICK}[proxy]\nupstream = ['{silent}', '{}']\n[proxy.timeouts]\nconnect = '1s'\n",
        two.address
    );
    assert_eq!(replaced(&sandbox, &gate, &group).await, "reloaded");
    for _ in 0..6 {
        assert_eq!(status(&gate, "/", ALICE).await, 200);
    }
    let late = "otpgate_upstream_failures_total{cause=\"connect_timeout\"}";
    assert_eq!(metric(&gate, late).await, None);
    assert_eq!((one.seen(), two.seen()), (0, 6));
}

/// A connection that was made under one CA does not serve those who trust another.
#[tokio::test(flavor = "multi_thread")]
async fn pooled_connections_are_not_shared_across_settings() {
    let (pki, other, sandbox) = (Pki::new(), Pki::new(), Sandbox::with_entries());
    let echo = Echo::over_tls(pki.server(&[])).await;
    let ca_file = sandbox.write("ca.pem", &std::fs::read_to_string(&pki.ca_file).unwrap());
    let settings = format!(
        "{QUICK}[proxy]\nupstream = {{ url = 'https://127.0.0.1:{}', server_name = 'localhost', \
         ca_file = '{}' }}\n[proxy.health]\ninterval = 'off'\n",
        echo.address.port(),
        ca_file.display()
    );
    let gate = sandbox.serve(&settings).ready().await;
    assert_eq!(status(&gate, "/", ALICE).await, 200);
    let wrong = std::fs::read_to_string(&other.ca_file).unwrap();
    assert_eq!(reloaded(&gate, || replace(&ca_file, &wrong)).await, "reloaded");
    assert_eq!(status(&gate, "/", ALICE).await, 502);
    let right = std::fs::read_to_string(&pki.ca_file).unwrap();
    assert_eq!(reloaded(&gate, || replace(&ca_file, &right)).await, "reloaded");
    assert_eq!(status(&gate, "/", ALICE).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_and_the_time_to_stop_change() {
    let (echo, sandbox) = (Echo::start().await, Sandbox::with_entries());
    let settings = |more: &str| format!("[reload]\nwatch = '100ms'\n{}{more}", proxy_to(&echo));
    let strict = settings(
        "[throttle]\nper_source = { failures = 1, per = '1h' }\n[shutdown]\ndelay = '1h'\n",
    );
    let gate = sandbox.serve(&strict).ready().await;
    let wrong = wrong_token(ALICE);
    let guess =
        async || gate.call("/", "alice", "shop", &wrong).send().await.unwrap().status().as_u16();
    assert_eq!((guess().await, guess().await), (401, 429));
    assert_eq!(
        replaced(&sandbox, &gate, &settings("[throttle]\nenabled = false\n")).await,
        "reloaded"
    );
    assert_eq!((guess().await, guess().await), (401, 401));
    // What has become unsafe is said once.
    assert_eq!(hung_up(&gate).await, "reloaded");
    assert_eq!(gate.log_text().matches("wrong tokens cost nothing").count(), 1);
    assert_eq!(replaced(&sandbox, &gate, &settings("")).await, "reloaded");
    gate.signal(libc::SIGTERM);
    // Not after an hour.
    gate.wait_for_log(|line| line["message"] == "stopped").unwrap();
    assert!(gate.wait().success());
}
