//! Tokens that may be used once, or a number of times: the real program, on both stores.

use std::sync::atomic::{AtomicUsize, Ordering};

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::Seed;
use otpgate::otp::{Generator, TokenParams};
use serde_json::{Value, json};

use crate::harness::{ADMIN, ALICE, BOB, Gate, Sandbox, VERIFIER, eventually, http, token};
use crate::peers::echo::Echo;
use crate::redis_server::{Options, RedisServer};

/// The token of `steps` steps from now: with a skew of 1, three are good at a time.
fn token_in(seed: &str, steps: i64) -> String {
    let generator = Generator::new(&Seed::parse(seed).unwrap(), TokenParams::default());
    generator.token_at(SystemClock.now().unix.saturating_add_signed(30 * steps))
}

async fn status(gate: &Gate, path: &str, token: &str) -> u16 {
    gate.call(path, "alice", "shop", token).send().await.unwrap().status().as_u16()
}

async fn gate(sandbox: &Sandbox, echo: &Echo, settings: &str) -> Gate {
    let upstream =
        format!("[proxy]\nupstream = '{}'\ntrusted_proxies = ['127.0.0.1']\n", echo.address);
    sandbox.serve(&(upstream + settings)).ready().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_works_once() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = gate(&sandbox, &echo, "[totp]\nreuse = 'once'\n").await;
    let token = token(ALICE);
    assert_eq!(status(&gate, "/", &token).await, 200);
    let seen = echo.seen();
    // The refusal is that of any wrong token.
    let again = gate.call("/", "alice", "shop", &token).send().await.unwrap();
    let wrong = gate.call("/", "nobody", "shop", &token).send().await.unwrap();
    assert_eq!((again.status(), wrong.status()), (http::StatusCode::UNAUTHORIZED, again.status()));
    let names = |response: &reqwest::Response| -> Vec<_> {
        response.headers().keys().map(ToString::to_string).collect()
    };
    assert_eq!(names(&again), names(&wrong));
    let [again, wrong]: [Value; 2] = [again.json().await.unwrap(), wrong.json().await.unwrap()];
    assert_eq!(again["detail"], wrong["detail"]);
    assert_eq!(echo.seen(), seen, "nothing reached the upstream");
    assert!(gate.wait_for_log(|line| line["reason"] == "reused").is_some());
    // Neighbouring steps have tokens of their own, in any order.
    assert_eq!(status(&gate, "/", &token_in(ALICE, 1)).await, 200);
    assert_eq!(status(&gate, "/", &token_in(ALICE, 1)).await, 401);
}

/// Marks are kept under the number of the step: no other spelling of a token is another token.
#[tokio::test(flavor = "multi_thread")]
async fn a_used_token_has_no_other_spelling() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = gate(&sandbox, &echo, "[totp]\nreuse = 'once'\n").await;
    let token = token(ALICE);
    let verify = |token: Value| {
        let body = json!({
            "auth_name": "verifier", "auth_realm": "ungleich-auth",
            "name": "alice", "realm": "shop", "token": token,
        });
        (body, format!("{}/verify", gate.api))
    };
    let mut caller_step = -1..=1;
    let mut send = async |spelled: Value| {
        let (mut body, url) = verify(spelled);
        // The caller's own tokens work once too.
        body["auth_token"] = json!(token_in(VERIFIER, caller_step.next().unwrap()));
        http().post(url).json(&body).send().await.unwrap().status().as_u16()
    };
    assert_eq!(send(json!(token)).await, 200);
    assert_eq!(send(json!(format!(" {token}\n"))).await, 403);
    let number: u64 = token.parse().unwrap();
    assert_eq!(send(json!(number)).await, 403);
    assert_eq!(status(&gate, "/", &token).await, 401, "the proxy knows of it too");
}

#[tokio::test(flavor = "multi_thread")]
async fn budgets_and_routes_have_their_own_rule() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = gate(
        &sandbox,
        &echo,
        "[realms.shop]\nreuse = { budget = 3 }\n\
         [[route]]\npath = '/'\nallow = ['*']\n\
         [[route]]\npath = '/pay'\nallow = ['*']\nreuse = 'once'\n\
         [[route]]\npath = '/feed'\nallow = ['*']\nreuse = 'window'\n",
    )
    .await;
    let token = token(ALICE);
    for expected in [200, 200, 200, 401, 401] {
        assert_eq!(status(&gate, "/", &token).await, expected);
    }
    // A route may be looser than the realm, or stricter.
    assert_eq!(status(&gate, "/feed", &token).await, 200);
    assert_eq!(status(&gate, "/pay", &token).await, 401, "it has been used");
    let next = token_in(ALICE, 1);
    assert_eq!(status(&gate, "/pay", &next).await, 200);
    assert_eq!(status(&gate, "/pay", &next).await, 401);
    assert_eq!(status(&gate, "/", &next).await, 200, "its budget is three");
    // Other realms are as [totp] says: as often as they like.
    for _ in 0..5 {
        let call = gate.call("/", "bob", "lab", &crate::harness::token(BOB)).send().await.unwrap();
        assert_eq!(call.status(), 200);
    }
}

