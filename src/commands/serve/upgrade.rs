//! Handing over to a new process of the same name, and taking over from an old one: an upgrade of the program in
//! which no request fails.
//!
//! The old gate starts the program at its own path, with its own arguments and environment, and sends it the
//! listening sockets over a connected socket that is the new one's standard input. Then they speak, one byte a
//! message:
//!
//! 1. the new one: it has [`STARTED`]: its settings can be used, and every address is open;
//! 2. the new one: it is [`READY`]: its entries are proven current;
//! 3. the old one: now [`SERVE`]. From here on both accept;
//! 4. the new one: it is [`SERVING`]. The old one closes its copies of the sockets, and drains.
//!
//! If the new one ends, or says nothing for too long, it is killed and the old one goes on. An old one that is
//! itself not current does not wait for more than the first word: what follows cannot be worse.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tracing::info;

use super::{LOOK_EVERY, Server};
use crate::cli::Failure;
use crate::net::inherited::{self, Handle, Inherited};

/// The flag that makes `serve` take over.
const FLAG: &str = "--takeover";

const STARTED: u8 = b'1';
const READY: u8 = b'2';
const SERVE: u8 = b'3';
const SERVING: u8 = b'4';

/// How often to look whether a process that hung up has ended, before it is killed: for five seconds.
const LOOKS_FOR_THE_END: usize = 250;
/// Variables of the service manager that are about the sockets of one process.
const LISTEN_VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// Why the gate goes on as it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    /// It would end with us.
    #[error("this is the first process of a container, which ends with it: replace the container")]
    FirstProcess,
    /// There is no new process.
    #[error("cannot start `{}`: {cause}", program.display())]
    Start {
        /// What was to be started.
        program: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// It did not get as far as serving; it has said why itself.
    #[error("the new process ended before it served: {0}")]
    Ended(ExitStatus),
    /// It was killed.
    #[error("the new process was not ready within `shutdown.upgrade_timeout` ({})",
        humantime::format_duration(*.0))]
    Late(Duration),
    /// It is no gate, or the channel broke.
    #[error("the new process cannot be understood: {0}")]
    Channel(#[from] io::Error),
}

/// How to start a successor, found out before anybody can replace the file.
pub(super) struct Program {
    path: PathBuf,
    args: Vec<OsString>,
}

impl Program {
    /// The program that this process runs.
    ///
    /// # Errors
    /// If the system does not tell.
    pub(super) fn of_this_process() -> io::Result<Self> {
        let mut args = std::env::args_os();
        let running = std::env::current_exe()?;
        let called = args.next().map(PathBuf::from).unwrap_or_default();
        let mut args: Vec<_> = args.collect();
        if !args.iter().any(|arg| arg == FLAG) {
            args.push(FLAG.into());
        }
        Ok(Self { path: path_of(&called, running), args })
    }
}

/// The path that leads to whatever is installed later: as the program was called, links unresolved, unless
/// that is not it.
fn path_of(called: &Path, running: PathBuf) -> PathBuf {
    let id = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let has_folder = called.components().count() > 1;
    match std::path::absolute(called) {
        Ok(path) if has_folder && id(&path).is_some() && id(&path) == id(&running) => path,
        _ => running,
    }
}

/// Starts a successor, and lets it serve as soon as it can. Its process id.
///
/// # Errors
/// Why there is none; nothing has changed then.
pub(super) async fn hand_over(program: &Program, server: &Server) -> Result<u32, Failed> {
    if std::process::id() == 1 {
        return Err(Failed::FirstProcess);
    }
    let limit = server.shutdown.load().upgrade_timeout;
    let mut successor = Successor::start(program, &server.handles)?;
    info!(pid = successor.child.id(), program = %program.path.display(), "started a successor");
    match timeout(limit, successor.take_over(server)).await {
        Ok(Ok(true)) => Ok(successor.release()),
        Ok(Ok(false)) => Err(successor.ended().await.map_or_else(Failed::from, Failed::Ended)),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Failed::Late(limit)),
    }
}

/// A new process, killed when dropped.
struct Successor {
    child: Child,
    channel: UnixStream,
    released: bool,
}

impl Successor {
    fn start(program: &Program, handles: &[Handle]) -> Result<Self, Failed> {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.map_err(io::Error::from)?;
        inherited::send(&ours, handles)?;
        let channel = stream(ours)?;
        let mut command = Command::new(&program.path);
        command.args(&program.args).stdin(Stdio::from(theirs));
        for variable in LISTEN_VARIABLES {
            command.env_remove(variable);
        }
        let child = command
            .spawn()
            .map_err(|cause| Failed::Start { program: program.path.clone(), cause })?;
        Ok(Self { child, channel, released: false })
    }

