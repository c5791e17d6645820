//! The client library against a real gate.

use otpgate::client::{Client, ClientError, ClientTls, Credentials, Filter, TokenSource};
use otpgate::entry::{Name, Realm};
use otpgate::secret::Secret;
use serde_json::{Map, Value, json};

use crate::api_harness::*;
use crate::harness::{self, Sandbox, otpgate};
use crate::peers::echo::Echo;

fn client_of(server: &str, (name, realm, seed): Triple) -> Client {
    let source = TokenSource::parse(name, realm, seed).unwrap();
    Client::new(server, source, &ClientTls::default()).unwrap()
}

fn fields(fields: Value) -> Map<String, Value> {
    fields.as_object().unwrap().clone()
}

#[track_caller]
fn refused(result: Result<impl std::fmt::Debug, ClientError>, status: u16, detail: &str) {
    match result {
        Err(ClientError::Refused { status: got, detail: words, .. }) => {
            assert_eq!((got.as_u16(), words.as_str()), (status, detail));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_call_works() {
    let gate = Gate::start().await;
    let admin = client_of(&format!("{}/ungleichotp/verify/", gate.base), ADMIN);
    let made = admin.create(fields(json!({"name": "svc", "realm": "users"}))).await.unwrap();
    let (id, seed) = (made.id.unwrap(), made.seed.clone().unwrap());
    assert_eq!(made.more["digits"], 6);

    let filter = Filter { name: None, realm: Some(Realm::parse("users").unwrap()) };
    let listed = admin.list(&filter).await.unwrap();
    let names: Vec<_> = listed.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["user", "svc"]);
    assert_eq!(admin.list(&Filter::default()).await.unwrap().len(), 4);
    assert_eq!(admin.show(id).await.unwrap(), made);

    let credentials = Credentials::Token {
        name: Name::parse(AUTH.0).unwrap(),
        realm: Realm::parse(AUTH.1).unwrap(),
        token: Secret::new(token(AUTH.2)),
    };
    let auth = Client::new(&gate.base, credentials, &ClientTls::default()).unwrap();
    auth.verify("svc", "users", &token(seed.expose()), None).await.unwrap();
    let denied = auth.verify("nobody", "users", &token(seed.expose()), None).await;
    assert!(denied.as_ref().is_err_and(|e| e.is_denial() && !e.is_about_caller()));
    refused(denied, 403, FORBIDDEN);

    let changed = admin.update(id, fields(json!({"comment": "x", "digits": 8}))).await.unwrap();
    assert_eq!((&changed.more["comment"], &changed.more["digits"]), (&json!("x"), &json!(8)));
    admin.delete(id).await.unwrap();
    refused(admin.show(id).await, 404, "No OTPSeed matches the given query.");
}

/// Runs `otpgate client` against a gate, as its admin unless the environment says otherwise.
async fn command(
    gate: &Gate,
    environment: &[(&str, &str)],
    args: &[&str],
) -> (Option<i32>, String) {
    let mut command = otpgate();
    command
        .args(["client", "--server-url", &gate.base])
        .args(args)
        .env("UNGLEICHOTPNAME", ADMIN.0)
        .env("UNGLEICHOTPREALM", ADMIN.1)
        .env("UNGLEICHOTPSEED", ADMIN.2)
        .envs(environment.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_do_what_the_calls_do() {
    let gate = Gate::start().await;
    let run = async |args: &[&str]| command(&gate, &[], args).await;
    let (code, made) = run(&["create", "--name", "svc", "--realm", "users", "--json"]).await;
    assert_eq!(code, Some(0), "{made}");
    let made: Value = serde_json::from_str(&made).unwrap();
    let (seed, id) = (made["seed"].as_str().unwrap(), made["id"].to_string());

    let as_auth = [
        ("OTPGATE_AUTH_NAME", AUTH.0),
        ("OTPGATE_AUTH_REALM", AUTH.1),
        ("OTPGATE_AUTH_SEED", AUTH.2),
    ];
    let verify = ["verify", "--name", "svc", "--realm", "users", "--seed", seed];
    let warned = "OK\notpgate: a seed in `--seed` shows in the list of processes: better `--seed-file` \
                  or a variable\n";
    assert_eq!(command(&gate, &as_auth, &verify).await, (Some(0), warned.to_owned()));
    let (code, refused) = run(&verify).await;
    assert_eq!(code, Some(1));
    assert!(refused.contains("403") && refused.contains(FORBIDDEN), "{refused}");

    let svc = ["--name", "svc", "--realm", "users"];
    let update = [&["update"] as &[_], &svc, &["--new-name", "new", "--comment", "x"]].concat();
    let (code, updated) = run(&update).await;
    assert_eq!(code, Some(0), "{updated}");
    assert!(
        updated.contains("name                new\n")
            && updated.contains("comment             x\n"),
        "{updated}"
    );
    let (_, listed) = run(&["list", "--realm", "users"]).await;
    assert_eq!(listed, format!("ID  REALM  NAME\n3   users  user\n{id}   users  new\n"));
    let (code, missing) = run(&[&["show"] as &[_], &svc].concat()).await;
    assert_eq!(code, Some(1), "{missing}");
    let (code, deleted) = run(&["delete", "--id", &id]).await;
    assert_eq!((code, deleted), (Some(0), format!("deleted {id}\n")));

    let (code, usage) = run(&["delete"]).await;
    assert_eq!(code, Some(2), "{usage}");
    let (code, usage) = run(&["list", "--auth-seed", "1!"]).await;
    assert_eq!(code, Some(2), "{usage}");
    assert!(!usage.contains("1!"), "{usage}");
}

#[tokio::test]
async fn failures_are_told_apart() {
    let gate = Gate::start().await;
    let wrong = client_of(&gate.base, (ADMIN.0, ADMIN.1, USER.2));
    let unproven = wrong.list(&Filter::default()).await;
    assert!(unproven.as_ref().is_err_and(|e| e.is_about_caller() && !e.is_denial()));
    refused(unproven, 403, UNPROVEN);
    let admin = client_of(&gate.base, ADMIN);
    let bad = admin.create(fields(json!({"name": "", "digits": 9}))).await;
    let words = "digits: Ensure this value is less than or equal to 8.; \
                 name: This field may not be blank.; realm: This field is required.";
    refused(bad, 400, words);

    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = client_of(&format!("http://{free}"), ADMIN);
    assert!(matches!(nobody.show(1).await, Err(ClientError::Unreachable(_))));
    // The root answers, but not as an entry would.
    let elsewhere = client_of(&format!("{}/nope", gate.base), ADMIN);
    refused(elsewhere.show(1).await, 404, "Not found.");
}

/// As services use it: a token for each request through the proxy, and a verified one from elsewhere.
#[tokio::test]
async fn a_service_calls_through_a_gate_and_verifies() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = sandbox.serve(&format!("[proxy]\nupstream = '{}'\n", echo.address)).ready().await;
    let seed = |name: &str, seed: &str| sandbox.write(name, seed);
    let alice =
        TokenSource::from_file("alice", "shop", seed("alice.seed", harness::ALICE)).unwrap();
    let mut request = harness::http().get(format!("{}/orders", gate.proxy)).build().unwrap();
    alice.sign(request.headers_mut());
    let answer = harness::http().execute(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.text().await.unwrap().contains("alice"));

    let shop = seed("shop.seed", harness::VERIFIER);
    let shop = TokenSource::from_file("verifier", "ungleich-auth", shop).unwrap();
    let client = Client::new(&gate.api, shop, &ClientTls::default()).unwrap();
    let peer = Some([192, 0, 2, 7].into());
    let verified = client.verify("alice", "shop", &alice.token(), peer).await.unwrap();
    assert!(!verified.is_counted);
    let wrong = harness::wrong_token(harness::ALICE);
    let mut refused = None;
    // Ten wrong ones from an address, and it has to wait.
    for _ in 0..11 {
        let error = client.verify("alice", "shop", &wrong, peer).await.unwrap_err();
        assert!(refused.is_none() && (error.is_denial() || !error.is_about_caller()));
        refused = Some(error).filter(|error| !error.is_denial());
    }
    let Some(ClientError::Refused { status, retry_after, .. }) = refused else { panic!() };
    assert_eq!(status, 429);
    assert!(retry_after.is_some_and(|wait| wait.as_secs() > 0));
    client.verify("alice", "shop", &alice.token(), Some([192, 0, 2, 8].into())).await.unwrap();
}
