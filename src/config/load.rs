//! From file, environment and flags to [`Config`]. Flags beat the environment, which beats the file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use toml::{Table, Value};

use super::peers::{parse_upstreams, read_listen, read_networks, read_upstream};
use super::reader::{Origin, Section};
use super::routes::{MODES, read_route};
use super::store::read_store;
use super::{
    Address, ApiConfig, Config, HeaderNames, HealthCheck, Limits, Listen, LogConfig, LogFormat,
    OpsConfig, ProxyConfig, ReservedRealms, ShutdownConfig, Upstream, UpstreamTimeouts,
};
use crate::directory::{RealmRules, TokenRules};
use crate::entry::{Algorithm, DIGITS, PERIOD_SECONDS, Realm};
use crate::otp::TokenParams;

pub use super::reader::Problem;

/// Read when no file is named.
pub const DEFAULT_PATH: &str = "/etc/otpgate/otpgate.toml";
/// Start of every environment variable that is a setting; section and key are joined by `__`.
pub const ENV_PREFIX: &str = "OTPGATE_";

/// A flag that sets a key.
#[derive(Clone, Debug)]
pub struct Flag {
    /// As typed, such as `--proxy`.
    pub name: &'static str,
    /// The key path that it sets.
    pub key: &'static str,
    /// Its value.
    pub value: String,
}

impl Flag {
    /// A flag, if it was given.
    #[must_use]
    pub fn given(name: &'static str, key: &'static str, value: Option<&String>) -> Option<Self> {
        value.map(|value| Self { name, key, value: value.clone() })
    }
}

/// Why there is no configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the configuration cannot be used:{}", .0.iter().fold(String::new(), |all, p| format!("{all}\n  {p}")))]
pub struct ConfigError(pub Vec<Problem>);

impl ConfigError {
    fn one(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self(vec![Problem { key: key.into(), message: message.into() }])
    }
}

/// Reads `file` (or [`DEFAULT_PATH`] if that exists), `env` and `flags`.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn load(
    file: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
    flags: &[Flag],
) -> Result<Config, ConfigError> {
    let mut table = match file {
        Some(path) => read_file(path)?,
        None if Path::new(DEFAULT_PATH).exists() => read_file(Path::new(DEFAULT_PATH))?,
        None => Table::new(),
    };
    let mut origins = BTreeMap::new();
    for (name, value) in env {
        if let Some((section, key)) = name.strip_prefix(ENV_PREFIX).and_then(|n| n.split_once("__"))
        {
            let path: Vec<_> = std::iter::once(section).chain(key.split("__")).collect();
            let path: Vec<_> = path.iter().map(|part| part.to_ascii_lowercase()).collect();
            let typed = typed(&value);
            set(&mut table, &path, typed, Origin { name, raw: value }, &mut origins)?;
        }
    }
    for flag in flags {
        let path: Vec<_> = flag.key.split('.').map(str::to_owned).collect();
        let origin = Origin { name: flag.name.to_owned(), raw: flag.value.clone() };
        set(&mut table, &path, Value::String(flag.value.clone()), origin, &mut origins)?;
    }
    let mut root = Section::root(table, origins);
    let config = read(&mut root);
    let problems = root.problems();
    if problems.is_empty() { Ok(config) } else { Err(ConfigError(problems)) }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|e| ConfigError::one(&name, format!("cannot read the file: {e}")))?;
    text.parse::<Table>().map_err(|e| {
        // The parser's full message quotes the line, which may hold a secret.
        let offset = e.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..offset].iter().filter(|b| **b == b'\n').count() + 1;
        ConfigError::one(format!("{name}, line {line}"), format!("not TOML: {}", e.message()))
    })
}

/// A variable's text as the TOML value that it looks like: a list, number or boolean; else a string.
fn typed(text: &str) -> Value {
    let parsed = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    parsed.filter(|v| !v.is_datetime()).unwrap_or_else(|| Value::String(text.to_owned()))
}

