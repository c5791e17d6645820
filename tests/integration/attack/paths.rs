//! Paths: decided on exactly as the upstream receives them.

use super::frames::{END_HEADERS, END_STREAM, End, HEADERS, block, frame, send};
use super::recorder::Recorder;
use super::rig::{Rig, passes, refused, summary};
use crate::harness::{Sandbox, run, stderr};

/// Ways to spell `/admin` for one reader or another, and to get there by a detour.
pub(crate) const DETOURS: &[&str] = &[
    "/admin",
    "/admin/",
    "/admin/x",
    "/%61dmin",
    "/%61%64%6d%69%6e",
    "/admi%6E/x",
    "/admin?x",
    "/admin;x",
    "/admin;x=1/y",
    "/;x/admin",
    "/public/../admin",
    "/public/./../admin",
    "/public/%2e%2e/admin",
    "/public/%2E%2E/admin",
    "/public/.%2e/admin",
    "/public/%2e./admin",
    "/public/..%2fadmin",
    "/public/..%5cadmin",
    "/public/..\\admin",
    "/public\\..\\admin",
    "/%2561dmin",
    "/%252561dmin/x",
    "/%2541dmin",
    "/admin%252e",
    "/public/%252e%252e/admin",
    "/public/%252e%252e%252fadmin",
    "/public/%25252e%25252e/admin",
    "/public/..;/admin",
    "/public/..;x=1/admin",
    "/public/;/../admin",
    "/public/..%3b/admin",
    "/public/..%00/admin",
    "/public/..%0d%0a/admin",
    "/public/%c0%ae%c0%ae/admin",
    "/public/%e0%80%ae%e0%80%ae/admin",
    "/public/..%c0%afadmin",
    "/public/\u{ff0e}\u{ff0e}/../admin",
    "//admin",
    "///admin",
    "/public//../admin",
    "/./admin",
    "/.//admin",
    "/admin/.",
    "/admin/..",
    "/admin//",
    "/public/..",
    "/public/../",
    "/..",
    "/.",
    "/%2fadmin",
    "/%2Fadmin",
    "/%5cadmin",
    "/\\admin",
    "/admin%00",
    "/admin%00.html",
    "/admin%0a",
    "/admin%20",
    "/admin%20/x",
    "/admin.",
    "/admin./x",
    "/admin..",
    "/admin...",
    "/admin%2e",
    "/admin%09",
    "/admin%3f",
    "/admin%23",
    "/admin%3bx",
    "/admin%2f",
    "/admin%5c",
    "/admin%",
    "/admin%4",
    "/admin%zz",
    "/admin%u0041",
    "/%u0061dmin",
    "/Admin",
    "/ADMIN",
    "/aDmIn/x",
    "/%41dmin",
    "/ADMIN;x",
    "/Admin.",
    "/ADMIN%20/x",
    "/admin#x",
    "/admin?/../public",
    "/public?/../admin",
    "/public?x=/admin",
    "/public#/../admin",
    "/public/x/../../admin",
    "/public/%2e%2e%2fadmin",
    "/public/%2e%2e%5cadmin",
    "/public/....//admin",
    "/public/..././admin",
    "/public/.../admin",
    "/public/.. /admin",
    "/public/%20../admin",
    "/public/..%20/admin",
    "/public/..%09/admin",
    "/public/\u{2025}/admin",
    "/public/%u002e%u002e/admin",
    "/public/%%32%65%%32%65/admin",
    "/public%2f..%2fadmin",
    "/public%2fadmin",
    "/publicadmin",
    "/public/admin",
    "/PUBLIC/../admin",
    "/public;/../admin",
    "/public;x/../admin",
    "/adm%69n%2f",
    "/adm\u{131}n",
    "/ad\u{ff4d}in",
    "/admin\u{301}",
    "/admin/%7f",
    "/admin/\u{85}",
    "/%ff/admin",
    "/%2e/admin",
    "/%2e%2e/admin",
    "/public/%2f%2e%2e%2fadmin",
    "/a/b/c/../../../admin",
    "/public/..;admin",
    "/public;/admin",
    "/public/;a=b/..;c=d/admin",
    "/public/%3b/../admin",
    "/public/%23/../admin",
    "/public/%3f/../admin",
    "/public/x%2f..%2f..%2fadmin",
];

