//! The Python package of clients: its own tests, run against the program of this build.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::{output_within, python, stderr, stdout};

/// The tests take some 15 seconds, most of them spent starting programs.
const PATIENCE: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_clients_work_with_this_program() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/python");
    let temporary = tempfile::tempdir().unwrap();
    let mut pytest = Command::new(python().await);
    pytest
        .args(["-m", "pytest", "-q", "--tb=short", "--basetemp"])
        .arg(temporary.path().join("pytest"))
        .env("OTPGATE_BIN", env!("CARGO_BIN_EXE_otpgate"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(package);
    let ran = output_within(PATIENCE, pytest).await;
    let text = stdout(&ran);
    assert!(ran.status.success(), "{text}{}", stderr(&ran));

    // Tests that were left out would show nothing.
    let summary = text.lines().last().unwrap_or_default();
    assert!(summary.contains(" passed") && !summary.contains("skipped"), "{text}");
}
