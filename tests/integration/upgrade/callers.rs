//! Callers of many kinds who never stop calling, and count every call that gets no answer: a connection that is
//! closed before its last answer said so, a reset, a refusal to connect.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::client::SendRequest;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

use crate::harness::{ALICE, VERIFIER, eventually, token};
use crate::peers::h2peer;
use crate::peers::tls::Pki;
use crate::peers::wire::Connection;

/// Who calls, how often that went well, and what went wrong.
type Tally = Arc<Mutex<BTreeMap<&'static str, (usize, Vec<String>)>>>;

pub(super) struct Callers {
    tally: Tally,
    over: Arc<AtomicBool>,
    tasks: Mutex<JoinSet<()>>,
}

impl Callers {
    pub(super) fn new() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        Self { tally: Tally::default(), over, tasks: Mutex::default() }
    }

    /// Waits until each has made so many further calls.
    pub(super) async fn go_on(&self, calls: usize) {
        let count =
            || -> Vec<usize> { self.tally.lock().unwrap().values().map(|(n, _)| *n).collect() };
        let before = count();
        eventually("everybody calls", || async {
            let enough = count().iter().zip(&before).all(|(now, before)| *now >= before + calls);
            let failed = self.tally.lock().unwrap().values().any(|(_, failed)| !failed.is_empty());
            (enough || failed).then_some(())
        })
        .await;
    }

    /// Lets them finish; fails the test if a call went wrong. What they did.
    pub(super) async fn end(self) -> String {
        self.over.store(true, Ordering::Relaxed);
        let tasks = self.tasks.into_inner().unwrap();
        tasks.join_all().await;
        let tally = self.tally.lock().unwrap();
        let failed: Vec<_> = tally.iter().filter(|(_, (_, failed))| !failed.is_empty()).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        tally
            .iter()
            .map(|(who, (calls, _))| format!("{who}: {calls} calls, none failed\n"))
            .collect()
    }

    /// Calls again and again, until all is over.
    fn start<C, F>(&self, who: &'static str, call: C)
    where
        C: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Vec<Result<(), String>>> + Send,
    {
        let (tally, over) = (self.tally.clone(), self.over.clone());
        tally.lock().unwrap().insert(who, (0, Vec::new()));
        self.tasks.lock().unwrap().spawn(async move {
            while !over.load(Ordering::Relaxed) {
                for outcome in call().await {
                    let mut tally = tally.lock().unwrap();
                    let (calls, failed) = tally.get_mut(who).unwrap();
                    match outcome {
                        Ok(()) => *calls += 1,
                        Err(error) => failed.push(error),
                    }
                }
            }
        });
    }

    pub(super) fn keep_alive(&self, who: &'static str, address: SocketAddr) {
        self.start(who, move || async move {
            match TcpStream::connect(address).await {
                Ok(stream) => use_up(stream, usize::MAX, get).await,
                Err(error) => vec![Err(format!("connecting: {error}"))],
            }
        });
    }

    pub(super) fn anew(&self, who: &'static str, address: SocketAddr) {
        self.start(who, move || async move {
            match TcpStream::connect(address).await {
                Ok(stream) => use_up(stream, 1, get).await,
                Err(error) => vec![Err(format!("connecting: {error}"))],
            }
        });
    }

    pub(super) fn unix(&self, who: &'static str, path: &Path) {
        let path: PathBuf = path.to_owned();
        self.start(who, move || {
            let path = path.clone();
            async move {
                match UnixStream::connect(path).await {
                    Ok(stream) => use_up(stream, usize::MAX, get).await,
                    Err(error) => vec![Err(format!("connecting: {error}"))],
                }
            }
        });
    }

    pub(super) fn over_tls(&self, who: &'static str, address: SocketAddr, pki: &Pki) {
        let connector = tokio_rustls::TlsConnector::from(pki.client(&["http/1.1"]));
        self.start(who, move || {
            let connector = connector.clone();
            async move {
                match tls(address, &connector).await {
                    Ok(stream) => use_up(stream, usize::MAX, get).await,
                    Err(error) => vec![Err(format!("connecting: {error}"))],
                }
            }
        });
    }

    pub(super) fn http2_over_tls(&self, who: &'static str, address: SocketAddr, pki: &Pki) {
        let connector = tokio_rustls::TlsConnector::from(pki.client(&["h2"]));
        self.start(who, move || {
            let connector = connector.clone();
            async move {
                match tls(address, &connector).await {
                    Ok(stream) => use_up_http2(stream).await,
                    Err(error) => vec![Err(format!("connecting: {error}"))],
                }
            }
        });
    }

    pub(super) fn http2(&self, who: &'static str, address: SocketAddr) {
        self.start(who, move || async move {
            match TcpStream::connect(address).await {
                Ok(stream) => use_up_http2(stream).await,
                Err(error) => vec![Err(format!("connecting: {error}"))],
            }
        });
    }

    pub(super) fn ready(&self, who: &'static str, base: String) {
        let address = crate::harness::address(&base);
        self.start(who, move || async move {
            let request = || "GET /readyz HTTP/1.1\r\nHost: g\r\n\r\n".to_owned();
            match TcpStream::connect(address).await {
                Ok(stream) => use_up(stream, 5, request).await,
                Err(error) => vec![Err(format!("connecting: {error}"))],
            }
        });
    }

    pub(super) fn verify(&self, who: &'static str, base: String) {
        let address = crate::harness::address(&base);
        let request = || {
            let body = json!({
                "auth_name": "verifier", "auth_realm": "ungleich-auth", "auth_token": token(VERIFIER),
                "name": "alice", "realm": "shop", "token": token(ALICE),
            })
            .to_string();
            format!(
                "POST /ungleichotp/verify/ HTTP/1.1\r\nHost: g\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
        };
        self.start(who, move || async move {
            match TcpStream::connect(address).await {
                Ok(stream) => use_up(stream, usize::MAX, request).await,
                Err(error) => vec![Err(format!("connecting: {error}"))],
            }
        });
    }
}

/// At most so many calls in a row; then others have their turn.
const IN_A_ROW: usize = 50;

fn get() -> String {
    let token = token(ALICE);
    format!(
        "GET / HTTP/1.1\r\nHost: g\r\nX-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {token}\r\n\r\n"
    )
}

async fn tls(
    address: SocketAddr,
    connector: &tokio_rustls::TlsConnector,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    connector.connect(name, TcpStream::connect(address).await?).await
}

/// Calls over one connection until it is said to end, or has had its number of calls.
async fn use_up<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    most: usize,
    request: impl Fn() -> String,
) -> Vec<Result<(), String>> {
    let mut connection = Connection::over(stream);
    let mut outcomes = Vec::new();
    while outcomes.len() < most.min(IN_A_ROW) {
        let Some(answer) = connection.ask(request()).await else {
            outcomes.push(Err("closed without an answer".to_owned()));
            break;
        };
        let ok = answer.status == 200;
        outcomes.push(if ok {
            Ok(())
        } else {
            Err(format!("{}: {}", answer.status, answer.text()))
        });
        if !ok || answer.header("connection") == Some("close") {
            break;
        }
        // Idle for a moment, as callers are: so the order to stop comes between two calls, too.
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    outcomes
}

/// The same over HTTP/2; the end is said by GOAWAY, after which nothing more can be sent.
async fn use_up_http2<S>(stream: S) -> Vec<Result<(), String>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let send = h2peer::client(stream).await;
    let mut outcomes = Vec::new();
    while outcomes.len() < IN_A_ROW {
        match ask_http2(&send).await {
            Some(outcome) => outcomes.push(outcome),
            None => break,
        }
    }
    outcomes
}

/// `None`: the connection takes no more.
async fn ask_http2(send: &SendRequest<Bytes>) -> Option<Result<(), String>> {
    let mut send = send.clone().ready().await.ok()?;
    let request = http::Request::get("https://localhost/")
        .header("x-auth-name", "alice")
        .header("x-auth-realm", "shop")
        .header("x-auth-token", token(ALICE))
        .body(())
        .unwrap();
    let (answer, _) = send.send_request(request, true).ok()?;
    let answer = async {
        let (head, mut body) = answer.await?.into_parts();
        while let Some(part) = body.data().await {
            let part = part?;
            body.flow_control().release_capacity(part.len())?;
        }
        Ok::<_, h2::Error>(head.status)
    };
    Some(match answer.await {
        Ok(status) if status == 200 => Ok(()),
        Ok(status) => Err(status.to_string()),
        // Its client sent it after GOAWAY had come, which names it as not looked at: all clients send such a request
        // again (RFC 9113 section 6.8).
        Err(error) if is_not_looked_at(&error) => return None,
        Err(error) => Err(error.to_string()),
    })
}

fn is_not_looked_at(error: &h2::Error) -> bool {
    error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR)
}
