//! What authenticator apps take over of an entry, from the API and on the command line; colours of terminals.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use otpgate::enrolment::Code;
use serde_json::{Value, json};

use crate::harness::{ADMIN, ALICE, Gate, Sandbox, VERIFIER, http, otpgate, stderr, stdout, token};

const URI: &str = "otpauth://totp/shop:alice?secret=MFRGGZDFMZTWQ2LKMFRGGZDFMZTWQ2LK&issuer=shop\
                   &algorithm=SHA1&digits=6&period=30";

/// A `GET` of alice's entry with the credentials of somebody, and an `Accept`.
async fn get(gate: &Gate, who: [&str; 3], what: &str, accept: &str) -> reqwest::Response {
    let [name, realm, seed] = who;
    let url = format!("{}/ungleichotp/3/{what}", gate.api);
    let request = http().get(url).header("X-Auth-Name", name).header("X-Auth-Realm", realm);
    request.header("X-Auth-Token", token(seed)).header("Accept", accept).send().await.unwrap()
}

const BY_ADMIN: [&str; 3] = ["admin", "ungleich-admin", ADMIN];
const BY_VERIFIER: [&str; 3] = ["verifier", "ungleich-auth", VERIFIER];

#[tokio::test(flavor = "multi_thread")]
async fn admins_get_the_uri_and_its_code() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    for path in ["uri/", "uri"] {
        let answer = get(&gate, BY_ADMIN, path, "application/json").await;
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["cache-control"]),
            (200, &"no-store".parse().unwrap())
        );
        assert_eq!(answer.json::<Value>().await.unwrap(), json!({ "uri": URI }));
    }
    for path in ["qr.svg", "qr.svg/"] {
        let answer = get(&gate, BY_ADMIN, path, "image/svg+xml").await;
        assert_eq!(answer.status(), 200);
        let headers = answer.headers().clone();
        for (name, value) in [
            ("content-type", "image/svg+xml"),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(headers[name], value);
        }
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
        assert_eq!(answer.text().await.unwrap(), image());
    }
    for (what, accept, status) in [
        ("qr.svg", "application/json", 406),
        ("uri/", "image/svg+xml", 406),
        ("qr.png", "*/*", 404),
    ] {
        assert_eq!(get(&gate, BY_ADMIN, what, accept).await.status(), status, "{what} {accept}");
    }
    // The audit trail says who saw the seed, and who would have liked to.
    for what in ["uri/", "qr.svg"] {
        assert_eq!(get(&gate, BY_VERIFIER, what, "*/*").await.status(), 403);
    }
    let told = |outcome: &str, caller: &str| {
        let audit = |line: &Value| line["target"] == "otpgate::audit" && line["action"] == "enrol";
        let is_it = |line: &Value| line["outcome"] == outcome && line["caller"] == caller;
        gate.wait_for_log(|line| audit(line) && is_it(line)).unwrap()
    };
    let done = told("done", "admin@ungleich-admin");
    let expected = (&json!(true), &json!("alice"), &json!(3));
    assert_eq!((&done["seeds"], &done["name"], &done["id"]), expected);
    let refused = told("refused", "verifier@ungleich-auth");
    assert_eq!((&refused["seeds"], &refused["reason"]), (&Value::Null, &json!("forbidden")));
    assert!(!gate.log_text().contains(ALICE));
}

/// The image of the URI, which decoders read back in the tests of the library.
fn image() -> String {
    Code::new(URI).unwrap().svg().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_seeds_stay_hidden() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("[api]\nreveal_seeds = false\n").ready().await;
    for what in ["uri/", "qr.svg"] {
        let answer = get(&gate, BY_ADMIN, what, "*/*").await;
        assert_eq!(answer.status(), 403);
        let detail = answer.json::<Value>().await.unwrap()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains("`api.reveal_seeds` is off"), "{detail}");
    }
    let refused = client(&sandbox, &gate, &["uri", "--id", "3"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("rotate --qr"), "{}", stderr(&refused));
    // The one answer that shows a seed is enough for the code.
    let shown = on_terminal(&sandbox, &gate, "", "rotate --id 3 --qr");
    assert!(shown.contains("seed") && shown.contains('▀'), "{shown}");
}

