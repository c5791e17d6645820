//! The whole gate as an operator runs it: the real program in front of a real nginx, entries made and
//! changed through its own commands.

use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{
    ADMIN, ALICE, BOB, Gate, Sandbox, Server, VERIFIER, eventually, free_port, http, otpgate, run,
    stderr, stdout, token, wrong_token,
};

/// A real nginx that answers with what it got.
async fn nginx(sandbox: &Sandbox) -> (Server, String) {
    let port = free_port();
    let dir = sandbox.path("").display().to_string();
    let config = sandbox.write(
        "nginx.conf",
        &format!(
            r#"
            daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/nginx-error.log;
            events {{}}
            http {{
                access_log off;
                client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
                uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
                underscores_in_headers on;
                server {{
                    listen 127.0.0.1:{port};
                    location / {{
                        default_type application/json;
                        return 200 '{{"name":"$http_x_auth_name","realm":"$http_x_auth_realm","token":"$http_x_auth_token","uri":"$request_uri","for":"$http_x_forwarded_for"}}';
                    }}
                }}
            }}"#
        ),
    );
    let program =
        if std::path::Path::new("/usr/sbin/nginx").exists() { "/usr/sbin/nginx" } else { "nginx" };
    let server = Server::spawn(
        Command::new(program).arg("-p").arg(&dir).arg("-c").arg(&config),
        &sandbox.path("nginx.log"),
    );
    eventually("nginx answers", || async {
        http().get(format!("http://127.0.0.1:{port}/")).send().await.ok().map(|_| ())
    })
    .await;
    (server, format!("127.0.0.1:{port}"))
}

async fn gate(sandbox: &Sandbox, upstream: &str, routes: &str) -> Gate {
    sandbox.serve(&format!("[proxy]\nupstream = '{upstream}'\n{routes}")).ready().await
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap_or(Value::Null))
}

#[tokio::test]
async fn tokens_decide_who_passes() {
    let sandbox = Sandbox::with_entries();
    let (_nginx, upstream) = nginx(&sandbox).await;
    let gate = gate(
        &sandbox,
        &upstream,
        "[[route]]\npath = '/'\nallow = ['shop']\n[[route]]\npath = '/public'\npublic = true\n",
    )
    .await;

    let (status, seen) = answer(gate.call("/orders?x=1", "alice", "shop", &token(ALICE))).await;
    assert_eq!(status, 200);
    assert_eq!((&seen["name"], &seen["realm"]), (&json!("alice"), &json!("shop")));
    assert_eq!((&seen["token"], &seen["uri"]), (&json!(""), &json!("/orders?x=1")));
    assert_eq!(seen["for"], "127.0.0.1");

    let refused = gate.call("/orders", "alice", "shop", &wrong_token(ALICE)).send().await.unwrap();
    assert_eq!(refused.status(), 401);
    for (header, start) in [
        ("www-authenticate", "OTP realm="),
        ("cache-control", "no-store"),
        ("content-type", "application/json"),
    ] {
        assert!(refused.headers()[header].to_str().unwrap().starts_with(start), "{header}");
    }
    assert!(refused.headers().contains_key("date"));
    let wrong = refused.json::<Value>().await.unwrap();

    // Unknown, wrong and missing get one answer.
    let (status, unknown) = answer(gate.call("/orders", "mallory", "shop", "123456")).await;
    assert_eq!((status, &unknown["detail"]), (401, &wrong["detail"]));
    let (status, none) = answer(http().get(format!("{}/orders", gate.proxy))).await;
    assert_eq!(status, 401);
    assert!(none["request_id"].is_string());

    let (status, _) = answer(gate.call("/orders", "bob", "lab", &token(BOB))).await;
    assert_eq!(status, 403);

    let (status, seen) = answer(http().get(format!("{}/public/x", gate.proxy))).await;
    assert_eq!((status, &seen["name"]), (200, &json!("")));
    // A public route passes no identity on, not even a claimed one.
    let (status, seen) = answer(gate.call("/public", "alice", "shop", &wrong_token(ALICE))).await;
    assert_eq!((status, &seen["name"], &seen["realm"]), (200, &json!(""), &json!("")));
    assert_eq!(seen["token"], "");
}

