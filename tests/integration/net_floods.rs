//! Floods against the real program: memory stays within a stated bound and comes back, and a caller who
//! behaves is answered all the while.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use h2::Reason;
use http::Request;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::harness::{ALICE, Gate, Sandbox, token};
use crate::peers::wire::{Connection, ask};
use crate::peers::{bounded, until};

/// How far memory may rise above what the gate takes when it has served everything once.
const RISE_MIB: u64 = 64;
/// How much of that may stay, all floods together: allocators keep some for later.
const REST_MIB: u64 = 48;
/// How much more after a flood that comes again than after its first time.
const AGAIN_MIB: u64 = 16;
/// Connections of the floods that cost a client nothing.
const MANY: u32 = 400;

const SETTINGS: &str = "h2c = true
limits = { max_connections = 1000, head_timeout = '500ms', keepalive_timeout = '500ms', \
body_timeout = '500ms', write_timeout = '500ms', max_connections_per_source = 100 }
[proxy.timeouts]
stream_idle = '5s'
[log]
access = false
";

/// The gate under attack, and a caller who behaves.
struct Target {
    gate: Gate,
    address: SocketAddr,
}

impl Target {
    /// Before an upstream that answers `/endless` with as much as anybody takes, all else with nothing.
    async fn start(sandbox: &Sandbox) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream));
            }
        });
        let settings = format!("[proxy]\nupstream = '{upstream}'\n{SETTINGS}");
        let gate = sandbox.serve(&settings).ready().await;
        let address = gate.proxy.strip_prefix("http://").unwrap().parse().unwrap();
        Self { gate, address }
    }

    fn rss_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.gate.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }

    async fn metric(&self, line: &str) -> f64 {
        let ops = self.gate.ops.strip_prefix("http://").unwrap().parse().unwrap();
        let text = ask(ops, "GET /metrics HTTP/1.0\r\n\r\n").await.text();
        let found = text.lines().find_map(|l| l.strip_prefix(line));
        found.map_or(0.0, |rest| rest.trim().parse().unwrap())
    }

    async fn open_connections(&self) -> f64 {
        self.metric(r#"otpgate_connections{listener="proxy"}"#).await
    }

    /// A caller who behaves gets an answer; after how long.
    async fn behave(&self) -> Duration {
        let started = Instant::now();
        let request = self.head("GET / HTTP/1.1", "");
        assert_eq!(ask(self.address, request).await.status, 200);
        started.elapsed()
    }

    /// A connection from the `n`th of many addresses.
    async fn connect(&self, n: u32) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        let source = Ipv4Addr::from_bits(0x7f01_0001 + n / 50);
        socket.bind((source, 0).into()).unwrap();
        bounded("a connection", socket.connect(self.address)).await.unwrap()
    }

    /// Connections from many addresses that have sent these bytes, as far as they were taken.
    async fn connections(&self, count: u32, bytes: &[u8]) -> Vec<TcpStream> {
        join_all((0..count).map(|n| async move {
            let mut stream = self.connect(n).await;
            let _ = tokio::time::timeout(Duration::from_millis(500), stream.write_all(bytes)).await;
            stream
        }))
        .await
    }

    fn head(&self, line: &str, more: &str) -> String {
        format!(
            "{line}\r\nHost: gate\r\nX-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {}\r\n{more}\r\n",
            token(ALICE)
        )
    }

    fn request(&self, path: &str) -> Request<()> {
        Request::get(format!("http://gate{path}"))
            .header("x-auth-name", "alice")
            .header("x-auth-realm", "shop")
            .header("x-auth-token", token(ALICE))
            .body(())
            .unwrap()
    }

    /// While `flood` lasts, and whatever it holds is held: memory is bounded, callers are answered.
    /// Afterwards every connection ends. Memory then.
    async fn withstand<T>(&self, what: &str, base: u64, flood: impl Future<Output = T>) -> u64 {
        let started = Instant::now();
        let mut most = (0, Duration::ZERO);
        let watched = async {
            loop {
                let took = self.behave().await;
                most = (most.0.max(self.rss_mib()), most.1.max(took));
                sleep(Duration::from_millis(50)).await;
            }
        };
        let held = tokio::select! {
            held = bounded(what, flood) => held,
            () = watched => unreachable!(),
        };
        for _ in 0..5 {
            let took = self.behave().await;
            most = (most.0.max(self.rss_mib()), most.1.max(took));
            sleep(Duration::from_millis(50)).await;
        }
        // Time-outs alone end it: nothing is dropped yet.
        until(what, || async { self.open_connections().await <= 20.0 }).await;
        drop(held);
        let (peak, slowest) = most;
        let (rest, took) = (self.rss_mib(), started.elapsed());
        eprintln!("{what}: {peak} MiB, slowest answer {slowest:?}, {rest} MiB after {took:?}");
        assert!(peak <= base + RISE_MIB, "{what}: {peak} MiB, {base} before");
        rest
    }
}

