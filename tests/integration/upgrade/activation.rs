//! Sockets that a service manager opens, and what it is told.

use std::os::unix::net::UnixDatagram;
use std::process::Command;

use super::callers::Callers;
use super::{Dynasty, addresses, has_ended};
use crate::harness::{
    ALICE, Gate, PATIENCE, Sandbox, eventually, free_port, python, stderr, token,
};
use crate::peers::echo::Echo;

/// Opens the addresses that stand before `--`, and runs what stands after it, again and again: as systemd does for
/// a service with sockets.
const MANAGER: &str = r#"
import fcntl, os, signal, socket, sys
at = sys.argv.index("--")
places, command = sys.argv[1:at], sys.argv[at + 1:]
opened = []
for place in places:
    name, address = place.split("=", 1)
    if address.startswith("udp:"):
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("127.0.0.1", 0))
    elif address.startswith("/"):
        one = socket.socket(socket.AF_UNIX)
        one.bind(address)
        one.listen(100)
    else:
        host, port = address.rsplit(":", 1)
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, int(port)))
        one.listen(100)
    opened.append((name, fcntl.fcntl(one, fcntl.F_DUPFD, 50)))
    one.detach()
while True:
    child = os.fork()
    if not child:
        for index, (name, one) in enumerate(opened):
            os.dup2(one, 3 + index, inheritable=True)
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.environ["LISTEN_FDS"] = str(len(opened))
        os.environ["LISTEN_FDNAMES"] = ":".join(name for name, _ in opened)
        os.closerange(3 + len(opened), 200)
        os.execv(command[0], command)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL) or os._exit(0))
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit(os.waitstatus_to_exitcode(status))
"#;

async fn managed(sandbox: &Sandbox, places: &[String], settings: &str) -> Command {
    let config = sandbox.write("otpgate.toml", settings);
    let mut command = Command::new(python().await);
    command
        .env_clear()
        .args(["-c", MANAGER])
        .args(places)
        .args(["--", env!("CARGO_BIN_EXE_otpgate"), "serve", "--log-format", "json"])
        .args(["--store", &sandbox.store(), "--config"])
        .arg(config);
    command
}

/// The processes that serve, in order.
fn pids(gate: &Gate) -> Vec<i32> {
    let log = gate.log_text();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let serving = lines.filter(|line| line["message"] == "serving");
    serving.map(|line| i32::try_from(line["pid"].as_i64().unwrap()).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_under_a_service_manager_refuse_nobody() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let (port, ops) = (free_port(), free_port());
    let api = sandbox.path("api.sock");
    let settings = format!(
        "[proxy]\nupstream = '{}'\nlisten = '127.0.0.1:{port}'\n[api]\nlisten = 'unix:{}'\n\
         [ops]\nlisten = '127.0.0.1:{ops}'\n[throttle]\nenabled = false\n",
        echo.address,
        api.display()
    );
    let places = [
        format!("otpgate-proxy.socket=127.0.0.1:{port}"),
        format!("api={}", api.display()),
        format!("ops=127.0.0.1:{ops}"),
    ];
    let gate = Gate::spawn(managed(&sandbox, &places, &settings).await)
        .unwrap_or_else(|output| panic!("{}", stderr(&output)))
        .ready()
        .await;
    let environment = std::fs::read_to_string(format!("/proc/{}/environ", pids(&gate)[0])).unwrap();
    assert!(environment.contains("LISTEN_FDS=3"), "it was given them");
    let callers = Callers::new();
    // Who comes while nobody accepts waits in the queue, for the gate and then for its entries.
    callers.anew("new connections", format!("127.0.0.1:{port}").parse().unwrap());
    for restart in 1..=2 {
        callers.go_on(10).await;
        let old = pids(&gate)[restart - 1];
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(old, libc::SIGTERM) }, 0);
        eventually("another one serves", || async { (pids(&gate).len() > restart).then_some(()) })
            .await;
        assert!(api.exists(), "the socket is the manager's");
    }
    callers.go_on(10).await;
    callers.end().await;
    let now = pids(&gate)[2];
    gate.signal(libc::SIGTERM);
    eventually("all have ended", || async { has_ended(now).then_some(()) }).await;
}

#[tokio::test]
async fn sockets_that_nothing_is_configured_for_are_refused() {
    let sandbox = Sandbox::with_entries();
    let port = free_port();
    let settings = format!(
        "[proxy]\nlisten = '127.0.0.1:{port}'\n[api]\nlisten = 'off'\n[ops]\nlisten = 'off'\n"
    );
    let other = free_port();
    for (place, expected) in [
        (
            format!("x=127.0.0.1:{other}"),
            format!("sockets on `127.0.0.1:{other}`, where nothing is to listen"),
        ),
        (
            "x=udp:".to_owned(),
            "what the service manager handed over: fd 4 is not a valid".to_owned(),
        ),
    ] {
        let places = [format!("proxy=127.0.0.1:{port}"), place];
        let Err(output) = Gate::spawn(managed(&sandbox, &places, &settings).await) else {
            panic!("it serves")
        };
        let said = stderr(&output);
        assert!(said.contains(&expected), "{said}");
    }
}

/// In containers the manager's socket may have a name that is in no file system.
#[test]
fn a_service_manager_without_a_file_is_told() {
    use std::os::linux::net::SocketAddrExt as _;
    let sandbox = Sandbox::with_entries();
    let name = sandbox.path("notify").display().to_string();
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let manager = UnixDatagram::bind_addr(&address).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = crate::harness::otpgate();
    command
        .args(["serve", "--log-format", "json", "--store", &sandbox.store()])
        .args(["--proxy", "127.0.0.1:0", "--api", "off", "--ops", "off"])
        .env("NOTIFY_SOCKET", format!("@{name}"));
    let gate = Gate::spawn(command).unwrap_or_else(|output| panic!("{}", stderr(&output)));
    assert_eq!(next(&manager), "READY=1");
    gate.signal(libc::SIGTERM);
    assert_eq!(next(&manager), "STOPPING=1");
}

/// What systemd would be told.
fn next(manager: &UnixDatagram) -> String {
    let mut text = [0; 256];
    let n = manager.recv(&mut text).expect("it is told in time");
    String::from_utf8_lossy(&text[..n]).trim().to_owned()
}

#[tokio::test]
async fn the_service_manager_is_told_where_the_service_is() {
    let sandbox = Sandbox::with_entries();
    let socket = sandbox.path("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let config = sandbox.write("otpgate.toml", "[proxy]\nupstream = '127.0.0.1:1'\n");
    let mut command = crate::harness::otpgate();
    command
        .args(["serve", "--log-format", "json", "--store", &sandbox.store(), "--config"])
        .arg(config)
        .args(["--proxy", "127.0.0.1:0", "--api", "127.0.0.1:0", "--ops", "127.0.0.1:0"])
        .env("NOTIFY_SOCKET", &socket);
    let gate = Gate::spawn(command).unwrap_or_else(|output| panic!("{}", stderr(&output)));
    assert_eq!(next(&manager), "READY=1");
    let mut gates = Dynasty::new(gate.ready().await);
    assert_eq!(addresses(&gates.gate, "proxy").len(), 1);
    gates.upgrade();
    assert_eq!(next(&manager), format!("MAINPID={}", gates.reigning));
    let call = gates.gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    assert_eq!(call.status(), 502, "let through");
    gates.signal(libc::SIGTERM);
    assert_eq!(next(&manager), "STOPPING=1");
}