#[tokio::test]
async fn spoofed_identity_never_arrives() {
    let sandbox = Sandbox::with_entries();
    let (_nginx, upstream) = nginx(&sandbox).await;
    let gate = gate(
        &sandbox,
        &upstream,
        "[[route]]\npath = '/'\nallow = ['*']\n[[route]]\npath = '/public'\npublic = true\n",
    )
    .await;
    for spelling in ["X-Auth-Name", "X_Auth_Name", "x.auth.name", "X-AUTH_NAME"] {
        let request = http().get(format!("{}/public", gate.proxy)).header(spelling, "root");
        let (status, seen) = answer(request).await;
        // Refused as ambiguous, or forwarded without it.
        assert!(
            status == 400 || (status == 200 && seen["name"] == ""),
            "{spelling}: {status} {seen}"
        );
    }
    let twice = gate.call("/private", "alice", "shop", &token(ALICE)).header("X-Auth-Name", "root");
    assert_eq!(answer(twice).await.0, 400);
    let nominated = gate
        .call("/public", "alice", "shop", "123456")
        .header("Connection", "close, X-Auth-Name, X-Auth-Realm");
    let (status, seen) = answer(nominated).await;
    assert!(status == 400 || (status == 200 && seen["name"] == ""), "{status} {seen}");
}

#[tokio::test]
async fn report_mode_blocks_nothing_and_says_what_it_would() {
    let sandbox = Sandbox::with_entries();
    let (_nginx, upstream) = nginx(&sandbox).await;
    let gate = sandbox
        .serve(&format!("[proxy]\nupstream = '{upstream}'\nmode = 'report'\n"))
        .ready()
        .await;
    let (status, seen) = answer(gate.call("/x", "alice", "shop", &wrong_token(ALICE))).await;
    assert_eq!((status, &seen["name"], &seen["token"]), (200, &json!(""), &json!("")));
    let (status, seen) = answer(gate.call("/x", "alice", "shop", &token(ALICE))).await;
    assert_eq!((status, &seen["name"]), (200, &json!("alice")));
    let metrics =
        http().get(format!("{}/metrics", gate.ops)).send().await.unwrap().text().await.unwrap();
    assert!(
        metrics.lines().any(|l| l.starts_with("otpgate_requests_total") && l.contains("report")),
        "{metrics}"
    );
}

