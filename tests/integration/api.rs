//! The API's documented behaviour, through the real accept loop and store.

use std::collections::BTreeSet;

use otpgate::api::{OPENAPI, ROUTES};
use otpgate::entry::{Algorithm, Seed};
use otpgate::otp::{Generator, TokenParams};
use otpgate::store::MAX_BATCH;
use serde_json::{Value, json};

use crate::api_harness::*;

#[tokio::test]
async fn an_entry_lives_and_dies() {
    let gate = Gate::start().await;
    let made = gate.create(json!({"name": " svc ", "realm": "users", "seed": ADMIN_SEED})).await;
    assert_eq!((made["name"].as_str(), made["realm"].as_str()), (Some("svc"), Some("users")));
    let seed = made["seed"].as_str().unwrap().to_owned();
    assert!(seed.len() == 32 && seed != ADMIN_SEED, "160 random bits: {seed}");
    let path = format!("/ungleichotp/{}/", made["id"]);

    // It works at once, is listed last, and is shown.
    assert_eq!(gate.verify("svc", "users", &seed).await, 200);
    let list = gate.call(ADMIN, "GET", "/ungleichotp/", json!({})).await.json;
    let names: Vec<_> = list.as_array().unwrap().iter().map(|e| e["name"].as_str()).collect();
    assert_eq!(names, [Some("admin"), Some("auth"), Some("user"), Some("svc")]);
    let shown = gate.call(ADMIN, "GET", &path, json!({})).await;
    assert_eq!((shown.status.as_u16(), &shown.json), (200, &Value::Object(made)));

    // Renamed, the seed stays and the old name is nobody's.
    let renamed = gate.call(ADMIN, "PATCH", &path, json!({"name": "new"})).await;
    assert_eq!((renamed.status.as_u16(), renamed.json["seed"].as_str()), (200, Some(&*seed)));
    assert_eq!(gate.verify("new", "users", &seed).await, 200);
    assert_eq!(gate.verify("svc", "users", &seed).await, 403);

    // Moved to the verifying realm it verifies, and no longer when moved back.
    let as_caller = |name: &str, realm: &str| {
        json!({"auth_name": name, "auth_realm": realm, "auth_token": token(&seed),
               "name": "user", "realm": "users", "token": token(USER_SEED)})
    };
    let put = json!({"name": "new", "realm": "ungleich-auth"});
    assert_eq!(gate.call(ADMIN, "PUT", &path, put).await.status, 200);
    let verified = gate.send("POST", "/verify", &as_caller("new", "ungleich-auth")).await;
    assert_eq!((verified.status.as_u16(), &verified.json), (200, &json!({"status": "OK"})));
    assert_eq!(gate.call(ADMIN, "PATCH", &path, json!({"realm": "users"})).await.status, 200);
    gate.send("POST", "/verify", &as_caller("new", "users")).await.refuses(403, FORBIDDEN);
    gate.send("POST", "/verify", &as_caller("new", "ungleich-auth")).await.refuses(403, UNPROVEN);

    // Deleted, it is gone at once; its number is not used again.
    let deleted = gate.call(ADMIN, "DELETE", &path, json!({})).await;
    assert_eq!((deleted.status.as_u16(), deleted.text.as_str()), (204, ""));
    assert!(!deleted.headers.contains_key("content-length"));
    assert_eq!(gate.verify("new", "users", &seed).await, 403);
    for method in ["GET", "PUT", "PATCH", "DELETE"] {
        let gone = gate.call(ADMIN, method, &path, json!({"name": "x", "realm": "y"})).await;
        gone.refuses(404, "No OTPSeed matches the given query.");
    }
    let again = gate.create(json!({"name": "svc", "realm": "users"})).await;
    assert!(again["id"].as_u64() > shown.json["id"].as_u64());
    assert_ne!(again["seed"], seed.as_str());
}

