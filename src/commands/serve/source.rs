//! Where settings come from while the gate runs: they are read again as at its start, and their files
//! watched. Only contents count: a file may be touched, replaced, or reached by other symbolic links, as
//! Kubernetes does with a ConfigMap. So files are looked at, not waited for: that works on every file
//! system.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ring::digest::{Context, SHA256};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use zeroize::Zeroizing;

use crate::config::Config;
use crate::config::load::{ConfigError, Files, Loaded, Problem};

/// After a change, files are looked at again this often, until all stay as they are: who writes several
/// has a moment for it, and a file may be gone while it is replaced.
const SETTLING: Duration = Duration::from_millis(200);
/// So many times at most: a file that never rests is read as it is.
const LOOKS: u32 = 20;
const CHUNK: usize = 64 << 10;

/// A digest of each file's contents; `None`: it cannot be read.
type Contents = BTreeMap<PathBuf, Option<[u8; 32]>>;

/// Reads settings as at the start.
type Load = Arc<dyn Fn(Files) -> Loaded + Send + Sync>;

/// The source of a running gate's settings.
pub struct Source {
    load: Load,
    /// The configuration file that was read at the start.
    file: Option<PathBuf>,
    /// The files of the settings in force, and of those read later that could not be used.
    seen: Contents,
    /// The files of the settings that were read last.
    named: Vec<PathBuf>,
}

impl Source {
    /// Reads the settings of the start, pipes included. `load` reads them, the same way each time.
    ///
    /// # Errors
    /// All that is wrong with them.
    pub fn begin(
        load: impl Fn(Files) -> Loaded + Send + Sync + 'static,
    ) -> Result<(Self, Config), ConfigError> {
        let load: Load = Arc::new(load);
        let (Loaded { file, files, config }, seen) = read(&load, Files::Any, []);
        Ok((Self { load, file, seen, named: files }, config?))
    }

    /// Reads the settings again. What changes in files from then on is a change to [`Self::changed`].
    ///
    /// # Errors
    /// All that is wrong with them.
    pub(super) async fn read(&mut self) -> Result<Config, Vec<Problem>> {
        let (load, known) = (self.load.clone(), self.seen.keys().cloned().collect::<Vec<_>>());
        let reading = spawn_blocking(move || read(&load, Files::Regular, known));
        let (loaded, seen) =
            reading.await.map_err(|_| vec![problem("reload", "reading failed")])?;
        self.seen = seen;
        self.named = loaded.files;
        match (&self.file, loaded.file) {
            // Its absence would mean the defaults, which nobody asked for.
            (Some(file), None) => Err(vec![problem(file.display(), "the file is gone")]),
            (_, file) => {
                let config = loaded.config.map_err(|error| error.0)?;
                self.file = file;
                Ok(config)
            }
        }
    }

    /// What was read last is in force: files that it does not name do not matter any more.
    pub(super) fn settle(&mut self) {
        self.seen.retain(|path, _| self.named.contains(path));
    }

    /// Waits until contents of files differ from what they were when settings were last read, looking at
    /// them `every` so often; for ever if that is `None`.
    pub(super) async fn changed(&self, every: Option<Duration>) {
        let Some(every) = every else { return std::future::pending().await };
        loop {
            sleep(every).await;
            if self.look().await == self.seen {
                continue;
            }
            if self.settled(SETTLING.min(every)).await != self.seen {
                return;
            }
        }
    }

    /// The contents once they stay as they are.
    async fn settled(&self, every: Duration) -> Contents {
        let mut before = self.look().await;
        for _ in 0..LOOKS {
            sleep(every).await;
            let now = self.look().await;
            if now == before {
                break;
            }
            before = now;
        }
        before
    }

    async fn look(&self) -> Contents {
        let files: Vec<_> = self.seen.keys().cloned().collect();
        // Only at the end of the process it does not run to its end.
        spawn_blocking(move || contents(files)).await.unwrap_or_else(|_| self.seen.clone())
    }
}

/// Reads settings, and the contents of their files and of `more`: these no later, so that no change is
/// missed.
fn read(
    load: &Load,
    may_name: Files,
    more: impl IntoIterator<Item = PathBuf>,
) -> (Loaded, Contents) {
    // Only settings say which files there are.
    let loaded = load(may_name);
    let seen = contents(loaded.files.iter().cloned().chain(more));
    // A pipe is empty by now: without what was in it, settings would be others.
    let again = loaded.files.iter().all(|file| Files::Regular.objection(file).is_none());
    (if again { load(may_name) } else { loaded }, seen)
}