/// How somebody behind the gate may read a path further.
pub(crate) fn readings(path: &str) -> Vec<String> {
    let mut readings = vec![path.to_owned()];
    for _ in 0..4 {
        let last = readings.last().unwrap().clone();
        let decoded = percent_encoding::percent_decode_str(&last).decode_utf8_lossy().into_owned();
        readings.push(decoded);
    }
    let mut all = Vec::new();
    for reading in readings {
        let reading = reading.replace('\\', "/").to_lowercase();
        let cut = reading.split(['?', '#', '\0', '\r', '\n']).next().unwrap_or_default();
        for parameters in [false, true] {
            let mut segments: Vec<&str> = Vec::new();
            for segment in cut.split('/') {
                let segment = if parameters { segment.split(';').next().unwrap() } else { segment };
                match segment.trim_end_matches(['.', ' ']) {
                    _ if segment == ".." => drop(segments.pop()),
                    "" => {}
                    name => segments.push(name),
                }
            }
            all.push(segments.join("/"));
        }
    }
    all
}

/// By nobody and by somebody who may not pass at `/admin`.
#[tokio::test]
async fn no_path_leads_to_another_route_than_the_upstream_sees() {
    let rig = Rig::normal().await;
    let mut passed = 0;
    for path in DETOURS {
        for proof in ["", "{alice}"] {
            let sends = format!("GET {path} HTTP/1.1\r\nHost: gate\r\n{proof}\r\n");
            let got = rig.send(&rig.fill(sends.as_bytes())).await;
            let seen = rig.seen().await;
            let [status] = got[..] else { panic!("{path:?}: {got:?}") };
            assert!([200, 400, 401, 403].contains(&status), "{path:?}: {status}");
            assert_eq!(seen.len(), usize::from(status == 200), "{path:?}: {status} {seen:?}");
            for seen in seen {
                passed += 1;
                let summary = summary(&seen);
                let (_, target) = summary.split_once(" GET ").unwrap();
                let received = target.split('?').next().unwrap();
                assert_not_admin(received);
                // What was received is decided on as what was sent.
                let again = format!("GET {received} HTTP/1.1\r\nHost: gate\r\n{proof}\r\n");
                assert_eq!(rig.send(&rig.fill(again.as_bytes())).await, [200], "{path:?}");
                let twice = rig.seen().await;
                assert_eq!(twice[0].line(), format!("GET {received}"), "{path:?}");
                assert_eq!(twice[0].who(), seen.who(), "{path:?}");
            }
        }
    }
    assert!(passed > 8, "only {passed} passed: this shows nothing");
}

/// No reading of a path is one of `/admin`.
pub(crate) fn assert_not_admin(received: &str) {
    for reading in readings(received) {
        assert!(reading != "admin" && !reading.starts_with("admin/"), "{received}");
    }
}

#[tokio::test]
async fn no_path_over_http2_leads_there_either() {
    let rig = Rig::normal().await;
    let token = rig.fill(b"{token}");
    let mut passed = 0;
    for path in DETOURS {
        let mut fields: Vec<(Vec<u8>, Vec<u8>)> = vec![
            (b":method".to_vec(), b"GET".to_vec()),
            (b":scheme".to_vec(), b"http".to_vec()),
            (b":authority".to_vec(), b"gate".to_vec()),
            (b":path".to_vec(), path.as_bytes().to_vec()),
        ];
        for (name, value) in [("name", &b"alice"[..]), ("realm", b"shop"), ("token", &token)] {
            fields.push((format!("x-auth-{name}").into_bytes(), value.to_vec()));
        }
        let frames = frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields));
        let end = send(rig.address(), &frames).await;
        let seen = rig.seen().await;
        assert_eq!(seen.len(), usize::from(end == End::Status(200)), "{path:?}: {end:?} {seen:?}");
        for seen in seen {
            passed += 1;
            assert_not_admin(seen.line().trim_start_matches("GET ").split('?').next().unwrap());
        }
    }
    assert!(passed > 4, "only {passed} passed: this shows nothing");
}

