//! An upstream that writes down every byte that it gets, and answers each request.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::peers::until;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Request line and header lines.
    pub(crate) head: String,
    /// Whether its end came.
    pub(crate) whole: bool,
}

impl Seen {
    /// All values of a header, however its name's separators are spelled.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        let fold = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines
            .filter(|(key, _)| key.chars().map(fold).eq(name.chars()))
            .map(|(_, value)| value.trim())
            .collect()
    }

    /// The request line without its version.
    pub(crate) fn line(&self) -> &str {
        let line = self.head.lines().next().unwrap_or_default();
        line.strip_suffix(" HTTP/1.1").unwrap_or(line)
    }

    /// Who it says the caller is.
    ///
    /// Panics if it says so in more than one way, or has anything of a claim that is none of the gate's.
    pub(crate) fn who(&self) -> String {
        assert!(self.values("x-auth-token").is_empty(), "a token: {}", self.head);
        match (self.values("x-auth-name").as_slice(), self.values("x-auth-realm").as_slice()) {
            ([], []) => "nobody".to_owned(),
            (["alice"], ["shop"]) => "alice".to_owned(),
            (["bob"], ["lab"]) => "bob".to_owned(),
            _ => panic!("an unclear identity: {}", self.head),
        }
    }
}

#[derive(Default)]
struct Record {
    bytes: Vec<u8>,
    seen: Vec<Seen>,
    /// Connections in the middle of a request, or with bytes that belong to none.
    busy: usize,
}

/// The upstream; it ends when dropped.
pub(crate) struct Recorder {
    pub(crate) address: SocketAddr,
    record: Arc<Mutex<Record>>,
    task: JoinHandle<()>,
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Recorder {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let record = Arc::new(Mutex::new(Record::default()));
        let shared = record.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Self { address, record, task }
    }

    /// What came since it was last asked: requests, and all bytes.
    pub(crate) async fn take(&self) -> (Vec<Seen>, Vec<u8>) {
        until("the upstream is idle", || async { self.record.lock().unwrap().busy == 0 }).await;
        let mut record = self.record.lock().unwrap();
        (std::mem::take(&mut record.seen), std::mem::take(&mut record.bytes))
    }
}

async fn serve(mut stream: TcpStream, record: Arc<Mutex<Record>>) {
    let mut buffer = Vec::new();
    let mut current: Option<usize> = None;
    let mut busy = false;
    let mut part = vec![0; 64 << 10];
    while let Ok(n @ 1..) = stream.read(&mut part).await {
        record.lock().unwrap().bytes.extend_from_slice(&part[..n]);
        buffer.extend_from_slice(&part[..n]);
        let answers = {
            let mut record = record.lock().unwrap();
            let answers = read_requests(&mut buffer, &mut current, &mut record);
            // Bytes that belong to no request keep it busy, and so fail the test.
            let now = current.is_some() || !buffer.is_empty();
            record.busy = record.busy + usize::from(now) - usize::from(busy);
            busy = now;
            answers
        };
        if stream.write_all(answers.as_bytes()).await.is_err() {
            break;
        }
    }
    record.lock().unwrap().busy -= usize::from(busy);
}

/// Takes what is whole out of the buffer; the answers to it.
fn read_requests(buffer: &mut Vec<u8>, current: &mut Option<usize>, record: &mut Record) -> String {
    let mut answers = String::new();
    loop {
        if current.is_none() {
            let Some(end) = find(buffer, b"\r\n\r\n") else { return answers };
            let head: Vec<u8> = buffer.drain(..end + 4).collect();
            let head = String::from_utf8_lossy(&head[..end]).into_owned();
            record.seen.push(Seen { head, whole: false });
            *current = Some(record.seen.len() - 1);
        }
        let Some(seen) = current.and_then(|at| record.seen.get_mut(at)) else { return answers };
        let Some(length) = body_length(seen, buffer) else { return answers };
        buffer.drain(..length);
        seen.whole = true;
        *current = None;
        let body = if seen.head.starts_with("HEAD ") { "" } else { "ok" };
        answers.push_str(&format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}"));
    }
}

/// Where the body ends, if it is all there. Read as strictly as can be.
fn body_length(seen: &Seen, buffer: &[u8]) -> Option<usize> {
    let lengths = seen.values("content-length");
    let codings = seen.values("transfer-encoding");
    match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => Some(0),
        ([length], []) => {
            let length = length.parse().unwrap_or_else(|_| panic!("length: {}", seen.head));
            (buffer.len() >= length).then_some(length)
        }
        ([], ["chunked"]) => chunks_length(buffer),
        _ => panic!("unclear framing: {}", seen.head),
    }
}

fn chunks_length(buffer: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let line = find(&buffer[at..], b"\r\n")?;
        let size = std::str::from_utf8(&buffer[at..at + line]).expect("a chunk's size");
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        at += line + 2 + size;
        if buffer.len() < at + 2 {
            return None;
        }
        // Trailers would stand here after the last chunk: the gate passes none on.
        assert_eq!(&buffer[at..at + 2], b"\r\n", "the end of a chunk");
        at += 2;
        if size == 0 {
            return Some(at);
        }
    }
}

/// Where `what` first stands in `text`.
pub(crate) fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}
