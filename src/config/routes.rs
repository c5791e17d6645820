//! `[[route]]`: who may pass where.

use std::fmt::Display;
use std::net::IpAddr;

use toml::Value;

use super::peers::{parse_host, read_upstream};
use super::reader::Section;
use super::tokens::read_reuse;
use super::{Target, Upstream};
use crate::entry::{Name, Principal, Realm};
use crate::policy::{Access, Grant, Mode, NormalPath, Policy, Route, RouteTimeouts, SimilarPaths};

pub(super) const MODES: &[(&str, Mode)] = &[("enforce", Mode::Enforce), ("report", Mode::Report)];

pub(super) const SIMILAR_PATHS: &[(&str, SimilarPaths)] =
    &[("refuse", SimilarPaths::Refuse), ("distinct", SimilarPaths::Distinct)];

/// Reads `[[route]]`. `is_asked`: other proxies may ask, which forward to servers of their own.
pub(super) fn read_routes(
    root: &mut Section,
    upstreams: &mut Vec<Upstream>,
    is_asked: bool,
) -> Vec<Route> {
    let mut routes: Vec<(usize, Route)> = Vec::new();
    for (i, section) in root.sections("route") {
        let Some(route) = read_route(section, upstreams) else { continue };
        if let Some((first, _)) = routes.iter().find(|(_, earlier)| covers(earlier, &route)) {
            root.problem(
                &format!("route[{i}]"),
                format_args!("is never reached: route[{first}] takes all of its requests"),
            );
        }
        routes.push((i, route));
    }
    check_raw_routes(root, &routes, upstreams, is_asked);
    routes.into_iter().map(|(_, route)| route).collect()
}

/// What a raw path means is up to the upstream: no raw route may lead past another one.
fn check_raw_routes(
    root: &Section,
    routes: &[(usize, Route)],
    upstreams: &[Upstream],
    is_asked: bool,
) {
    let policy = Policy::new(routes.iter().map(|(_, route)| route.clone()).collect());
    let group = |route: &Route| upstreams.get(route.upstream.unwrap_or(0));
    for (i, raw) in routes.iter().filter(|(_, route)| route.raw_path) {
        let others = routes.iter().filter(|(j, _)| j != i);
        let own_servers = !is_asked
            && raw.upstream.is_some()
            && group(raw).is_some_and(|own| {
                let proxys = upstreams.first();
                let all = others.filter_map(|(_, other)| group(other)).chain(proxys);
                all.into_iter().all(|other| !have_a_server_in_common(own, other))
            });
        if let Some(conflict) = policy.raw_conflict(raw, own_servers) {
            root.problem(&format!("route[{i}].raw_path"), conflict);
        }
    }
}

/// Whether a server is in both groups, as far as addresses tell.
fn have_a_server_in_common(one: &Upstream, other: &Upstream) -> bool {
    let is_loopback = |host: &str| {
        let host = host.to_ascii_lowercase();
        host == "localhost"
            || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
    };
    let same = |a: &Target, b: &Target| match (a, b) {
        (Target::Host(a, a_port), Target::Host(b, b_port)) => {
            a_port == b_port
                && (a.trim_end_matches('.').eq_ignore_ascii_case(b.trim_end_matches('.'))
                    || (is_loopback(a) && is_loopback(b)))
        }
        (a, b) => a == b,
    };
    one.targets.iter().any(|a| other.targets.iter().any(|b| same(a, b)))
}

/// Whether every request that `later` governs is governed by `earlier`, as [`crate::policy::Policy`]
/// chooses: of one path, those for certain hosts before those for all, then in their order.
fn covers(earlier: &Route, later: &Route) -> bool {
    let all_of = |earlier: &[String], later: &[String]| {
        earlier.is_empty() || (!later.is_empty() && later.iter().all(|one| earlier.contains(one)))
    };
    earlier.prefix == later.prefix
        && earlier.hosts.is_empty() == later.hosts.is_empty()
        && all_of(&earlier.hosts, &later.hosts)
        && all_of(&earlier.methods, &later.methods)
}

fn read_route(mut s: Section, upstreams: &mut Vec<Upstream>) -> Option<Route> {
    let prefix = s.required("path", |text| {
        let path = NormalPath::parse(text).map_err(|e| e.to_string())?;
        if path.decoded().contains(';') {
            return Err("a path with `;` is never matched: parameters do not count".to_owned());
        }
        Ok(path.decoded().trim_end_matches('/').to_owned())
    });
    let methods = s
        .list("methods", |m| {
            let good = !m.is_empty() && m.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
            good.then(|| m.to_owned()).ok_or(format!("`{m}` is no method: methods are upper case"))
        })
        .unwrap_or_default();
    let hosts = s.list("hosts", parse_host).unwrap_or_default();
    let access = read_access(&mut s);
    let raw_path = read_raw_path(&mut s, prefix.as_deref(), access.as_ref());
    let upstream = s.take("upstream").and_then(|value| {
        let group = read_upstream(&s, "upstream", value)?;
        upstreams.push(group);
        Some(upstreams.len() - 1)
    });
    let mode = s.choice("mode", MODES);
    let reuse = read_reuse(&mut s);
    if reuse.is_some() && matches!(access, Some(Access::Public)) {
        s.problem("reuse", "says nothing: a public route asks for no token");
    }
    let mut t = s.section("timeouts");
    let timeouts = RouteTimeouts { read: t.duration("read"), write: t.duration("write") };
    t.finish();
    s.finish();
    Some(Route {
        prefix: prefix?,
        methods,
        hosts,
        raw_path,
        access: access?,
        mode,
        upstream,
        reuse,
        timeouts,
    })
}

fn read_raw_path(s: &mut Section, prefix: Option<&str>, access: Option<&Access>) -> bool {
    let raw = s.or("raw_path", false);
    if !raw {
        return false;
    }
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~".contains(&b);
    if prefix.is_some_and(|prefix| !prefix.bytes().all(is_plain)) {
        s.problem("raw_path", "needs a plain `path`, of ASCII letters, digits and `-._~`");
    }
    if access.is_some_and(|access| match access {
        Access::Public => false,
        Access::Allow(grants) => *grants != [Grant::Anybody],
    }) {
        s.problem("raw_path", "is for routes with `allow = [\"*\"]` or `public = true`");
    }
    true
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
        Value::String(text) if text.trim() == "*" => Some(Grant::Anybody),
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
