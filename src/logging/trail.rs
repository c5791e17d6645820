//! An audit trail of its own: lines to a file or to standard output, written by a thread of their own, so
//! that a slow disk or reader never holds up a request.
//!
//! A line that cannot be written where it belongs goes to standard error and is counted: it is not lost.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use prometheus::IntCounter;
use tracing_subscriber::fmt::MakeWriter;

use crate::store::private_file::directory_of;

/// Lines that may wait for the disk.
const WAITING_LINES: usize = 1024;
/// Longest wait, at the end of the process, for the lines that still wait.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Counts the lines that went to standard error instead, in a process that has metrics.
static FAILURES: OnceLock<IntCounter> = OnceLock::new();

/// Counts failures of this process's trail there. The first call wins.
pub(super) fn count_failures(counter: &IntCounter) {
    let _ = FAILURES.set(counter.clone());
}

enum Message {
    Line(Vec<u8>),
    /// Answered when all lines before it are written.
    Flush(SyncSender<()>),
}

/// Takes lines for the thread that writes them.
#[derive(Clone)]
pub(super) struct Trail(SyncSender<Message>);

impl Trail {
    /// A trail to the end of a file, which is made if it is absent.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub(super) fn to_file(path: &Path) -> io::Result<Self> {
        let mut file = TrailFile::open(path)?;
        Self::start(move |line| file.append(line))
    }

    /// A trail to standard output.
    ///
    /// # Errors
    /// If there can be no thread.
    pub(super) fn to_stdout() -> io::Result<Self> {
        Self::start(|line| {
            let mut out = io::stdout().lock();
            out.write_all(line).and_then(|()| out.flush())
        })
    }

    fn start(write: impl FnMut(&[u8]) -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let (lines, waiting) = sync_channel(WAITING_LINES);
        std::thread::Builder::new().name("audit".into()).spawn(move || run(&waiting, write))?;
        Ok(Self(lines))
    }

    /// Waits until all lines so far are written, within reason.
    pub(super) fn flush(&self) {
        let (done, written) = sync_channel(1);
        // A full queue means that the thread is stuck: waiting would not help.
        if self.0.try_send(Message::Flush(done)).is_ok() {
            let _ = written.recv_timeout(FLUSH_LIMIT);
        }
    }
}

impl Write for Trail {
    /// Takes a whole line: this is how `tracing` hands them over.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0.try_send(Message::Line(line.to_vec())) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => put_elsewhere(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Trail {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Writes lines until nobody can send any more. Says once that there is trouble, and once that it is over.
fn run(waiting: &Receiver<Message>, mut write: impl FnMut(&[u8]) -> io::Result<()>) {
    let mut in_trouble = false;
    while let Ok(message) = waiting.recv() {
        let line = match message {
            Message::Line(line) => line,
            Message::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        match write(&line) {
            Ok(()) if std::mem::replace(&mut in_trouble, false) => {
                tracing::warn!("audit events are written where they belong again");
            }
            Ok(()) => {}
            Err(error) => {
                put_elsewhere(&line);
                if !std::mem::replace(&mut in_trouble, true) {
                    tracing::error!(%error, "audit events cannot be written where they belong: they go to standard error");
                }
            }
        }
    }
}

fn put_elsewhere(line: &[u8]) {
    let _ = io::stderr().lock().write_all(line);
    if let Some(failures) = FAILURES.get() {
        failures.inc();
    }
}

/// A file that is appended to, also after it was moved away or cut short.
struct TrailFile {
    path: PathBuf,
    file: File,
    /// The last line may be there in part.
    torn: bool,
}

impl TrailFile {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: open(path)?, torn: false })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if !self.is_in_place() {
            self.file = open(&self.path)?;
            self.torn = false;
        }
        if self.torn {
            self.file.write_all(b"\n")?;
        }
        self.torn = true;
        self.file.write_all(line)?;
        self.torn = false;
        Ok(())
    }

    /// Whether the path still names the open file: programs that rotate logs move it away.
    fn is_in_place(&self) -> bool {
        let (Ok(there), Ok(open)) = (std::fs::metadata(&self.path), self.file.metadata()) else {
            return false;
        };
        (there.dev(), there.ino()) == (open.dev(), open.ino())
    }
}

/// Whether the file could be opened, or made; makes none that stays.
pub(super) fn check(path: &Path) -> io::Result<()> {
    match OpenOptions::new().append(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tempfile::tempfile_in(directory_of(path)).map(drop)
        }
        opened => opened.map(drop),
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn lines_are_appended_also_after_the_file_was_moved_or_cut() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("audit"), folder.path().join("audit.1"));
        fs::write(&path, "before\n").unwrap();
        let trail = Trail::to_file(&path).unwrap();
        let write = |line: &str| {
            trail.clone().write_all(line.as_bytes()).unwrap();
            trail.flush();
        };
        let read = |path| fs::read_to_string(path).unwrap();
        write("one\n");
        assert_eq!(read(&path), "before\none\n");
        fs::rename(&path, &moved).unwrap();
        write("two\n");
        assert_eq!((read(&moved), read(&path)), ("before\none\n".into(), "two\n".into()));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        File::options().write(true).truncate(true).open(&path).unwrap();
        write("three\n");
        assert_eq!(read(&path), "three\n");
        assert!(Trail::to_file(&folder.path().join("absent/audit")).is_err());
    }

    #[test]
    fn a_line_after_a_torn_one_is_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let mut file = TrailFile::open(&path).unwrap();
        file.file.write_all(b"torn").unwrap();
        file.torn = true;
        file.append(b"whole\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "torn\nwhole\n");
    }

    #[test]
    fn nobody_waits_for_a_stuck_disk() {
        let (go, stuck) = channel::<()>();
        let (wrote, written) = channel();
        let mut trail = Trail::start(move |line| {
            let _ = stuck.recv();
            wrote.send(line.to_vec()).unwrap();
            Ok(())
        })
        .unwrap();
        // One that is being written, those that wait, and one too many.
        for _ in 0..WAITING_LINES + 2 {
            trail.write_all(b"x\n").unwrap();
        }
        drop(go);
        trail.flush();
        drop(trail);
        let written = written.iter().count();
        assert!((WAITING_LINES..WAITING_LINES + 2).contains(&written), "{written}");
    }
}
