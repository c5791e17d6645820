//! What the numbers were measured on.

use std::fs;
use std::process::Command;

use serde::Serialize;

/// Names and what stands behind them.
pub(crate) type Facts = Vec<Fact>;

/// One of them.
#[derive(Serialize)]
pub(crate) struct Fact {
    pub(crate) what: &'static str,
    pub(crate) is: String,
}

/// All of them.
pub(crate) fn facts(threads: usize) -> Facts {
    let profile = if cfg!(debug_assertions) {
        "not optimised: these numbers mean nothing"
    } else {
        "bench (that of release)"
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let processes = match threads {
        1 => "1 thread or worker each; upstream and load on core 0, what is measured on core 1",
        _ => "all share all cores",
    };
    let processes = format!("{processes}; threads of what is measured: {threads}");
    let facts = [
        ("processor", format!("{}, {cores} cores", value("/proc/cpuinfo", "model name", ':'))),
        ("memory", value("/proc/meminfo", "MemTotal", ':')),
        ("system", value("/etc/os-release", "PRETTY_NAME", '=').replace('"', "")),
        ("kernel", fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()),
        ("processes", processes),
        ("otpgate", format!("{} ({})", env!("CARGO_PKG_VERSION"), revision())),
        ("profile", profile.to_owned()),
        ("toolchain", said("rustc", &["-V"])),
        ("nginx", said("nginx", &["-v"])),
        ("HAProxy", said("haproxy", &["-v"])),
        ("Caddy", said("caddy", &["version"])),
        ("wrk", said("wrk", &["-v"])),
        ("h2load", said("h2load", &["--version"])),
    ];
    facts.map(|(what, is)| Fact { what, is: is.trim().to_owned() }).into()
}

/// The first line that begins with `key`.
fn value(file: &str, key: &str, separator: char) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key));
    let value = line.and_then(|line| line.split_once(separator));
    value.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

fn revision() -> String {
    let git = |args| said("git", args);
    let revision = git(&["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--short=12", "HEAD"]);
    let changed = git(&["-C", env!("CARGO_MANIFEST_DIR"), "status", "--porcelain", "-uno"]);
    match (revision.as_str(), changed.as_str()) {
        ("", _) => "no revision known".to_owned(),
        (revision, "") => revision.to_owned(),
        (revision, _) => format!("{revision}, with changes"),
    }
}

/// The first line that a program says, wherever; nothing if it cannot be run.
fn said(program: &str, args: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(args).output() else { return String::new() };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().next().unwrap_or_default().trim().to_owned()
}
