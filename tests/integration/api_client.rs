//! The client library against a real gate.

use std::sync::Arc;

use otpgate::client::{Client, ClientError, Credentials, Filter, Proof};
use otpgate::clock::SystemClock;
use otpgate::entry::{Name, Realm, Seed};
use otpgate::secret::Secret;
use serde_json::{Map, Value, json};

use crate::api_harness::*;

fn client_of(server: &str, (name, realm, _): Triple, proof: Proof) -> Client {
    let credentials = Credentials {
        name: Name::parse(name).unwrap(),
        realm: Realm::parse(realm).unwrap(),
        proof,
    };
    Client::new(server, credentials, None, Arc::new(SystemClock)).unwrap()
}

fn seed_of(triple: Triple) -> Proof {
    Proof::Seed(Seed::parse(triple.2).unwrap())
}

fn fields(fields: Value) -> Map<String, Value> {
    fields.as_object().unwrap().clone()
}

#[track_caller]
fn refused(result: Result<impl std::fmt::Debug, ClientError>, status: u16, detail: &str) {
    match result {
        Err(ClientError::Refused { status: got, detail: words }) => {
            assert_eq!((got.as_u16(), words.as_str()), (status, detail));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_call_works() {
    let gate = Gate::start().await;
    let admin = client_of(&format!("{}/ungleichotp/verify/", gate.base), ADMIN, seed_of(ADMIN));
    let made = admin.create(fields(json!({"name": "svc", "realm": "users"}))).await.unwrap();
    let (id, seed) = (made.id.unwrap(), made.seed.clone().unwrap());
    assert_eq!(made.more["digits"], 6);

    let filter = Filter { name: None, realm: Some(Realm::parse("users").unwrap()) };
    let listed = admin.list(&filter).await.unwrap();
    let names: Vec<_> = listed.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["user", "svc"]);
    assert_eq!(admin.list(&Filter::default()).await.unwrap().len(), 4);
    assert_eq!(admin.show(id).await.unwrap(), made);

    let auth = client_of(&gate.base, AUTH, Proof::Token(Secret::new(token(AUTH.2))));
    auth.verify("svc", "users", &token(seed.expose())).await.unwrap();
    refused(auth.verify("nobody", "users", &token(seed.expose())).await, 403, FORBIDDEN);

    let changed = admin.update(id, fields(json!({"comment": "x", "digits": 8}))).await.unwrap();
    assert_eq!((&changed.more["comment"], &changed.more["digits"]), (&json!("x"), &json!(8)));
    admin.delete(id).await.unwrap();
    refused(admin.show(id).await, 404, "No OTPSeed matches the given query.");
}

#[tokio::test]
async fn failures_are_told_apart() {
    let gate = Gate::start().await;
    let wrong = client_of(&gate.base, ADMIN, seed_of(USER));
    refused(wrong.list(&Filter::default()).await, 403, UNPROVEN);
    let admin = client_of(&gate.base, ADMIN, seed_of(ADMIN));
    let bad = admin.create(fields(json!({"name": "", "digits": 9}))).await;
    let words = "digits: Ensure this value is less than or equal to 8.; \
                 name: This field may not be blank.; realm: This field is required.";
    refused(bad, 400, words);

    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = client_of(&format!("http://{free}"), ADMIN, seed_of(ADMIN));
    assert!(matches!(nobody.show(1).await, Err(ClientError::Unreachable(_))));
    // The root answers, but not as an entry would.
    let elsewhere = client_of(&format!("{}/nope", gate.base), ADMIN, seed_of(ADMIN));
    refused(elsewhere.show(1).await, 404, "Not found.");
}
