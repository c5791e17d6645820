//! Every setting is taken over by a running gate, or named.

use otpgate::config::Config;

use crate::docs::{load_text, read};
use crate::harness::Sandbox;

/// By section: keys with a value that is not the default, in TOML.
const OTHERS: &[(&str, &[(&str, &str)])] = &[
    (
        "proxy",
        &[
            ("listen", "'127.0.0.1:1'"),
            ("tls_cert_file", "'{file}'\ntls_key_file = '{file}'"),
            ("tls_client_ca_file", "'{file}'\ntls_cert_file = '{file}'\ntls_key_file = '{file}'"),
            ("allow_from", "['10.0.0.0/8']"),
            ("unix_mode", "'0660'"),
            ("h2c", "true"),
            ("upstream", "'127.0.0.1:1'"),
            ("mode", "'report'"),
            ("similar_paths", "'distinct'"),
            ("trusted_proxies", "['10.0.0.0/8']"),
            ("threads", "7"),
        ],
    ),
    ("proxy.limits", LIMITS),
    ("api.limits", LIMITS),
    ("ops.limits", LIMITS),
    (
        "proxy.timeouts",
        &[
            ("connect", "'7s'"),
            ("read", "'7s'"),
            ("write", "'7s'"),
            ("idle", "'7s'"),
            ("stream_idle", "'7s'"),
        ],
    ),
    ("proxy.health", &[("interval", "'7s'"), ("path", "'/up'"), ("dns_interval", "'7s'")]),
    (
        "api",
        &[
            ("listen", "'off'"),
            ("tls_cert_file", "'{file}'\ntls_key_file = '{file}'"),
            ("tls_client_ca_file", "'{file}'\ntls_cert_file = '{file}'\ntls_key_file = '{file}'"),
            ("allow_from", "['10.0.0.0/8']"),
            ("unix_mode", "'0660'"),
            ("h2c", "false"),
            ("trusted_proxies", "['10.0.0.0/8']"),
            ("allowed_hosts", "['h']"),
            ("reveal_seeds", "false"),
            ("rotate_overlap", "'7s'"),
        ],
    ),
    (
        "ops",
        &[
            ("listen", "'127.0.0.1:1'"),
            ("tls_cert_file", "'{file}'\ntls_key_file = '{file}'"),
            ("tls_client_ca_file", "'{file}'\ntls_cert_file = '{file}'\ntls_key_file = '{file}'"),
            ("allow_from", "['10.0.0.0/8']"),
            ("unix_mode", "'0660'"),
            ("h2c", "true"),
        ],
    ),
    (
        "store",
        &[
            ("url", "'redis://elsewhere'"),
            ("username", "'me'\npassword = 'it'"),
            ("password", "'it'"),
            ("sentinel_username", "'me'\nsentinel_password = 'it'"),
            ("sentinel_password", "'it'"),
            ("ca_file", "'{file}'"),
            ("tls_cert_file", "'{file}'\ntls_key_file = '{file}'"),
            ("prefix", "'other'"),
            ("redis_writes", "'scripts'"),
            ("wait_replicas", "1"),
            ("wait_timeout", "'2s'"),
            ("max_stale", "'7s'"),
            ("hold", "'index'"),
            ("cached_entries", "200"),
            ("realms", "['ungleich-admin']"),
            ("sealing", "'off'"),
            ("key_file", "'{file}.other'"),
            ("old_key_files", "['{file}']"),
        ],
    ),
    (
        "totp",
        &[
            ("algorithm", "'SHA256'"),
            ("digits", "7"),
            ("period", "60"),
            ("skew", "2"),
            ("reuse", "'once'"),
        ],
    ),
    ("realms", &[("admin", "'a'"), ("auth", "'b'"), ("billing", "{ digits = 8 }")]),
    (
        "headers",
        &[
            ("name", "'X-N'"),
            ("realm", "'X-R'"),
            ("token", "'X-T'"),
            ("identity_name", "'X-N'"),
            ("identity_realm", "'X-R'"),
            ("identity_principal", "'X-P'"),
        ],
    ),
    (
        "throttle",
        &[
            ("enabled", "false"),
            ("per_source", "{ failures = 7 }"),
            ("per_entry", "{ failures = 7 }"),
            ("per_address", "{ failures = 7 }"),
            ("remember_success", "'7d'"),
        ],
    ),
    (
        "log",
        &[("level", "'debug'"), ("format", "'json'"), ("access", "false"), ("audit", "'stdout'")],
    ),
    (
        "shutdown",
        &[("delay", "'7s'"), ("grace", "'7s'"), ("streams", "'7s'"), ("upgrade_timeout", "'7s'")],
    ),
    (
        "remote",
        &[
            ("url", "'https://elsewhere'"),
            ("name", "'other'"),
            ("realm", "'other'"),
            ("seed", "'GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ'"),
            ("ca_file", "'{file}'"),
            ("tls_cert_file", "'{file}'\ntls_key_file = '{file}'"),
            ("timeout", "'7s'"),
            ("max_in_flight", "7"),
            ("cache_entries", "7"),
            ("max_stale", "'7s'"),
        ],
    ),
    ("reload", &[("watch", "'off'")]),
    ("process", &[("core_dumps", "true")]),
];

