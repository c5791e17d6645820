//! Successors that do not get as far as serving: the old process goes on.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::{Dynasty, has_ended, installed};
use crate::harness::{ALICE, Gate, Sandbox, eventually, free_port, http, token};
use crate::peers::echo::Echo;

/// Puts a program into the place of the gate's, as an installation does: beside it, then renamed.
fn install(sandbox: &Sandbox, program: &[u8]) {
    let beside = sandbox.path("otpgate.new");
    std::fs::write(&beside, program).unwrap();
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(beside, sandbox.path("otpgate")).unwrap();
}

async fn failures(gate: &Gate) -> String {
    let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let line = metrics.lines().find(|line| line.starts_with("otpgate_upgrade_failures_total"));
    line.unwrap().to_owned()
}

/// The failure that is logged after so many others.
fn told(gates: &Dynasty, about: &str) {
    let is_it = |error: &str| error.contains(about);
    gates.gate.wait_for_log(|line| line["error"].as_str().is_some_and(is_it)).unwrap();
}

async fn answers(gate: &Gate) {
    let call = gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    assert_eq!(call.status(), 200);
}

#[tokio::test]
async fn a_successor_that_does_not_serve_changes_nothing() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let of_store = |store: &str, more: &str| {
        format!(
            "[proxy]\nupstream = '{}'\n[shutdown]\nupgrade_timeout = '1s'\n[store]\n{store}\n{more}",
            echo.address
        )
    };
    let settings = |more: &str| of_store(&format!("url = '{}'", sandbox.store()), more);
    let mut gates = Dynasty::new(installed(&sandbox, &settings("")).ready().await);
    let failed = |n: usize| format!("otpgate_upgrade_failures_total {n}");

    // Settings that cannot be used.
    sandbox.write("otpgate.toml", &settings("[nonsense]\n"));
    gates.signal(libc::SIGUSR2);
    told(&gates, "the new process ended before it served: exit status: 1");
    answers(&gates.gate).await;
    assert_eq!(failures(&gates.gate).await, failed(1));
    sandbox.write("otpgate.toml", &settings(""));

    // A store that it cannot reach, unlike this process.
    let away = format!("url = 'redis://127.0.0.1:{}'\nsealing = 'off'", free_port());
    sandbox.write("otpgate.toml", &of_store(&away, ""));
    gates.signal(libc::SIGUSR2);
    told(&gates, "was not ready within `shutdown.upgrade_timeout` (1s)");
    answers(&gates.gate).await;
    assert_eq!(failures(&gates.gate).await, failed(2));
    sandbox.write("otpgate.toml", &settings(""));

    // No program.
    install(&sandbox, b"this is none");
    gates.signal(libc::SIGUSR2);
    told(&gates, "cannot start `");
    answers(&gates.gate).await;

    // One that does something else, for too long.
    install(&sandbox, b"#!/bin/sh\nexec sleep 600\n");
    gates.signal(libc::SIGUSR2);
    eventually("it is given up", || async {
        (failures(&gates.gate).await == failed(4)).then_some(())
    })
    .await;
    answers(&gates.gate).await;
    let log = gates.gate.log_text();
    let started =
        log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let started = started.filter(|line| line["message"] == "started a successor");
    for line in started {
        let pid = i32::try_from(line["pid"].as_i64().unwrap()).unwrap();
        eventually("nothing of it is left", || async { has_ended(pid).then_some(()) }).await;
    }

    // Then a good one, where the running one was long since removed.
    install(&sandbox, &std::fs::read(env!("CARGO_BIN_EXE_otpgate")).unwrap());
    gates.upgrade();
    answers(&gates.gate).await;
    let program = std::fs::read_link(format!("/proc/{}/exe", gates.reigning)).unwrap();
    assert_eq!(program, sandbox.path("otpgate"));
    assert_eq!(failures(&gates.gate).await, failed(0), "another process");
    let events = gates.gate.log_text();
    assert_eq!(events.matches("\"action\":\"upgrade\"").count(), 4, "{events}");
}

#[tokio::test]
async fn a_stop_ends_an_upgrade_that_is_under_way() {
    let sandbox = Sandbox::with_entries();
    let settings = format!("[store]\nurl = '{}'\n", sandbox.store());
    let gates = Dynasty::new(installed(&sandbox, &settings).ready().await);
    install(&sandbox, b"#!/bin/sh\nexec sleep 600\n");
    gates.signal(libc::SIGUSR2);
    let successor = gates.next_of("started a successor");
    gates.signal(libc::SIGTERM);
    for pid in [successor, gates.reigning] {
        eventually("both end", || async { has_ended(pid).then_some(()) }).await;
    }
}

/// A Unix socket that a failed successor had already is still there, and the old process's.
#[tokio::test]
async fn a_failed_successor_leaves_the_sockets_in_their_places() {
    let sandbox = Sandbox::with_entries();
    let path = sandbox.path("api.sock");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let settings = |ops: SocketAddr| {
        format!("[api]\nlisten = 'unix:{}'\n[ops]\nlisten = '{ops}'\n", path.display())
    };
    let gates = Dynasty::found(&sandbox, &settings(([127, 0, 0, 1], 0).into())).await;
    // Found out only when other addresses are open.
    sandbox.write("otpgate.toml", &settings(taken.local_addr().unwrap()));
    gates.signal(libc::SIGUSR2);
    told(&gates, "exit status: 1");
    tokio::net::UnixStream::connect(&path).await.unwrap();
    gates.signal(libc::SIGTERM);
    eventually("it ends", || async { has_ended(gates.reigning).then_some(()) }).await;
    assert!(!Path::new(&path).exists(), "the old one removes it");
}

/// An old process that cannot answer callers has nothing that a new one could lose.
#[tokio::test]
async fn a_store_that_is_away_does_not_hinder_an_upgrade() {
    let sandbox = Sandbox::new();
    let settings = format!(
        "[store]\nurl = 'redis://127.0.0.1:{}'\nsealing = 'off'\nmax_stale = '2s'\n",
        free_port()
    );
    let mut gates = Dynasty::new(sandbox.serve(&settings));
    gates.upgrade();
    let ready = http().get(format!("{}/readyz", gates.gate.ops)).send().await.unwrap();
    assert_eq!(ready.status(), 503);
}

#[test]
fn the_flag_is_for_gates() {
    let sandbox = Sandbox::with_entries();
    let mut command = crate::harness::otpgate();
    command.args(["serve", "--takeover", "--store", &sandbox.store()]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = crate::harness::stderr(&output);
    assert!(
        said.contains("`--takeover` is for a gate that starts its successor (SIGUSR2)"),
        "{said}"
    );
}