fn set(
    table: &mut Table,
    path: &[String],
    value: Value,
    origin: Origin,
    origins: &mut BTreeMap<String, Origin>,
) -> Result<(), ConfigError> {
    let (last, parents) = path.split_last().expect("a path has at least one part");
    let mut at = table;
    for part in parents {
        let next = at.entry(part.clone()).or_insert_with(|| Value::Table(Table::new()));
        at = next.as_table_mut().ok_or_else(|| {
            ConfigError::one(
                format!("{} ({})", path.join("."), origin.name),
                format!("`{part}` is not a table"),
            )
        })?;
    }
    at.insert(last.clone(), value);
    origins.insert(path.join("."), origin);
    Ok(())
}

fn read(root: &mut Section) -> Config {
    let mut upstreams = Vec::new();
    let proxy = read_proxy(root.section("proxy"), &mut upstreams);
    let api = read_api(root.section("api"));
    let ops = read_ops(root.section("ops"));
    let store = read_store(root.section("store"));
    let mut totp = root.section("totp");
    let default = read_rules(&mut totp, RealmRules::default());
    totp.finish();
    let (realms, rules) = read_realms(root.section("realms"), default);
    let headers = read_headers(root.section("headers"));
    let log = read_log(root.section("log"));
    let shutdown = read_shutdown(root.section("shutdown"));
    let routes =
        root.sections("route").into_iter().filter_map(|s| read_route(s, &mut upstreams)).collect();
    let proxy = ProxyConfig { upstreams, ..proxy };
    let config = Config { proxy, api, ops, store, rules, realms, headers, log, shutdown, routes };
    check_addresses(root, &config);
    config
}

fn read_proxy(mut s: Section, upstreams: &mut Vec<Upstream>) -> ProxyConfig {
    let limits = read_limits(&mut s, Limits::default());
    let listen = read_listen(&mut s, "127.0.0.1:8080");
    let upstream = match s.take("upstream") {
        Some(value) => read_upstream(&s, "upstream", value),
        None => parse_upstreams(&["127.0.0.1:9000".to_owned()]).ok(),
    };
    upstreams.extend(upstream);
    let mode = s.choice("mode", MODES).unwrap_or_default();
    let trusted_proxies = read_networks(&mut s, "trusted_proxies");
    let threads = s.get::<std::num::NonZeroUsize>("threads").map(usize::from);
    let mut t = s.section("timeouts");
    let default = UpstreamTimeouts::default();
    let timeouts = UpstreamTimeouts {
        connect: t.duration("connect").unwrap_or(default.connect),
        read: t.duration("read").unwrap_or(default.read),
        write: t.duration("write").unwrap_or(default.write),
        idle: t.duration("idle").unwrap_or(default.idle),
        stream_idle: t.duration("stream_idle").unwrap_or(default.stream_idle),
    };
    t.finish();
    let mut h = s.section("health");
    let default = HealthCheck::default();
    let health = HealthCheck {
        interval: h.duration_or_off("interval").unwrap_or(default.interval),
        path: h.parse("path", |text| {
            if text.starts_with('/') { Ok(text.to_owned()) } else { Err("must start with `/`") }
        }),
        dns_interval: h.duration("dns_interval").unwrap_or(default.dns_interval),
    };
    h.finish();
    s.finish();
    ProxyConfig {
        listen,
        upstreams: Vec::new(),
        mode,
        trusted_proxies,
        limits,
        timeouts,
        health,
        threads,
    }
}

fn read_api(mut s: Section) -> ApiConfig {
    // Django's own bound on request bodies.
    let default = Limits { max_body_bytes: Some(2_621_440), ..Limits::default() };
    let config = ApiConfig {
        limits: read_limits(&mut s, default),
        listen: read_listen(&mut s, "127.0.0.1:8081"),
        trusted_proxies: read_networks(&mut s, "trusted_proxies"),
        allowed_hosts: s
            .list("allowed_hosts", |h| Ok::<_, String>(h.to_ascii_lowercase()))
            .unwrap_or_default(),
        reveal_seeds: s.or("reveal_seeds", true),
    };
    s.finish();
    config
}

fn read_ops(mut s: Section) -> OpsConfig {
    let default = Limits { max_connections: 256, max_body_bytes: Some(0), ..Limits::default() };
    let config = OpsConfig {
        limits: read_limits(&mut s, default),
        listen: read_listen(&mut s, "127.0.0.1:9464"),
    };
    s.finish();
    config
}

