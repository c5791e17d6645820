//! Listening sockets, TCP and Unix, and the streams that they accept.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pingora::protocols::l4::socket::SocketAddr as PeerAddress;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::{GetSocketDigest, SocketDigest, TcpKeepalive};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, UnixListener, UnixSocket};

use super::BindCause;
use crate::config::Address;

/// Connections that the kernel queues for us.
const BACKLOG: u32 = 4096;
/// Bytes not yet sent that the kernel holds for a client. Without a bound it holds megabytes, and asks for
/// more only when a third of them is gone: a client that takes 10 kB a second would seem to take nothing for
/// minutes.
const UNSENT: u32 = 128 << 10;
/// Dead peers are noticed even where no time-out of HTTP applies, as on idle WebSockets.
pub(crate) const KEEPALIVE: TcpKeepalive = TcpKeepalive {
    idle: Duration::from_secs(60),
    interval: Duration::from_secs(15),
    count: 4,
    #[cfg(target_os = "linux")]
    user_timeout: Duration::ZERO,
};

/// A listening socket.
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

impl Socket {
    /// `unix_mode`: permissions of the file, if `address` is a Unix socket.
    pub(super) fn bind(address: &Address, unix_mode: u32) -> Result<Self, BindCause> {
        match address {
            Address::Tcp(address) => {
                let socket =
                    if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
                socket.set_reuseaddr(true)?;
                // Accepted connections inherit it. Not every kernel knows it: slow clients suffer there.
                let _ = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT);
                socket.bind(*address)?;
                Ok(Self::Tcp(socket.listen(BACKLOG)?))
            }
            Address::Unix(path) => {
                let (listener, file) = bind_unix(path, unix_mode)?;
                Ok(Self::Unix(listener, file))
            }
        }
    }

    pub(super) fn address(&self) -> Address {
        match self {
            Self::Tcp(listener) => {
                Address::Tcp(listener.local_addr().expect("a bound socket has an address"))
            }
            Self::Unix(_, file) => Address::Unix(file.path.clone()),
        }
    }

    /// Accepts one connection, and tells the IP address of its peer if it has one.
    pub(super) async fn accept(&self) -> io::Result<(Stream, Option<IpAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (tcp, peer) = listener.accept().await?;
                tcp.set_nodelay(true)?;
                let digest = SocketDigest::from_raw_fd(tcp.as_raw_fd());
                let _ = digest.peer_addr.set(Some(PeerAddress::Inet(peer)));
                let mut stream = Stream::from(tcp);
                stream.set_socket_digest(digest);
                stream.set_keepalive(&KEEPALIVE).map_err(io::Error::other)?;
                // An IPv4 client of a dual-stack socket shows as ::ffff:a.b.c.d.
                Ok((stream, Some(peer.ip().to_canonical())))
            }
            Self::Unix(listener, _) => {
                let (unix, _) = listener.accept().await?;
                let digest = SocketDigest::from_raw_fd(unix.as_raw_fd());
                let mut stream = Stream::from(unix);
                stream.set_socket_digest(digest);
                Ok((stream, None))
            }
        }
    }
}

/// Binds beside `path` and renames, so that the socket never has wider permissions than it should
/// and a stale one is replaced in one step.
fn bind_unix(path: &Path, mode: u32) -> Result<(UnixListener, SocketFile), BindCause> {
    refuse_unless_stale(path)?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    if let Err(error) = fs::remove_file(&beside)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(error.into());
    }
    let permissions = fs::Permissions::from_mode(mode);
    let socket = UnixSocket::new_stream()?;
    // The file gets these, less the process's mask, as it is made.
    fs::File::from(socket.as_fd().try_clone_to_owned()?).set_permissions(permissions.clone())?;
    socket.bind(&beside)?;
    let listener = socket.listen(BACKLOG)?;
    let placed = fs::set_permissions(&beside, permissions)
        .and_then(|()| fs::rename(&beside, path))
        .and_then(|()| fs::metadata(path));
    match placed {
        Ok(meta) => {
            let id = (meta.dev(), meta.ino());
            Ok((listener, SocketFile { path: path.to_owned(), id }))
        }
        Err(error) => {
            let _ = fs::remove_file(&beside);
            Err(error.into())
        }
    }
}

/// Only a socket that nobody answers on may be replaced.
fn refuse_unless_stale(path: &Path) -> Result<(), BindCause> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(meta) if !meta.file_type().is_socket() => return Err(BindCause::NotASocket),
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Err(BindCause::InUse),
    }
}

/// The file of a Unix socket; removed when dropped, if it is still ours.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode: a successor may have put its own socket there.
    id: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
