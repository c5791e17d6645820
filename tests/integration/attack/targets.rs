//! What a request is for: method, target and host.

use super::rig::{Case, Rig, answers, passes, refused};

fn request(line: &str, lines: &str) -> String {
    format!("{line}\r\n{lines}{{alice}}\r\n")
}

fn hosts() -> Vec<Case> {
    let mut table = vec![
        refused("no host", request("GET / HTTP/1.1", ""), 400),
        refused("no host in HTTP/1.0", request("GET / HTTP/1.0", ""), 400),
        passes("a host in HTTP/1.0", request("GET / HTTP/1.0", "Host: gate\r\n"), &["alice GET /"]),
        answers(
            "HTTP/1.0 is not kept alive unasked",
            request("GET /1 HTTP/1.0", "Host: gate\r\n")
                + &request("GET /2 HTTP/1.0", "Host: gate\r\n"),
            &[200],
            &["alice GET /1"],
        ),
        answers(
            "HTTP/1.0, kept alive: each request is proven",
            request("GET /1 HTTP/1.0", "Host: gate\r\nConnection: keep-alive\r\n")
                + "GET /2 HTTP/1.0\r\nHost: gate\r\n\r\n",
            &[200, 401],
            &["alice GET /1"],
        ),
        refused("two hosts", request("GET / HTTP/1.1", "Host: gate\r\nHost: evil\r\n"), 400),
        refused(
            "the same host twice",
            request("GET / HTTP/1.1", "Host: gate\r\nHost: gate\r\n"),
            400,
        ),
        passes("an underscore", request("GET / HTTP/1.1", "Host: my_gate\r\n"), &["alice GET /"]),
    ];
    table.extend(
        [
            "",
            " ",
            "evil/path",
            "gate/evil",
            "evil@gate",
            "gate:80@evil",
            "gate evil",
            "gate, evil",
            "gate:",
            "gate:x",
            "gate:80:80",
            "gate:99999",
            "gate:-1",
            "gate?evil",
            "gate#evil",
            "gate\\evil",
            "ev%69l",
            "[::1",
            "[::1]evil",
            "[fe80::1%25evil]",
            "gate..",
            ".gate",
            "http://gate",
            "*",
            "ev\u{ef}l",
            "gate\tevil",
        ]
        .map(|host| {
            refused(
                "a host that is none",
                request("GET / HTTP/1.1", &format!("Host: {host}\r\n")),
                400,
            )
        }),
    );
    table.push(refused(
        "another spelling of Host",
        request("GET / HTTP/1.1", "Host: gate\r\nHost : evil\r\n"),
        400,
    ));
    table
}

fn targets() -> Vec<Case> {
    let mut table = vec![
        passes(
            "the absolute form of this host becomes a path",
            request("GET http://gate/p?q HTTP/1.1", "Host: gate\r\n"),
            &["alice GET /p?q"],
        ),
        passes(
            "with nothing behind the host",
            request("GET http://gate HTTP/1.1", "Host: gate\r\n"),
            &["alice GET /"],
        ),
        refused(
            "the absolute form leads around no route",
            request("GET http://gate/admin HTTP/1.1", "Host: gate\r\n"),
            403,
        ),
        refused("CONNECT", request("CONNECT gate:80 HTTP/1.1", "Host: gate:80\r\n"), 405),
        refused("CONNECT to elsewhere", request("CONNECT evil:80 HTTP/1.1", "Host: gate\r\n"), 400),
        refused("CONNECT with a path", request("CONNECT / HTTP/1.1", "Host: gate\r\n"), 405),
    ];
    for (says, target) in [
        ("another host", "http://evil/"),
        ("another port", "http://gate:81/"),
        ("userinfo", "http://evil@gate/"),
        ("this host as userinfo", "http://gate@evil/"),
        ("this host and another as userinfo", "http://gate:x@evil/"),
        ("another scheme", "ftp://gate/"),
        ("a scheme without slashes", "http:gate"),
        ("a scheme with three", "http:///gate/"),
        ("no scheme", "gate/evil"),
        ("an authority", "gate:80"),
        ("an asterisk", "*"),
        ("an asterisk and more", "*/admin"),
        ("nothing but a query", "?evil"),
        ("a query right behind the host", "http://gate?evil"),
        ("a backslash behind the host", "http://gate\\evil"),
        ("a fragment", "/a#evil"),
        ("a fragment in the query", "/?a#evil"),
        ("a fragment behind the host", "http://gate#evil"),
        ("an encoded slash in front", "%2fadmin"),
        ("a dot in front", "./admin"),
    ] {
        table.push(refused(
            says,
            request(&format!("GET {target} HTTP/1.1"), "Host: gate\r\n"),
            400,
        ));
    }
    table.push(refused("OPTIONS for all", request("OPTIONS * HTTP/1.1", "Host: gate\r\n"), 400));
    table
}

fn methods() -> Vec<Case> {
    let mut table = Vec::new();
    for method in ["TRACE", "TRACK"] {
        table.push(refused(
            "methods that reflect",
            request(&format!("{method} / HTTP/1.1"), "Host: gate\r\n"),
            405,
        ));
    }
    let long = "M".repeat(64 << 10);
    for method in [
        "get",
        "Get",
        "post",
        "trace",
        "G_T",
        "GET2",
        "G\u{c9}T",
        "(GET)",
        "\"GET\"",
        &"M".repeat(33),
    ] {
        table.push(refused(
            "methods of odd form",
            request(&format!("{method} / HTTP/1.1"), "Host: gate\r\n"),
            400,
        ));
    }
    table.push(refused(
        "a method of 64 kB",
        request(&format!("{long} / HTTP/1.1"), "Host: gate\r\n"),
        431,
    ));
    for (method, seen) in [
        ("PROPFIND", &["alice PROPFIND /"]),
        ("M-SEARCH", &["alice M-SEARCH /"]),
        ("PATCH", &["alice PATCH /"]),
        ("DELETE", &["alice DELETE /"]),
        ("PRI", &["alice PRI /"]),
    ] {
        let sends = request(&format!("{method} / HTTP/1.1"), "Host: gate\r\n");
        table.push(passes("other methods are methods", sends, seen));
    }
    table
}

pub(super) fn table() -> Vec<Case> {
    [hosts(), targets(), methods()].into_iter().flatten().collect()
}

#[tokio::test]
async fn method_target_and_host_have_one_reading() {
    Rig::normal().await.run(&table()).await;
}

/// Only who may not pass is let through to be reported.
#[tokio::test]
async fn report_mode_forwards_no_unclear_target() {
    let unclear: Vec<_> = table().into_iter().filter(|case| case.is_unclear()).collect();
    Rig::reporting().await.run(&unclear).await;
}
