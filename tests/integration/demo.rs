//! The first thing that a stranger runs.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::{otpgate, run, stderr, stdout};

#[test]
fn the_demo_shows_the_main_job_and_ends() {
    let output = run(&["demo", "--once"]);
    let shown = stdout(&output);
    assert!(output.status.success(), "{shown}{}", stderr(&output));
    let answers: Vec<_> = shown.lines().filter_map(|l| l.strip_prefix("→ ")).collect();
    assert_eq!(
        answers,
        [
            "200 OK",
            "401 Unauthorized",
            "403 Forbidden",
            "401 Unauthorized",
            "200 OK",
            "200 OK",
            "403 Forbidden"
        ]
    );
    assert!(shown.contains("the upstream got GET /orders\n  X-Auth-Name: alice\n  X-Auth-Realm: shop\n  X-Auth-Token: (none)"), "{shown}");
    assert!(shown.contains("{\"status\":\"OK\"}"), "{shown}");
    assert!(!shown.contains("panicked") && stderr(&output).is_empty(), "{}", stderr(&output));
}

/// A running demo, killed when dropped.
struct Demo {
    child: std::process::Child,
    shown: String,
    folder: PathBuf,
}

impl Demo {
    /// Starts it with a folder for temporary files whose name a shell would split, and reads what it
    /// shows until it waits.
    fn start(temp: &Path) -> Self {
        let mut child =
            otpgate().arg("demo").env("TMPDIR", temp).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut shown = String::new();
        let last = lines
            .by_ref()
            .inspect(|line| {
                shown.push_str(line);
                shown.push('\n');
            })
            .find(|line| line.starts_with("Everything lies in "));
        let last = last.unwrap_or_else(|| panic!("the demo ended: {shown}"));
        let folder =
            last.trim_start_matches("Everything lies in ").trim_end_matches(" until then.");
        Self { child, folder: folder.into(), shown }
    }

    /// The commands to paste.
    fn commands(&self) -> Vec<&str> {
        let (_, after) = self.shown.split_once("Try, in another terminal:\n").unwrap();
        let (commands, _) = after.split_once("Everything lies in").unwrap();
        commands.split("\n\n").map(str::trim).filter(|text| !text.is_empty()).collect()
    }

    fn end(&mut self, signal: i32) -> std::process::ExitStatus {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: kill takes two integers; the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        self.child.wait().unwrap()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_the_demo_prints_works_when_pasted() {
    let temp = tempfile::Builder::new().prefix("it's a \"$folder\" ").tempdir().unwrap();
    let mut demo = Demo::start(temp.path());
    let answers = demo.commands().into_iter().map(|command| {
        let ran = Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(ran.status.success(), "{command}: {}", stderr(&ran));
        stdout(&ran)
    });
    let answers: Vec<_> = answers.collect();
    let starts = [
        "HTTP/1.1 200 OK",
        "HTTP/1.1 403 Forbidden",
        "HTTP/1.1 200 OK",
        "ID  REALM",
        "{\"timestamp\":",
    ];
    assert_eq!(answers.len(), starts.len(), "{}", demo.shown);
    for (answer, start) in answers.iter().zip(starts) {
        assert!(answer.starts_with(start), "{start}: {answer}");
    }
    assert!(answers[3].contains("shop            alice"), "{}", answers[3]);

    assert!(demo.folder.starts_with(temp.path()) && demo.folder.exists());
    assert_eq!(demo.end(libc::SIGINT).code(), Some(0));
    assert!(!demo.folder.exists());
}

#[test]
fn the_demo_leaves_nothing_behind_however_it_is_stopped() {
    let temp = tempfile::tempdir().unwrap();
    let mut demo = Demo::start(temp.path());
    assert_eq!(demo.end(libc::SIGTERM).code(), Some(0));
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
}
