//! Generated requests of every kind against a gate: what it answers must be what `/openapi.json` says.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::api_harness::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_as_the_schema_says() {
    let gate = Gate::start().await;
    // The hooks point generated numbers at these.
    let pool: Vec<_> =
        (1000..1500).map(|id| entry(id, (&format!("n{id}"), "pool", USER.2))).collect();
    gate.store.insert(&pool).await.unwrap();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut venv = Command::new(root.join("tests/tools/venv"));
    let base = gate.base.clone();
    let ran = tokio::task::spawn_blocking(move || {
        let made = venv.stdin(Stdio::null()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let python = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
        Command::new(python.with_file_name("schemathesis"))
            .args(["run", &format!("{base}/openapi.json"), "--no-color", "--max-examples=40"])
            .args(["--phases=examples,coverage,fuzzing", "--seed=1"])
            // Leniency is part of the API: unknown fields are skipped, numbers count as texts.
            .arg("--exclude-checks=negative_data_rejection")
            .env("SCHEMATHESIS_HOOKS", "schema_hooks")
            .env("PYTHONPATH", root.join("tests/tools"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("ADMIN_SEED", ADMIN.2)
            .env("AUTH_SEED", AUTH.2)
            .current_dir(root.join("target"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    })
    .await
    .unwrap();
    let text = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(ran.status.success(), "{text}{}", String::from_utf8_lossy(&ran.stderr));
    // Requests that were all refused would show nothing.
    let metrics = String::from_utf8(gate.metrics.render()).unwrap();
    for action in ["root", "list", "create", "show", "update", "delete", "verify", "options"] {
        let done =
            format!("otpgate_requests_total{{listener=\"api\",outcome=\"ok\",route=\"{action}\"}}");
        assert!(metrics.contains(&done), "no `{action}` was done: {metrics}");
    }
}