async fn answer(stream: TcpStream) {
    let mut upstream = Connection::over(stream);
    while let Some(head) = upstream.request_head().await {
        if head.contains(" /endless ") {
            let (_, mut stream) = upstream.into_parts();
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            while stream.write_all(&[0; 64 << 10]).await.is_ok() {}
            return;
        }
        upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    }
}

/// A frame of HTTP/2 (RFC 9113 section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// What an HTTP/2 client begins with, and then the same bytes again and again.
fn http2(count: usize, repeated: &[u8]) -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(repeated.repeat(count));
    bytes
}

/// Opens and resets until the gate has had enough.
async fn rapid_reset(target: &Target, n: u32) -> u32 {
    let (mut send, connection) = h2::client::handshake(target.connect(n).await).await.unwrap();
    tokio::spawn(connection);
    for sent in 0..20_000 {
        let Ok(ready) = send.ready().await else { return sent };
        send = ready;
        let Ok((_, mut body)) = send.send_request(target.request("/"), false) else { return sent };
        body.send_reset(Reason::CANCEL);
    }
    panic!("no end");
}

/// Streams whose window stays shut.
async fn stalled_windows(target: &Target, n: u32, streams: u32) -> JoinSet<()> {
    let mut builder = h2::client::Builder::new();
    let handshake = builder.initial_window_size(0).handshake::<_, Bytes>(target.connect(n).await);
    let (send, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let mut held = JoinSet::new();
    for _ in 0..streams {
        // The gate may have had enough already.
        let Ok(mut ready) = send.clone().ready().await else { break };
        let Ok((answer, _)) = ready.send_request(target.request("/endless"), true) else { break };
        held.spawn(async move {
            if let Ok(answer) = answer.await {
                let _ = answer.into_body().data().await;
            }
        });
    }
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_bounded_under_floods_and_callers_are_answered() {
    let sandbox = Sandbox::with_entries();
    let target = Target::start(&sandbox).await;
    // What every thread needs once.
    for _ in 0..100 {
        target.behave().await;
    }
    let base = target.rss_mib();
    eprintln!("before: {base} MiB");
    let t = &target;

    t.withstand("idle connections", base, t.connections(MANY, b"")).await;
    t.withstand("slow heads", base, t.connections(MANY, b"GET / HTTP/1.1\r\nHo")).await;
    let huge = ["GET / HTTP/1.1\r\nA: ", &"a".repeat(1 << 20)].concat();
    t.withstand("huge heads", base, t.connections(150, huge.as_bytes())).await;
    let half = t.head("POST / HTTP/1.1", "Content-Length: 1000000\r\n") + "half";
    t.withstand("slow bodies", base, t.connections(300, half.as_bytes())).await;
    let reading = t.head("GET /endless HTTP/1.1", "");
    let once = t.withstand("answers not taken", base, t.connections(50, reading.as_bytes())).await;
    let stalled = join_all((0..10).map(|n| stalled_windows(t, n, 5)));
    t.withstand("shut windows", base, stalled).await;
    let resets = join_all((0..20).map(|n| rapid_reset(t, n)));
    t.withstand("rapid resets", base, resets).await;
    // HEADERS, then CONTINUATION without end.
    let endless = [frame(1, 0, 1, &[0x82]), frame(9, 0, 1, &[0; 8192]).repeat(200)].concat();
    t.withstand("continuations", base, t.connections(20, &http2(1, &endless))).await;
    let pings = http2(2_000, &frame(6, 0, 0, &[7; 8]));
    t.withstand("pings", base, t.connections(10, &pings)).await;
    let settings = http2(2_000, &frame(4, 0, 0, &[]));
    t.withstand("settings", base, t.connections(10, &settings)).await;
    let answers = http2(2_000, &frame(6, 1, 0, &[7; 8]));
    t.withstand("answers to pings that nobody sent", base, t.connections(10, &answers)).await;

    // Once more: what stays does not add up. (The allocator has given some of it back meanwhile.)
    t.withstand("slow heads again", base, t.connections(MANY, b"GET / HTTP/1.1\r\nHo")).await;
    let again =
        t.withstand("answers not taken again", base, t.connections(50, reading.as_bytes())).await;
    assert!(again <= once + AGAIN_MIB, "{again} MiB, {once} the first time");
    until("memory comes back", || async { t.rss_mib() <= base + REST_MIB }).await;
    // A flood does not fill the log either.
    assert!(t.gate.log_text().lines().count() < 200, "{}", t.gate.log_text());
    let mut quiet = t.connect(0).await;
    quiet.write_all(t.head("GET / HTTP/1.1", "").as_bytes()).await.unwrap();
    let mut status = [0; 12];
    bounded("an answer", quiet.read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
}