const LIMITS: &[(&str, &str)] = &[
    ("max_connections", "7"),
    ("max_connections_per_source", "7"),
    ("head_timeout", "'7s'"),
    ("keepalive_timeout", "'7s'"),
    ("body_timeout", "'7s'"),
    ("write_timeout", "'7s'"),
    ("min_body_rate", "7"),
    ("max_head_bytes", "'7KiB'"),
    ("max_headers", "17"),
    ("max_body_bytes", "7"),
];

/// What other keys of its section a key needs to mean something, before and after.
fn beside(section: &str, key: &str) -> &'static str {
    match (section, key) {
        ("store", "url") => "sealing = 'off'\n",
        ("store", "cached_entries") => "hold = 'index'\n",
        ("store", "sentinel_username" | "sentinel_password") => {
            "url = 'redis-sentinel://h/m'\nsealing = 'off'\n"
        }
        ("remote", "url") => "name = 'n'\nseed = 'NBSWY3DPO5XXE3DENBSWY3DPO5XXE3DE'\n",
        ("remote", "name") => "url = 'https://h'\nseed = 'NBSWY3DPO5XXE3DENBSWY3DPO5XXE3DE'\n",
        ("remote", "seed") => "url = 'https://h'\nname = 'n'\n",
        ("remote", _) => {
            "url = 'https://h'\nname = 'n'\nseed = 'NBSWY3DPO5XXE3DENBSWY3DPO5XXE3DE'\n"
        }
        ("store", "username" | "password") => "url = 'redis://h'\nsealing = 'off'\n",
        _ => "",
    }
}

/// What must be set, and is something else before.
fn before(section: &str, key: &str) -> &'static str {
    match (section, key) {
        ("remote", "url") => "url = 'https://h'",
        ("remote", "name") => "name = 'n'",
        ("remote", "seed") => "seed = 'NBSWY3DPO5XXE3DENBSWY3DPO5XXE3DE'",
        _ => "",
    }
}

fn load(section: &str, text: &str, file: &str) -> Config {
    let text = format!("[{section}]\n{}\n", text.replace("{file}", file));
    load_text(&text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The lines of a section of the manual.
fn manual_of<'a>(manual: &'a str, section: &str) -> &'a str {
    let start = manual.find(&format!("\n[{section}]\n")).unwrap_or_else(|| panic!("[{section}]"));
    let part = &manual[start + 2..];
    &part[..part.find("\n[").unwrap_or(part.len())]
}

#[test]
fn every_setting_is_taken_over_or_named_and_the_manual_says_which() {
    let (manual, sandbox) = (read("config/otpgate.toml"), Sandbox::new());
    let file = sandbox.write("file", "").display().to_string();
    for (section, keys) in OTHERS {
        let known = load_text(&format!("[{section}]\nnonsense = 1\n")).unwrap_err();
        let known = known.split("known here: ").nth(1).unwrap().lines().next().unwrap();
        for key in known.split(", ") {
            let is_secret_file =
                key.ends_with("_file") && known.contains(key.trim_end_matches("_file"));
            let has_own_section = OTHERS.iter().any(|(s, _)| *s == format!("{section}.{key}"));
            let paired = key == "tls_key_file";
            let is_here = keys.iter().any(|(name, _)| *name == key);
            assert!(is_here || has_own_section || paired || is_secret_file, "[{section}] {key}");
        }
        for (key, other) in *keys {
            let beside = beside(section, key);
            let running = load(section, &format!("{beside}{}", before(section, key)), &file);
            let wanted = load(section, &format!("{beside}{key} = {other}"), &file);
            assert_ne!(running, wanted, "[{section}] {key} = {other}");
            let (taken, named) = wanted.clone().as_far_as_running(&running);
            let path = format!("{section}.{key}");
            let is_named = named.contains(&path.as_str());
            assert_eq!(is_named, taken != wanted, "{path}: {named:?}");
            assert_eq!(named.len(), usize::from(is_named), "{path}: {named:?}");
            // So that it is named again, for as long as it is so.
            assert_eq!(is_named, taken == running, "{path}");

            let lines: Vec<_> = manual_of(&manual, section)
                .lines()
                .filter(|line| line.starts_with(&format!("#{key} = ")))
                .collect();
            let is_marked = lines.iter().any(|line| line.ends_with("# restart"));
            assert!(lines.is_empty() || is_marked == is_named, "{path}: {lines:?}");
        }
    }
}

