//! An HTTP/1.1 client that sends exactly the bytes it is told to.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bounded;

/// An answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Status line and header lines.
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// The first header of that name in a head.
pub(crate) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A connection with what was read ahead.
pub(crate) struct Connection<S> {
    pub(crate) stream: S,
    ahead: Vec<u8>,
}

impl Connection<TcpStream> {
    pub(crate) async fn to(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).await.unwrap())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(crate) fn over(stream: S) -> Self {
        Self { stream, ahead: Vec::new() }
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // The other side may close early; the answer tells.
        let _ = self.stream.write_all(bytes.as_ref()).await;
        let _ = self.stream.flush().await;
    }

    /// Reads one answer; `None` if the connection ends before its head does.
    pub(crate) async fn answer(&mut self) -> Option<Answer> {
        bounded("an answer", self.read_answer(false)).await
    }

    /// Sends and reads one answer.
    pub(crate) async fn ask(&mut self, request: impl AsRef<[u8]>) -> Option<Answer> {
        self.send(request).await;
        self.answer().await
    }

    /// The answer to HEAD, which has no body.
    pub(crate) async fn answer_to_head(&mut self) -> Option<Answer> {
        bounded("an answer", self.read_answer(true)).await
    }

    /// Whether the other side ends the connection without another byte.
    pub(crate) async fn ends(&mut self) -> bool {
        self.ahead.is_empty() && !bounded("the end", self.more()).await
    }

    async fn more(&mut self) -> bool {
        matches!(self.stream.read_buf(&mut self.ahead).await, Ok(n) if n > 0)
    }

    async fn head(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.ahead.windows(4).position(|four| four == b"\r\n\r\n") {
                let rest = self.ahead.split_off(at + 4);
                let head = std::mem::replace(&mut self.ahead, rest);
                return Some(String::from_utf8_lossy(&head[..at]).into_owned());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    async fn read_answer(&mut self, no_body: bool) -> Option<Answer> {
        let head = self.head().await?;
        let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = if no_body || status / 100 == 1 || status == 204 || status == 304 {
            Vec::new()
        } else {
            read_body(self, &head).await?
        };
        Some(Answer { status, head, body })
    }

    async fn take(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.ahead.len() < count {
            if !self.more().await {
                return None;
            }
        }
        let rest = self.ahead.split_off(count);
        Some(std::mem::replace(&mut self.ahead, rest))
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.ahead.windows(2).position(|two| two == b"\r\n") {
                let line = self.take(at + 2).await?;
                return Some(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    /// The next request's head and body, for servers.
    pub(crate) async fn request(&mut self) -> Option<(String, Vec<u8>)> {
        let head = self.head().await?;
        let body = self.body_of(&head).await?;
        Some((head, body))
    }

    /// The next request's head alone, for servers that read the body themselves.
    pub(crate) async fn request_head(&mut self) -> Option<String> {
        self.head().await
    }

    /// The body behind a head that was read; nothing if the head announces none.
    pub(crate) async fn body_of(&mut self, head: &str) -> Option<Vec<u8>> {
        let framed =
            header(head, "content-length").is_some() || header(head, "transfer-encoding").is_some();
        if framed { read_body(self, head).await } else { Some(Vec::new()) }
    }

    /// What was read beyond the last head, and the stream.
    pub(crate) fn into_parts(self) -> (Vec<u8>, S) {
        (self.ahead, self.stream)
    }
}

async fn read_body<S: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Connection<S>,
    head: &str,
) -> Option<Vec<u8>> {
    if let Some(length) = header(head, "content-length") {
        return connection.take(length.parse().unwrap()).await;
    }
    let mut body = Vec::new();
    if header(head, "transfer-encoding").is_none() {
        while connection.more().await {}
        body.append(&mut connection.ahead);
        return Some(body);
    }
    loop {
        let size = connection.line().await?;
        let size = usize::from_str_radix(size.split(';').next().unwrap().trim(), 16).unwrap();
        if size == 0 {
            while !connection.line().await?.is_empty() {}
            return Some(body);
        }
        body.extend(connection.take(size).await?);
        connection.line().await?;
    }
}

/// One request on a connection of its own.
pub(crate) async fn ask(address: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
    Connection::to(address).await.ask(request).await.expect("an answer")
}
