//! Settings that work and are unsafe: `otpgate check` names them, `otpgate serve` logs them at its start.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::{
    Address, ApiConfig, AuditTo, Config, Listen, RemoteConfig, Sealing, StoreConfig,
    ThrottleConfig, TrustedPeer,
};
use crate::directory::RealmRules;
use crate::otp::Reuse;
use crate::policy::{Access, Grant, Mode, Route};
use crate::store::private_file::{directory_of, is_world_readable, is_world_writable};
use crate::store::url::{RedisUrl, StoreUrl, Topology};

/// More time steps than these on either side are worth a warning: RFC 6238 section 5.2 recommends one.
const USUAL_SKEW_STEPS: u8 = 1;

/// A longer `store.max_stale` is worth a warning: failovers are over by then.
const USUAL_MAX_STALE: Duration = Duration::from_secs(5 * 60);
/// More guesses than these in a day are worth a warning: with 6 digits and a skew of 1, one in 33 days is
/// right with so many.
const USUAL_GUESSES: u64 = 10_000;
const DAY: Duration = Duration::from_secs(24 * 3600);

/// An unsafe setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Its key path, such as `store.sealing`.
    pub key: String,
    /// What follows from it, and what would be safe; never a secret.
    pub text: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.text)
    }
}

/// What is found so far.
#[derive(Default)]
struct Found(Vec<Warning>);

impl Found {
    fn add(&mut self, key: impl Into<String>, text: impl Into<String>) {
        self.0.push(Warning { key: key.into(), text: text.into() });
    }

    fn add_if(&mut self, unsafe_: bool, key: &str, text: &str) {
        if unsafe_ {
            self.add(key, text);
        }
    }
}

/// Every unsafe setting, by name, in the order of the manual. Looks at modes of files; connects to nothing.
#[must_use]
pub fn warnings(config: &Config) -> Vec<Warning> {
    let mut found = Found::default();
    proxy(&mut found, config);
    api(&mut found, &config.api);
    // Nothing of the ops listener is secret, and a pod must open it to kubelet.
    tls_keys(&mut found, "ops", &config.ops.listen);
    match &config.remote {
        None => store(&mut found, &config.store),
        Some(config) => remote(&mut found, config),
    }
    skew(&mut found, "totp", &config.rules.default);
    let default = config.rules.default.skew_steps;
    let mut realms: Vec<_> = config.rules.realms.iter().collect();
    realms.sort_by_key(|(name, _)| *name);
    for (name, rules) in realms.into_iter().filter(|(_, rules)| rules.skew_steps != default) {
        skew(&mut found, &format!("realms.{name}"), rules);
    }
    throttle(&mut found, &config.throttle);
    log(&mut found, config);
    found.add_if(
        config.process.core_dumps,
        "process.core_dumps",
        "a crash may write all seeds to a file, and every process of this user may read them: for debugging alone",
    );
    found.0
}

fn proxy(found: &mut Found, config: &Config) {
    if config.proxy.listen.is_empty() {
        return;
    }
    let report = "nothing is refused: requests without proof are forwarded, without identity";
    found.add_if(config.proxy.mode == Mode::Report, "proxy.mode", report);
    tls_keys(found, "proxy", &config.proxy.listen);
    found.add_if(
        config.proxy.trusted_proxies.iter().any(is_nearly_everybody),
        "proxy.trusted_proxies",
        "nearly everybody is trusted to say where a request came from: name your proxies alone",
    );
    for (i, route) in config.routes.iter().enumerate() {
        if route.access == Access::Public && route.prefix.is_empty() {
            let text =
                "a public route covers every path that no other route names: nobody is asked there";
            found.add(format!("route[{i}].public"), text);
        }
        let looser =
            |here: Reuse| realms_of(route, config).any(|realm| here.is_looser_than(realm.reuse));
        if route.reuse.is_some_and(looser) {
            let text = "a token may be used more often here than its realm says";
            found.add(format!("route[{i}].reuse"), text);
        }
        if route.mode == Some(Mode::Report) {
            found.add(format!("route[{i}].mode"), report);
        }
    }
}