fn read_limits(s: &mut Section, default: Limits) -> Limits {
    let mut l = s.section("limits");
    let limits = Limits {
        max_connections: l
            .get::<std::num::NonZeroUsize>("max_connections")
            .map_or(default.max_connections, usize::from),
        head_timeout: l.duration("head_timeout").unwrap_or(default.head_timeout),
        keepalive_timeout: l.duration("keepalive_timeout").unwrap_or(default.keepalive_timeout),
        body_timeout: l.duration("body_timeout").unwrap_or(default.body_timeout),
        write_timeout: l.duration("write_timeout").unwrap_or(default.write_timeout),
        max_head_bytes: l
            .bytes("max_head_bytes")
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(default.max_head_bytes),
        max_headers: l.or("max_headers", default.max_headers),
        max_body_bytes: l.bytes("max_body_bytes").or(default.max_body_bytes),
    };
    if !(1024..=1 << 20).contains(&limits.max_head_bytes) {
        l.problem("max_head_bytes", "must be between 1KiB and 1MiB");
    }
    if !(8..=256).contains(&limits.max_headers) {
        l.problem("max_headers", "must be between 8 and 256");
    }
    l.finish();
    limits
}

fn read_rules(s: &mut Section, default: RealmRules) -> RealmRules {
    let algorithms =
        [Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512].map(|a| (a.as_str(), a));
    let rules = RealmRules {
        params: TokenParams {
            algorithm: s.choice("algorithm", &algorithms).unwrap_or(default.params.algorithm),
            digits: s.or("digits", default.params.digits),
            step_seconds: s.or("period", default.params.step_seconds),
        },
        skew_steps: s.or("skew", default.skew_steps),
    };
    if !DIGITS.contains(&rules.params.digits) {
        s.problem("digits", "must be 6, 7 or 8");
    }
    if !PERIOD_SECONDS.contains(&rules.params.step_seconds) {
        s.problem("period", "must be between 5 and 3600 seconds");
    }
    if rules.skew_steps > 10 {
        s.problem("skew", "must be at most 10 time steps");
    }
    read_reuse(s);
    rules
}

/// Tokens may be used as often as their window lasts; other policies are refused, not ignored.
pub(super) fn read_reuse(s: &mut Section) {
    s.choice("reuse", &[("window", ())]);
}

fn read_realms(mut s: Section, default: RealmRules) -> (ReservedRealms, TokenRules) {
    // A realm may itself be called `admin` or `auth`: then its key holds a table.
    let reserved = |s: &mut Section, key: &str, default: &str| {
        let named = if s.other_tables().iter().any(|t| t == key) {
            None
        } else {
            s.parse(key, Realm::parse)
        };
        named.unwrap_or_else(|| Realm::parse(default).expect("a valid realm"))
    };
    let realms = ReservedRealms {
        admin: reserved(&mut s, "admin", "ungleich-admin"),
        auth: reserved(&mut s, "auth", "ungleich-auth"),
    };
    if realms.admin == realms.auth {
        s.problem("auth", "must differ from `realms.admin`: verifying must not mean managing");
    }
    let mut rules = TokenRules { default, realms: HashMap::new() };
    for name in s.other_tables() {
        let mut r = s.section(&name);
        match Realm::parse(&name) {
            Ok(realm) => {
                rules.realms.insert(realm.as_str().to_owned(), read_rules(&mut r, default));
            }
            Err(error) => s.problem(&name, format_args!("the realm's name {error}")),
        }
        r.finish();
    }
    s.finish();
    (realms, rules)
}

