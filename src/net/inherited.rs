//! Listening sockets that somebody else opened: the service manager, or the gate that this one succeeds.
//!
//! A gate hands its sockets to its successor as one message over a connected socket (`SCM_RIGHTS`), so that
//! nothing else is inherited, whatever else is open. Both then hold the same sockets: what waits in the
//! kernel's queues is lost to neither.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use listenfd::ListenFd;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use super::socket::{FileId, Socket};
use crate::config::Address;

/// Most sockets of one message: the kernel's bound.
const MAX_SOCKETS: usize = 253;
/// Most bytes that describe them.
const MAX_DESCRIPTION: usize = 128 << 10;

/// Sockets that were opened for this process and wait for the listeners that they belong to.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: Vec<Handed>,
}

#[derive(Debug)]
struct Handed {
    about: About,
    socket: OwnedFd,
}

/// What is said of a socket that is handed over.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    /// `proxy`, `api` or `ops`; `None`: whichever has the address.
    listener: Option<String>,
    /// As in the configuration: port 0 stays 0.
    address: String,
    /// The Unix socket's file, if it is the gate's own to remove.
    file: Option<FileId>,
}

impl Inherited {
    /// Takes what the service manager opened (`LISTEN_FDS`), and the variables that say so. Must be called
    /// while the process has one thread.
    ///
    /// # Errors
    /// If one of them is not a socket.
    pub fn from_service_manager() -> io::Result<Self> {
        let mut handed = ListenFd::from_env();
        let mut sockets = Vec::new();
        for index in 0..handed.len() {
            // Not a TCP socket is no error yet.
            let tcp = handed.take_tcp_listener(index).ok().flatten().map(OwnedFd::from);
            let socket = match tcp {
                Some(tcp) => tcp,
                None => match handed.take_unix_listener(index)? {
                    Some(unix) => unix.into(),
                    None => continue,
                },
            };
            let address = bound_to(&socket)?.to_string();
            sockets.push(Handed { about: About { listener: None, address, file: None }, socket });
        }
        Ok(Self { sockets })
    }

    /// Takes what a gate sends with [`send`] over `channel`.
    ///
    /// # Errors
    /// If it is gone, or sends something else.
    pub fn receive(channel: impl AsFd) -> io::Result<Self> {
        let mut text = vec![0; MAX_DESCRIPTION];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut text)];
        let received = recvmsg(channel, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let sockets: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
                _ => None,
            })
            .flatten()
            .collect();
        let about: Vec<About> =
            serde_json::from_slice(&text[..received.bytes]).map_err(|_| strange())?;
        if about.len() != sockets.len() {
            return Err(strange());
        }
        let pairs = about.into_iter().zip(sockets);
        Ok(Self { sockets: pairs.map(|(about, socket)| Handed { about, socket }).collect() })
    }

    /// The socket for a listener's address, if there is one.
    pub(super) fn take(
        &mut self,
        listener: &'static str,
        address: &Address,
    ) -> Option<(OwnedFd, Option<FileId>)> {
        let address = address.to_string();
        let is_it = |handed: &Handed| {
            handed.about.address == address
                && handed.about.listener.as_ref().is_none_or(|name| name == listener)
        };
        let index = self.sockets.iter().position(is_it)?;
        let Handed { about, socket } = self.sockets.remove(index);
        Some((socket, about.file))
    }

    /// The addresses of those that nobody took.
    #[must_use]
    pub fn left(&self) -> Vec<&str> {
        self.sockets.iter().map(|handed| handed.about.address.as_str()).collect()
    }
}

/// A listening socket of a running listener, as long as that listens.
#[derive(Clone)]
pub struct Handle {
    listener: &'static str,
    configured: Address,
    socket: Weak<Socket>,
}

impl Handle {
    pub(super) fn new(listener: &'static str, configured: Address, socket: &Arc<Socket>) -> Self {
        Self { listener, configured, socket: Arc::downgrade(socket) }
    }

    /// Whether the file of a Unix socket stays when the listener closes it.
    pub fn keep_file(&self, kept: bool) {
        if let Some(socket) = self.socket.upgrade() {
            socket.keep_file(kept);
        }
    }
}

