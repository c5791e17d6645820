//! Paths: decided on exactly as the upstream receives them.

use super::rig::{Rig, summary};

/// Ways to spell `/admin` for one reader or another, and to get there by a detour.
const DETOURS: &[&str] = &[
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
fn readings(path: &str) -> Vec<String> {
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

/// Over both protocols, by nobody and by somebody who may not pass at `/admin`.
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
                for reading in readings(received) {
                    assert!(
                        reading != "admin" && !reading.starts_with("admin/"),
                        "{path:?}: {received}"
                    );
                }
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