/// The rules of all realms whose principals a route may let pass.
fn realms_of<'a>(route: &'a Route, config: &'a Config) -> impl Iterator<Item = &'a RealmRules> {
    let grants = match &route.access {
        Access::Public => &[],
        Access::Allow(grants) => grants.as_slice(),
    };
    let all = || config.rules.realms.values().chain([&config.rules.default]).collect::<Vec<_>>();
    grants.iter().flat_map(move |grant| match grant {
        Grant::Anybody => all(),
        Grant::Realm(realm) => vec![config.rules.of(realm.as_str())],
        Grant::Principal(who) => vec![config.rules.of(who.realm.as_str())],
    })
}

fn api(found: &mut Found, api: &ApiConfig) {
    found.add_if(
        is_plain_beyond_loopback(&api.listen),
        "api.listen",
        "others than this machine reach it without TLS: tokens and seeds can be read on the way",
    );
    tls_keys(found, "api", &api.listen);
    found.add_if(
        !api.listen.is_empty() && api.trusted_proxies.iter().any(is_nearly_everybody),
        "api.trusted_proxies",
        "nearly everybody is trusted to say where a request came from: name your proxies alone",
    );
    let is_open = beyond_loopback(&api.listen).next().is_some();
    found.add_if(
        is_open && api.allowed_hosts.is_empty(),
        "api.allowed_hosts",
        "is empty, and others than this machine reach the API: a web page may reach it under a name of its own \
         (DNS rebinding); name the API's hosts",
    );
    found.add_if(
        is_open && api.reveal_seeds,
        "api.reveal_seeds",
        "every admin can read all seeds from other machines: `false` shows a seed once, when it is made",
    );
}

fn store(found: &mut Found, store: &StoreConfig) {
    match &store.url {
        StoreUrl::Sqlite(path) => sqlite(found, path),
        StoreUrl::Redis(url) => redis(found, url),
    }
    found.add_if(
        store.max_stale > USUAL_MAX_STALE,
        "store.max_stale",
        "a gate that has lost the store accepts deleted and disabled entries for so long",
    );
    match &store.sealing {
        Sealing::Off => {
            found.add(
                "store.sealing",
                "entries are stored unsealed: who reads the store has all seeds",
            );
        }
        Sealing::KeyFile { path, old, .. } => {
            public_key_files(found, "store.key_file", std::slice::from_ref(path));
            public_key_files(found, "store.old_key_files", old);
        }
    }
}

fn sqlite(found: &mut Found, path: &Path) {
    let (key, folder) = ("store.url", directory_of(path));
    let shown = path.display();
    if is_world_readable(path) {
        found.add(key, format!("every user of this machine may read `{shown}`: use mode 0600"));
    }
    if is_world_writable(folder) {
        found.add(key, format!("every user of this machine may put files beside `{shown}`"));
    }
    let temporary = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into(), "/dev/shm".into()];
    if temporary.iter().any(|place| path.starts_with(place)) {
        found.add(key, format!("`{shown}` is in a place for temporary files: entries may be lost"));
    }
}

fn redis(found: &mut Found, url: &RedisUrl) {
    let hosts: Vec<&str> = match &url.topology {
        Topology::Unix(_) => return,
        Topology::Single(host, _) => vec![host],
        Topology::Sentinel { nodes, .. } | Topology::Cluster(nodes) => {
            nodes.iter().map(|(host, _)| host.as_str()).collect()
        }
    };
    found.add_if(
        !url.tls && !hosts.iter().all(|host| is_here(host)),
        "store.url",
        "Redis is reached without TLS: its password can be read, and entries deleted or put back, on the way",
    );
    found.add_if(
        url.password.is_none(),
        "store.password",
        "Redis asks for none: whoever reaches it can delete entries, or put deleted ones back",
    );
}

fn remote(found: &mut Found, remote: &RemoteConfig) {
    found.add_if(
        reqwest::Url::parse(&remote.url).is_ok_and(|url| {
            let host = url.host_str().unwrap_or_default();
            url.scheme() == "http" && !is_here(host.trim_matches(['[', ']']))
        }),
        "remote.url",
        "the server is reached without TLS: tokens can be read, and a yes be forged, on the way",
    );
    if let Some((_, key_file)) = &remote.tls.identity
        && is_world_readable(key_file)
    {
        let path = key_file.display();
        let text = format!("every user of this machine may read the private key `{path}`");
        found.add("remote.tls_key_file", text);
    }
}