fn problem(key: impl ToString, message: &str) -> Problem {
    Problem { key: key.to_string(), message: message.to_owned() }
}

fn contents(files: impl IntoIterator<Item = PathBuf>) -> Contents {
    let print = |path: &Path| -> io::Result<Option<[u8; 32]>> {
        // Opening something else might wait for ever.
        if Files::Regular.objection(path).is_some() {
            return Ok(None);
        }
        digest(File::open(path)?).map(Some)
    };
    files
        .into_iter()
        .map(|path| {
            let print = print(&path).unwrap_or_default();
            (path, print)
        })
        .collect()
}

fn digest(mut file: File) -> io::Result<[u8; 32]> {
    // What it holds may be a secret.
    let mut buffer = Zeroizing::new(vec![0; CHUNK]);
    let mut digest = Context::new(&SHA256);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => digest.update(&buffer[..n]),
        }
    }
    let mut print = [0; 32];
    print.copy_from_slice(digest.finish().as_ref());
    Ok(print)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source whose settings are all defaults and depend on `files`, the first of which is the
    /// configuration file, if it is there.
    fn source(files: &[&Path]) -> Source {
        let files: Vec<_> = files.iter().map(|path| path.to_path_buf()).collect();
        let load = move |may_name| {
            let (none, empty) = (std::iter::empty(), tempfile::NamedTempFile::new().unwrap());
            let loaded =
                crate::config::load::load_noting_files(Some(empty.path()), none, &[], may_name);
            let file = files.first().filter(|path| path.exists()).cloned();
            Loaded { file, files: files.clone(), config: loaded.config }
        };
        Source::begin(load).unwrap().0
    }

    /// Looks at files all the time.
    async fn changed(source: &Source) {
        let soon = source.changed(Some(Duration::from_millis(5)));
        tokio::time::timeout(Duration::from_secs(20), soon).await.expect("the change is noticed");
    }

    #[tokio::test]
    async fn a_configuration_that_is_gone_is_not_that_of_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("otpgate.toml");
        std::fs::write(&file, "").unwrap();
        let mut source = source(&[&file]);
        source.read().await.unwrap();
        std::fs::remove_file(&file).unwrap();
        changed(&source).await;
        let problems = source.read().await.unwrap_err();
        assert_eq!(problems, [problem(file.display(), "the file is gone")]);
        // It is seen to be gone: that it comes back is a change.
        std::fs::write(&file, "").unwrap();
        changed(&source).await;
        source.read().await.unwrap();

        // Where there was none, one may come.
        let late = folder.path().join("late.toml");
        let mut source = self::source(&[&late]);
        std::fs::write(&late, "").unwrap();
        changed(&source).await;
        source.read().await.unwrap();
        std::fs::remove_file(&late).unwrap();
        source.read().await.unwrap_err();
    }

    #[tokio::test]
    async fn a_pipe_is_never_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (file, pipe) = (folder.path().join("otpgate.toml"), folder.path().join("pipe"));
        std::fs::write(&file, "").unwrap();
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let mut source = source(&[&file, &pipe]);
        std::fs::write(&file, "changed").unwrap();
        changed(&source).await;
        source.read().await.unwrap();
        assert_eq!(source.look().await, source.seen);
    }

    #[tokio::test]
    async fn files_that_are_not_named_any_more_do_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        let [file, one, two] = ["file", "one", "two"].map(|name| folder.path().join(name));
        let all = [&file, &one, &two];
        all.iter().for_each(|file| std::fs::write(file, "").unwrap());
        let mut source = source(&all.map(PathBuf::as_path));
        source.load = self::source(&[&file, &two]).load;
        source.read().await.unwrap();
        // Until what was read is in force, it may have to be read again.
        std::fs::write(&one, "changed").unwrap();
        assert_ne!(source.look().await, source.seen);
        source.settle();
        assert_eq!(source.look().await, source.seen);
        std::fs::write(&two, "changed").unwrap();
        assert_ne!(source.look().await, source.seen);
    }

    /// What changes between two looks and back again is no change; what never rests is one.
    #[tokio::test]
    async fn only_contents_that_rest_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("otpgate.toml");
        std::fs::write(&file, "one").unwrap();
        let source = source(&[&file]);
        std::fs::remove_file(&file).unwrap();
        let back = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            std::fs::write(&file, "one").unwrap();
        };
        let (settled, ()) = tokio::join!(source.settled(Duration::from_millis(50)), back);
        assert_eq!(settled, source.seen);

        let restless = async {
            for n in 0_u64.. {
                std::fs::write(&file, n.to_string()).unwrap();
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = changed(&source) => {}
            () = restless => {}
        }
    }
}
