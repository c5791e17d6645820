//! `[[route]]`: who may pass where.

use std::fmt::Display;

use toml::Value;

use super::Upstream;
use super::peers::read_upstream;
use super::reader::Section;
use crate::entry::{Name, Principal, Realm};
use crate::policy::{Access, Authority, Grant, Mode, NormalPath, Route, RouteTimeouts};

pub(super) const MODES: &[(&str, Mode)] = &[("enforce", Mode::Enforce), ("report", Mode::Report)];

pub(super) fn read_route(mut s: Section, upstreams: &mut Vec<Upstream>) -> Option<Route> {
    let prefix = s.required("path", |text| {
        NormalPath::parse(text).map(|p| p.decoded().trim_end_matches('/').to_owned())
    });
    let methods = s
        .list("methods", |m| {
            let good = !m.is_empty() && m.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
            good.then(|| m.to_owned()).ok_or(format!("`{m}` is no method: methods are upper case"))
        })
        .unwrap_or_default();
    let hosts = s
        .list("hosts", |h| {
            let host = Authority::parse(h).filter(|parsed| parsed.host() == parsed.as_str());
            host.map(|parsed| parsed.host().to_owned())
                .ok_or(format!("`{h}` is no host name without a port"))
        })
        .unwrap_or_default();
    let access = read_access(&mut s);
    let upstream = s.take("upstream").and_then(|value| {
        let group = read_upstream(&s, "upstream", value)?;
        upstreams.push(group);
        Some(upstreams.len() - 1)
    });
    let mode = s.choice("mode", MODES);
    super::load::read_reuse(&mut s);
    let mut t = s.section("timeouts");
    let timeouts = RouteTimeouts { read: t.duration("read"), write: t.duration("write") };
    t.finish();
    s.finish();
    Some(Route { prefix: prefix?, methods, hosts, access: access?, mode, upstream, timeouts })
}

fn read_access(s: &mut Section) -> Option<Access> {
    let public = s.or("public", false);
    let grants = match s.take("allow") {
        None => None,
        Some(Value::Array(items)) => {
            let grants: Vec<_> = items.into_iter().filter_map(|item| read_grant(s, item)).collect();
            Some(grants)
        }
        Some(single) => Some(read_grant(s, single).into_iter().collect()),
    };
    match (public, grants) {
        (true, None) => Some(Access::Public),
        (false, Some(grants)) => {
            if grants.is_empty() {
                s.problem(
                    "allow",
                    "lets nobody pass: name somebody, or `*` for any proven principal",
                );
            }
            Some(Access::Allow(grants))
        }
        (true, Some(_)) => {
            s.problem("allow", "a route is public or has `allow`, not both");
            None
        }
        (false, None) => {
            s.problem(
                "allow",
                "is missing: say who may pass, `*` for any proven principal, or `public = true`",
            );
            None
        }
    }
}

/// `*`, `realm`, `name@realm` (split at the last `@`) or `{ name = "...", realm = "..." }`.
fn read_grant(s: &Section, value: Value) -> Option<Grant> {
    let say = |error: &dyn Display| s.problem("allow", error);
    match value {
        Value::String(text) if text == "*" => Some(Grant::Anybody),
        Value::String(text) => {
            let grant = match text.rsplit_once('@') {
                Some((name, realm)) => Principal::parse(name, realm).map(Grant::Principal),
                None => Realm::parse(&text).map(Grant::Realm),
            };
            grant.map_err(|e| say(&format_args!("`{text}` {e}"))).ok()
        }
        Value::Table(table) => {
            let mut t = s.child("allow", table);
            let realm = t.required("realm", Realm::parse);
            let named = t.has("name");
            let name = t.parse("name", Name::parse);
            t.finish();
            match (realm?, name) {
                (realm, Some(name)) => Some(Grant::Principal(Principal { realm, name })),
                (realm, None) if !named => Some(Grant::Realm(realm)),
                _ => None,
            }
        }
        other => {
            say(&format_args!("expected a string or a table, found {}", other.type_str()));
            None
        }
    }
}
