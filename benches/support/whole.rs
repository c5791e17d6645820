//! Whole requests, over loopback sockets, with client, proxy and upstream in one thread: what two proxies
//! differ in is theirs, since client and upstream do the same for both and allocate nothing.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use otpgate::config::{Address, Limits, Listen};
use otpgate::metrics::Metrics;
use otpgate::net::Listener;
use pingora::apps::{HttpServerApp, ServerApp as _};
use pingora::protocols::l4::stream::Stream;
use pingora::proxy::http_proxy;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::bare::{Bare, Does, conf};
use crate::hot::Rig;

const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n{}\n";

/// What forwards.
#[derive(Clone, Copy)]
pub(crate) enum Front {
    Bare(Does),
    Gate,
}

/// Whole requests; what the gate has beyond the first is its own.
pub(crate) const WHOLE: [(&str, Front); 4] = [
    ("a request through bare pingora", Front::Bare(Does::Nothing)),
    ("a request through bare pingora on the gate's listener", Front::Bare(Does::OurListener)),
    ("a request through bare pingora with the gate's duties", Front::Bare(Does::OurDuties)),
    ("a request through the gate", Front::Gate),
];

/// A client on a connection that is kept alive, and all that answers it. Nothing happens beside its requests,
/// so that it does not matter how long they take.
pub(crate) struct Whole {
    runtime: Runtime,
    client: TcpStream,
    requests: Vec<Vec<u8>>,
    _rig: Rig,
    _stop: watch::Sender<bool>,
}

impl Whole {
    /// Starts it.
    pub(crate) fn new(front: Front) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let rig = Rig::new();
        let (stop, stopped) = watch::channel(false);
        let client = runtime.block_on(async {
            let upstream = upstream().await;
            let address = match front {
                Front::Bare(Does::Nothing) => bare(upstream, stopped).await,
                Front::Bare(does) => listen(
                    Arc::new(http_proxy(&Arc::new(conf(1)), Bare { upstream, does })),
                    stopped,
                ),
                Front::Gate => listen(rig.proxy(upstream).await, stopped),
            };
            let client = TcpStream::connect(address).await.expect("it listens");
            client.set_nodelay(true).expect("a socket");
            client
        });
        Self { runtime, client, requests: rig.requests(), _rig: rig, _stop: stop }
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
    let app = Arc::new(http_proxy(&Arc::new(conf(1)), Bare { upstream, does: Does::Nothing }));
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

/// Serves `app` on the gate's listener.
fn listen<A>(app: Arc<A>, stop: watch::Receiver<bool>) -> SocketAddr
where
    A: HttpServerApp + Send + Sync + 'static,
{
    let place = Listen::at(Address::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    let metrics = Arc::new(Metrics::new([]));
    let listener = Listener::bind("proxy", &[place], Limits::default(), metrics);
    let listener = listener.expect("a port");
    let Address::Tcp(address) = listener.addresses().remove(0) else { panic!("TCP") };
    tokio::spawn(listener.run(app, stop));
    address
}
