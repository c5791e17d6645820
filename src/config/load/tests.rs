//! Settings as operators write them, good and bad.

use super::super::{Sealing, Target, UpstreamHttp};
use super::*;
use crate::entry::{Principal, Realm};
use crate::policy::{Access, Grant, Mode};

fn load_text(text: &str, env: &[(&str, &str)], flags: &[Flag]) -> Result<Config, ConfigError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let env = env.iter().map(|(k, v)| (OsString::from(k), OsString::from(v)));
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
fn an_address_may_differ_from_its_listener() {
    let text = r#"
        [ops]
        allow_from = "10.0.0.0/8"
        unix_mode = "0660"
        listen = ["unix:/run/a", { address = "unix:/run/b", unix_mode = "600", allow_from = [] }]
        limits = { max_connections_per_source = 0, min_body_rate = 0 }
    "#;
    let ops = load_text(text, &[], &[]).unwrap().ops;
    let seen: Vec<_> = ops.listen.iter().map(|l| (l.unix_mode, l.allow_from.len())).collect();
    assert_eq!(seen, [(0o660, 1), (0o600, 0)]);
    assert_eq!((ops.limits.max_connections_per_source, ops.limits.min_body_rate), (None, None));
    let default = load_text("", &[], &[]).unwrap();
    assert_eq!(default.ops.listen[0], Listen::at(default.ops.listen[0].address.clone()));
    let of_one = |limits: &crate::config::Limits| limits.max_connections_per_source;
    let caps = [&default.proxy.limits, &default.api.limits, &default.ops.limits].map(of_one);
    assert_eq!(caps, [Some(1_000), Some(100), Some(100)]);
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
        allow_from = ["10.0.0.1", "somewhere"]
        unix_mode = "0400"
        [proxy.limits]
        head_timeout = "0s"
        max_headers = 1
        min_body_rate = -1
        max_connections_per_source = "many"
        [api]
        tls_cert_file = "/absent.pem"
        [store]
        max_stale = 15
        prefix = "{}"
        [totp]
        digits = 9
        reuse = "twice"
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
        "proxy.allow_from: item 1: `somewhere` is no network",
        "proxy.unix_mode: `0400` is no mode of a socket",
        "proxy.limits.min_body_rate: must be a whole number from 0 to 1048576",
        "proxy.limits.max_connections_per_source: must be a whole number from 0 to",
        "proxy.limits.head_timeout: `0s` is not between 1ms and 365days",
        "proxy.limits.max_headers: must be a whole number from 8 to 256",
        "api.tls_cert_file: cannot read `/absent.pem`",
        "api.tls_key_file: is missing",
        "store.max_stale: expected a string",
        "store.prefix: must be",
        "totp.digits: must be a whole number from 6 to 8",
        "totp.reuse: must be \"window\", \"once\" or { budget = N }",
        "realms.auth: must differ",
        "realms.billing.skew: must be a whole number from 0 to 10",
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

#[test]
fn odd_shapes_are_problems_and_show_no_values() {
    for (text, expected) in [
        ("[[store]]\nurl = 's3cr3t'", "store: expected a table, found array"),
        ("store = 's3cr3t'", "store: expected a table, found string"),
        ("[store]\nurl.x = 's3cr3t'", "store.url: expected a string"),
        ("[store]\npassword = ['s3cr3t']", "store.password: expected a string"),
        ("[store]\npassword = { x = 's3cr3t' }", "store.password: expected a string"),
        ("[store]\npasswrod = 's3cr3t'", "store.passwrod: unknown key"),
        ("[store]\nurl = 'redis://u:s3cr3t@'", "store.url: names no host"),
        ("[store]\npassword = 's3cr3t'", "store.password: is for Redis"),
        ("[store]\nsentinel_password = 's3cr3t'", "store.sentinel_password: is for"),
        ("[store]\nurl = 'redis://h'\nsentinel_username = 'u'", "store.sentinel_username: is for"),
        (
            "[store]\nurl = 'redis-sentinel://h/m'\nsentinel_username = 'u'",
            "store.sentinel_username: is set without",
        ),
        ("[store]\nredis_writes = 'lua'", "store.redis_writes: `lua` is none of"),
        ("[store]\nwait_replicas = -1", "store.wait_replicas: must be"),
        ("[store]\nwait_timeout = '11s'", "store.wait_timeout: must be at most 10s"),
        ("[store]\n'' = 1", "store.: unknown key"),
        ("[store]\nmax_stale = '1s'", "store.max_stale: must be at least 2s"),
        ("[store]\nhold = 'some'", "store.hold: "),
        ("[store]\ncached_entries = 1000", "store.cached_entries: is for `hold = \"index\"`"),
        ("[store]\nhold = 'index'\ncached_entries = 1", "store.cached_entries: must be"),
        ("[store]\nrealms = []", "store.realms: names no realm"),
        ("[store]\nrealms = ['a', '']", "store.realms: item 1: is empty"),
        ("[store]\nrealms = ['a']", "store.realms: has neither `ungleich-admin` nor"),
        (
            "[store]\nrealms = ['a', 'ungleich-auth']\n[[route]]\npath = '/'\nallow = ['a', 'x@b']",
            "route[0].allow: `store.realms` leaves `b` out",
        ),
        ("route = 5", "route: expected an array of tables, found integer"),
        ("route = [5]", "route[0]: expected a table, found integer"),
        ("[route]\npath = '/'", "route: expected an array of tables, found table"),
        ("[proxy]\nupstream = 'http://u:s3cr3t@h:1'", "proxy.upstream: an upstream takes no user"),
        ("[proxy]\nthreads = 0", "proxy.threads: must be a whole number from 1 to 1024"),
        ("[proxy]\nthreads = 100000", "proxy.threads: must be a whole number from 1 to 1024"),
        ("[proxy.limits]\nmax_connections = 9000000000000000000", "from 1 to 1048576"),
        ("[proxy.limits]\nmax_body_bytes = -5", "proxy.limits.max_body_bytes: must be"),
        ("[proxy.limits]\nhead_timeout = '-5s'", "proxy.limits.head_timeout: `-5s` is no"),
        ("[proxy.limits]\nhead_timeout = '500y'", "`500y` is not between 1ms and 365days"),
        ("[proxy.health]\ninterval = '1ns'", "`1ns` is not between 1ms and 365days"),
        ("[api]\nallowed_hosts = ['a:1']", "api.allowed_hosts: item 0: `a:1` is no host name"),
        ("[api]\ntrusted_proxies = ['::ffff:10.0.0.0/104']", "is an IPv4 network"),
        ("[log]\nlevel = ''", "log.level: is empty"),
        ("[proxy.health]\npath = '/a b'", "proxy.health.path: `/a b` is no path"),
        ("[proxy.health]\npath = \"/a\\r\\nx: y\"", "proxy.health.path: "),
        ("[proxy]\nlisten = \"unix:/\\u0000\"", "a socket's path is absolute"),
        ("[proxy]\nupstream = 'http://*:1'", "`http://*:1` is no upstream"),
        (
            "[proxy]\nupstream = { url = 'https://h', server_name = 'a b' }",
            "proxy.upstream.server_name: `a b` is no name of a server",
        ),
        ("[totp]\nskew = 300", "totp.skew: must be a whole number from 0 to 10"),
        ("[totp]\nskew = 256", "totp.skew: must be a whole number from 0 to 10"),
        ("[totp]\ndigits = 262", "totp.digits: must be a whole number from 6 to 8"),
        ("[totp]\ndigits = 6.0", "totp.digits: must be a whole number from 6 to 8"),
        ("[totp]\nperiod = -30", "totp.period: must be a whole number from 5 to 3600"),
        ("[realms.a]\n[realms.' a']", "the realm `a` is there already"),
        ("[realms]\na = 5", "realms.a: unknown key"),
        ("[headers]\nidentity_name = 'x_auth_token'", "headers.identity_name: identity headers"),
        ("[headers]\nname = 'content_length'", "`content_length` has a meaning of its own"),
    ] {
        let all = problems(text);
        assert!(all.contains(expected), "{text}: {all}");
        assert!(!all.contains("s3cr3t"), "{text}: {all}");
    }
}

#[test]
fn odd_variables_are_problems_or_none_of_ours() {
    for (name, value, expected) in [
        ("OTPGATE_PROXY__", "1", "OTPGATE_PROXY__: is no setting"),
        ("OTPGATE___X", "1", "OTPGATE___X: is no setting"),
        ("OTPGATE____", "1", "OTPGATE____: is no setting"),
        ("OTPGATE_TOTP__SKEW__X", "1", "totp.skew.x (OTPGATE_TOTP__SKEW__X): `skew` is not a"),
        ("OTPGATE_ROUTE__0__PATH", "/", "route: expected an array of tables, found table"),
        ("OTPGATE_TOTP__DIGITS", "7\nskew = 3", "totp.digits (OTPGATE_TOTP__DIGITS): must be"),
    ] {
        let all = load_text("[totp]\nskew = 2", &[(name, value), ("OTPGATE_OPS__X", "1")], &[]);
        let all = all.unwrap_err().to_string();
        assert!(all.contains(expected), "{name}: {all}");
        assert!(all.contains("ops.x (OTPGATE_OPS__X): unknown key"), "{name}: {all}");
    }
    for name in ["OTPGATE_PORT", "OTPGATE_API_SERVICE_HOST", "OTPGATE_SEED", "otpgate_a__b"] {
        assert!(load_text("", &[(name, "x")], &[]).is_ok(), "{name}");
    }
    let not_utf8 = std::os::unix::ffi::OsStringExt::from_vec(b"s3cr3t\xff".to_vec());
    let env = [("OTPGATE_STORE__PASSWORD".into(), not_utf8)];
    let all = load(Some(Path::new("/dev/null")), env, &[]).unwrap_err().to_string();
    assert!(all.ends_with("OTPGATE_STORE__PASSWORD: is not UTF-8"), "{all}");
}

#[test]
fn texts_in_the_environment_are_taken_as_they_are() {
    for text in ["\"quoted\"", "'quoted' # no comment", "12", "true", "[1", "1\nx = 2", "{}"] {
        let env = [
            ("OTPGATE_STORE__URL", "redis://h"),
            ("OTPGATE_STORE__SEALING", "off"),
            ("OTPGATE_STORE__PASSWORD", text),
        ];
        let config = load_text("", &env, &[]).unwrap();
        let crate::store::url::StoreUrl::Redis(url) = config.store.url else { panic!() };
        assert_eq!(url.password.unwrap().expose(), text);
    }
}

#[test]
fn routes_that_are_never_reached_are_problems() {
    let route =
        |path: &str, rest: &str| format!("[[route]]\npath = '{path}'\npublic = true\n{rest}\n");
    for (first, second) in [
        (route("/a", ""), route("/a/", "")),
        (route("/a", ""), route("/%61", "methods = ['GET']")),
        (route("/a", "methods = ['GET', 'PUT']"), route("/a", "methods = ['PUT']")),
        (route("/a", "hosts = ['h', 'i']"), route("/a", "hosts = ['I']\nmethods = ['GET']")),
    ] {
        let all = problems(&format!("{first}{second}"));
        assert!(all.contains("route[1]: is never reached: route[0] takes"), "{all}");
    }
    for (first, second) in [
        (route("/a", ""), route("/a/b", "")),
        (route("/a", "methods = ['GET']"), route("/a", "")),
        (route("/a", "methods = ['GET']"), route("/a", "methods = ['GET', 'PUT']")),
        (route("/a", ""), route("/a", "hosts = ['h']")),
        (route("/a", "hosts = ['h']"), route("/a", "hosts = ['h', 'i']")),
    ] {
        let both = format!("{first}{second}");
        load_text(&both, &[], &[]).unwrap_or_else(|e| panic!("{both}: {e}"));
    }
    for path in ["/a?x", "/a#x", "/a;x", "/a;x/b", "a", "", "/a//b", "/a%2fb"] {
        let all = problems(&route(path, ""));
        assert!(all.contains("route[0].path: "), "{path}: {all}");
    }
    for host in ["*.example", "h:1", "", "u@h", "a b", "::1"] {
        let all = problems(&route("/", &format!("hosts = ['{host}']")));
        assert!(all.contains("route[0].hosts: item 0: "), "{host}: {all}");
    }
    load_text(&route("/", "hosts = ['[::1]', '127.0.0.1', 'A_b.example.']"), &[], &[]).unwrap();
}

#[test]
fn raw_routes_lead_past_no_other_route() {
    let route = |path: &str, rest: &str| format!("[[route]]\npath = '{path}'\n{rest}\n");
    let public = |path: &str| route(path, "public = true");
    let anybody = |path: &str| route(path, "allow = ['*']");
    let staff = |path: &str| route(path, "allow = ['staff']");
    let raw = |path: &str, access: &str, more: &str| {
        route(path, &format!("{access}\nraw_path = true\n{more}"))
    };
    let (open, proven) = ("public = true", "allow = ['*']");
    let own = "upstream = '127.0.0.1:9001'";
    for text in [
        raw("/", proven, ""),
        raw("/", open, ""),
        anybody("/") + &raw("/raw", proven, ""),
        public("/") + &raw("/raw", proven, ""),
        public("/health") + &raw("/", proven, ""),
        staff("/") + &raw("/raw", open, own),
        staff("/") + &raw("/", proven, &format!("hosts = ['h']\n{own}")),
        staff("/").replace("allow", "hosts = ['h']\nallow") + &raw("/", proven, "hosts = ['i']"),
        staff("/raw/admin") + &raw("/other", open, own),
        anybody("/raw/x") + &raw("/raw", proven, own),
        raw("/", proven, "methods = ['GET']"),
    ] {
        load_text(&text, &[], &[]).unwrap_or_else(|e| panic!("{text}: {e}"));
    }
    for (text, expected) in [
        (raw("/raw", proven, ""), "a raw path may become one below `/` that no route governs"),
        (staff("/") + &raw("/raw", proven, ""), "one below `/`, which is stricter"),
        (anybody("/") + &raw("/raw", open, ""), "one below `/`, which is stricter"),
        (
            anybody("/") + &staff("/admin") + &raw("/raw", proven, ""),
            "one below `/admin`, which is stricter",
        ),
        (
            anybody("/") + &staff("/raw/x") + &raw("/raw", proven, own),
            "one below `/raw/x`, which is stricter",
        ),
        (
            anybody("/")
                + &route("/a", "allow = ['*']\nmethods = ['GET']")
                + &raw("/raw", proven, ""),
            "one below `/a` that no route governs",
        ),
        (
            staff("/") + &raw("/raw", proven, "upstream = '127.0.0.1:9000'"),
            "one below `/`, which is stricter",
        ),
        (
            staff("/") + &raw("/raw", proven, "upstream = ['localhost:9000', '127.0.0.1:9001']"),
            "one below `/`, which is stricter",
        ),
        (
            staff("/") + &raw("/raw", proven, own) + &route("/b", &format!("allow = ['x']\n{own}")),
            "one below `/`, which is stricter",
        ),
        (
            staff("/").replace("allow", "hosts = ['h']\nallow") + &raw("/", proven, ""),
            "one below `/`, which is stricter",
        ),
        (
            public("/").replace("public", "mode = 'enforce'\nallow = ['*'] #")
                + &raw("/r", proven, "mode = 'report'"),
            "one below `/`, which is stricter",
        ),
        (
            raw("/", "allow = ['staff']", ""),
            "is for routes with `allow = [\"*\"]` or `public = true`",
        ),
        (raw("/", "allow = ['*', 'staff']", ""), "is for routes with"),
        (raw("/a%20b", open, own), "needs a plain `path`"),
        (raw("/\u{fc}", open, own), "needs a plain `path`"),
    ] {
        let all = problems(&text);
        assert!(all.contains(".raw_path: "), "{text}: {all}");
        assert!(all.contains(expected), "{text}: {all}");
    }
    // Another proxy that asks knows nothing of `upstream`.
    let text = staff("/") + &raw("/raw", open, own);
    let asked = "[api]\ntrusted_proxies = ['127.0.0.1']\n";
    let all = problems(&format!("{asked}{text}"));
    assert!(all.contains("one below `/`, which is stricter"), "{all}");
    load_text(&format!("{asked}listen = 'off'\n{text}"), &[], &[]).unwrap();
    let all = problems("[proxy]\nsimilar_paths = 'yes'");
    assert!(all.contains("proxy.similar_paths: `yes` is none of `refuse`, `distinct`"), "{all}");
}

#[test]
fn a_remote_server_stands_in_place_of_a_store() {
    let remote = "[remote]\nurl = 'https://otp.example/'\nname = 'gate'\nseed = 'AAAAAAAA'\n";
    let config = load_text(remote, &[], &[]).unwrap();
    assert!(config.api.listen.is_empty(), "nothing can be managed");
    let read = config.remote.unwrap();
    assert_eq!((read.url.as_str(), read.realm.as_str()), ("https://otp.example/", "ungleich-auth"));
    assert!(!format!("{read:?}").contains("AAAA"));
    let own = load_text(&format!("{remote}[realms]\nauth = 'verifiers'\n"), &[], &[]).unwrap();
    assert_eq!(own.remote.unwrap().realm.as_str(), "verifiers");
    let open = load_text(&format!("{remote}[api]\nlisten = '127.0.0.1:1'\n"), &[], &[]).unwrap();
    assert_eq!(open.api.listen.len(), 1);
    assert!(load_text("[remote]\n", &[], &[]).unwrap().remote.is_none(), "nothing is set");
    for (text, expected) in [
        ("[store]\nurl = 'sqlite:x'\nmax_stale = '1m'\n", "store.max_stale: [remote] is set too"),
        ("[store]\nurl = 'sqlite:x'\n", "store.url: [remote] is set too"),
    ] {
        let all = problems(&format!("{remote}{text}"));
        assert!(all.contains(expected), "{all}");
    }
    let flag = Flag { name: "--store", key: "store.url", value: "sqlite:x".into() };
    let clash = load_text(remote, &[], &[flag]).unwrap_err().to_string();
    assert!(clash.contains("store.url (--store): [remote] is set too"), "{clash}");
    for (text, expected) in [
        ("url = 'otp.example'", "remote.url: `otp.example` is no server's URL"),
        ("url = 'https://me:hunter2@otp.example'", "remote.url: holds a user or password"),
        ("url = 'unix:x.sock'", "remote.url: `unix:x.sock`: the path of a socket begins"),
        ("timeout = '31s'", "remote.url: is missing"),
        ("timeout = '31s'", "remote.name: is missing"),
        ("timeout = '31s'", "remote.seed_file: is missing"),
        ("timeout = '31s'", "remote.timeout: must be at most 30s"),
        ("seed = '1hunter2'", "remote.seed: the seed is not base32"),
        ("max_stale = '1s'", "remote.max_stale: must be at least 2s"),
        ("max_in_flight = 0", "remote.max_in_flight: must be a whole number"),
        ("url = 'http://a'\nca_file = '/dev/null'", "remote.ca_file: `remote.url` is not"),
    ] {
        let all = problems(&format!("[remote]\n{text}\n"));
        assert!(all.contains(expected) && !all.contains("hunter2"), "{text}: {all}");
    }
}
