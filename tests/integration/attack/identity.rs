//! Identity that was not proven never arrives, whatever it is wrapped in.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::rig::{Case, Rig, answers, get_with, passes, refused};
use crate::harness::{Gate, Sandbox};
use crate::peers::bounded;
use crate::peers::wire::Connection;

pub(super) fn table() -> Vec<Case> {
    let spoofed = "X-Auth-Name: evil\r\nX-Auth-Realm: evil\r\nx_auth_name: evil\r\nX.Auth.Realm: evil\r\n\
                   X-AUTH_TOKEN: evil\r\n";
    let get = |path: &str, lines: &str| format!("GET {path} HTTP/1.1\r\nHost: gate\r\n{lines}\r\n");
    let mut table = vec![
        passes("public routes bear no identity", get("/public", spoofed), &["nobody GET /public"]),
        passes("not even a proven one", get("/public", "{alice}"), &["nobody GET /public"]),
        passes("reported routes bear none", get("/watched", spoofed), &["nobody GET /watched"]),
        passes(
            "nor of those who may not pass",
            get("/watched", "{alice}"),
            &["nobody GET /watched"],
        ),
        passes("but of those who may", get("/watched", "{bob}"), &["bob GET /watched"]),
        refused("denied routes forward nothing", get("/admin", "{alice}"), 403),
        refused(
            "identity alone is no proof",
            get("/", "X-Auth-Name: evil\r\nX-Auth-Realm: evil\r\n"),
            401,
        ),
        refused("nor is it one on other routes", get("/admin", spoofed), 400),
        answers(
            "a proof is good for one request: kept alive",
            format!("{}{}", get("/1", "{alice}"), get("/2", "")),
            &[200, 401],
            &["alice GET /1"],
        ),
        answers(
            "pipelined requests are decided one by one",
            format!(
                "{}{}{}{}{}",
                get("/1", "{alice}"),
                get("/public", spoofed),
                get("/admin", "{bob}"),
                "POST /2 HTTP/1.1\r\nHost: gate\r\nContent-Length: 3\r\n{alice}\r\nabc",
                get("/admin", "{alice}"),
            ),
            &[200, 200, 200, 200, 403],
            &["alice GET /1", "nobody GET /public", "bob GET /admin", "alice POST /2"],
        ),
        answers(
            "a refused request's body is no request",
            format!(
                "POST /x HTTP/1.1\r\nHost: gate\r\nContent-Length: 50\r\n\r\n{}",
                get("/smuggled", "{alice}")
            ),
            &[401],
            &[],
        ),
        answers(
            "a body is not read as a request",
            "POST /x HTTP/1.1\r\nHost: gate\r\nContent-Length: 38\r\n{alice}\r\nGET /smuggled HTTP/1.1\r\nHost: gate\r\n\r\n",
            &[200],
            &["alice POST /x"],
        ),
        answers(
            "who expects to be asked for the body gets the decision first",
            "POST /x HTTP/1.1\r\nHost: gate\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
            &[401],
            &[],
        ),
        answers(
            "trailers over HTTP/1.1 are dropped",
            "POST /x HTTP/1.1\r\nHost: gate\r\nTE: trailers\r\nTrailer: X-Auth-Name\r\nTransfer-Encoding: chunked\r\n\
             {alice}\r\n3\r\nabc\r\n0\r\nX-Auth-Name: evil\r\nx_auth_realm: evil\r\nHost: evil\r\n\r\n",
            &[200],
            &["alice POST /x"],
        ),
        answers(
            "trailers on public routes too, and the next request begins behind them",
            "POST /public HTTP/1.1\r\nHost: gate\r\nTransfer-Encoding: chunked\r\n\r\n\
             0\r\nX-Auth-Name: evil\r\n\r\nGET /1 HTTP/1.1\r\nHost: gate\r\n\r\n",
            &[200, 401],
            &["nobody POST /public"],
        ),
    ];
    for (says, lines) in [
        ("nominated", "Connection: X-Auth-Name\r\n"),
        ("nominated in lower case", "connection: x-auth-name\r\n"),
        ("nominated in capitals", "CONNECTION: X-AUTH-NAME, X-AUTH-REALM, X-AUTH-TOKEN\r\n"),
        ("nominated behind close", "Connection: close, X-Auth-Name\r\n"),
        ("nominated behind nothing", "Connection: , , X-Auth-Realm\r\n"),
        ("nominated by the second of two", "Connection: keep-alive\r\nConnection: X-Auth-Name\r\n"),
        ("nominated behind an empty one", "Connection:\r\nConnection: X-Auth-Realm\r\n"),
        ("nominated with a tab", "Connection: close,\tX-Auth-Name\t\r\n"),
        ("nominated by Keep-Alive", "Connection: keep-alive\r\nKeep-Alive: X-Auth-Name\r\n"),
        ("nominated by Proxy-Connection", "Proxy-Connection: X-Auth-Name\r\n"),
        ("nominated by TE", "TE: X-Auth-Name\r\n"),
        ("nominated with its alias", "Connection: x_auth_name, X-Auth-Name\r\n"),
        ("the request id nominated", "Connection: X-Request-Id\r\n"),
    ] {
        table.push(passes(says, get_with(lines), &["alice GET /"]));
        let on_public = get("/public", &format!("{spoofed}{lines}"));
        table.push(passes(says, on_public, &["nobody GET /public"]));
    }
    table
}