/// Who may pass there does, by every spelling that has one reading.
#[tokio::test]
async fn spellings_of_one_reading_pass() {
    let rig = Rig::normal().await;
    for (path, received) in [
        ("/admin", "/admin"),
        ("/admin/", "/admin/"),
        ("/%61dmin/%78", "/admin/x"),
        ("/admin/a%2bb%c3%bc", "/admin/a%2Bb%C3%BC"),
        ("/admin/\u{fc}", "/admin/%C3%BC"),
        ("/admin;v=1", ""),
        ("/admin/x;v=1", "/admin/x;v=1"),
        ("/admin/100%25", "/admin/100%25"),
        ("/admin/%61%2b?x=%2e%2e&x", "/admin/a%2B?x=%2e%2e&x"),
        ("/admin?a=/../b&c=%2e%2e", "/admin?a=/../b&c=%2e%2e"),
    ] {
        let sends = format!("GET {path} HTTP/1.1\r\nHost: gate\r\n{{bob}}\r\n");
        let got = rig.send(&rig.fill(sends.as_bytes())).await;
        let seen: Vec<_> = rig.seen().await.iter().map(summary).collect();
        if received.is_empty() {
            assert_eq!((got, seen), (vec![400], Vec::new()), "{path}");
        } else {
            assert_eq!((got, seen), (vec![200], vec![format!("bob GET {received}")]), "{path}");
        }
    }
    let long = format!("/admin/{}", "x".repeat(20_000));
    let sends = format!("GET {long} HTTP/1.1\r\nHost: gate\r\n{{bob}}\r\n");
    assert_eq!(rig.send(&rig.fill(sends.as_bytes())).await, [200]);
    assert_eq!(summary(&rig.seen().await[0]), format!("bob GET {long}"));
    let long = "x".repeat(70_000);
    let sends = format!("GET /{long} HTTP/1.1\r\nHost: gate\r\n{{bob}}\r\n");
    assert_eq!(rig.send(&rig.fill(sends.as_bytes())).await, [431]);
    assert!(rig.seen().await.is_empty());
}

/// Where the upstream tells them apart and the settings say so, `/Admin` is another path than `/admin`.
#[tokio::test]
async fn similar_paths_pass_if_the_upstream_tells_them_apart() {
    let routes =
        "[[route]]\npath = \"/\"\npublic = true\n[[route]]\npath = \"/admin\"\nallow = [\"lab\"]\n";
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: gate\r\n\r\n");
    let safe = Rig::with("", routes).await;
    let distinct = Rig::with("similar_paths = \"distinct\"", routes).await;
    for (path, seen) in [
        ("/Admin", &["nobody GET /Admin"][..]),
        ("/admin.", &["nobody GET /admin."]),
        ("/ADMIN%20/x", &["nobody GET /ADMIN%20/x"]),
    ] {
        safe.run(&[refused("refused unless set otherwise", get(path), 400)]).await;
        distinct.run(&[passes("another path", get(path), seen)]).await;
    }
    for rig in [safe, distinct] {
        rig.run(&[
            refused("another spelling of it", get("/%61dmin"), 401),
            refused("its parameters", get("/admin;x"), 400),
            passes("no similarity", get("/Administration"), &["nobody GET /Administration"]),
        ])
        .await;
    }
}