fn read_headers(mut s: Section) -> HeaderNames {
    let parse = |text: &str| {
        http::HeaderName::try_from(text).map_err(|_| format!("`{text}` is no header name"))
    };
    let default = HeaderNames::default();
    let headers = HeaderNames {
        name: s.parse("name", parse).unwrap_or(default.name),
        realm: s.parse("realm", parse).unwrap_or(default.realm),
        token: s.parse("token", parse).unwrap_or(default.token),
        identity_name: s.parse("identity_name", parse).unwrap_or(default.identity_name),
        identity_realm: s.parse("identity_realm", parse).unwrap_or(default.identity_realm),
        identity_principal: s.parse("identity_principal", parse),
    };
    let credentials = [&headers.name, &headers.realm, &headers.token];
    let mut identity = vec![&headers.identity_name, &headers.identity_realm];
    identity.extend(&headers.identity_principal);
    let distinct = |names: &[&http::HeaderName]| {
        names.iter().map(|n| fold_header(n.as_str())).collect::<HashSet<_>>().len() == names.len()
    };
    if !distinct(&credentials) {
        s.problem(
            "token",
            "`name`, `realm` and `token` must differ, also with `_` and `.` read as `-`",
        );
    }
    if !distinct(&identity) || identity.iter().any(|n| **n == headers.token) {
        s.problem("identity_name", "identity headers must differ from each other and from `token`");
    }
    for name in credentials.iter().chain(&identity) {
        if RESERVED_HEADERS.contains(&name.as_str()) {
            s.problem("name", format_args!("`{name}` has a meaning of its own in HTTP"));
        }
    }
    s.finish();
    headers
}

