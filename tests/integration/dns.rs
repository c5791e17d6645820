//! Upstreams by DNS name: looked up again and again, the last good answer kept.
//!
//! The gate runs with an `/etc/hosts` of its own, in a mount namespace of its own.

use std::path::Path;

use crate::harness::{ALICE, Gate, Sandbox, eventually, token};
use crate::peers::echo::Echo;

fn spawn(sandbox: &Sandbox, hosts: &Path, port: u16) -> Gate {
    let config = sandbox.write(
        "otpgate.toml",
        &format!(
            "[proxy]\nlisten = '127.0.0.1:0'\nupstream = 'http://app.test:{port}'\n\
             [proxy.health]\ndns_interval = '100ms'\n\
             [api]\nlisten = 'off'\n[ops]\nlisten = '127.0.0.1:0'\n\
             [store]\nurl = '{}'\n",
            sandbox.store()
        ),
    );
    Gate::with_hosts(hosts, &config)
}

/// Who answers a call: the upstream's name, or nobody and the gate's status.
async fn answers(gate: &Gate) -> String {
    let answer = gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    match answer.headers().get("x-upstream") {
        Some(name) => name.to_str().unwrap().to_owned(),
        None => answer.status().as_str().to_owned(),
    }
}

#[tokio::test]
async fn a_name_that_moves_is_followed_and_one_that_is_lost_is_kept() {
    let sandbox = Sandbox::with_entries();
    let one = Echo::at("one", "127.0.0.1:0").await;
    let port = one.address.port();
    let _two = Echo::at("two", &format!("127.0.0.2:{port}")).await;
    let hosts = sandbox.write("hosts", "127.0.0.1 localhost\n");
    let gate = spawn(&sandbox, &hosts, port).ready().await;
    // Nobody knows the name yet: the gate serves, and says so.
    assert_eq!(answers(&gate).await, "502");
    gate.wait_for_log(|line| line["host"] == "app.test").unwrap();

    for (address, name) in [("127.0.0.1", "one"), ("127.0.0.2", "two"), ("127.0.0.1", "one")] {
        sandbox.write("hosts", &format!("{address} app.test\n"));
        eventually("the name is followed", || async {
            (answers(&gate).await == name).then_some(())
        })
        .await;
    }

    sandbox.write("hosts", "127.0.0.1 localhost\n");
    gate.wait_for_log(|line| line["host"] == "app.test" && line["kept"] == 1).unwrap();
    assert_eq!(answers(&gate).await, "one");
}