#[tokio::test]
async fn capabilities_follow_the_proven_realm() {
    let gate = Gate::start().await;
    let fields = json!({"name": "user", "realm": "users", "token": token(USER_SEED)});
    for (caller, admin, auth) in [(ADMIN, true, false), (AUTH, false, true), (USER, false, false)] {
        for (method, path, allowed) in [
            ("GET", "/ungleichotp/", admin),
            ("POST", "/ungleichotp/", admin),
            ("GET", "/ungleichotp/3/", admin),
            ("PUT", "/ungleichotp/3/", admin),
            ("PATCH", "/ungleichotp/3/", admin),
            ("POST", "/ungleichotp/verify/", auth),
            ("POST", "/verify", auth),
            ("GET", "/", true),
            ("OPTIONS", "/ungleichotp/", true),
        ] {
            let answer = gate.call(caller, method, path, fields.clone()).await;
            if allowed {
                // creating "user" again is a bad request, not a forbidden one
                assert!([200, 400].contains(&answer.status.as_u16()), "{caller:?} {method} {path}");
            } else {
                answer.refuses(403, FORBIDDEN);
            }
        }
        if !admin {
            let deleted = gate.call(caller, "DELETE", "/ungleichotp/3/", json!({})).await;
            deleted.refuses(403, FORBIDDEN);
        }
    }
    // A wrong token, an unknown name and a wrong realm are refused alike, whatever is asked for.
    let now = token(ADMIN_SEED);
    let wrong = if now == "000000" { "000001" } else { "000000" };
    for (name, realm, token) in [
        ("admin", "ungleich-admin", wrong),
        ("nobody", "ungleich-admin", &now),
        ("admin", "users", &now),
        ("admin", "ungleich-admin", ""),
        ("admin", "ungleich-admin", "１２３４５６"),
        ("a\u{0}b", "ungleich-admin", &now),
        ("a\u{200b}b", "ungleich-admin", &now),
    ] {
        for (method, path, _) in [
            ("GET", "/ungleichotp/", 0),
            ("POST", "/ungleichotp/", 0),
            ("DELETE", "/ungleichotp/3/", 0),
            ("BREW", "/ungleichotp/3/", 0),
            ("POST", "/verify", 0),
            ("GET", "/", 0),
        ] {
            let body = json!({"auth_name": name, "auth_realm": realm, "auth_token": token});
            gate.send(method, path, &body).await.refuses(403, UNPROVEN);
        }
    }
}

#[tokio::test]
async fn verification_tells_bad_fields_from_unproven_ones() {
    let gate = Gate::start().await;
    let verify = async |name: Value, realm: Value, token: Value| {
        let fields = json!({"name": name, "realm": realm, "token": token});
        gate.call(AUTH, "POST", "/verify", fields).await
    };
    let now = token(USER_SEED);
    assert_eq!(
        verify(json!(" user "), json!("users"), json!(format!(" {now}\n"))).await.status,
        200
    );
    for (name, token) in [
        (json!("nobody"), json!(now)),
        (json!("user"), json!("12345")),
        (json!("user"), json!(format!("{now}0"))),
        (json!("user"), json!(format!("{} {}", &now[..3], &now[3..]))),
        (json!("user"), json!("x".repeat(128))),
        (json!("us\u{202e}er"), json!(now)),
        (json!(1.5), json!(-123_456)),
    ] {
        verify(name, json!("users"), token).await.refuses(403, FORBIDDEN);
    }
    let bad = verify(json!(["user"]), json!(null), json!("x".repeat(129))).await;
    assert_eq!(bad.status, 400);
    assert_eq!(
        bad.json,
        json!({
            "name": ["Not a valid string."],
            "realm": ["This field may not be null."],
            "token": ["Ensure this field has no more than 128 characters."],
        })
    );
}

#[tokio::test]
async fn headers_authenticate_where_the_body_does_not() {
    let gate = Gate::start().await;
    let get = || gate.request("GET", "/ungleichotp/3/");
    let triple = |request: reqwest::RequestBuilder| {
        request
            .header("X-Auth-Name", "admin")
            .header("x-auth-realm", "ungleich-admin")
            .header("X-AUTH-TOKEN", token(ADMIN_SEED))
    };
    let send =
        async |request: reqwest::RequestBuilder| Answer::of(request.send().await.unwrap()).await;
    let shown = send(triple(get())).await;
    assert_eq!((shown.status.as_u16(), shown.json["name"].as_str()), (200, Some("user")));
    // Fields of the request itself may stand in the body.
    let body = json!({"name": "user2"});
    let renamed = send(triple(gate.request("PATCH", "/ungleichotp/3/")).json(&body)).await;
    assert_eq!(renamed.status, 200);
    // As soon as the body has a part of a triple, the headers do not count.
    let partial = json!({"auth_name": "admin"});
    send(triple(get()).json(&partial)).await.refuses(403, UNPROVEN);
    let other = body_of(USER, json!({}));
    send(triple(get()).json(&other)).await.refuses(403, UNPROVEN);
    // No triple at all, a part of one, one that is ambiguous.
    send(get()).await.refuses(403, UNPROVEN);
    send(get().header("X-Auth-Name", "admin")).await.refuses(403, UNPROVEN);
    let twice = send(triple(get()).header("X-Auth-Name", "user")).await;
    twice.refuses(400, "A credential header is given twice.");
    for alias in ["X_Auth_Token", "x-auth_name", "X.Auth.Realm"] {
        let alias = send(triple(get()).header(alias, "a")).await;
        alias.refuses(400, "A credential header is spelled in an ambiguous way.");
    }
    // The query is not looked at.
    let query =
        format!("/?auth_name=admin&auth_realm=ungleich-admin&auth_token={}", token(ADMIN_SEED));
    send(gate.request("GET", &query)).await.refuses(403, UNPROVEN);
}