    /// Whether it serves; otherwise it has ended.
    async fn take_over(&mut self, server: &Server) -> io::Result<bool> {
        let mut started = false;
        loop {
            tokio::select! {
                word = hear(&mut self.channel) => match word? {
                    Some(STARTED) => started = true,
                    Some(READY) => break,
                    Some(_) => return Err(ErrorKind::InvalidData.into()),
                    None => return Ok(false),
                },
                () = sleep(LOOK_EVERY), if started => if !server.is_current() { break },
            }
        }
        // It has none of what was counted here alone.
        server.throttle.flush(server.clock.now()).await;
        self.channel.write_all(&[SERVE]).await?;
        match hear(&mut self.channel).await? {
            // A last word from before.
            Some(READY) => Ok(hear(&mut self.channel).await? == Some(SERVING)),
            word => Ok(word == Some(SERVING)),
        }
    }

    /// Lets it live. Its process id.
    fn release(mut self) -> u32 {
        self.released = true;
        self.child.id()
    }

    /// How it ended, after it has hung up: it may still be saying why.
    async fn ended(&mut self) -> io::Result<ExitStatus> {
        for _ in 0..LOOKS_FOR_THE_END {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            sleep(LOOK_EVERY).await;
        }
        self.end()
    }

    /// Ends it.
    fn end(&mut self) -> io::Result<ExitStatus> {
        let _ = self.child.kill();
        self.child.wait()
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if !self.released {
            let _ = self.end();
        }
    }
}

/// The gate that started this process to be succeeded by it.
pub(super) struct Predecessor {
    channel: OwnedFd,
}

impl Predecessor {
    /// Takes over its sockets, and standard input, through which they came.
    ///
    /// # Errors
    /// If there is no such gate.
    pub(super) fn meet() -> Result<(Self, Inherited), Failure> {
        let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
        let inherited = Inherited::receive(&channel).map_err(|error| {
            format!("`{FLAG}` is for a gate that starts its successor (SIGUSR2): {error}")
        })?;
        rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
        Ok((Self { channel }, inherited))
    }

    /// Serves in its place as soon as it says so.
    ///
    /// # Errors
    /// If it is gone.
    pub(super) async fn succeed(self, server: &Server) -> Result<(), Failure> {
        let mut channel = stream(self.channel)?;
        say(&mut channel, STARTED).await?;
        let mut ready = false;
        loop {
            tokio::select! {
                word = hear(&mut channel) => match word? {
                    Some(SERVE) => break,
                    _ => return Err("the gate that was to be succeeded is gone".into()),
                },
                () = sleep(LOOK_EVERY), if !ready => if server.is_current() {
                    ready = true;
                    say(&mut channel, READY).await?;
                },
            }
        }
        server.open();
        // If it does not hear that any more, somebody must serve all the same.
        let _ = say(&mut channel, SERVING).await;
        for handle in &server.handles {
            handle.keep_file(false);
        }
        Ok(())
    }
}

/// Messages keep their bounds, whatever the type says.
fn stream(channel: OwnedFd) -> io::Result<UnixStream> {
    let channel = StdUnixStream::from(channel);
    channel.set_nonblocking(true)?;
    UnixStream::from_std(channel)
}

async fn say(channel: &mut UnixStream, word: u8) -> io::Result<()> {
    channel.write_all(&[word]).await
}

/// The other's next word; `None`: it is gone.
async fn hear(channel: &mut UnixStream) -> io::Result<Option<u8>> {
    let mut word = [0];
    match channel.read(&mut word).await {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(word[0])),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_as_called_unless_that_is_something_else() {
        let folder = tempfile::tempdir().unwrap();
        let [program, link, other] =
            ["otpgate-1", "otpgate", "other"].map(|name| folder.path().join(name));
        std::fs::write(&program, "").unwrap();
        std::fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&program, &link).unwrap();
        for (called, expected) in [
            (link.as_path(), &link),
            (other.as_path(), &program),
            (Path::new("otpgate"), &program),
            (Path::new("/absent/otpgate"), &program),
            (Path::new(""), &program),
        ] {
            assert_eq!(path_of(called, program.clone()), *expected, "{}", called.display());
        }
    }
}