/// A raw route's paths arrive byte for byte, with identity as everywhere.
#[tokio::test]
async fn raw_paths_arrive_as_they_came() {
    let routes = "[[route]]\npath = \"/\"\nallow = [\"*\"]\n\
                  [[route]]\npath = \"/raw\"\nallow = [\"*\"]\nraw_path = true\n";
    let rig = Rig::with("", routes).await;
    let get = |path: &str, lines: &str| format!("GET {path} HTTP/1.1\r\nHost: gate\r\n{lines}\r\n");
    for path in [
        "/raw",
        "/raw/",
        "/raw//a//b",
        "/raw/a%2Fb%2fc",
        "/raw/%7e%7E~",
        "/raw/../x",
        "/raw/%2e%2e/./x/",
        "/raw/a;b/..;/c",
        "/raw/%00%ff%zz%",
        "/raw/a\\b",
        "/raw/%252f",
        "/raw/x?y=/../z&%2e",
        "/raw/\u{fc}",
        "http://gate/raw//x",
    ] {
        let got = rig.send(&rig.fill(get(path, "{alice}").as_bytes())).await;
        let seen: Vec<_> = rig.seen().await.iter().map(summary).collect();
        let arrived = path.trim_start_matches("http://gate");
        assert_eq!((got, seen), (vec![200], vec![format!("alice GET {arrived}")]), "{path}");
        let spoofed = get(path, "X-Auth-Name: evil\r\nConnection: x-auth-name\r\n");
        assert_eq!(rig.send(spoofed.as_bytes()).await, [401], "{path}");
        assert!(rig.seen().await.is_empty(), "{path}");
    }
    rig.run(&[
        refused("not literally its path", get("/%72aw/x", "{alice}"), 400),
        refused("its path with parameters", get("/raw;x", "{alice}"), 400),
        refused("a detour to it", get("/x/../raw", "{alice}"), 400),
        refused("two slashes before it", get("//raw/x", "{alice}"), 400),
        refused("a longer name", get("/raws//x", "{alice}"), 400),
        refused("a fragment", get("/raw/x#y", "{alice}"), 400),
        passes("nor a control character", get("/raw/x\x01", "{alice}"), &["alice GET /raw/x%01"]),
        refused("an alias of a credential", get("/raw//x", "{alice}x_auth_name: evil\r\n"), 400),
        passes(
            "a space, which no target has, is escaped",
            get("/raw/a b", "{alice}"),
            &["alice GET /raw/a%20b"],
        ),
        passes("elsewhere paths are normalised", get("/x/%7e", "{alice}"), &["alice GET /x/~"]),
    ])
    .await;
}

/// A raw route with servers of its own opens these servers, and no others.
#[tokio::test]
async fn raw_paths_reach_no_server_but_their_own() {
    let blobs = Recorder::start().await;
    let routes = format!(
        "[[route]]\npath = \"/\"\nallow = [\"lab\"]\n\
         [[route]]\npath = \"/blob\"\npublic = true\nraw_path = true\nupstream = \"{}\"\n",
        blobs.address
    );
    let rig = Rig::with("", &routes).await;
    for path in ["/blob/../admin", "/blob/%2e%2e/admin", "/blob/..%2fadmin", "/blob/x//y"] {
        let get = format!("GET {path} HTTP/1.1\r\nHost: gate\r\nX-Auth-Name: evil\r\n\r\n");
        assert_eq!(rig.send(get.as_bytes()).await, [200], "{path}");
        assert!(rig.seen().await.is_empty(), "{path}");
        let (seen, _) = blobs.take().await;
        assert_eq!(seen.iter().map(summary).collect::<Vec<_>>(), [format!("nobody GET {path}")]);
    }
}

#[test]
fn check_tells_of_raw_routes_that_lead_past_others() {
    let sandbox = Sandbox::new();
    let file = sandbox.write(
        "raw.toml",
        "[[route]]\npath = \"/\"\nallow = [\"staff\"]\n\
         [[route]]\npath = \"/raw\"\npublic = true\nraw_path = true\n",
    );
    let output = run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("route[1].raw_path: a raw path may become one below `/`"), "{said}");
}
