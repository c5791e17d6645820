//! The first thing that a stranger runs.

use crate::harness::{run, stderr, stdout};

#[test]
fn the_demo_shows_the_main_job_and_ends() {
    let output = run(&["demo", "--once"]);
    let shown = stdout(&output);
    assert!(output.status.success(), "{shown}{}", stderr(&output));
    let answers: Vec<_> = shown.lines().filter_map(|l| l.strip_prefix("→ ")).collect();
    assert_eq!(
        answers,
        [
            "200 OK",
            "401 Unauthorized",
            "403 Forbidden",
            "401 Unauthorized",
            "200 OK",
            "200 OK",
            "403 Forbidden"
        ]
    );
    assert!(shown.contains("the upstream got GET /orders\n  X-Auth-Name: alice\n  X-Auth-Realm: shop\n  X-Auth-Token: (none)"), "{shown}");
    assert!(shown.contains("{\"status\":\"OK\"}"), "{shown}");
    assert!(!shown.contains("panicked") && stderr(&output).is_empty(), "{}", stderr(&output));
}
