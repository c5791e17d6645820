//! Connections to upstreams for WebSockets.
//!
//! pingora ends an upgraded exchange when it is told that the request's empty body is over, if it
//! looks at that after the 101. When an upstream answers at once, both are there, and it looks at them
//! in random order: some of these tunnels would end as they begin. On a [`LateReader`] the answer is
//! there one turn later than the end of the body.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::ext::set_tcp_keepalive;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use pingora::{Error, ErrorType};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// Connects in pingora's place. pingora bounds the time for it.
#[derive(Debug)]
pub(super) struct TunnelConnector;

#[async_trait]
impl Connect for TunnelConnector {
    async fn connect(&self, address: &SocketAddr) -> pingora::Result<Stream> {
        let socket: io::Result<Box<dyn VirtualSocket>> = match address {
            SocketAddr::Inet(address) => {
                TcpStream::connect(address).await.map(|tcp| LateReader::boxed(tcp) as _)
            }
            SocketAddr::Unix(address) => match address.as_pathname() {
                Some(path) => {
                    UnixStream::connect(path).await.map(|unix| LateReader::boxed(unix) as _)
                }
                None => Err(io::ErrorKind::AddrNotAvailable.into()),
            },
        };
        match socket {
            Ok(socket) => Ok(Stream::from(VirtualSocketStream::new(socket))),
            Err(error) => {
                let what = match error.kind() {
                    io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
                    io::ErrorKind::TimedOut => ErrorType::ConnectTimedout,
                    _ => ErrorType::ConnectError,
                };
                Error::e_because(what, "connecting for a WebSocket", error)
            }
        }
    }
}

/// A stream whose first read after a write waits for one turn.
#[derive(Debug)]
struct LateReader<S> {
    inner: S,
    wrote: bool,
}

impl<S> LateReader<S> {
    fn boxed(inner: S) -> Box<Self> {
        Box::new(Self { inner, wrote: false })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LateReader<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.wrote) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LateReader<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.wrote = true;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl VirtualSocket for LateReader<TcpStream> {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        match option {
            VirtualSockOpt::NoDelay => self.inner.set_nodelay(true),
            VirtualSockOpt::KeepAlive(keepalive) => {
                set_tcp_keepalive(&self.inner, &keepalive).map_err(io::Error::other)
            }
            _ => Ok(()),
        }
    }
}

impl VirtualSocket for LateReader<UnixStream> {
    /// All options are TCP's.
    fn set_socket_option(&self, _: VirtualSockOpt) -> io::Result<()> {
        Ok(())
    }
}