#[tokio::test]
async fn bodies_of_all_kinds_are_read_within_bounds() {
    let gate = Gate::start().await;
    let fields = |name: &str| {
        let body = body_of(ADMIN, json!({"name": name, "realm": "users", "digits": "8"}));
        let pairs = body.as_object().unwrap().iter();
        pairs.map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned())).collect::<Vec<_>>()
    };
    let post = |kind: &str, body: Vec<u8>| {
        let request = gate.request("POST", "/ungleichotp/?full=1").header("content-type", kind);
        async { Answer::of(request.body(body).send().await.unwrap()).await }
    };
    let form =
        form_urlencoded::Serializer::new(String::new()).extend_pairs(fields("form ü")).finish();
    let made = post("application/x-www-form-urlencoded", form.into_bytes()).await;
    assert_eq!((made.status.as_u16(), made.json["name"].as_str()), (201, Some("form ü")));
    assert_eq!(made.json["digits"], 8);

    let multipart = |name: &str| {
        let part =
            |(k, v)| format!("--b\r\nContent-Disposition: form-data; name=\"{k}\"\r\n\r\n{v}\r\n");
        fields(name).into_iter().map(part).collect::<String>() + "--b--\r\n"
    };
    let made = post("multipart/form-data; boundary=b", multipart("multi ü").into_bytes()).await;
    assert_eq!((made.status.as_u16(), made.json["name"].as_str()), (201, Some("multi ü")));
    let file = multipart("x").replace("name=\"name\"", "name=\"name\"; filename=\"f\"");
    let file = post("multipart/form-data; boundary=b", file.into_bytes()).await;
    assert_eq!(file.json, json!({"name": ["Not a valid string."]}));

    for kind in ["text/plain", "application/vnd.api+json", "application/json; charset=koi8-r"] {
        let refused = post(kind, b"{}".to_vec()).await;
        refused.refuses(415, &format!("Unsupported media type \"{kind}\" in request."));
    }
    // The type is refused before anything is read, the length before the token is looked at.
    assert_eq!(post("text/plain", vec![b'a'; 3 << 20]).await.status, 415);
    let large = post("application/json", vec![b' '; 3 << 20]).await;
    large.refuses(400, "The request's body is too large.");
    let mut padded = body_of(ADMIN, json!({"name": "padded", "realm": "users"}));
    padded["padding"] = json!("a".repeat(2 << 20));
    assert_eq!(post("application/json", padded.to_string().into_bytes()).await.status, 201);

    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    let deep = post("application/json", deep.into_bytes()).await;
    deep.refuses(400, "JSON parse error - nested too deeply");
    let twice = post("application/json", br#"{"auth_name":"a","auth_name":"b"}"#.to_vec()).await;
    twice.refuses(400, "The field \"auth_name\" is given twice.");
    let twice = post("application/x-www-form-urlencoded", b"realm=a&realm=b".to_vec()).await;
    twice.refuses(400, "The field \"realm\" is given twice.");
    let broken = post("application/json", br#"{"auth_token": "987654"#.to_vec()).await;
    assert_eq!(broken.status, 400);
    assert!(!broken.text.contains("987654"), "{}", broken.text);
    assert_eq!(post("text/plain", Vec::new()).await.status, 403, "no body: no type");
}

#[tokio::test]
async fn paths_and_methods_are_as_documented() {
    let gate = Gate::start().await;
    for path in ["/ungleichotp", "/ungleichotp/", "/ungleichotp/3", "/ungleichotp/3/", "/"] {
        assert_eq!(gate.call(ADMIN, "GET", path, json!({})).await.status, 200, "{path}");
        let head = gate.call(ADMIN, "HEAD", path, json!({})).await;
        assert_eq!((head.status.as_u16(), head.text.as_str()), (200, ""), "{path}");
    }
    let verify = json!({"name": "user", "realm": "users", "token": token(USER_SEED)});
    for path in ["/verify", "/verify/", "/ungleichotp/verify", "/ungleichotp/verify/"] {
        assert_eq!(gate.call(AUTH, "POST", path, verify.clone()).await.status, 200, "{path}");
        let get = gate.call(AUTH, "GET", path, json!({})).await;
        get.refuses(405, "Method \"GET\" not allowed.");
        assert_eq!(get.headers["allow"], "POST, OPTIONS");
    }
    for path in [
        "/nope",
        "//",
        "/ungleichotp//",
        "/ungleichotp/verify//",
        "/ungleichotp/3/x/",
        "/favicon.ico",
    ] {
        // Unknown paths need no proof: there is nothing to be found out.
        let answer = gate.send("GET", path, &json!({})).await;
        assert_eq!((answer.status.as_u16(), path), (404, path));
        answer.refuses(404, "Not found.");
    }
    for (id, detail) in [
        ("abc", "Not found."),
        ("3.json", "Not found."),
        ("%C3%BC", "Not found."),
        ("%ff", "Not found."),
        ("99", "No OTPSeed matches the given query."),
        ("-1", "No OTPSeed matches the given query."),
        ("18446744073709551616", "No OTPSeed matches the given query."),
        ("9007199254740993", "No OTPSeed matches the given query."),
    ] {
        gate.call(ADMIN, "GET", &format!("/ungleichotp/{id}/"), json!({}))
            .await
            .refuses(404, detail);
    }
    for (method, path, allow) in [
        ("POST", "/", "GET, HEAD, OPTIONS"),
        ("PATCH", "/ungleichotp/", "GET, POST, HEAD, OPTIONS"),
        ("POST", "/ungleichotp/99/", "GET, PUT, PATCH, DELETE, HEAD, OPTIONS"),
        ("TRACE", "/ungleichotp/", "GET, POST, HEAD, OPTIONS"),
        ("BREW", "/ungleichotp/", "GET, POST, HEAD, OPTIONS"),
    ] {
        let answer = gate.call(USER, method, path, json!({})).await;
        answer.refuses(405, &format!("Method \"{method}\" not allowed."));
        assert_eq!(answer.headers["allow"], allow);
    }
    let answer = gate.send("DELETE", "/openapi.json", &json!({})).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers["allow"]),
        (405, &"GET, HEAD".parse().unwrap())
    );
    let html = gate.request("GET", "/").header("accept", "text/html").send().await.unwrap();
    Answer::of(html).await.refuses(406, "Could not satisfy the request Accept header.");
    let root = gate.call(USER, "GET", "/", json!({})).await.json;
    assert_eq!(root, json!({"ungleichotp": format!("{}/ungleichotp/", gate.base)}));
}

