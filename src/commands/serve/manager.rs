//! What the service manager is told (`NOTIFY_SOCKET`); nothing where there is none.

use std::ffi::OsStr;
use std::io;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tracing::warn;

/// Requests are answered.
pub(super) fn ready() {
    tell("READY=1");
}

/// The process is to stop.
pub(super) fn stopping() {
    tell("STOPPING=1");
}

/// The service goes on in another process.
pub(super) fn goes_on_in(pid: u32) {
    tell(&format!("MAINPID={pid}"));
}

fn tell(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
        return;
    };
    if let Err(error) = send(&name, state) {
        warn!(%error, "cannot tell the service manager `{state}`");
    }
}

fn send(name: &OsStr, state: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address_of(name)?)?;
    socket.send(state.as_bytes()).map(drop)
}

/// `@` stands for the zero byte of a name that is in no file system.
fn address_of(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes().strip_prefix(b"@") {
        #[cfg(target_os = "linux")]
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
        _ => SocketAddr::from_pathname(name),
    }
}