#[tokio::test]
async fn only_proven_identity_arrives() {
    Rig::normal().await.run(&table()).await;
}

/// Where it is only said who would be refused, everything else holds.
#[tokio::test]
async fn report_mode_lets_no_unproven_identity_through() {
    let rig = Rig::reporting().await;
    rig.run_checking(&table(), |case, got, seen| {
        // All of it can be read, so the first answer is the upstream's; `who` fails for more than one identity, and `evil` is looked for.
        let nobodys = seen.iter().filter(|seen| seen.who() == "nobody").count();
        let proofs = [&b"{alice}"[..], b"{bob}"].map(|proof| count(&case.sends, proof));
        let forwarded = got.iter().filter(|status| **status == 200).count();
        got.first() == Some(&200)
            && forwarded == seen.len()
            && seen.len() - nobodys <= proofs[0] + proofs[1]
    })
    .await;
}

fn count(text: &[u8], what: &[u8]) -> usize {
    text.windows(what.len()).filter(|window| *window == what).count()
}

/// An upstream that closes a kept connection when it is used again makes the gate send once more.
#[tokio::test]
async fn a_second_attempt_is_made_as_the_first() {
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sandbox = Sandbox::with_entries();
    let proxy = format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\nupstream = \"{}\"",
        upstream.local_addr().unwrap()
    );
    let health = "[proxy.health]\ninterval = \"off\"";
    let gate = sandbox.serve(&format!("{proxy}\n{health}")).ready().await;
    let (name, realm, seed) = ("alice", "shop", crate::harness::ALICE);
    let get = |path: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nHost: gate\r\nConnection: X-Auth-Name\r\nX-Auth-Name: {name}\r\n\
             X-Auth-Realm: {realm}\r\nX-Auth-Token: {}\r\n\r\n",
            crate::harness::token(seed)
        )
    };
    let address = gate.proxy.strip_prefix("http://").unwrap().parse().unwrap();
    let mut client = Connection::to(address).await;
    client.send(get("/1")).await;
    let mut first = Connection::over(upstream.accept().await.unwrap().0);
    bounded("the first request", first.request_head()).await.unwrap();
    first.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(client.answer().await.unwrap().status, 200);
    client.send(get("/2")).await;
    let before = bounded("the second request", first.request_head()).await.unwrap();
    drop(first);
    let mut second = Connection::over(bounded("another try", upstream.accept()).await.unwrap().0);
    let after = bounded("the same request", second.request_head()).await.unwrap();
    second.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(client.answer().await.unwrap().status, 200);
    let lines = |head: &str| {
        let mut lines: Vec<_> = head.to_lowercase().lines().map(ToOwned::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&before), lines(&after));
    assert!(lines(&after).contains(&"x-auth-name: alice".to_owned()), "{after}");
    assert!(!after.to_lowercase().contains("x-auth-token"), "{after}");
}

/// A gate in front of `upstream`, which a test plays itself, and where the gate listens.
async fn gate_before(upstream: &TcpListener, sandbox: &Sandbox) -> (Gate, SocketAddr) {
    let proxy = format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\nupstream = \"{}\"",
        upstream.local_addr().unwrap()
    );
    let gate = sandbox.serve(&format!("{proxy}\n[proxy.health]\ninterval = \"off\"")).ready().await;
    let address = gate.proxy.strip_prefix("http://").unwrap().parse().unwrap();
    (gate, address)
}