/// Sends the sockets behind `handles` for [`Inherited::receive`].
///
/// # Errors
/// If they cannot be sent at once, in one message.
pub fn send(channel: impl AsFd, handles: &[Handle]) -> io::Result<()> {
    let sockets: Vec<_> =
        handles.iter().filter_map(|handle| Some((handle, handle.socket.upgrade()?))).collect();
    let about: Vec<_> = sockets
        .iter()
        .map(|(handle, socket)| About {
            listener: Some(handle.listener.to_owned()),
            address: handle.configured.to_string(),
            file: socket.file(),
        })
        .collect();
    let text = serde_json::to_vec(&about)?;
    if sockets.len() > MAX_SOCKETS || text.len() > MAX_DESCRIPTION {
        return Err(io::Error::new(ErrorKind::InvalidInput, "more than 253 listening sockets"));
    }
    let borrowed: Vec<BorrowedFd<'_>> = sockets.iter().map(|(_, socket)| socket.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(channel, &[IoSlice::new(&text)], &mut ancillary, flags)?;
    Ok(())
}

/// Where a socket listens.
fn bound_to(socket: &OwnedFd) -> io::Result<Address> {
    let bound = SockRef::from(socket).local_addr()?;
    match (bound.as_socket(), bound.as_pathname()) {
        (Some(tcp), _) => Ok(Address::Tcp(tcp)),
        (None, path) => Ok(Address::Unix(path.map_or_else(PathBuf::new, PathBuf::from))),
    }
}

fn strange() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "this is not what a gate hands to its successor")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn channel() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    fn any() -> Address {
        Address::Tcp(([127, 0, 0, 1], 0).into())
    }

    #[tokio::test]
    async fn sockets_arrive_under_their_names_and_each_once() {
        let (ours, theirs) = channel();
        let open = || Arc::new(Socket::bind(&any(), 0o600).unwrap());
        let sockets = [open(), open()];
        let handles = [("proxy", 0), ("api", 1)].map(|(n, i)| Handle::new(n, any(), &sockets[i]));
        send(&ours, &handles).unwrap();
        let mut handed = Inherited::receive(&theirs).unwrap();
        assert_eq!(handed.left().len(), 2);
        assert!(handed.take("ops", &any()).is_none());
        let (api, file) = handed.take("api", &any()).unwrap();
        assert!(handed.take("api", &any()).is_none());
        assert_eq!((file, handed.left()), (None, vec!["127.0.0.1:0"]));
        let api = Socket::adopt(&any(), api, None, 0o600).unwrap();
        assert_eq!(api.address(), sockets[1].address());
    }

    #[tokio::test]
    async fn what_does_not_listen_there_is_refused() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = Address::Tcp(tcp.local_addr().unwrap());
        let adopt =
            |address: &Address, socket: OwnedFd| Socket::adopt(address, socket, None, 0o600);
        let clone = || OwnedFd::from(tcp.try_clone().unwrap());
        assert!(adopt(&there, clone()).is_ok());
        let elsewhere = Address::Tcp(([127, 0, 0, 1], 1).into());
        assert!(adopt(&elsewhere, clone()).is_err());
        assert!(adopt(&Address::Unix("/x".into()), clone()).is_err());
        let connected = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let its = Address::Tcp(connected.local_addr().unwrap());
        assert!(adopt(&its, connected.into()).is_err());
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let its = Address::Tcp(udp.local_addr().unwrap());
        assert!(adopt(&its, udp.into()).is_err());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(adopt(&there, file.into()).is_err());
    }

    #[test]
    fn a_stranger_at_the_other_end_is_noticed() {
        for said in [b"nonsense".as_slice(), b"[]x", br#"[{"address":"x"}]"#] {
            let (ours, theirs) = channel();
            rustix::io::write(&ours, said).unwrap();
            assert!(Inherited::receive(&theirs).is_err(), "{said:?}");
        }
        let (ours, theirs) = channel();
        drop(ours);
        assert!(Inherited::receive(&theirs).is_err());
    }
}
