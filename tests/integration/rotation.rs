//! Rotation of seeds: the real program, its API and its client.

use serde_json::{Value, json};

use crate::harness::{
    ADMIN, ALICE, Gate, Sandbox, eventually, http, otpgate, stderr, stdout, token,
};
use crate::peers::echo::Echo;

async fn status(gate: &Gate, seed: &str) -> u16 {
    let call = gate.call("/", "alice", "shop", &token(seed));
    call.send().await.unwrap().status().as_u16()
}

async fn rotate(gate: &Gate, fields: Value) -> (u16, Value) {
    let mut body = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(ADMIN),
    });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let url = format!("{}/ungleichotp/3/rotate/?full=1", gate.api);
    let answer = http().post(url).json(&body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

fn seed_of(answer: &Value) -> String {
    answer["seed"].as_str().unwrap().to_owned()
}

async fn start(sandbox: &Sandbox, echo: &Echo, api: &str) -> Gate {
    let upstream = format!("[proxy]\nupstream = '{}'\n", echo.address);
    sandbox.serve(&format!("{upstream}[throttle]\nenabled = false\n{api}")).ready().await
}

#[tokio::test(flavor = "multi_thread")]
async fn both_seeds_work_during_the_overlap() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "[realms.shop]\n").await;
    let (code, shown) = rotate(&gate, json!({})).await;
    assert_eq!(code, 200, "{shown}");
    let new = seed_of(&shown);
    assert_ne!(new, ALICE);
    assert!(shown["previous_seed_until"].is_string(), "{shown}");
    assert_eq!((status(&gate, ALICE).await, status(&gate, &new).await), (200, 200));

    // Who still uses the old one can be found out.
    let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let line = "otpgate_previous_seed_verifications_total{realm=\"shop\"} 1";
    assert!(metrics.contains(line), "{metrics}");
    let access = gate.wait_for_log(|line| line["seed"] == "previous").unwrap();
    assert_eq!((&access["name"], &access["realm"]), (&json!("alice"), &json!("shop")));
    let audit = gate.wait_for_log(|line| line["action"] == "rotate").unwrap();
    assert_eq!((&audit["outcome"], &audit["id"]), (&json!("done"), &json!(3)));
    assert!(!gate.log_text().contains(&new));

    // No overlap: every older seed ends at once.
    let (code, shown) = rotate(&gate, json!({ "overlap": 0 })).await;
    assert_eq!((code, &shown["previous_seed_until"]), (200, &Value::Null));
    assert_eq!((status(&gate, ALICE).await, status(&gate, &new).await), (401, 401));
    assert_eq!(status(&gate, &seed_of(&shown)).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_overlap_ends_by_itself() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "[api]\nrotate_overlap = '2s'\n").await;
    let (_, shown) = rotate(&gate, json!({})).await;
    assert_eq!(status(&gate, &seed_of(&shown)).await, 200);
    eventually("the old seed is refused", || async {
        (status(&gate, ALICE).await == 401).then_some(())
    })
    .await;
    assert_eq!(status(&gate, &seed_of(&shown)).await, 200);
    // Then nothing stands in the way of the next one.
    assert_eq!(rotate(&gate, json!({})).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_rotation_drops_no_seed_unasked() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "").await;
    let lost = seed_of(&rotate(&gate, json!({})).await.1);
    let (code, refused) = rotate(&gate, json!({})).await;
    assert_eq!(code, 409, "{refused}");
    assert_eq!(status(&gate, &lost).await, 200, "nothing has changed");
    // The answer was lost: callers still use the first one.
    let (_, shown) = rotate(&gate, json!({ "keep": "previous" })).await;
    let second = seed_of(&shown);
    assert_eq!(status(&gate, ALICE).await, 200);
    assert_eq!((status(&gate, &lost).await, status(&gate, &second).await), (401, 200));
    // Callers have changed over.
    let (_, shown) = rotate(&gate, json!({ "keep": "current", "overlap": 60 })).await;
    assert_eq!((status(&gate, ALICE).await, status(&gate, &second).await), (401, 200));
    assert_eq!(status(&gate, &seed_of(&shown)).await, 200);
    for (fields, bad) in [
        (json!({ "overlap": -1 }), "overlap"),
        (json!({ "overlap": 7_776_001 }), "overlap"),
        (json!({ "overlap": "soon" }), "overlap"),
        (json!({ "keep": "both" }), "keep"),
    ] {
        let (code, errors) = rotate(&gate, fields).await;
        assert_eq!((code, errors[bad].is_array()), (400, true), "{errors}");
    }
}

/// A used token of one seed says nothing about the other's token of the same time step.
#[tokio::test(flavor = "multi_thread")]
async fn one_time_tokens_of_both_seeds_are_apart() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "[realms.shop]\nreuse = 'once'\n").await;
    let new = seed_of(&rotate(&gate, json!({})).await.1);
    let (old_token, new_token) = (token(ALICE), token(&new));
    for (token, expected) in
        [(&old_token, 200), (&new_token, 200), (&old_token, 401), (&new_token, 401)]
    {
        let call = gate.call("/", "alice", "shop", token).send().await.unwrap();
        assert_eq!(call.status(), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_rotates() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "[api]\nreveal_seeds = false\n").await;
    let client = |args: &[&str]| {
        otpgate()
            .args(["client", "--server-url", &gate.api, "--auth-name", "admin"])
            .args(["--auth-realm", "ungleich-admin", "--json"])
            .env("OTPGATE_AUTH_SEED", ADMIN)
            .args(args)
            .output()
            .unwrap()
    };
    let who = ["--name", "alice", "--realm", "shop"];
    let output = client(&[&["rotate"][..], &who, &["--overlap", "10m"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let shown: Value = serde_json::from_str(&stdout(&output)).unwrap();
    // This answer shows the seed though others hide it.
    assert_eq!((status(&gate, &seed_of(&shown)).await, status(&gate, ALICE).await), (200, 200));
    let again = client(&[&["rotate"][..], &who].concat());
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("`keep`"), "{}", stderr(&again));
    let kept = client(&[&["rotate"][..], &who, &["--keep", "previous"]].concat());
    assert!(kept.status.success(), "{}", stderr(&kept));
    assert_eq!(status(&gate, ALICE).await, 200);
}
