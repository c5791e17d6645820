//! `[headers]`: the names of headers.

use std::collections::HashSet;

use http::HeaderName;

use super::HeaderNames;
use super::reader::Section;
use crate::credentials::fold;

pub(super) fn read_headers(mut s: Section) -> HeaderNames {
    let parse =
        |text: &str| HeaderName::try_from(text).map_err(|_| format!("`{text}` is no header name"));
    let default = HeaderNames::default();
    let headers = HeaderNames {
        name: s.parse("name", parse).unwrap_or(default.name),
        realm: s.parse("realm", parse).unwrap_or(default.realm),
        token: s.parse("token", parse).unwrap_or(default.token),
        identity_name: s.parse("identity_name", parse).unwrap_or(default.identity_name),
        identity_realm: s.parse("identity_realm", parse).unwrap_or(default.identity_realm),
        identity_principal: s.parse("identity_principal", parse),
    };
    let credentials = headers.credentials();
    let identity: Vec<_> = headers.identity().collect();
    let distinct = |names: &[&HeaderName]| {
        names.iter().map(|name| fold(name)).collect::<HashSet<_>>().len() == names.len()
    };
    let token = fold(&headers.token);
    if !distinct(&credentials) {
        s.problem(
            "token",
            "`name`, `realm` and `token` must differ, also with `_` and `.` read as `-`",
        );
    }
    if !distinct(&identity) || identity.iter().any(|name| fold(name) == token) {
        s.problem("identity_name", "identity headers must differ from each other and from `token`");
    }
    for name in headers.protected() {
        if RESERVED.contains(&fold(name).as_str()) {
            s.problem("name", format_args!("`{name}` has a meaning of its own in HTTP"));
        }
    }
    s.finish();
    headers
}

/// Headers that cannot carry credentials or identity.
const RESERVED: &[&str] = &[
    "host",
    "connection",
    "content-length",
    "content-type",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "keep-alive",
    "proxy-connection",
    "cookie",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-request-id",
];
