//! An HTTP/1.1 upstream that answers with the head and the length of the body that it got.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::wire::Connection;

/// A running upstream; it ends when dropped.
pub(crate) struct Echo {
    pub(crate) address: SocketAddr,
    /// Requests seen.
    pub(crate) requests: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Echo {
    pub(crate) fn seen(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) async fn start() -> Self {
        Self::named("").await
    }

    /// Says its name in `X-Upstream`.
    pub(crate) async fn named(name: &'static str) -> Self {
        Self::at(name, "127.0.0.1:0").await
    }

    pub(crate) async fn at(name: &'static str, address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = requests.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, name, counted.clone()));
            }
        });
        Self { address, requests, task }
    }

    pub(crate) async fn over_tls(config: Arc<ServerConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = requests.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (config, counted) = (config.clone(), counted.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = TlsAcceptor::from(config).accept(stream).await {
                        serve(stream, "", counted).await;
                    }
                });
            }
        });
        Self { address, requests, task }
    }
}

/// The same on a Unix socket.
pub(crate) fn on_unix(path: &Path) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, "", Arc::default()));
        }
    })
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    name: &'static str,
    requests: Arc<AtomicUsize>,
) {
    let mut connection = Connection::over(stream);
    while let Some((head, body)) = connection.request().await {
        requests.fetch_add(1, Ordering::SeqCst);
        let seen = format!("{head}\n\n{}", body.len());
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-Upstream: {name}\r\nKeep-Alive: timeout=9\r\n\r\n",
            seen.len()
        );
        let body = if head.starts_with("HEAD ") { "" } else { seen.as_str() };
        connection.send(format!("{answer}{body}")).await;
    }
}
