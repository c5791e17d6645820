//! The API over TLS, as other programs see it: curl and the commands.

use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{ADMIN, Gate, Sandbox, otpgate, run_with_input, stderr, stdout, token};
use crate::peers::tls::Pki;

/// A gate whose API speaks TLS alone, and the API's URL.
async fn gate(sandbox: &Sandbox, pki: &Pki) -> (Gate, String) {
    let settings = format!(
        "[api]\ntls_cert_file = '{}'\ntls_key_file = '{}'\n",
        pki.files.cert_file.display(),
        pki.files.key_file.display()
    );
    let gate = sandbox.serve(&settings).ready().await;
    let port = gate.api.rsplit(':').next().unwrap();
    let url = format!("https://localhost:{port}");
    (gate, url)
}

#[tokio::test]
async fn curl_is_served_over_either_http() {
    let (sandbox, pki) = (Sandbox::with_entries(), Pki::new());
    let (_gate, url) = gate(&sandbox, &pki).await;
    for (flag, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let mut curl = Command::new("curl");
        // The resolver may prefer ::1.
        curl.args(["-sS", "--ipv4", flag, "--cacert"]).arg(&pki.ca_file);
        curl.args(["-H", "Content-Type: application/json", "-d", "@-", "-X", "GET"]);
        curl.args(["-w", "\n%{http_version} %{http_code}", &format!("{url}/")]);
        let body = json!({
            "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(ADMIN),
        });
        let output = run_with_input(curl, &body.to_string());
        assert!(output.status.success(), "{}", stderr(&output));
        let expected = format!("{{\"ungleichotp\":\"{url}/ungleichotp/\"}}\n{version} 200");
        assert_eq!(stdout(&output), expected);
    }
}

#[tokio::test]
async fn the_commands_know_whom_they_trust() {
    let (sandbox, pki) = (Sandbox::with_entries(), Pki::new());
    let (gate, url) = gate(&sandbox, &pki).await;
    let list = |url: &str, more: &[&str]| {
        otpgate()
            .args(["client", "--json", "list", "--server-url", url])
            .args(["--auth-name", "admin", "--auth-realm", "ungleich-admin"])
            .args(more)
            .env("OTPGATE_AUTH_SEED", ADMIN)
            .output()
            .unwrap()
    };
    let trusting = ["--ca-file", pki.ca_file.to_str().unwrap()];
    let listed = list(&url, &trusting);
    assert!(listed.status.success(), "{}", stderr(&listed));
    let entries: Value = serde_json::from_str(&stdout(&listed)).unwrap();
    assert_eq!(entries.as_array().map(Vec::len), Some(4));

    // A CA that nobody named, a name that the certificate does not hold, no TLS at all.
    let port = url.rsplit(':').next().unwrap();
    for (url, more) in [
        (url.clone(), &[] as &[&str]),
        (format!("https://127.0.0.1:{port}"), &trusting),
        (gate.api.clone(), &trusting),
    ] {
        let refused = list(&url, more);
        assert_eq!(refused.status.code(), Some(1), "{url}");
        assert!(stderr(&refused).contains("cannot be reached"), "{url}: {}", stderr(&refused));
    }
}
