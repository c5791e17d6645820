//! HTTP/2 on both ends, by the h2 crate: a client, and an upstream that behaves like a gRPC service
//! that echoes messages.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::bounded;
use super::tls::Pki;

/// A client on a connection that speaks HTTP/2.
pub(crate) async fn client<S>(stream: S) -> SendRequest<Bytes>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (send, connection) = bounded("the handshake", h2::client::handshake(stream)).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    send
}

/// A client over TLS that negotiates HTTP/2.
pub(crate) async fn tls_client(address: SocketAddr, pki: &Pki) -> SendRequest<Bytes> {
    let stream = tls(address, pki, &["h2", "http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    client(stream).await
}

/// A TLS connection that offers these protocols.
pub(crate) async fn tls(
    address: SocketAddr,
    pki: &Pki,
    alpn: &[&str],
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    bounded("TLS", TlsConnector::from(pki.client(alpn)).connect(name, stream)).await.unwrap()
}

/// An exchange: what is to be sent goes into `body`.
pub(crate) struct Exchange {
    pub(crate) response: Response<RecvStream>,
    pub(crate) body: SendStream<Bytes>,
}

/// Sends a request whose body stays open, and waits for the head of the answer.
pub(crate) async fn open(send: &SendRequest<Bytes>, request: Request<()>) -> Exchange {
    let mut send = bounded("a stream", send.clone().ready()).await.unwrap();
    let (response, body) = send.send_request(request, false).unwrap();
    let response = bounded("the answer's head", response).await.unwrap();
    Exchange { response, body }
}

/// Sends a request without body and reads all of the answer.
pub(crate) async fn ask(
    send: &SendRequest<Bytes>,
    request: Request<()>,
) -> (Response<()>, Vec<u8>) {
    let mut send = bounded("a stream", send.clone().ready()).await.unwrap();
    let (response, _) = send.send_request(request, true).unwrap();
    let response = bounded("the answer's head", response).await.unwrap();
    let (parts, mut stream) = response.into_parts();
    let mut body = Vec::new();
    while let Some(part) = data(&mut stream).await {
        body.extend_from_slice(&part);
    }
    (Response::from_parts(parts, ()), body)
}

/// The next data of a body.
pub(crate) async fn data(stream: &mut RecvStream) -> Option<Bytes> {
    let part = bounded("data", stream.data()).await?.unwrap();
    stream.flow_control().release_capacity(part.len()).unwrap();
    Some(part)
}

/// An upstream that echoes.
pub(crate) struct EchoH2 {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for EchoH2 {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl EchoH2 {
    /// By prior knowledge, or over TLS.
    pub(crate) async fn start(tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream).await,
                        Some(config) => {
                            if let Ok(stream) = TlsAcceptor::from(config).accept(stream).await {
                                serve(stream).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, task }
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S) {
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((request, respond))) = connection.accept().await {
        tokio::spawn(echo(request, respond));
    }
}

/// Answers at once with the request's headers as `seen-…`, then each message as it comes, then
/// trailers that tell the request's trailers.
async fn echo(request: Request<RecvStream>, mut respond: h2::server::SendResponse<Bytes>) {
    let (parts, mut body) = request.into_parts();
    let mut head = Response::builder().header("content-type", "application/grpc");
    for (name, value) in &parts.headers {
        head = head.header(format!("seen-{name}"), value);
    }
    head = head.header("seen-path", parts.uri.path_and_query().unwrap().as_str());
    head = head.header("seen-authority", parts.uri.authority().unwrap().as_str());
    let Ok(mut answer) = respond.send_response(head.body(()).unwrap(), false) else { return };
    while let Some(Ok(part)) = body.data().await {
        let _ = body.flow_control().release_capacity(part.len());
        if answer.send_data(part, false).is_err() {
            return;
        }
    }
    let got = body.trailers().await.ok().flatten().unwrap_or_default();
    let names: Vec<_> = got.keys().map(http::HeaderName::as_str).collect();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    trailers.insert("seen-trailers", names.join(",").parse().unwrap());
    let _ = answer.send_trailers(trailers);
}