/// A new key, or password, is of the store that is named beside it: the old store keeps its own.
#[test]
fn what_opens_another_store_waits_for_it() {
    let sandbox = Sandbox::new();
    let file = sandbox.write("file", "").display().to_string();
    let running = load("store", "url = 'sqlite:one.db'\nmax_stale = '3s'", &file);
    let redis =
        "url = 'redis://:secret@h'\nkey_file = '{file}'\nca_file = '{file}'\nmax_stale = '4s'";
    let (taken, named) = load("store", redis, &file).as_far_as_running(&running);
    assert_eq!(named, ["store.url", "store.key_file", "store.ca_file"]);
    assert_eq!(taken.store.max_stale.as_secs(), 4);
    assert_eq!((taken.store.url, taken.store.sealing), (running.store.url, running.store.sealing));

    let running = load("store", "url = 'redis://:one@h/1'\nkey_file = '{file}'", &file);
    let wanted = load("store", "url = 'redis://me:two@h/1'\nkey_file = '{file}'", &file);
    let (taken, named) = wanted.clone().as_far_as_running(&running);
    assert!(named.is_empty() && taken == wanted, "{named:?}");
}

/// A gate that asks a server goes on to ask it, and to make its own tokens as before.
#[test]
fn stores_and_servers_take_each_others_place_at_a_restart() {
    let (sandbox, remote) = (
        Sandbox::new(),
        "url = 'https://h'\nname = 'n'\nseed = 'NBSWY3DPO5XXE3DENBSWY3DPO5XXE3DE'\n",
    );
    let file = sandbox.write("file", "").display().to_string();
    let (asking, storing) = (load("remote", remote, &file), load("totp", "skew = 2", &file));
    let (taken, named) = storing.clone().as_far_as_running(&asking);
    assert_eq!(taken.remote, asking.remote);
    assert_eq!(taken.rules, asking.rules);
    assert!(named.contains(&"remote.url") && named.contains(&"totp"), "{named:?}");
    let (taken, named) = asking.as_far_as_running(&storing);
    assert_eq!(taken.remote, None);
    assert!(named.contains(&"remote.url"), "{named:?}");
}

/// Addresses stay, each with what its own new settings say.
#[test]
fn addresses_are_matched_one_by_one() {
    let sandbox = Sandbox::new();
    let file = sandbox.write("file", "").display().to_string();
    let running = load("api", "listen = ['127.0.0.1:0', 'unix:/run/a', '127.0.0.1:0']", &file);
    let wanted = "listen = [{ address = 'unix:/run/a', unix_mode = '0666' }, '127.0.0.1:0', \
                  { address = '127.0.0.1:0', allow_from = '10.0.0.0/8' }]";
    let (taken, named) = load("api", wanted, &file).as_far_as_running(&running);
    assert_eq!(named, ["api.unix_mode"]);
    let listen = &taken.api.listen;
    assert_eq!(listen[1], running.api.listen[1]);
    assert!(listen[0].allow_from.is_empty() && listen[2].allow_from.len() == 1, "{listen:?}");

    let fewer = "listen = { address = 'unix:/run/a', allow_from = '10.0.0.0/8' }";
    let (taken, named) = load("api", fewer, &file).as_far_as_running(&running);
    assert_eq!(named, ["api.listen"]);
    let counts: Vec<_> = taken.api.listen.iter().map(|l| l.allow_from.len()).collect();
    assert_eq!(counts, [0, 1, 0]);
}