/// Upgrades: none without proof, no tunnel unless the upstream switches, and what goes through one is
/// not looked at.
#[tokio::test]
async fn an_upgrade_is_proven_first_and_a_tunnel_only_if_both_sides_switch() {
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sandbox = Sandbox::with_entries();
    let (_gate, address) = gate_before(&upstream, &sandbox).await;
    let ask = |proof: bool| {
        let proof = if proof {
            format!(
                "X-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {}\r\n",
                crate::harness::token(crate::harness::ALICE)
            )
        } else {
            "X-Auth-Name: evil\r\nX-Auth-Realm: evil\r\n".to_owned()
        };
        format!(
            "GET /ws HTTP/1.1\r\nHost: gate\r\nConnection: Upgrade, X-Auth-Name\r\nUpgrade: websocket\r\n{proof}\r\n"
        )
    };
    let mut unproven = Connection::to(address).await;
    assert_eq!(unproven.ask(ask(false)).await.unwrap().status, 401);

    // A body of an upgrade's request is a body: none of it is taken for what follows a switch.
    let mut with_body = Connection::to(address).await;
    let body = "GET /inner HTTP/1.1\r\nHost: gate\r\n\r\n";
    let head =
        ask(true).replace("Connection:", &format!("Content-Length: {}\r\nConnection:", body.len()));
    with_body.send(head + body + "GET /next HTTP/1.1\r\nHost: gate\r\n\r\n").await;
    let mut server = Connection::over(bounded("the upgrade", upstream.accept()).await.unwrap().0);
    let (_, got) = bounded("its body", server.request()).await.unwrap();
    assert_eq!(got, body.as_bytes());
    server.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno").await;
    assert_eq!(with_body.answer().await.unwrap().text(), "no");
    assert!(with_body.answer().await.is_none_or(|answer| answer.status == 401));
    drop(with_body);
    assert!(server.ends().await, "nothing more went to the upstream");

    let inner = "GET /inner HTTP/1.1\r\nHost: gate\r\nX-Auth-Name: evil\r\n\r\n";
    let mut refused = Connection::to(address).await;
    refused.send(ask(true) + inner).await;
    let mut server = Connection::over(bounded("the upgrade", upstream.accept()).await.unwrap().0);
    let head = bounded("its head", server.request_head()).await.unwrap();
    assert!(head.to_lowercase().contains("x-auth-name: alice"), "{head}");
    server.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno").await;
    assert_eq!(refused.answer().await.unwrap().text(), "no");
    assert_eq!(refused.answer().await.unwrap().status, 401, "a request like any other");
    drop(refused);
    assert!(server.ends().await, "nothing of it went to the upstream");

    let mut tunnel = Connection::to(address).await;
    tunnel.send(ask(true)).await;
    let mut server = Connection::over(bounded("the upgrade", upstream.accept()).await.unwrap().0);
    bounded("its head", server.request_head()).await.unwrap();
    server
        .send(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        )
        .await;
    assert_eq!(tunnel.answer().await.unwrap().status, 101);
    tunnel.send(inner).await;
    let (_, mut stream) = server.into_parts();
    let mut got = vec![0; inner.len()];
    bounded("the tunnel's bytes", stream.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, inner.as_bytes());
    // The end of the tunnel is the end of the connection: no request follows on it.
    stream.shutdown().await.unwrap();
    drop(stream);
    tunnel.send(ask(true)).await;
    assert!(tunnel.answer().await.is_none());
}

/// Early hints are the upstream's, and no answer: what follows is.
#[tokio::test]
async fn early_hints_do_not_shift_answers() {
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sandbox = Sandbox::with_entries();
    let (_gate, address) = gate_before(&upstream, &sandbox).await;
    let token = crate::harness::token(crate::harness::ALICE);
    let proof = format!("X-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {token}\r\n");
    let mut client = Connection::to(address).await;
    client
        .send(format!(
            "GET /1 HTTP/1.1\r\nHost: gate\r\n{proof}\r\nGET /2 HTTP/1.1\r\nHost: gate\r\n\r\n"
        ))
        .await;
    let mut server = Connection::over(bounded("the request", upstream.accept()).await.unwrap().0);
    bounded("its head", server.request_head()).await.unwrap();
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
    server.send(format!("{hints}{hints}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")).await;
    let mut statuses = Vec::new();
    while let Some(answer) = client.answer().await {
        statuses.push(answer.status);
        if answer.status >= 400 {
            break;
        }
    }
    statuses.retain(|status| *status != 103);
    assert_eq!(statuses, [200, 401]);
}
