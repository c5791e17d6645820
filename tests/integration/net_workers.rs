//! Which threads serve connections.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use otpgate::config::{Address, Limits, Listen};
use otpgate::metrics::Metrics;
use otpgate::net::service::TowerApp;
use otpgate::net::{Listener, Workers};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::harness::{Gate, Sandbox, http};
use crate::peers::wire::Connection;
use crate::peers::{bounded, until};

const ASK: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
const HANG: &str = "GET /hang HTTP/1.1\r\nHost: h\r\n\r\n";

/// A listener on workers, that says which of them answers.
struct Served {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Served {
    fn start(workers: Arc<Workers>) -> Self {
        let listen = [Listen::at(Address::Tcp(([127, 0, 0, 1], 0).into()))];
        let metrics = Arc::new(Metrics::new([]));
        let listener = Listener::bind("api", &listen, Limits::default(), metrics.clone()).unwrap();
        let Address::Tcp(address) = listener.addresses().remove(0) else { panic!("TCP") };
        let (stop, stopped) = watch::channel(false);
        let name = || async { std::thread::current().name().unwrap_or_default().to_owned() };
        let routes = Router::new().route("/", get(name));
        let routes = routes.route("/hang", get(std::future::pending::<()>));
        let app = Arc::new(TowerApp::new(routes));
        let task = tokio::spawn(listener.run_on(workers, move || app.clone(), stopped));
        Self { address, metrics, stop, task }
    }

    fn open(&self) -> i64 {
        self.metrics.open_connections("api").get()
    }
}

async fn ask(connection: &mut Connection<TcpStream>) -> String {
    let answer = connection.ask(ASK).await.unwrap();
    assert_eq!(answer.status, 200);
    String::from_utf8(answer.body).unwrap()
}

#[tokio::test]
async fn each_connection_stays_with_one_of_the_workers_that_had_the_fewest() {
    let served = Served::start(Workers::start(3).unwrap());
    let mut connections = Vec::new();
    for _ in 0..6 {
        let mut connection = Connection::to(served.address).await;
        let name = ask(&mut connection).await;
        connections.push((name, connection));
    }
    let mut of_each = HashMap::<String, Vec<_>>::new();
    for (name, mut connection) in connections {
        assert_eq!(ask(&mut connection).await, name);
        of_each.entry(name).or_default().push(connection);
    }
    assert!(of_each.keys().all(|name| name.starts_with("worker-")), "{:?}", of_each.keys());
    assert_eq!(of_each.values().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2]);
    // Who has become idle is the next one's.
    let idle = of_each.keys().next().unwrap().clone();
    drop(of_each.remove(&idle));
    until("they are gone", async || served.open() == 4).await;
    for _ in 0..2 {
        let mut connection = Connection::to(served.address).await;
        assert_eq!(ask(&mut connection).await, idle);
        of_each.entry(idle.clone()).or_default().push(connection);
    }
    served.stop.send_replace(true);
    bounded("the end", served.task).await.unwrap();
    for connection in of_each.values_mut().flatten() {
        assert!(connection.ends().await);
    }
}

#[tokio::test]
async fn a_single_worker_is_the_callers_own_thread() {
    let served = Served::start(Workers::start(1).unwrap());
    let mut connection = Connection::to(served.address).await;
    assert_eq!(Some(ask(&mut connection).await.as_str()), std::thread::current().name());
}

/// What is cut at the end of the grace is cut on other threads, too.
#[tokio::test]
async fn what_runs_on_workers_ends_with_the_listener() {
    let served = Served::start(Workers::start(2).unwrap());
    let mut connections = Vec::new();
    for _ in 0..4 {
        let mut connection = Connection::to(served.address).await;
        connection.send(HANG).await;
        connections.push(connection);
    }
    until("all are served", async || served.open() == 4).await;
    served.task.abort();
    for mut connection in connections {
        assert!(connection.ends().await);
    }
    until("nothing is left", async || served.open() == 0).await;
}

/// The names of a gate's threads that serve connections.
fn workers(gate: &Gate) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", gate.pid())).unwrap();
    let names = threads.filter_map(|thread| {
        let name = std::fs::read_to_string(thread.ok()?.path().join("comm")).ok()?;
        name.starts_with("worker-").then(|| name.trim().to_owned())
    });
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_gate_has_as_many_workers_as_it_is_told() {
    let sandbox = Sandbox::with_entries();
    for (threads, expected) in [(1, &[][..]), (3, &["worker-0", "worker-1", "worker-2"])] {
        let gate = sandbox.serve(&format!("[proxy]\nthreads = {threads}"));
        let gate = gate.ready().await;
        assert_eq!(workers(&gate), expected, "{threads}");
        // Both listeners are theirs; nothing waits for another one's turn.
        for base in [&gate.proxy, &gate.api] {
            for _ in 0..5 {
                let answer = http().get(format!("{base}/")).send().await.unwrap();
                assert!(answer.status().is_client_error(), "{}", answer.status());
            }
        }
        gate.signal(libc::SIGTERM);
        assert!(gate.wait().success());
    }
}
