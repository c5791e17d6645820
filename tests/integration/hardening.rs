//! The process's memory, as other processes of the machine see it.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, Output};

use crate::harness::{Gate, Sandbox, http, stderr};

/// Root may read everything, so tests that run as root look with this user's eyes.
const NOBODY: u32 = 65534;

/// A gate, and the user that it runs as if that is not the tests' own.
struct Watched {
    sandbox: Sandbox,
    user: Option<u32>,
    gate: Gate,
}

impl Watched {
    async fn start(core_dumps: bool) -> Self {
        let sandbox = Sandbox::new();
        let folder = sandbox.path("");
        let is_root = std::fs::metadata(&folder).unwrap().uid() == 0;
        let user = is_root.then_some(NOBODY);
        let mut program = env!("CARGO_BIN_EXE_otpgate").to_owned();
        if let Some(user) = user {
            // Where the tests were built, others may not look.
            let copy = sandbox.path("otpgate");
            std::fs::copy(&program, &copy).unwrap();
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
            program = copy.display().to_string();
            chown(&folder, Some(user), Some(user)).unwrap();
        }
        // As if the machine allowed core files.
        let script = "ulimit -S -c $(ulimit -H -c); exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command
            .args(["-c", script, &program, "serve", "--log-format", "json"])
            .args(["--proxy", "127.0.0.1:0", "--api", "127.0.0.1:0", "--ops", "127.0.0.1:0"])
            .current_dir(&folder)
            .env_clear()
            .env("OTPGATE_SEED", "in-the-environment")
            .env("OTPGATE_PROCESS__CORE_DUMPS", core_dumps.to_string());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let gate = Gate::spawn(command).unwrap_or_else(|output| panic!("{}", stderr(&output)));
        Self { sandbox, user, gate: gate.ready().await }
    }

    /// Reads one of its files in `/proc` as its own user.
    fn read(&self, file: &str) -> Output {
        let mut cat = Command::new("cat");
        if let Some(user) = self.user {
            cat.uid(user).gid(user);
        }
        cat.arg(format!("/proc/{}/{file}", self.gate.pid())).output().unwrap()
    }
}

#[tokio::test]
async fn nobody_reads_the_memory_of_a_gate_and_a_crash_leaves_none_of_it() {
    let watched = Watched::start(false).await;
    for secret in ["environ", "maps"] {
        let read = watched.read(secret);
        assert!(!read.status.success() && read.stdout.is_empty(), "{secret}");
        assert!(stderr(&read).contains("ermission denied"), "{}", stderr(&read));
    }
    let limits = String::from_utf8(watched.read("limits").stdout).unwrap();
    let core = limits.lines().find_map(|l| l.strip_prefix("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().next(), Some("0"), "{limits}");

    // The gate itself still reads what its metrics are made of.
    let metrics = http().get(format!("{}/metrics", watched.gate.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    for metric in
        ["process_open_fds", "process_resident_memory_bytes", "process_start_time_seconds"]
    {
        let value =
            metrics.lines().find_map(|l| l.strip_prefix(metric)?.trim().parse::<f64>().ok());
        assert!(value.is_some_and(|value| value > 0.0), "{metric} in {metrics}");
    }

    let Watched { sandbox, gate, .. } = watched;
    // As `abort` does; Rust returns from the first SIGSEGV that no memory access caused.
    gate.signal(libc::SIGABRT);
    let end = gate.wait();
    assert_eq!((end.signal(), end.core_dumped()), (Some(libc::SIGABRT), false));
    let files = std::fs::read_dir(sandbox.path("")).unwrap();
    let cores =
        files.filter(|f| f.as_ref().unwrap().file_name().to_string_lossy().contains("core"));
    assert_eq!(cores.count(), 0);
}

#[tokio::test]
async fn debugging_can_be_allowed() {
    let watched = Watched::start(true).await;
    let environ = watched.read("environ");
    assert!(String::from_utf8_lossy(&environ.stdout).contains("in-the-environment"));
}