/// Runs `otpgate client` as the admin.
fn client(sandbox: &Sandbox, gate: &Gate, args: &[&str]) -> Output {
    let seed = sandbox.write("admin.seed", ADMIN);
    let mut command = otpgate();
    command.args(["client", "--server-url", &gate.api, "--auth-name", "admin"]);
    command.args(["--auth-realm", "ungleich-admin", "--auth-seed-file"]).arg(seed);
    command.args(args).output().unwrap()
}

/// The same on a terminal, with more variables (`NAME=VALUE`).
fn on_terminal(sandbox: &Sandbox, gate: &Gate, variables: &str, args: &str) -> String {
    let seed = sandbox.write("admin.seed", ADMIN);
    let command = format!(
        "env {variables} '{}' client --server-url {} --auth-name admin --auth-realm ungleich-admin \
         --auth-seed-file '{}' {args}",
        env!("CARGO_BIN_EXE_otpgate"),
        gate.api,
        seed.display(),
    );
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &command, "/dev/null"]);
    let ran =
        script.env_clear().env("TERM", "xterm").env("PATH", "/usr/bin:/bin").output().unwrap();
    assert!(ran.status.success(), "{}{}", stdout(&ran), stderr(&ran));
    stdout(&ran)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_prints_codes_on_terminals_and_into_files_alone() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    let who = ["--name", "alice", "--realm", "shop"];
    let uri = client(&sandbox, &gate, &[&["uri"], &who[..]].concat());
    assert_eq!(stdout(&uri), format!("{URI}\n"));
    let uri = client(&sandbox, &gate, &[&["uri", "--json"], &who[..]].concat());
    assert_eq!(serde_json::from_slice::<Value>(&uri.stdout).unwrap(), json!({ "uri": URI }));

    let file = sandbox.path("alice.svg");
    let svg = ["qr", "--svg", file.to_str().unwrap()];
    let written = client(&sandbox, &gate, &[&svg, &who[..]].concat());
    assert_eq!(stdout(&written), format!("{}\n", file.display()));
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), image());
    // What is there stays.
    let again = client(&sandbox, &gate, &[&svg, &who[..]].concat());
    assert_eq!(again.status.code(), Some(1), "{}", stderr(&again));

    // Nothing of it on anything but a terminal; an entry whose code could not be shown is not made.
    for args in [&["qr"][..], &["rotate", "--qr"], &["create", "--qr"]] {
        let refused = client(&sandbox, &gate, &[args, &who[..]].concat());
        let said = stderr(&refused);
        assert_eq!((refused.status.code(), stdout(&refused).as_str()), (Some(2), ""), "{said}");
        assert!(said.contains("--svg FILE"), "{said}");
    }
    assert!(on_terminal(&sandbox, &gate, "", "qr --id 3").contains("\u{1b}[30;107m"));
    let plain = on_terminal(&sandbox, &gate, "NO_COLOR=1", "qr --id 3");
    assert!(plain.contains('▀') && !plain.contains('\u{1b}'), "{plain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_have_colours_on_terminals_alone() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    let is_plain = |text: &str| !text.contains('\u{1b}') && text.contains("alice");
    assert!(is_plain(&stdout(&client(&sandbox, &gate, &["list"]))));
    for variables in ["NO_COLOR=1", "TERM=dumb"] {
        assert!(is_plain(&on_terminal(&sandbox, &gate, variables, "list")), "{variables}");
    }
    let coloured = on_terminal(&sandbox, &gate, "", "list");
    assert!(coloured.contains("\u{1b}[1mID  REALM"), "{coloured:?}");
    assert!(on_terminal(&sandbox, &gate, "", "show --id 3").contains("\u{1b}[1mname"));
    let json = on_terminal(&sandbox, &gate, "", "list --json");
    assert!(is_plain(&json), "{json:?}");
}
