//! Listening sockets, TCP and Unix, and the streams that they accept.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pingora::protocols::l4::socket::SocketAddr as PeerAddress;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::{GetSocketDigest, SocketDigest, TcpKeepalive};
use socket2::{SockRef, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream};

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

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
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

    /// Takes a socket that was opened for us. `file`: what is known of the Unix socket's file, which stays until
    /// [`Self::keep_file`] says otherwise; `None`: it is somebody else's, who chose its permissions and removes
    /// it.
    pub(super) fn adopt(
        address: &Address,
        socket: OwnedFd,
        file: Option<FileId>,
        unix_mode: u32,
    ) -> Result<Self, BindCause> {
        check(&socket, address)?;
        SockRef::from(&socket).set_nonblocking(true)?;
        match address {
            Address::Tcp(_) => {
                let _ = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT);
                Ok(Self::Tcp(TcpListener::from_std(socket.into())?))
            }
            Address::Unix(path) => {
                let listener = UnixListener::from_std(socket.into())?;
                // Whoever handed it over may go on.
                let file = SocketFile { path: path.clone(), id: file, kept: AtomicBool::new(true) };
                if file.is_there() {
                    fs::set_permissions(path, fs::Permissions::from_mode(unix_mode))?;
                }
                Ok(Self::Unix(listener, file))
            }
        }
    }

    /// The file of a Unix socket, if it is ours to remove.
    pub(super) fn file(&self) -> Option<FileId> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(_, file) => file.id,
        }
    }

    /// Whether the socket's file stays when we close it: a successor's is the same.
    pub(super) fn keep_file(&self, kept: bool) {
        if let Self::Unix(_, file) = self {
            file.kept.store(kept, Ordering::Relaxed);
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

    /// Accepts one connection.
    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (tcp, peer) = listener.accept().await?;
                Ok(Accepted::Tcp(tcp.into_std()?, peer))
            }
            Self::Unix(listener, _) => {
                let (unix, _) = listener.accept().await?;
                Ok(Accepted::Unix(unix.into_std()?))
            }
        }
    }
}

/// A connection that was accepted and is no runtime's yet.
pub(super) enum Accepted {
    /// With its peer's address.
    Tcp(std::net::TcpStream, SocketAddr),
    Unix(std::os::unix::net::UnixStream),
}

impl Accepted {
    /// The IP address of its peer, if it has one.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        match self {
            // An IPv4 client of a dual-stack socket shows as ::ffff:a.b.c.d.
            Self::Tcp(_, peer) => Some(peer.ip().to_canonical()),
            Self::Unix(_) => None,
        }
    }

    /// Makes it the stream of the runtime around the caller.
    ///
    /// # Errors
    /// If it is gone, or the system allows no more of them.
    pub(super) fn open(self) -> io::Result<Stream> {
        match self {
            Self::Tcp(tcp, peer) => {
                tcp.set_nodelay(true)?;
                let digest = SocketDigest::from_raw_fd(tcp.as_raw_fd());
                let _ = digest.peer_addr.set(Some(PeerAddress::Inet(peer)));
                let mut stream = Stream::from(TcpStream::from_std(tcp)?);
                stream.set_socket_digest(digest);
                stream.set_keepalive(&KEEPALIVE).map_err(io::Error::other)?;
                Ok(stream)
            }
            Self::Unix(unix) => {
                let digest = SocketDigest::from_raw_fd(unix.as_raw_fd());
                let mut stream = Stream::from(UnixStream::from_std(unix)?);
                stream.set_socket_digest(digest);
                Ok(stream)
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
            let id = Some((meta.dev(), meta.ino()));
            let file = SocketFile { path: path.to_owned(), id, kept: AtomicBool::new(false) };
            Ok((listener, file))
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

/// Only what would have been bound here in its place is taken: a stream socket that listens on `address`.
fn check(socket: &OwnedFd, address: &Address) -> Result<(), BindCause> {
    let socket = SockRef::from(socket);
    let wrong = || BindCause::NotListening;
    let is_fit = socket.r#type().map_err(|_| wrong())? == Type::STREAM
        && socket.is_listener().map_err(|_| wrong())?;
    let bound = socket.local_addr()?;
    let is_there = match address {
        Address::Tcp(address) => bound.as_socket().is_some_and(|bound| {
            bound.ip() == address.ip() && (address.port() == 0 || bound.port() == address.port())
        }),
        // Which name a socket was bound under says nothing: ours are renamed.
        Address::Unix(_) => bound.is_unix(),
    };
    if is_fit && is_there { Ok(()) } else { Err(wrong()) }
}

/// Device and inode of a Unix socket's file.
pub(super) type FileId = (u64, u64);

/// The file of a Unix socket; removed when dropped, if it is still ours.
pub(super) struct SocketFile {
    path: PathBuf,
    /// A successor may have put its own socket there. `None`: it never was ours.
    id: Option<FileId>,
    /// Somebody goes on listening on it.
    kept: AtomicBool,
}

impl SocketFile {
    /// Whether our file is still in its place.
    fn is_there(&self) -> bool {
        self.id.is_some()
            && fs::symlink_metadata(&self.path).is_ok_and(|m| Some((m.dev(), m.ino())) == self.id)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed) && self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
