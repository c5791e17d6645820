//! Generated requests of every kind against a gate: what it answers must be what `/openapi.json` says.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::{
    ADMIN, ALICE, Sandbox, VERIFIER, http, output_within, python, stderr, stdout,
};

/// A run takes some 20 seconds of a whole processor.
const PATIENCE: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_as_the_schema_says() {
    let sandbox = Sandbox::with_entries();
    // The hooks point generated numbers at these.
    let names: Vec<_> = (1000..1500).map(|id| (id, format!("n{id}"))).collect();
    let pool: Vec<_> = names.iter().map(|(id, name)| (*id, name.as_str(), "pool", ALICE)).collect();
    assert_eq!(sandbox.import(&pool), [""; 0]);
    let gate = sandbox.serve("").ready().await;

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut schemathesis = Command::new(python().await.with_file_name("schemathesis"));
    schemathesis
        .args(["run", &format!("{}/openapi.json", gate.api), "--no-color", "--max-examples=40"])
        .args(["--phases=examples,coverage,fuzzing", "--request-timeout=20"])
        // The same requests every time: a failure must be due to a change.
        .arg("--generation-deterministic")
        // Leniency is part of the API: unknown fields are skipped, numbers count as texts.
        .arg("--exclude-checks=negative_data_rejection")
        .env("SCHEMATHESIS_HOOKS", "schema_hooks")
        .env("PYTHONPATH", root.join("tests/tools"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("ADMIN_SEED", ADMIN)
        .env("VERIFIER_SEED", VERIFIER)
        .current_dir(sandbox.path(""));
    let ran = output_within(PATIENCE, schemathesis).await;
    assert!(ran.status.success(), "{}{}", stdout(&ran), stderr(&ran));

    // Requests that were all refused would show nothing.
    let metrics =
        http().get(format!("{}/metrics", gate.ops)).send().await.unwrap().text().await.unwrap();
    for action in [
        "root", "list", "create", "show", "update", "rotate", "enrol", "delete", "verify",
        "options",
    ] {
        let done =
            format!("otpgate_requests_total{{listener=\"api\",outcome=\"ok\",route=\"{action}\"}}");
        assert!(metrics.contains(&done), "no `{action}` was done: {metrics}");
    }
    assert!(metrics.contains("otpgate_panics_total 0"), "{metrics}");
}
