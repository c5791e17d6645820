//! The audit trail of the real program: where it goes, and what changes it tells.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{ADMIN, Gate, Sandbox, eventually, http, otpgate, run, stderr, stdout, token};

/// The events in a file so far, without what differs from run to run.
fn events(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// `action outcome name`.
fn short(event: &Value) -> String {
    ["action", "outcome", "name"]
        .into_iter()
        .filter_map(|field| event[field].as_str())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Waits until a file holds an event.
async fn wait_for(file: &Path, expected: &str) {
    eventually(expected, || async {
        events(file).iter().any(|e| short(e) == expected).then_some(())
    })
    .await;
}

async fn manage(gate: &Gate, method: &str, path: &str, more: Value) -> Value {
    let mut body = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(ADMIN),
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
    let url = format!("{}/ungleichotp/{path}", gate.api);
    let answer = http().request(method, url).json(&body).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.status());
    answer.json().await.unwrap_or_default()
}

#[tokio::test]
async fn a_file_holds_the_whole_trail_and_the_log_none_of_it() {
    let sandbox = Sandbox::with_entries();
    let file = sandbox.path("audit.json");
    let settings = format!("[log]\nlevel = 'error'\naudit = 'file:{}'\n", file.display());
    // Below this level nothing says where the gate listens.
    let settings = settings.replace("'error'", "'error,otpgate::commands::serve=info'");
    let gate = sandbox.serve(&settings).ready().await;
    wait_for(&file, "directory current").await;
    let made = manage(&gate, "POST", "", json!({"name": "n\"ew\\", "realm": "shop"})).await;
    let one = format!("{}/", made["id"]);
    manage(&gate, "PATCH", &one, json!({"enabled": false})).await;
    manage(&gate, "PATCH", &one, json!({"comment": "no change of whom it lets pass"})).await;
    manage(&gate, "PATCH", &one, json!({"enabled": true})).await;
    manage(&gate, "DELETE", &one, json!({})).await;
    // Another process's write is told when it is in force here.
    let bootstrap = ["store", "bootstrap", "--name", "second", "--config"];
    let mut command = otpgate();
    command.args(bootstrap).arg(sandbox.path("otpgate.toml")).args(["--store", &sandbox.store()]);
    let output = command.output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
    wait_for(&file, "entry accepted second").await;
    gate.signal(libc::SIGTERM);
    let log = gate.log_text();
    assert!(gate.wait().success());

    let events = events(&file);
    let name = "n\"ew\\";
    let mut told: Vec<_> = events.iter().map(short).collect();
    // Writer and follower of one change tell it in either order; so do gate and directory at the start.
    told.sort();
    let mut expected = vec![
        "gate started".to_owned(),
        "directory current".into(),
        format!("create done {name}"),
        format!("entry accepted {name}"),
        format!("update done {name}"),
        format!("entry refused {name}"),
        format!("update done {name}"),
        format!("update done {name}"),
        format!("entry accepted {name}"),
        format!("delete done {name}"),
        format!("entry refused {name}"),
        "store_bootstrap done second".into(),
        "entry accepted second".into(),
        "gate stopped".into(),
    ];
    expected.sort();
    assert_eq!(told, expected);
    assert!(events.iter().all(|event| event["target"] == "otpgate::audit"));
    let bootstrap = events.iter().find(|e| e["action"] == "store_bootstrap").unwrap();
    assert!(bootstrap["caller"].as_str().unwrap().starts_with("uid "), "{bootstrap}");
    assert!(!log.contains("otpgate::audit"), "{log}");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains(made["seed"].as_str().unwrap()) && !text.contains(ADMIN));
}

#[tokio::test]
async fn a_gate_that_cannot_know_its_entries_tells_it_once() {
    let sandbox = Sandbox::with_entries();
    let file = sandbox.path("audit.json");
    let settings = format!(
        "[store]\nurl = '{}'\nmax_stale = '2s'\n[log]\naudit = 'file:{}'\n",
        sandbox.store(),
        file.display()
    );
    let gate = sandbox.serve(&settings).ready().await;
    wait_for(&file, "directory current").await;
    let (database, aside) = (sandbox.path("otpgate.db"), sandbox.path("aside"));
    std::fs::rename(&database, &aside).unwrap();
    std::fs::create_dir(&database).unwrap();
    wait_for(&file, "directory stale").await;
    std::fs::remove_dir(&database).unwrap();
    std::fs::rename(&aside, &database).unwrap();
    let turns = || events(&file).iter().filter(|e| e["action"] == "directory").count();
    eventually("the gate answers again", || async { (turns() == 3).then_some(()) }).await;
    drop(gate);
    assert_eq!(turns(), 3);
}

#[test]
fn a_trail_that_cannot_be_written_is_refused_at_once() {
    let sandbox = Sandbox::new();
    let config = sandbox.write("otpgate.toml", "[log]\naudit = 'file:/absent/audit.json'\n");
    let (config, store) = (config.to_str().unwrap(), sandbox.store());
    for command in [vec!["check"], vec!["serve"], vec!["store", "init"], vec!["store", "bootstrap"]]
    {
        let mut args = command.clone();
        args.extend(["--store", &store, "--config", config]);
        let output = run(&args);
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let complaint = stderr(&output);
        assert!(
            complaint.contains("cannot write audit events to `/absent/audit.json`"),
            "{complaint}"
        );
    }
    assert!(!sandbox.path("otpgate.db").exists(), "nothing was written that is not in the trail");
}

/// As on a full disk.
#[tokio::test]
async fn events_that_nothing_takes_go_to_the_log_and_count() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("[log]\naudit = 'file:/dev/full'\n").ready().await;
    manage(&gate, "GET", "", json!({})).await;
    gate.wait_for_log(|line| line["action"] == "list").unwrap();
    let trouble = |line: &Value| {
        line["level"] == "ERROR"
            && line["message"].as_str().is_some_and(|m| m.starts_with("audit events"))
    };
    gate.wait_for_log(trouble).unwrap();
    let log = gate.log_text();
    let said = log.lines().filter(|l| trouble(&serde_json::from_str(l).unwrap())).count();
    assert_eq!(said, 1, "{log}");
    let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let failures =
        metrics.lines().find_map(|l| l.strip_prefix("otpgate_audit_write_failures_total "));
    assert!(failures.unwrap().parse::<f64>().unwrap() >= 2.0, "{failures:?}");
}

#[test]
fn standard_output_can_be_the_trail() {
    let sandbox = Sandbox::with_entries();
    let config = sandbox.write("otpgate.toml", "[log]\naudit = 'stdout'\n");
    let mut command = otpgate();
    command.args(["serve", "--proxy", "127.0.0.1:0", "--api", "off", "--ops", "off", "--config"]);
    command.arg(config).args(["--store", &sandbox.store()]);
    let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(first["target"], "otpgate::audit");
    let init = run(&["store", "init", "--json", "--store", &sandbox.store()]);
    assert_eq!(stdout(&init).lines().count(), 1, "a command's output is its result alone");
}
