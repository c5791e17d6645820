//! Whoever is refused cannot tell why: the answers are the same, byte for byte.

use serde_json::{Value, json};

use crate::harness::{
    ADMIN, ALICE, BOB, Gate, Sandbox, VERIFIER, address, http, token, wrong_token,
};
use crate::peers::wire::{Answer, Connection};

/// An answer without what differs between any two: its time and its request's id.
fn bare(answer: &Answer) -> String {
    let head: Vec<_> = answer
        .head
        .lines()
        .filter(|line| !line.to_ascii_lowercase().starts_with("date: "))
        .map(|line| match line.to_ascii_lowercase().starts_with("x-request-id: ") {
            true => format!("id of {} characters", line.len()),
            false => line.to_owned(),
        })
        .collect();
    let mut body = answer.text();
    if let Some(id) = answer.json()["request_id"].as_str() {
        body = body.replace(id, &"0".repeat(id.len()));
    }
    format!("{}\n\n{body}", head.join("\n"))
}

async fn change(gate: &Gate, id: u64, fields: Value) {
    let mut body = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(ADMIN),
    });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let url = format!("{}/ungleichotp/{id}/", gate.api);
    assert_eq!(http().patch(url).json(&body).send().await.unwrap().status(), 200);
}

/// The seed of carol@used, whose tokens may be used once.
const CAROL: &str = "KRSXG5CTMVRXEZLUKRSXG5CTMVRXEZLU";

/// Claims that are refused, each for another reason. `used` is a token of carol's.
fn claims(used: &str) -> Vec<(&'static str, &'static str, &'static str, String)> {
    vec![
        ("wrong token", "alice", "shop", wrong_token(ALICE)),
        ("unknown name", "alic3", "shop", token(ALICE)),
        ("unknown realm", "alice", "sh0p", token(ALICE)),
        ("disabled", "bob", "lab", token(BOB)),
        ("disabled, wrong token", "bob", "lab", wrong_token(BOB)),
        ("expired", "expired", "lab", token(BOB)),
        ("too many digits", "alice", "shop", format!("{}0", token(ALICE))),
        ("no digits", "alice", "shop", "abcdef".to_owned()),
        ("somebody else's token", "alice", "shop", token(BOB)),
        ("used", "carol", "used", used.to_owned()),
    ]
}

/// A gate, and a token of carol's that was used.
async fn gate(sandbox: &Sandbox) -> (Gate, String) {
    let more = [(5, "expired", "lab", BOB), (6, "carol", "used", CAROL)];
    assert_eq!(sandbox.import(&more), [""; 0]);
    let settings = "[throttle]\nenabled = false\n[realms.used]\nreuse = 'once'\n";
    let gate = sandbox.serve(settings).ready().await;
    let used = token(CAROL);
    let status = gate.call("/", "carol", "used", &used).send().await.unwrap().status();
    assert_ne!(status, 401, "its first use");
    change(&gate, 4, json!({"enabled": false})).await;
    change(&gate, 5, json!({"expires_at": "2001-01-01T00:00:00Z"})).await;
    (gate, used)
}

/// Asserts that all answers are the first one.
#[track_caller]
fn assert_alike(answers: &[(&str, String)]) {
    for (why, answer) in answers {
        assert_eq!(answer, &answers[0].1, "{why} differs from {}", answers[0].0);
    }
}

#[tokio::test]
async fn refusals_of_the_proxy_are_alike() {
    let sandbox = Sandbox::with_entries();
    let (gate, used) = gate(&sandbox).await;
    let mut answers = Vec::new();
    let mut connection = Connection::to(address(&gate.proxy)).await;
    for (why, name, realm, token) in claims(&used) {
        let head = format!(
            "GET / HTTP/1.1\r\nHost: gate\r\nX-Auth-Name: {name}\r\nX-Auth-Realm: {realm}\r\n\
             X-Auth-Token: {token}\r\n\r\n"
        );
        let answer = connection.ask(head).await.unwrap();
        assert_eq!(answer.status, 401, "{why}");
        answers.push((why, bare(&answer)));
    }
    assert_alike(&answers);
}

#[tokio::test]
async fn refusals_of_the_api_are_alike() {
    let sandbox = Sandbox::with_entries();
    let (gate, used) = gate(&sandbox).await;
    let mut connection = Connection::to(address(&gate.api)).await;
    // Of callers, and of those whom a proven caller asks about.
    for asks_about in [false, true] {
        let mut answers = Vec::new();
        for (why, name, realm, claimed) in claims(&used) {
            let body = match asks_about {
                false => json!({ "auth_name": name, "auth_realm": realm, "auth_token": claimed }),
                true => json!({
                    "auth_name": "verifier", "auth_realm": "ungleich-auth",
                    "auth_token": token(VERIFIER),
                    "name": name, "realm": realm, "token": claimed,
                }),
            };
            let body = body.to_string();
            let head = format!(
                "POST /verify HTTP/1.1\r\nHost: gate\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let answer = connection.ask(head).await.unwrap();
            assert_eq!(answer.status, 403, "{why}");
            answers.push((why, bare(&answer)));
        }
        assert_alike(&answers);
    }
}
