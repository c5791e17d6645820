//! Headers that make an upstream see another request, or another sender, than there was.

use super::rig::{Rig, get_with};

/// Removed whoever sends them, in every spelling.
const OVERRIDES: &[&str] = &[
    "X-HTTP-Method-Override",
    "x_http_method_override",
    "X-HTTP-Method",
    "X-Method-Override",
    "X-HTTP-Host-Override",
    "X-Override-URL",
    "X-Original-URL",
    "X-Original-URI",
    "X_Original_Url",
    "X-Original-Method",
    "X-Original-Host",
    "X-Rewrite-URL",
    "X.Rewrite.Url",
];

/// Removed from strangers, in every spelling.
const FORWARDING: &[&str] = &[
    "Forwarded",
    "X-Forwarded-For",
    "X_Forwarded_For",
    "X.Forwarded.For",
    "X-Forwarded-Proto",
    "X-Forwarded-Host",
    "X-Forwarded-Port",
    "X-Forwarded-Prefix",
    "X-Forwarded-Uri",
    "X-Forwarded-Method",
    "X-Forwarded-User",
    "X-Forwarded-Server",
    "X-Forwarded-Scheme",
    "X-Forwarded-Client-Cert",
    "X-Forwarded",
    "Forwarded-For",
    "Client-IP",
    "X-Client-IP",
    "True_Client_Ip",
    "CF-Connecting-IP",
    "X-Cluster-Client-IP",
    "X-Real-IP",
    "X_Real_Ip",
    "X-Request-Id",
];

#[tokio::test]
async fn strangers_speak_for_nobody() {
    let rig = Rig::normal().await;
    for name in OVERRIDES.iter().chain(FORWARDING) {
        for value in ["evil", "evil, 127.0.0.1", "for=evil;host=evil"] {
            let sends = get_with(&format!("{name}: {value}\r\n{name}: evil\r\n"));
            assert_eq!(rig.send(&rig.fill(sends.as_bytes())).await, [200], "{name}");
            // `evil` among what is seen fails there.
            let seen = rig.seen().await;
            assert_eq!(seen[0].values("x-forwarded-for"), ["127.0.0.1"], "{name}");
            assert_eq!(seen[0].values("x-forwarded-host"), ["gate"], "{name}");
            assert_eq!(seen[0].values("x-request-id").len(), 1, "{name}");
        }
    }
}

#[tokio::test]
async fn trusted_proxies_speak_for_senders_but_change_no_request() {
    let rig = Rig::with("trusted_proxies = [\"127.0.0.0/8\"]", "").await;
    for name in OVERRIDES {
        let sends = get_with(&format!("{name}: evil\r\n"));
        assert_eq!(rig.send(&rig.fill(sends.as_bytes())).await, [200], "{name}");
        rig.seen().await;
    }
    for (lines, header, values) in [
        ("X-Forwarded-For: 192.0.2.1\r\n", "x-forwarded-for", "192.0.2.1, 127.0.0.1"),
        (
            "X-Forwarded-For: 192.0.2.1\r\nX_Forwarded_For: evil\r\n",
            "x-forwarded-for",
            "192.0.2.1, 127.0.0.1",
        ),
        ("X-Forwarded-Proto: https\r\nX.Forwarded.Proto: evil\r\n", "x-forwarded-proto", "https"),
        ("X-Forwarded-Host: evil\r\nX-Forwarded-Host: evil\r\n", "x-forwarded-host", "gate"),
        ("X-Request-Id: front-1\r\n", "x-request-id", "front-1"),
    ] {
        assert_eq!(rig.send(&rig.fill(get_with(lines).as_bytes())).await, [200], "{lines}");
        assert_eq!(rig.seen().await[0].values(header), [values], "{lines}");
    }
    for id in ["evil evil", "evil\u{fc}", "evil\"", &"evil".repeat(40), "evil, evil", ""] {
        let sends = get_with(&format!("X-Request-Id: {id}\r\n"));
        assert_eq!(rig.send(&rig.fill(sends.as_bytes())).await, [200], "{id}");
        assert_eq!(rig.seen().await[0].values("x-request-id")[0].len(), 32, "{id}");
    }
}