#[tokio::test]
async fn lists_are_whole_ordered_and_narrowed() {
    let gate = Gate::start().await;
    // More than two pages.
    let many: Vec<_> = (10..1213_u64)
        .map(|id| {
            entry(id, (&format!("n{id}"), if id % 2 == 0 { "even" } else { "odd" }, USER_SEED))
        })
        .collect();
    for batch in many.chunks(MAX_BATCH) {
        gate.store.insert(batch).await.unwrap();
    }
    let ids = async |query: &str| {
        let answer = gate.call(ADMIN, "GET", &format!("/ungleichotp/{query}"), json!({})).await;
        assert_eq!(answer.status, 200, "{query}: {}", answer.text);
        assert_eq!(answer.headers["content-type"], "application/json");
        let entries = answer.json.as_array().unwrap();
        entries.iter().map(|e| e["id"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    let all: Vec<_> = [1, 2, 3].into_iter().chain(10..1213).collect();
    assert_eq!(ids("").await, all);
    assert_eq!(ids("?realm=even").await, (10..1213).step_by(2).collect::<Vec<_>>());
    assert_eq!(ids("?realm=odd&limit=3&after=1000").await, [1001, 1003, 1005]);
    assert_eq!(ids("?name=n700").await, [700]);
    assert_eq!(ids("?name=%20n700%20&realm=even").await, [700]);
    for nothing in [
        "?name=n700&realm=odd",
        "?after=1212",
        "?realm=none",
        "?name=n700&realm=even&after=700",
        "?name=&realm=",
    ] {
        assert_eq!(ids(nothing).await, [0_u64; 0], "{nothing}");
    }
    assert_eq!(ids("?limit=2").await, [1, 2]);
    assert_eq!(ids("?limit=1206").await, all);
    // Walking with limit and after gives the same as one list.
    let (mut walked, mut after) = (Vec::new(), 0);
    loop {
        let page = ids(&format!("?limit=500&after={after}")).await;
        let Some(last) = page.last() else { break };
        after = *last;
        walked.extend(page);
    }
    assert_eq!(walked, all);
    for (query, errors) in [
        ("?limit=0", json!({"limit": ["Ensure this value is greater than or equal to 1."]})),
        ("?after=x", json!({"after": ["A valid integer is required."]})),
        ("?full=maybe", json!({"full": ["Must be a valid boolean."]})),
        ("?realm=a&realm=b", json!({"realm": ["Give this parameter once."]})),
    ] {
        let answer = gate.call(ADMIN, "GET", &format!("/ungleichotp/{query}"), json!({})).await;
        assert_eq!((answer.status.as_u16(), answer.json), (400, errors), "{query}");
    }
}

#[tokio::test]
async fn an_entry_that_cannot_be_opened_is_shown_and_deleted_like_the_others() {
    let gate = Gate::start().await;
    let made = gate.create(json!({"name": "svc", "realm": "users"})).await;
    let path = format!("/ungleichotp/{}/", made["id"]);
    let damage = rusqlite::Connection::open(&gate.file).unwrap();
    let changed = damage.execute("UPDATE entries SET blob = x'01' WHERE name = 'svc'", []).unwrap();
    assert_eq!(changed, 1);
    drop(damage);

    let broken = json!({
        "id": made["id"], "name": "svc", "realm": "users", "seed": null,
        "error": "This entry cannot be opened, the gate's log says why.",
    });
    let shown = gate.call(ADMIN, "GET", &path, json!({})).await;
    assert_eq!((shown.status.as_u16(), &shown.json), (200, &broken));
    for query in ["", "?name=svc", "?realm=users&full=1", "?name=svc&realm=users"] {
        let list = gate.call(ADMIN, "GET", &format!("/ungleichotp/{query}"), json!({})).await;
        assert_eq!(list.status, 200, "{query}");
        let list = list.json.as_array().unwrap().clone();
        assert!(list.contains(&broken), "{query}: {list:?}");
        assert!(list.iter().all(|e| e["seed"].is_string() || *e == broken), "{query}");
    }
    // Nobody can say what a change would keep.
    let changed = gate.call(ADMIN, "PATCH", &path, json!({"comment": "x"})).await;
    assert_eq!(changed.status, 503);
    let again = json!({"name": "svc", "realm": "users"});
    assert_eq!(gate.call(ADMIN, "POST", "/ungleichotp/", again.clone()).await.status, 400);

    assert_eq!(gate.call(ADMIN, "DELETE", &path, json!({})).await.status, 204);
    assert_eq!(gate.call(ADMIN, "GET", &path, json!({})).await.status, 404);
    gate.create(again).await;
}

#[tokio::test]
async fn further_fields_are_set_shown_and_in_force() {
    let gate = Gate::start().await;
    let made = gate
        .call(
            ADMIN,
            "POST",
            "/ungleichotp/?full=true",
            json!({"name": "x", "realm": "users", "algorithm": "SHA256", "digits": 8, "period": 60,
                   "comment": "bill", "expires_at": "2999-01-01T01:00:00+01:00"}),
        )
        .await;
    assert_eq!(made.status, 201, "{}", made.text);
    assert_eq!(
        (&made.json["algorithm"], &made.json["digits"], &made.json["period"]),
        (&json!("SHA256"), &json!(8), &json!(60))
    );
    assert_eq!(made.json["expires_at"], "2999-01-01T00:00:00Z");
    assert_eq!((&made.json["comment"], &made.json["enabled"]), (&json!("bill"), &json!(true)));
    let path = format!("/ungleichotp/{}/?full=1", made.json["id"]);
    let params = TokenParams { algorithm: Algorithm::Sha256, digits: 8, step_seconds: 60 };
    let seed = made.json["seed"].as_str().unwrap();
    let generator = Generator::new(&Seed::parse(seed).unwrap(), params);
    let verify = async || {
        let fields = json!({"name": "x", "realm": "users", "token": generator.token_at(now())});
        gate.call(AUTH, "POST", "/verify", fields).await.status.as_u16()
    };
    assert_eq!(verify().await, 200);
    for (change, status) in [
        (json!({"enabled": false}), 403),
        (json!({"enabled": true}), 200),
        (json!({"expires_at": "2001-01-01T00:00:00Z"}), 403),
        (json!({"expires_at": null}), 200),
        (json!({"digits": null}), 403),
    ] {
        let changed = gate.call(ADMIN, "PATCH", &path, change.clone()).await;
        assert_eq!(changed.status, 200, "{}", changed.text);
        assert_eq!(verify().await, status, "{change}");
    }
    let shown = gate.call(ADMIN, "GET", &path, json!({})).await.json;
    assert_eq!((&shown["digits"], &shown["expires_at"]), (&json!(6), &json!(null)));
    let put = gate.call(ADMIN, "PUT", &path, json!({"name": "x", "realm": "users"})).await;
    assert_eq!(put.json["algorithm"], "SHA256", "what is not given stays");
    let bad = gate.call(ADMIN, "PATCH", &path, json!({"period": 1, "algorithm": "MD5"})).await;
    assert_eq!(
        bad.json,
        json!({"period": ["Ensure this value is greater than or equal to 5."],
               "algorithm": ["Must be SHA1, SHA256 or SHA512."]})
    );
}

#[tokio::test]
async fn names_are_unique_within_their_realm() {
    let gate = Gate::start().await;
    let unique = json!({"non_field_errors": ["The fields name, realm must make a unique set."]});
    let other = gate.create(json!({"name": "other", "realm": "users"})).await;
    let path = format!("/ungleichotp/{}/", other["id"]);
    let user = json!({"name": " user", "realm": "users"});
    for (method, path, body) in [
        ("POST", "/ungleichotp/", user.clone()),
        ("PUT", &*path, user),
        ("PATCH", &*path, json!({"name": "user"})),
    ] {
        let answer = gate.call(ADMIN, method, path, body).await;
        assert_eq!((answer.status.as_u16(), &answer.json), (400, &unique), "{method}");
    }
    gate.create(json!({"name": "USER", "realm": "users"})).await;
    gate.create(json!({"name": "user", "realm": "users2"})).await;
    let hidden = gate.call(
        ADMIN,
        "POST",
        "/ungleichotp/",
        json!({"name": "us\u{200b}er", "realm": "\u{7}"}),
    );
    let message = "Control and invisible characters are not allowed.";
    assert_eq!(hidden.await.json, json!({"name": [message], "realm": [message]}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_creations_of_one_name_one_succeeds() {
    let gate = Gate::start().await;
    let create = || gate.call(ADMIN, "POST", "/ungleichotp/", json!({"name": "one", "realm": "r"}));
    let answers = futures_util::future::join_all((0..100).map(|_| create())).await;
    let (made, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|a| a.status == 201);
    assert_eq!((made.len(), refused.len()), (1, 99));
    let unique = json!({"non_field_errors": ["The fields name, realm must make a unique set."]});
    assert!(refused.iter().all(|a| a.status == 400 && a.json == unique));
}

#[tokio::test]
async fn concurrent_changes_all_take_effect_or_say_so() {
    let gate = Gate::start().await;
    let changes = (0..12).map(|i| {
        let change = match i % 3 {
            0 => json!({ "comment": format!("c{i}") }),
            1 => json!({ "digits": 7 }),
            _ => json!({ "period": 60 }),
        };
        gate.call(ADMIN, "PATCH", "/ungleichotp/3/?full=1", change)
    });
    let answers = futures_util::future::join_all(changes).await;
    let done = |i: usize| answers.iter().skip(i).step_by(3).any(|a| a.status == 200);
    for answer in &answers {
        assert!([200, 409].contains(&answer.status.as_u16()), "{} {}", answer.status, answer.text);
    }
    let shown = gate.call(ADMIN, "GET", "/ungleichotp/3/?full=1", json!({})).await.json;
    assert!(done(0) && shown["comment"] != "");
    assert_eq!((done(1), done(2)), (shown["digits"] == 7, shown["period"] == 60));
}

#[tokio::test]
async fn seeds_can_be_hidden_except_at_creation() {
    let mut setup = Setup::default();
    setup.api.reveal_seeds = false;
    let gate = Gate::start_with(setup).await;
    let made = gate.create(json!({"name": "x", "realm": "users"})).await;
    let seed = made["seed"].as_str().unwrap();
    assert_eq!(gate.verify("x", "users", seed).await, 200);
    let path = format!("/ungleichotp/{}/?full=1", made["id"]);
    for (method, path) in [("GET", &*path), ("PATCH", &*path), ("GET", "/ungleichotp/?full=1")] {
        let answer = gate.call(ADMIN, method, path, json!({"comment": "y"})).await;
        assert_eq!(answer.status, 200);
        assert!(
            !answer.text.contains("\"seed\"") && !answer.text.contains(seed),
            "{}",
            answer.text
        );
    }
}

#[tokio::test]
async fn foreign_hosts_and_pages_are_refused() {
    let mut setup = Setup::default();
    setup.api.allowed_hosts = vec!["otp.example".into()];
    let gate = Gate::start_with(setup).await;
    let get = async |host: &str, origin: Option<&str>| {
        let request = gate.request("GET", "/ungleichotp/").header("host", host);
        let request = match origin {
            Some(origin) => request.header("origin", origin),
            None => request,
        };
        Answer::of(request.json(&body_of(ADMIN, json!({}))).send().await.unwrap()).await
    };
    assert_eq!(get("otp.example", None).await.status, 200);
    assert_eq!(get("OTP.example:8081", Some("https://otp.example:8081")).await.status, 200);
    for host in ["evil.example", "127.0.0.1", "otp.example.evil"] {
        get(host, None).await.refuses(400, "This host is not served here.");
    }
    for origin in [
        "https://evil.example",
        "null",
        "https://otp.example:1",
        "file://",
        "",
        "https://otp.example/",
        "https://otp.example@evil.example",
        "https://otp.example, https://evil.example",
    ] {
        let refused = get("otp.example", Some(origin)).await;
        refused.refuses(403, "Requests of foreign pages are refused.");
    }
    let dotted = "OTP.example.:8081";
    assert_eq!(get(dotted, Some("https://otp.example:8081")).await.status, 200);
}

/// Every path, also one that leads nowhere: its answer bears what all answers do and is counted, and a host
/// that is not served is refused, except where proxies ask about others.
#[tokio::test]
async fn every_route_passes_the_edge() {
    let mut setup = Setup::default();
    setup.api.allowed_hosts = vec!["otp.example".into()];
    let gate = Gate::start_with(setup).await;
    let own = ROUTES.map(|(path, _)| path.replace("{id}", "3"));
    let bare = own.iter().map(|path| path.trim_end_matches('/').to_owned() + "?");
    let mut paths: Vec<_> = own.iter().cloned().chain(bare).map(|path| (path, true)).collect();
    paths.extend(
        ["/openapi.json", "/nope", "/ungleichotp/3/x/"].map(|path| (path.to_owned(), true)),
    );
    paths.extend(
        [
            "/authz/auth-request",
            "/authz/forward-auth",
            "/authz/ext-authz",
            "/authz/ext-authz/",
            "/authz/ext-authz/x/y",
            "/authz/nope",
            "/envoy.service.auth.v3.Authorization/Check",
        ]
        .map(|path| (path.to_owned(), false)),
    );
    let mut asked = 0;
    for (path, is_held_to_hosts) in &paths {
        for method in ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "BREW"] {
            let request = gate.request(method, path).header("host", "evil.example");
            let answer = request.send().await.unwrap();
            asked += 1;
            let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
            assert_eq!(header("x-request-id").len(), 32, "{method} {path}");
            assert_eq!(header("x-content-type-options"), "nosniff", "{method} {path}");
            assert_eq!(header("cache-control"), "no-store", "{method} {path}");
            assert!(header("content-length") != "0", "{method} {path}");
            if *is_held_to_hosts {
                assert_eq!(answer.status(), 400, "{method} {path}");
            }
            let body = answer.text().await.unwrap();
            assert_eq!(body.is_empty(), method == "HEAD", "{method} {path}");
        }
    }
    let metrics = String::from_utf8(gate.metrics.render()).unwrap();
    let counts =
        metrics.lines().filter(|line| line.starts_with("otpgate_requests_total{listener=\"api\""));
    let counted = counts.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u32>().unwrap());
    assert_eq!(counted.sum::<u32>(), asked);
}

/// A page of a name that leads here only since its owner says so is of the same origin; so is one of an
/// address, which nobody can make lead elsewhere.
#[tokio::test]
async fn without_a_list_of_hosts_pages_of_names_are_refused() {
    let gate = Gate::start().await;
    let post = async |headers: &[(&str, &str)]| {
        let mut request = gate.request("POST", "/ungleichotp/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = body_of(ADMIN, json!({"name": "page", "realm": "shop"}));
        Answer::of(request.json(&body).send().await.unwrap()).await.status
    };
    let rebound = ("host", "evil.example:8081");
    let local = ("host", "127.0.0.1:8081");
    for (headers, status) in [
        // Programs: whatever they call this host.
        (&[rebound][..], 201),
        (&[local, ("sec-fetch-mode", "cors")], 400),
        // Pages
        (&[rebound, ("origin", "http://evil.example:8081")], 403),
        (&[rebound, ("sec-fetch-site", "same-origin")], 403),
        (&[local, ("origin", "http://evil.example:8081")], 403),
        (&[local, ("origin", "null")], 403),
        (&[local, ("origin", "http://127.0.0.1:1")], 403),
        (&[local, ("sec-fetch-site", "cross-site")], 403),
        (&[local, ("sec-fetch-site", "same-site")], 403),
        (&[local, ("sec-fetch-site", "what")], 403),
        (&[local, ("sec-fetch-site", "none"), ("sec-fetch-site", "cross-site")], 403),
        (&[local, ("origin", "http://127.0.0.1:8081"), ("sec-fetch-site", "cross-site")], 403),
        // 400: the entry is there by now.
        (&[local, ("origin", "http://127.0.0.1:8081"), ("sec-fetch-site", "same-origin")], 400),
        (&[("host", "[::1]:8081"), ("origin", "http://[::1]:8081")], 400),
        (&[("host", "localhost"), ("origin", "http://localhost")], 400),
        (&[rebound, ("sec-fetch-site", "none")], 400),
    ] {
        assert_eq!(post(headers).await, status, "{headers:?}");
    }
}

#[tokio::test]
async fn what_is_not_known_to_be_current_is_unavailable() {
    let gate = Gate::start_with(Setup { follow: false, ..Setup::default() }).await;
    for (method, path) in [("GET", "/"), ("POST", "/verify"), ("POST", "/ungleichotp/")] {
        let answer = gate.call(ADMIN, method, path, json!({"name": "x", "realm": "y"})).await;
        answer.refuses(503, "Entries are not available right now, try again later.");
        assert_eq!(answer.headers["retry-after"], "1");
    }
    // Broken bodies and unknown paths can be told all the same.
    assert_eq!(gate.send("GET", "/nope", &json!({})).await.status, 404);
}

#[tokio::test]
async fn a_store_that_takes_no_writes_gives_503_without_its_words() {
    let gate = Gate::start().await;
    let blocker = rusqlite::Connection::open(&gate.file).unwrap();
    blocker.execute_batch("BEGIN EXCLUSIVE").unwrap();
    for (method, path) in [("POST", "/ungleichotp/"), ("DELETE", "/ungleichotp/3/")] {
        let answer = gate.call(ADMIN, method, path, json!({"name": "x", "realm": "y"})).await;
        assert_eq!(answer.status, 503, "{}", answer.text);
        assert_eq!(answer.headers["retry-after"], "1");
        for word in ["sqlite", "database", "locked", gate.file.to_str().unwrap()] {
            assert!(!answer.text.to_lowercase().contains(word), "{}", answer.text);
        }
    }
    // Verification needs no store.
    assert_eq!(gate.verify("user", "users", USER_SEED).await, 200);
    blocker.execute_batch("ROLLBACK").unwrap();
    gate.create(json!({"name": "x", "realm": "y"})).await;
}

#[tokio::test]
async fn the_description_fits_the_routes() {
    let gate = Gate::start().await;
    let served = gate.send("GET", "/openapi.json", &json!({})).await;
    assert_eq!(served.json, serde_json::from_str::<Value>(OPENAPI).unwrap());
    let described: BTreeSet<(String, String)> = served.json["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys().filter(|key| *key != "parameters");
            methods.map(move |method| (path.clone(), method.to_uppercase()))
        })
        .collect();
    let mut routed: BTreeSet<(String, String)> = ROUTES
        .iter()
        .flat_map(|(path, resource)| {
            let methods = resource.allow().split(", ");
            methods.map(move |method| ((*path).to_owned(), method.to_owned()))
        })
        .collect();
    routed.extend(["GET", "HEAD"].map(|method| ("/openapi.json".to_owned(), method.to_owned())));
    assert_eq!(described, routed);
}
