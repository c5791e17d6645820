//! Whole requests, over loopback sockets, with client, proxy and upstream in one thread: what two proxies
//! differ in is theirs, since client and upstream do the same for both and allocate nothing.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use otpgate::clock::ManualClock;
use otpgate::commands::serve::Server;
use otpgate::config::{Address, Config, Limits, Listen};
use otpgate::metrics::Metrics;
use otpgate::net::Listener;
use otpgate::seal::Sealer;
use otpgate::store::Store;
use otpgate::store::sqlite::Sqlite;
use pingora::apps::ServerApp as _;
use pingora::protocols::l4::stream::Stream;
use pingora::proxy::http_proxy;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::bare::{Bare, conf};
use crate::filled::{entry, fill};
use crate::hot::{NOW, headers, token_of};

const CALLERS: u64 = 500;
const PATIENCE: Duration = Duration::from_secs(600);
const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n{}\n";

/// What forwards.
#[derive(Clone, Copy)]
pub(crate) enum Front {
    Bare,
    BareOnOurListener,
    Gate,
}

/// A client on a connection that is kept alive, and all that answers it.
pub(crate) struct Whole {
    runtime: Runtime,
    client: TcpStream,
    requests: Vec<Vec<u8>>,
    _gate: Option<Server>,
    _stop: watch::Sender<bool>,
    _folder: tempfile::TempDir,
}

impl Whole {
    /// Starts it.
    pub(crate) fn new(front: Front) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let database = folder.path().join("otpgate.db");
        let (stop, stopped) = watch::channel(false);
        let entries: Vec<_> = (1..=CALLERS).map(entry).collect();
        let requests = entries.iter().map(|entry| {
            let who = &entry.principal;
            request(who.name.as_str(), who.realm.as_str(), &token_of(&entry.seed))
        });
        let requests = requests.collect();
        let (client, gate) = runtime.block_on(async {
            let upstream = upstream().await;
            let (address, gate) = match front {
                Front::Bare => (bare(upstream, stopped).await, None),
                Front::BareOnOurListener => (bare_on_our_listener(upstream, stopped), None),
                Front::Gate => {
                    let store = Store::new(Arc::new(Sqlite::new(&database)), Sealer::off());
                    store.init().await.expect("a new store");
                    let version = fill(&store, entries.iter().cloned()).await;
                    let clock = Arc::new(ManualClock::at(NOW));
                    let config = settings(&database, upstream);
                    let gate = Server::start(config, clock).await.expect("it starts");
                    assert!(gate.directory.wait_for(version, PATIENCE).await);
                    (tcp(&gate.proxy), Some(gate))
                }
            };
            let client = TcpStream::connect(address).await.expect("it listens");
            client.set_nodelay(true).expect("a socket");
            (client, gate)
        });
        Self { runtime, client, requests, _gate: gate, _stop: stop, _folder: folder }
    }

    /// Sends a request and takes its answer.
    pub(crate) fn ask(&mut self, number: usize) {
        let (request, client) = (&self.requests[number % self.requests.len()], &mut self.client);
        self.runtime.block_on(async {
            client.write_all(request).await.expect("it reads");
            let mut answer = [0; 2048];
            let mut filled = 0;
            while !answer[..filled].ends_with(b"\r\n\r\n{}\n") {
                let read = client.read(&mut answer[filled..]).await.expect("it answers");
                assert!(read > 0, "{}", String::from_utf8_lossy(&answer[..filled]));
                filled += read;
            }
            assert!(answer.starts_with(b"HTTP/1.1 200 "));
        });
    }
}

fn request(name: &str, realm: &str, token: &str) -> Vec<u8> {
    let headers = headers(name, realm, token).map(|(name, value)| format!("{name}: {value}\r\n"));
    format!("GET /items/{name} HTTP/1.1\r\n{}\r\n", headers.concat()).into_bytes()
}

/// Answers every request, none of which has a body, with the same.
async fn upstream() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.set_nodelay(true).expect("a socket");
            tokio::spawn(async move {
                let mut head = [0; 2048];
                let mut filled = 0;
                while let Ok(1..) = stream.read(&mut head[filled..]).await.inspect(|n| filled += n)
                {
                    if head[..filled].ends_with(b"\r\n\r\n") {
                        filled = 0;
                        stream.write_all(ANSWER).await.expect("the proxy reads");
                    }
                }
            });
        }
    });
    address
}

async fn bare(upstream: SocketAddr, stop: watch::Receiver<bool>) -> SocketAddr {
    let app = Arc::new(http_proxy(&Arc::new(conf()), Bare::<false> { upstream }));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tcp.set_nodelay(true).expect("a socket");
            let (app, stop) = (app.clone(), stop.clone());
            tokio::spawn(async move {
                let mut stream = Some(Box::new(Stream::from(tcp)) as pingora::protocols::Stream);
                while let Some(next) = stream {
                    stream = app.process_new(next, &stop).await;
                }
            });
        }
    });
    address
}

fn bare_on_our_listener(upstream: SocketAddr, stop: watch::Receiver<bool>) -> SocketAddr {
    let app = Arc::new(http_proxy(&Arc::new(conf()), Bare::<true> { upstream }));
    let place = Listen::at(Address::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    let metrics = Arc::new(Metrics::new([]));
    let listener = Listener::bind("proxy", &[place], Limits::default(), metrics);
    let listener = listener.expect("a port");
    let address = tcp(&listener.addresses());
    tokio::spawn(listener.run(app, stop));
    address
}

fn settings(database: &std::path::Path, upstream: SocketAddr) -> Config {
    let settings = [
        ("STORE__URL", format!("sqlite:{}", database.display())),
        ("STORE__SEALING", "off".to_owned()),
        ("PROXY__LISTEN", "127.0.0.1:0".to_owned()),
        ("PROXY__UPSTREAM", upstream.to_string()),
        ("API__LISTEN", "off".to_owned()),
        ("OPS__LISTEN", "off".to_owned()),
        ("LOG__ACCESS", "false".to_owned()),
    ];
    let variables = settings.map(|(key, value)| (format!("OTPGATE_{key}").into(), value.into()));
    otpgate::config::load::load(None, variables, &[]).expect("good settings")
}

fn tcp(addresses: &[Address]) -> SocketAddr {
    match addresses {
        [Address::Tcp(address)] => *address,
        other => panic!("one TCP address, not {other:?}"),
    }
}