fn is_here(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// Not refused: Kubernetes mounts secrets with mode 0644 unless told otherwise.
fn public_key_files(found: &mut Found, key: &str, files: &[PathBuf]) {
    for path in files.iter().filter(|path| is_world_readable(path)) {
        let path = path.display();
        found.add(key, format!("every user of this machine may read the sealing key `{path}`"));
    }
}

fn tls_keys(found: &mut Found, section: &str, listen: &[Listen]) {
    let files: BTreeSet<_> =
        listen.iter().filter_map(|one| Some(&one.tls.as_ref()?.files.key_file)).collect();
    for path in files.into_iter().filter(|path| is_world_readable(path)) {
        let text =
            format!("every user of this machine may read the private key `{}`", path.display());
        found.add(format!("{section}.tls_key_file"), text);
    }
}

fn skew(found: &mut Found, section: &str, rules: &RealmRules) {
    if rules.skew_steps > USUAL_SKEW_STEPS {
        let tokens = 2 * u32::from(rules.skew_steps) + 1;
        let seconds = tokens * rules.params.step_seconds;
        let text = format!(
            "{tokens} tokens are valid at any moment, each for {seconds} s: guessing is that much easier"
        );
        found.add(format!("{section}.skew"), text);
    }
}

fn throttle(found: &mut Found, throttle: &ThrottleConfig) {
    if !throttle.enabled {
        let text = "wrong tokens cost nothing: who may try often enough guesses a right one";
        return found.add("throttle.enabled", text);
    }
    for (key, quota) in [("per_source", throttle.per_source), ("per_entry", throttle.per_entry)] {
        let later = DAY.as_nanos() / quota.interval().as_nanos();
        let guesses = u64::from(quota.failures) + u64::try_from(later).unwrap_or(u64::MAX);
        if guesses > USUAL_GUESSES {
            let text = format!("allows {guesses} guesses at the tokens of one name in a day");
            found.add(format!("throttle.{key}"), text);
        }
    }
}

fn log(found: &mut Found, config: &Config) {
    let filter = EnvFilter::builder().parse_lossy(&config.log.level);
    let finest = filter.max_level_hint().unwrap_or(LevelFilter::TRACE);
    found.add_if(
        finest > LevelFilter::INFO,
        "log.level",
        "below `info` the log is for developers: it grows with every request and tells about callers",
    );
    if let AuditTo::File(path) = &config.log.audit {
        let (key, shown) = ("log.audit", path.display());
        if is_world_readable(path) {
            found.add(key, format!("every user of this machine may read `{shown}`: use mode 0600"));
        }
        if is_world_writable(directory_of(path)) {
            found.add(key, format!("every user of this machine may put files beside `{shown}`"));
        }
    }
}

fn beyond_loopback(listen: &[Listen]) -> impl Iterator<Item = &Listen> {
    listen.iter().filter(|one| match &one.address {
        Address::Tcp(address) => !address.ip().to_canonical().is_loopback(),
        Address::Unix(_) => false,
    })
}

fn is_plain_beyond_loopback(listen: &[Listen]) -> bool {
    beyond_loopback(listen).any(|one| one.tls.is_none())
}

/// Whether a network is wider than any private one is.
fn is_nearly_everybody(peer: &TrustedPeer) -> bool {
    match peer {
        TrustedPeer::Network(IpNet::V4(v4)) => v4.prefix_len() < 8,
        TrustedPeer::Network(IpNet::V6(v6)) => v6.prefix_len() < 7,
        TrustedPeer::Unix => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::config::TlsFiles;
    use crate::config::load::load;

    fn config(text: &str) -> Config {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        load(Some(file.path()), [], &[]).unwrap()
    }

    fn keys(text: &str) -> Vec<String> {
        warnings(&config(text)).into_iter().map(|warning| warning.key).collect()
    }

    #[test]
    fn each_unsafe_setting_is_named_and_safe_ones_are_not() {
        let api = "[api]\nlisten = '0.0.0.0:1'\n";
        let remote =
            |url: &str| format!("[remote]\nname = 'a'\nseed = 'AAAAAAAA'\nurl = '{url}'\n");
        let redis = "[store]\nkey_file = '/absent'\npassword = 'x'\nurl = ";
        for (text, expected) in [
            ("", &[] as &[&str]),
            ("[proxy]\nlisten = '0.0.0.0:1'\n", &[]),
            ("[proxy]\nmode = 'report'\n", &["proxy.mode"]),
            ("[proxy]\nmode = 'report'\nlisten = 'off'\n", &[]),
            (
                "[proxy]\ntrusted_proxies = ['10.0.0.0/8', '0.0.0.0/0']\n",
                &["proxy.trusted_proxies"],
            ),
            ("[proxy]\ntrusted_proxies = '::/0'\n", &["proxy.trusted_proxies"]),
            (
                "[proxy]\ntrusted_proxies = ['0.0.0.0/1', '128.0.0.0/1']\n",
                &["proxy.trusted_proxies"],
            ),
            ("[proxy]\ntrusted_proxies = ['10.0.0.0/8', 'fc00::/7']\n", &[]),
            ("[api]\ntrusted_proxies = '0.0.0.0/0'\n", &["api.trusted_proxies"]),
            (api, &["api.listen", "api.allowed_hosts", "api.reveal_seeds"]),
            (&format!("{api}allowed_hosts = 'a'\nreveal_seeds = false\n"), &["api.listen"]),
            ("[api]\nlisten = ['127.0.0.9:1', '[::1]:1', 'unix:/x']\n", &[]),
            ("[api]\nlisten = '[::ffff:127.0.0.1]:1'\n", &[]),
            ("[ops]\nlisten = ['127.0.0.1:1', '[::]:1']\n", &[]),
            ("[[route]]\npath = '/'\npublic = true\n", &["route[0].public"]),
            ("[[route]]\npath = '/x'\npublic = true\n", &[]),
            (
                "[[route]]\npath = '/x'\npublic = true\n[[route]]\npath='/'\nallow='*'\nmode='report'\n",
                &["route[1].mode"],
            ),
            ("[totp]\nskew = 3\n", &["totp.skew"]),
            ("[totp]\nskew = 3\n[realms.a]\nskew = 1\n", &["totp.skew"]),
            ("[realms.b]\nskew = 2\n[realms.a]\nskew = 2\n", &["realms.a.skew", "realms.b.skew"]),
            ("[log]\nlevel = 'debug'\n", &["log.level"]),
            ("[log]\nlevel = 'warn,otpgate=trace'\n", &["log.level"]),
            ("[log]\nlevel = 'warn'\n", &[]),
            ("[throttle]\nenabled = false\n", &["throttle.enabled"]),
            ("[throttle]\nper_source = { failures = 5, per = '1m' }\n", &[]),
            ("[throttle]\nper_source = { failures = 10, per = '1m' }\n", &["throttle.per_source"]),
            (
                "[throttle]\nper_entry = { failures = 10000, per = '30days' }\n",
                &["throttle.per_entry"],
            ),
            ("[store]\nmax_stale = '5m'\n", &[]),
            (&remote("http://[::1]:8081"), &[]),
            (&remote("https://otp.example"), &[]),
            (&remote("unix:/run/api.sock"), &[]),
            (&remote("http://otp.example"), &["remote.url"]),
            ("[store]\nmax_stale = '301s'\n", &["store.max_stale"]),
            (
                "[totp]\nreuse = 'once'\n[[route]]\npath = '/'\nallow = '*'\nreuse = 'window'\n",
                &["route[0].reuse"],
            ),
            (
                "[realms.a]\nreuse = 'once'\n[[route]]\npath = '/'\nallow = 'a'\nreuse = { budget = 2 }\n",
                &["route[0].reuse"],
            ),
            (
                "[realms.a]\nreuse = 'once'\n[[route]]\npath = '/'\nallow = 'x@b'\nreuse = 'window'\n",
                &[],
            ),
            ("[[route]]\npath = '/'\nallow = '*'\nreuse = 'once'\n", &[]),
            ("[process]\ncore_dumps = true\n", &["process.core_dumps"]),
            ("[store]\nsealing = 'off'\n", &["store.sealing"]),
            ("[store]\nurl = 'sqlite:/var/tmp/o.db'\n", &["store.url", "store.url"]),
            (&format!("{redis}'rediss://redis.example'\n"), &[]),
            (&format!("{redis}'redis://127.0.0.1'\n"), &[]),
            (&format!("{redis}'redis://[::1]'\n"), &[]),
            (&format!("{redis}'redis://redis.example'\n"), &["store.url"]),
            (&format!("{redis}'redis-cluster://localhost,h'\n"), &["store.url"]),
            ("[store]\nkey_file='/absent'\nurl = 'redis://localhost'\n", &["store.password"]),
            ("[store]\nkey_file='/absent'\nurl = 'redis+unix:///r.sock'\n", &[]),
        ] {
            assert_eq!(keys(text), expected, "{text}");
        }
    }

    #[test]
    fn tls_makes_a_listener_safe() {
        let mut config =
            config("[api]\nlisten = '0.0.0.0:1'\nallowed_hosts = 'a'\nreveal_seeds = false\n");
        assert_eq!(warnings(&config).len(), 1);
        config.api.listen[0].tls =
            Some(TlsFiles { cert_file: "a".into(), key_file: "b".into() }.into());
        assert_eq!(warnings(&config), []);
        let key = tempfile::NamedTempFile::new().unwrap();
        let files = TlsFiles { cert_file: "a".into(), key_file: key.path().into() };
        config.api.listen[0].tls = Some(files.into());
        config.ops.listen = vec![config.api.listen[0].clone(), config.api.listen[0].clone()];
        assert_eq!(warnings(&config), []);
        fs::set_permissions(key.path(), Permissions::from_mode(0o644)).unwrap();
        let named: Vec<_> = warnings(&config).into_iter().map(|warning| warning.key).collect();
        assert_eq!(named, ["api.tls_key_file", "ops.tls_key_file"]);
    }

    #[test]
    fn files_that_others_may_read_are_named() {
        let folder = tempfile::tempdir().unwrap();
        // All of this is in a place for temporary files, which has its own test.
        let keys = |text: &str| -> Vec<_> {
            let about_place = |warning: &Warning| warning.text.contains("temporary files");
            let found = warnings(&config(text)).into_iter();
            found.filter(|found| !about_place(found)).map(|found| found.key).collect()
        };
        let (database, key) = (folder.path().join("o.db"), folder.path().join("key"));
        fs::write(&key, "").unwrap();
        let text = format!(
            "[store]\nurl = 'sqlite:{}'\nkey_file = '{}'\n",
            database.display(),
            key.display()
        );
        let mode =
            |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        mode(&key, 0o640);
        assert_eq!(keys(&text), [""; 0]);
        mode(&key, 0o644);
        assert_eq!(keys(&text), ["store.key_file"]);
        mode(&key, 0o600);
        fs::write(&database, "").unwrap();
        mode(&database, 0o644);
        assert_eq!(keys(&text), ["store.url"]);
        mode(&database, 0o600);
        mode(folder.path(), 0o777);
        assert_eq!(keys(&text), ["store.url"]);
        let audit = folder.path().join("audit");
        let text = format!("[log]\naudit = 'file:{}'\n", audit.display());
        assert_eq!(keys(&text), ["log.audit"]);
        mode(folder.path(), 0o700);
        assert_eq!(keys(&text), [""; 0]);
        fs::write(&audit, "").unwrap();
        mode(&audit, 0o644);
        assert_eq!(keys(&text), ["log.audit"]);
    }

    #[test]
    fn the_number_of_valid_tokens_is_told() {
        let text = warnings(&config("[totp]\nskew = 3\n"))[0].to_string();
        assert!(
            text.starts_with("totp.skew: 7 tokens are valid at any moment, each for 210 s"),
            "{text}"
        );
    }
}