/// `otpgate client` against a running gate, as admin.
fn client(gate: &Gate, args: &[&str]) -> (Option<i32>, Value) {
    let output = otpgate()
        .args(["client", "--server-url", &gate.api, "--auth-name", "admin"])
        .args(["--auth-realm", "ungleich-admin", "--json"])
        .env("OTPGATE_AUTH_SEED", ADMIN)
        .args(args)
        .output()
        .unwrap();
    (output.status.code(), serde_json::from_str(&stdout(&output)).unwrap_or(Value::Null))
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_made_through_the_api_are_in_force_at_once() {
    let sandbox = Sandbox::with_entries();
    let (_nginx, upstream) = nginx(&sandbox).await;
    let gate = gate(&sandbox, &upstream, "").await;
    let (code, entry) = client(&gate, &["create", "--name", "carol", "--realm", "shop"]);
    assert_eq!(code, Some(0), "{entry}");
    let seed = entry["seed"].as_str().unwrap().to_owned();
    let id = entry["id"].to_string();
    assert_eq!(answer(gate.call("/", "carol", "shop", &token(&seed))).await.0, 200);

    let (code, _) = client(&gate, &["update", "--id", &id, "--new-name", "caroline"]);
    assert_eq!(code, Some(0));
    assert_eq!(answer(gate.call("/", "carol", "shop", &token(&seed))).await.0, 401);
    assert_eq!(answer(gate.call("/", "caroline", "shop", &token(&seed))).await.0, 200);

    let (code, list) = client(&gate, &["list"]);
    assert_eq!((code, list.as_array().map(Vec::len)), (Some(0), Some(5)));

    assert_eq!(client(&gate, &["delete", "--id", &id]).0, Some(0));
    assert_eq!(answer(gate.call("/", "caroline", "shop", &token(&seed))).await.0, 401);
    let audit = gate.log_text();
    assert!(audit.contains("otpgate::audit") && !audit.contains(&seed));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_gates_and_a_command_on_one_store_see_each_other() {
    let sandbox = Sandbox::with_entries();
    let (_nginx, upstream) = nginx(&sandbox).await;
    let (one, two) = (gate(&sandbox, &upstream, "").await, gate(&sandbox, &upstream, "").await);
    let (_, entry) = client(&one, &["create", "--name", "dave", "--realm", "shop"]);
    let seed = entry["seed"].as_str().unwrap().to_owned();
    eventually("the other gate knows", || async {
        (answer(two.call("/", "dave", "shop", &token(&seed))).await.0 == 200).then_some(())
    })
    .await;
    client(&two, &["delete", "--name", "dave", "--realm", "shop"]);
    eventually("the first gate knows", || async {
        (answer(one.call("/", "dave", "shop", &token(&seed))).await.0 == 401).then_some(())
    })
    .await;

    let made =
        run(&["store", "bootstrap", "--store", &sandbox.store(), "--name", "second", "--json"]);
    assert!(made.status.success(), "{}", stderr(&made));
    let made: Value = serde_json::from_str(&stdout(&made)).unwrap();
    let seed = made["seed"].as_str().unwrap().to_owned();
    eventually("both know what a command wrote", || async {
        let call = |gate: &Gate| answer(gate.call("/", "second", "ungleich-admin", &token(&seed)));
        (call(&one).await.0 == 200 && call(&two).await.0 == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn verify_in_one_call() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("[proxy]\nlisten = 'off'\n").ready().await;
    assert_eq!(gate.proxy, "");
    let verify = |who: &'static str, realm: &'static str, proof: String| {
        http().post(format!("{}/verify", gate.api)).json(&json!({
            "auth_name": "verifier", "auth_realm": "ungleich-auth", "auth_token": token(VERIFIER),
            "name": who, "realm": realm, "token": proof,
        }))
    };
    let (status, body) = answer(verify("alice", "shop", token(ALICE))).await;
    assert_eq!((status, body), (200, json!({ "status": "OK" })));
    assert_eq!(answer(verify("alice", "shop", wrong_token(ALICE))).await.0, 403);
    assert_eq!(answer(verify("nobody", "shop", token(ALICE))).await.0, 403);
}

#[tokio::test]
async fn a_pure_sidecar_has_no_api() {
    let sandbox = Sandbox::with_entries();
    let (_nginx, upstream) = nginx(&sandbox).await;
    let gate = gate(&sandbox, &upstream, "[api]\nlisten = 'off'\n").await;
    assert_eq!(gate.api, "");
    assert_eq!(answer(gate.call("/", "alice", "shop", &token(ALICE))).await.0, 200);
    // The API's paths are the upstream's business here.
    let (_, seen) = answer(gate.call("/verify", "alice", "shop", &token(ALICE))).await;
    assert_eq!(seen["uri"], "/verify");
}

#[tokio::test]
async fn serve_needs_no_file() {
    let sandbox = Sandbox::with_entries();
    let (_nginx, upstream) = nginx(&sandbox).await;
    let mut command = otpgate();
    command
        .args([
            "serve",
            "--store",
            &sandbox.store(),
            "--upstream",
            &upstream,
            "--log-format",
            "json",
        ])
        .args(["--proxy", "127.0.0.1:0", "--api", "off", "--ops", "127.0.0.1:0"]);
    let gate = Gate::spawn(command).unwrap_or_else(|o| panic!("{}", stderr(&o))).ready().await;
    assert_eq!(answer(gate.call("/", "alice", "shop", &token(ALICE))).await.0, 200);
}

#[tokio::test]
async fn listeners_on_unix_sockets_are_private() {
    use std::os::unix::fs::PermissionsExt as _;

    let sandbox = Sandbox::with_entries();
    let socket = sandbox.path("api.sock");
    let gate =
        sandbox.serve(&format!("[api]\nlisten = 'unix:{}'\n", socket.display())).ready().await;
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "{mode:o}");
    let output = Command::new("curl")
        .args(["-sS", "--unix-socket"])
        .arg(&socket)
        .args(["-o", "/dev/null", "-w", "%{http_code}", "http://localhost/openapi.json"])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "200", "{}", stderr(&output));
    drop(gate);
}