/// Headers that cannot carry credentials or identity.
const RESERVED_HEADERS: &[&str] = &[
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

/// A header's name as careless upstreams read it: lower case, everything but letters and digits as
/// `-`.
#[must_use]
pub fn fold_header(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .collect()
}

fn read_log(mut s: Section) -> LogConfig {
    let config = LogConfig {
        level: s
            .parse("level", |text| {
                tracing_subscriber::EnvFilter::builder()
                    .parse(text)
                    .map(|_| text.to_owned())
                    .map_err(|e| format!("`{text}` is no log level: {e}"))
            })
            .unwrap_or_else(|| "info".to_owned()),
        format: s
            .choice("format", &[("text", LogFormat::Text), ("json", LogFormat::Json)])
            .unwrap_or_default(),
        access: s.or("access", true),
    };
    s.finish();
    config
}

fn read_shutdown(mut s: Section) -> ShutdownConfig {
    let config = ShutdownConfig {
        delay: s.duration_or_off("delay").unwrap_or(None).unwrap_or_default(),
        grace: s.duration("grace").unwrap_or(Duration::from_secs(30)),
    };
    s.finish();
    config
}

/// No two listeners on one address; at least one open.
fn check_addresses(root: &Section, config: &Config) {
    let listeners = [
        ("proxy.listen", &config.proxy.listen),
        ("api.listen", &config.api.listen),
        ("ops.listen", &config.ops.listen),
    ];
    let mut seen: HashMap<&Address, &str> = HashMap::new();
    for (key, listen) in listeners {
        for Listen { address, .. } in listen {
            if matches!(address, Address::Tcp(tcp) if tcp.port() == 0) {
                continue;
            }
            if let Some(other) = seen.insert(address, key) {
                root.problem(key, format_args!("the address is also in `{other}`"));
            }
        }
    }
    if config.proxy.listen.is_empty() && config.api.listen.is_empty() {
        root.problem("proxy.listen", "both `proxy` and `api` are off: nothing would be served");
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Sealing, Target, UpstreamHttp};
    use super::*;
    use crate::entry::Principal;
    use crate::policy::{Access, Grant, Mode};

    fn load_text(text: &str, env: &[(&str, &str)], flags: &[Flag]) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        load(Some(file.path()), env, flags)
    }

    fn problems(text: &str) -> String {
        load_text(text, &[], &[]).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_gives_the_documented_defaults() {
        let c = load_text("", &[], &[]).unwrap();
        let tcp = |l: &[Listen]| l.iter().map(|l| l.address.clone()).collect::<Vec<_>>();
        let at = |text: &str| vec![Address::Tcp(text.parse().unwrap())];
        assert_eq!(tcp(&c.proxy.listen), at("127.0.0.1:8080"));
        assert_eq!(tcp(&c.api.listen), at("127.0.0.1:8081"));
        assert_eq!(tcp(&c.ops.listen), at("127.0.0.1:9464"));
        assert_eq!(c.proxy.upstreams[0].targets, [Target::Host("127.0.0.1".into(), 9000)]);
        assert_eq!(c.store.max_stale, Duration::from_secs(15));
        assert!(matches!(c.store.sealing, Sealing::KeyFile { make: true, .. }));
        assert_eq!(c.rules.default, RealmRules::default());
        assert_eq!(c.realms.admin.as_str(), "ungleich-admin");
        assert!(c.proxy.trusted_proxies.is_empty());
    }

    #[test]
    fn flags_beat_environment_beats_file() {
        let file = "[proxy]\nupstream = 'file:1'\nlisten = '127.0.0.1:1'\n[log]\nlevel = 'warn'";
        let env = [
            ("OTPGATE_PROXY__UPSTREAM", "env:2"),
            ("OTPGATE_PROXY__LISTEN", "['127.0.0.1:2', 'unix:/run/x']"),
            ("OTPGATE_TOTP__SKEW", "2"),
            ("OTPGATE_STORE__PREFIX", "123"),
            ("OTPGATE_SEED", "not a setting"),
        ];
        let flag = Flag { name: "--upstream", key: "proxy.upstream", value: "flag:3".into() };
        let c = load_text(file, &env, &[flag]).unwrap();
        assert_eq!(c.proxy.upstreams[0].targets, [Target::Host("flag".into(), 3)]);
        assert_eq!(c.proxy.listen.len(), 2);
        assert_eq!(c.rules.default.skew_steps, 2);
        assert_eq!(c.store.prefix, "123");
        assert_eq!(c.log.level, "warn");
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let text = r#"
            tpyo = 1
            [proxy]
            listen = ["nonsense", 5]
            upstream = "ftp://x"
            mode = "maybe"
            trusted_proxies = ["10.0.0.0/33"]
            [proxy.limits]
            head_timeout = "0s"
            max_headers = 1
            [api]
            tls_cert_file = "/absent.pem"
            [store]
            max_stale = 15
            prefix = "{}"
            [totp]
            digits = 9
            reuse = "once"
            [realms]
            admin = "same"
            auth = "same"
            [realms.billing]
            skew = 11
            [headers]
            token = "x_auth_name"
            [log]
            format = "xml"
            [[route]]
            path = "/a/../b"
            [[route]]
            path = "/x"
            public = true
            allow = ["*"]
            methods = ["get"]
        "#;
        let all = problems(text);
        for expected in [
            "tpyo: unknown key; known here: api, headers",
            "proxy.listen: `nonsense` is no address",
            "proxy.listen: expected a string or a table, found integer",
            "proxy.upstream: `ftp://x`: the scheme is none of",
            "proxy.mode: `maybe` is none of `enforce`, `report`",
            "proxy.trusted_proxies: item 0: `10.0.0.0/33` is no network",
            "proxy.limits.head_timeout: must be more than zero",
            "proxy.limits.max_headers: must be between",
            "api.tls_cert_file: cannot read `/absent.pem`",
            "api.tls_key_file: is missing",
            "store.max_stale: expected a string",
            "store.prefix: must be",
            "totp.digits: must be 6, 7 or 8",
            "totp.reuse: `once` is none of `window`",
            "realms.auth: must differ",
            "realms.billing.skew: must be at most",
            "headers.token: `name`, `realm` and `token` must differ",
            "log.format: `xml` is none of",
            "route[0].path: the path contains a dot segment",
            "route[0].allow: is missing",
            "route[1].allow: a route is public or has `allow`",
            "route[1].methods: item 0: `get` is no method",
        ] {
            assert!(all.contains(expected), "{expected}\nin {all}");
        }
    }

    #[test]
    fn problems_name_the_variable_or_flag_they_come_from() {
        let env = [("OTPGATE_PROXY__LISTEN", "nonsense"), ("OTPGATE_PROXY__TPYO", "1")];
        let flag = Flag { name: "--ops", key: "ops.listen", value: "x".into() };
        let all = load_text("", &env, &[flag]).unwrap_err().to_string();
        assert!(all.contains("proxy.listen (OTPGATE_PROXY__LISTEN): `nonsense`"), "{all}");
        assert!(all.contains("proxy.tpyo (OTPGATE_PROXY__TPYO): unknown key"), "{all}");
        assert!(all.contains("ops.listen (--ops): `x` is no address"), "{all}");
    }

    #[test]
    fn a_syntax_error_names_the_line_but_never_quotes_it() {
        let all = problems("[store]\npassword = \"hunter2\n");
        assert!(all.contains(", line 2: not TOML"), "{all}");
        assert!(!all.contains("hunter2"), "{all}");
        let absent = load(Some(Path::new("/absent.toml")), [], &[]).unwrap_err().to_string();
        assert!(absent.contains("/absent.toml: cannot read the file"), "{absent}");
    }

    #[test]
    fn upstreams_are_of_one_kind() {
        let group = |text: &str| {
            load_text(&format!("[proxy]\nupstream = {text}"), &[], &[])
                .map(|c| c.proxy.upstreams[0].clone())
        };
        let g = group("['http://a:1', 'b:2', 'http://[::1]']").unwrap();
        assert_eq!(
            g.targets,
            [("a", 1), ("b", 2), ("::1", 80)].map(|(h, p)| Target::Host(h.into(), p))
        );
        let g = group("'h2c://a:1'").unwrap();
        assert_eq!((g.http, g.tls.is_some()), (UpstreamHttp::Http2, false));
        let g = group("{ url = 'https://a', http = 'auto', server_name = 'b' }").unwrap();
        assert_eq!((g.http, g.tls.unwrap().server_name.as_str()), (UpstreamHttp::Auto, "b"));
        assert_eq!(group("'unix:/run/s'").unwrap().targets, [Target::Unix("/run/s".into())]);
        for bad in [
            "[]",
            "''",
            "'a'",
            "'http://'",
            "'http://u:p@h'",
            "'http://a/path'",
            "'a:0'",
            "'a:x'",
            "['http://a', 'https://a']",
            "['https://a', 'https://b']",
            "'unix:relative'",
            "{}",
            "{ url = 'http://a', ca_file = '/absent' }",
            "5",
        ] {
            assert!(group(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn routes_say_who_may_pass() {
        let text = r#"
            [[route]]
            path = "/admin/"
            methods = ["GET", "POST"]
            hosts = ["A.example"]
            allow = ["staff", "a@b@c", "*", { name = "x@y", realm = "z" }, { realm = "r@s" }]
            mode = "report"
            upstream = "other:1"
            timeouts = { read = "5s" }
            [[route]]
            path = "/"
            public = true
        "#;
        let c = load_text(text, &[], &[]).unwrap();
        let route = &c.routes[0];
        assert_eq!(route.prefix, "/admin");
        assert_eq!(route.hosts, ["a.example"]);
        assert_eq!(route.mode, Some(Mode::Report));
        assert_eq!(c.proxy.upstreams[route.upstream.unwrap()].targets.len(), 1);
        assert_eq!(route.timeouts.read, Some(Duration::from_secs(5)));
        let principal = |n, r| Grant::Principal(Principal::parse(n, r).unwrap());
        let realm = |r| Grant::Realm(Realm::parse(r).unwrap());
        assert_eq!(
            route.access,
            Access::Allow(vec![
                realm("staff"),
                principal("a@b", "c"),
                Grant::Anybody,
                principal("x@y", "z"),
                realm("r@s"),
            ])
        );
        assert_eq!(c.routes[1].access, Access::Public);
        assert_eq!(c.routes[1].prefix, "");
    }

    #[test]
    fn realms_inherit_from_totp() {
        let text = "[totp]\nskew = 3\n[realms]\nadmin = 'root'\n[realms.'a.b']\ndigits = 8";
        let c = load_text(text, &[], &[]).unwrap();
        assert_eq!(c.realms.admin.as_str(), "root");
        let rules = c.rules.of("a.b");
        assert_eq!((rules.params.digits, rules.skew_steps), (8, 3));
        assert_eq!(c.rules.of("other").params.digits, 6);
    }

    #[test]
    fn listeners_do_not_share_addresses_and_are_not_all_off() {
        let all = problems("[proxy]\nlisten = '127.0.0.1:1'\n[ops]\nlisten = '127.0.0.1:1'");
        assert!(all.contains("ops.listen: the address is also in `proxy.listen`"), "{all}");
        let all = problems("[proxy]\nlisten = 'off'\n[api]\nlisten = 'off'");
        assert!(all.contains("nothing would be served"), "{all}");
    }
}