/// A token counts as used once it was accepted, whatever became of the request; and not before.
#[tokio::test(flavor = "multi_thread")]
async fn accepted_tokens_are_used_and_no_others() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = gate(
        &sandbox,
        &echo,
        "limits = { max_body_bytes = 5 }\n[totp]\nreuse = 'once'\n\
         [[route]]\npath = '/'\nallow = ['*']\n\
         [[route]]\npath = '/open'\npublic = true\n\
         [[route]]\npath = '/others'\nallow = ['lab']\n\
         [[route]]\npath = '/soon'\nallow = ['shop']\nmode = 'report'\n",
    )
    .await;
    // Neither is a token looked at here.
    let [first, second] = [0, 1].map(|steps| token_in(ALICE, steps));
    assert_eq!(status(&gate, "/open", &first).await, 200);
    let large = gate.call("/", "alice", "shop", &first).body("too large").send().await.unwrap();
    assert_eq!(large.status(), 413);
    assert_eq!(status(&gate, "/", &first).await, 200);
    assert_eq!(status(&gate, "/others", &second).await, 403);
    assert_eq!(status(&gate, "/", &second).await, 401);
    let third = token_in(BOB, 0);
    for (path, expected) in [("/soon", 200), ("/", 401)] {
        let call = gate.call(path, "bob", "lab", &third).send().await.unwrap();
        assert_eq!(call.status(), expected);
    }
}

/// A request that a trusted proxy repeats is the same request; from anybody else, ids mean nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_is_not_another_use() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = gate(&sandbox, &echo, "[totp]\nreuse = 'once'\n").await;
    let token = token(ALICE);
    let send = async |id: &str, client: &str| {
        let call = gate.call("/", "alice", "shop", &token);
        let call = call.header("X-Request-Id", id).header("X-Forwarded-For", client);
        call.send().await.unwrap().status().as_u16()
    };
    assert_eq!(send("one", "203.0.113.1").await, 200);
    assert_eq!(send("one", "203.0.113.1").await, 200);
    assert_eq!(send("two", "203.0.113.1").await, 401);
    assert_eq!(send("one", "203.0.113.2").await, 401, "another client cannot borrow the id");

    let strict = sandbox
        .serve(&format!("[proxy]\nupstream = '{}'\n[totp]\nreuse = 'once'\n", echo.address))
        .ready()
        .await;
    let token = token_in(ALICE, 1);
    for expected in [200, 401] {
        let call = strict.call("/", "alice", "shop", &token).header("X-Request-Id", "one");
        assert_eq!(call.send().await.unwrap().status(), expected);
    }
}

/// However many requests and gates race for one token, it is used as often as it may be.
async fn race(gates: &[Gate], budget: usize, token: &str) {
    let passed = AtomicUsize::new(0);
    futures_util::future::join_all((0..30).map(|i| {
        let (gate, passed) = (&gates[i % gates.len()], &passed);
        async move {
            match status(gate, "/", token).await {
                200 => drop(passed.fetch_add(1, Ordering::Relaxed)),
                other => assert_eq!(other, 401),
            }
        }
    }))
    .await;
    assert_eq!(passed.into_inner(), budget);
}

#[tokio::test(flavor = "multi_thread")]
async fn gates_on_one_file_agree() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let settings = "[totp]\nreuse = 'once'\n";
    let gates = [gate(&sandbox, &echo, settings).await, gate(&sandbox, &echo, settings).await];
    race(&gates, 1, &token(ALICE)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gates_on_one_redis_agree_and_refuse_without_it() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let mut redis = RedisServer::start(Options { aof: true, ..Options::default() });
    sandbox.write("key", &otpgate::seal::Sealer::random_key());
    let settings = format!(
        "[totp]\nreuse = {{ budget = 4 }}\n[store]\nurl = '{}'\nkey_file = '{}'\nmax_stale = '60s'\n",
        redis.url(),
        sandbox.path("key").display(),
    );
    let config = sandbox.write("bootstrap.toml", &settings);
    let made = crate::harness::otpgate()
        .args(["store", "bootstrap", "--config"])
        .arg(&config)
        .args(["--name", "admin", "--seed-file"])
        .arg(sandbox.write("admin.seed", ADMIN))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", crate::harness::stderr(&made));
    let gates = [gate(&sandbox, &echo, &settings).await, gate(&sandbox, &echo, &settings).await];
    let admin = async |gate: &Gate, token: &str| {
        gate.call("/", "admin", "ungleich-admin", token).send().await.unwrap().status().as_u16()
    };
    let passed = AtomicUsize::new(0);
    let token = token(ADMIN);
    futures_util::future::join_all((0..24).map(|i| {
        let (gate, passed, token) = (&gates[i % 2], &passed, &token);
        async move {
            if admin(gate, token).await == 200 {
                passed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }))
    .await;
    assert_eq!(passed.into_inner(), 4);

    // Entries are known for a while without the store; uses are not.
    redis.kill();
    let seen = echo.seen();
    assert_eq!(admin(&gates[0], &token_in(ADMIN, 1)).await, 503);
    assert_eq!(echo.seen(), seen);
    redis.restart();
    eventually("the gate counts again", || async {
        (admin(&gates[0], &token_in(ADMIN, 1)).await == 200).then_some(())
    })
    .await;
}
