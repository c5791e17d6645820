//! From file, environment and flags to [`Config`]. Flags beat the environment, which beats the file.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};
use zeroize::Zeroizing;

use super::headers::read_headers;
use super::listeners::{read_api, read_ops, read_proxy};
use super::reader::{Origin, Section};
use super::remote::read_remote;
use super::routes::read_routes;
use super::store::read_store;
use super::throttle::read_throttle;
use super::tokens::{read_realms, read_rules};
use super::{
    Address, AuditTo, Config, Listen, LogConfig, LogFormat, ProcessConfig, ProxyConfig,
    ReloadConfig, ReservedRealms, ShutdownConfig,
};
use crate::directory::RealmRules;
use crate::entry::Realm;
use crate::policy::{Access, Grant};

pub use super::reader::{Files, Problem};

/// Read when no file is named.
pub const DEFAULT_PATH: &str = "/etc/otpgate/otpgate.toml";
/// Start of every environment variable that is a setting; section and key are joined by `__`.
pub const ENV_PREFIX: &str = "OTPGATE_";

/// Where the API listens unless set otherwise.
const API: &str = "127.0.0.1:8081";
/// As a listener's only address: it is not opened.
const OFF: &str = "off";
/// How often files are looked at, unless set otherwise, and at most.
const WATCH: Duration = Duration::from_secs(2);
const SHORTEST_WATCH: Duration = Duration::from_millis(100);

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

/// Settings, and what they came from.
pub struct Loaded {
    /// The configuration file that was read.
    pub file: Option<PathBuf>,
    /// Every file whose contents matter: the configuration file, also where it may come to be, and those
    /// that settings name. Of a file that is no TOML it is the file alone.
    pub files: Vec<PathBuf>,
    /// The settings, or everything that is wrong.
    pub config: Result<Config, ConfigError>,
}

/// Reads `file` (or [`DEFAULT_PATH`] if that exists), `env` and `flags`.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn load(
    file: Option<&Path>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    flags: &[Flag],
) -> Result<Config, ConfigError> {
    load_noting_files(file, env, flags, Files::Any).config
}

/// As [`load`], and tells which files that depends on. Other files than `may_name` are not opened.
pub fn load_noting_files(
    file: Option<&Path>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    flags: &[Flag],
    may_name: Files,
) -> Loaded {
    let path = file.unwrap_or(Path::new(DEFAULT_PATH)).to_owned();
    // If nobody can tell whether it exists, reading it says why.
    let is_read = file.is_some() || path.try_exists().unwrap_or(true);
    let table = match may_name.objection(&path) {
        Some(objection) => Err(ConfigError::one(path.display().to_string(), objection)),
        None if is_read => read_file(&path),
        None => Ok(Table::new()),
    };
    let file = is_read.then(|| path.clone());
    let table = match table {
        Ok(table) => table,
        Err(error) => return Loaded { file, files: vec![path], config: Err(error) },
    };
    let mut sources = Sources { table, ..Sources::default() };
    for (name, value) in env {
        sources.variable(name, value);
    }
    for flag in flags {
        let path = flag.key.split('.').map(str::to_owned).collect();
        let origin = Origin { name: flag.name.to_owned(), raw: flag.value.clone().into() };
        sources.set(path, Value::String(flag.value.clone()), origin);
    }
    let mut root = Section::root(may_name, sources.table, sources.origins, sources.problems);
    root.depends_on("", &path);
    let config = read(&mut root);
    let files = root.files();
    let problems = root.problems();
    let config = if problems.is_empty() { Ok(config) } else { Err(ConfigError(problems)) };
    Loaded { file, files, config }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map(Zeroizing::new)
        .map_err(|e| ConfigError::one(&name, format!("cannot read the file: {e}")))?;
    text.parse::<Table>().map_err(|e| {
        // The parser's full message quotes the line, which may hold a secret.
        let offset = e.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..offset].iter().filter(|b| **b == b'\n').count() + 1;
        ConfigError::one(format!("{name}, line {line}"), format!("not TOML: {}", e.message()))
    })
}

/// What file, environment and flags say together.
#[derive(Default)]
struct Sources {
    table: Table,
    /// By key path, what does not come from the file.
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
}

impl Sources {
    /// Takes a variable, if it is a setting.
    fn variable(&mut self, name: OsString, value: OsString) {
        let Ok(name) = name.into_string() else { return };
        let Some(rest) = name.strip_prefix(ENV_PREFIX).filter(|rest| rest.contains("__")) else {
            return;
        };
        let path: Vec<_> = rest.split("__").map(str::to_ascii_lowercase).collect();
        if path.iter().any(String::is_empty) {
            let message = format!("is no setting: those are {ENV_PREFIX}<SECTION>__<KEY>");
            return self.problems.push(Problem { key: name, message });
        }
        match value.into_string() {
            Ok(raw) => self.set(path, typed(&raw), Origin { name, raw: raw.into() }),
            Err(_) => self.problems.push(Problem { key: name, message: "is not UTF-8".into() }),
        }
    }

    fn set(&mut self, mut path: Vec<String>, value: Value, origin: Origin) {
        let key = path.join(".");
        let last = path.pop().expect("a path has at least one part");
        let mut at = &mut self.table;
        for part in path {
            let next = at.entry(part.clone()).or_insert_with(|| Value::Table(Table::new()));
            let Value::Table(table) = next else {
                let key = format!("{key} ({})", origin.name);
                let message = format!("`{part}` is not a table");
                return self.problems.push(Problem { key, message });
            };
            at = table;
        }
        at.insert(last, value);
        self.origins.insert(key, origin);
    }
}

/// A variable's text as the TOML value that it looks like: a list, table, number or boolean; else a
/// string, quotes included.
fn typed(text: &str) -> Value {
    let parsed = Zeroizing::new(format!("v = {text}"))
        .parse::<Table>()
        .ok()
        .filter(|table| table.len() == 1);
    parsed
        .and_then(|mut table| table.remove("v"))
        .filter(|value| !value.is_datetime() && !value.is_str())
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn read(root: &mut Section) -> Config {
    let mut upstreams = Vec::new();
    let proxy = read_proxy(root.section("proxy"), &mut upstreams);
    let remote = root.section("remote");
    let api = read_api(root.section("api"), if remote.is_empty() { API } else { OFF });
    let ops = read_ops(root.section("ops"));
    let store = root.section("store");
    if !remote.is_empty() {
        check_no_store(&store);
    }
    let store = read_store(store);
    let mut totp = root.section("totp");
    let default = read_rules(&mut totp, RealmRules::default());
    totp.finish();
    let (realms, rules) = read_realms(root.section("realms"), default);
    let remote = read_remote(remote, &realms.auth);
    let headers = read_headers(root.section("headers"));
    let throttle = read_throttle(root.section("throttle"));
    let log = read_log(root.section("log"));
    let shutdown = read_shutdown(root.section("shutdown"));
    let reload = read_reload(root.section("reload"));
    let process = read_process(root.section("process"));
    let is_asked = !api.listen.is_empty() && !api.trusted_proxies.is_empty();
    let routes = read_routes(root, &mut upstreams, is_asked);
    let proxy = ProxyConfig { upstreams, ..proxy };
    let config = Config {
        proxy,
        api,
        ops,
        store,
        remote,
        rules,
        realms,
        headers,
        throttle,
        log,
        shutdown,
        reload,
        process,
        routes,
    };
    check_addresses(root, &config);
    check_scope(root, &config);
    config
}

fn read_log(mut s: Section) -> LogConfig {
    let config = LogConfig {
        level: s
            .parse("level", |text| {
                if text.trim().is_empty() {
                    return Err("is empty".to_owned());
                }
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
        audit: s.parse("audit", parse_audit).unwrap_or_default(),
    };
    s.finish();
    config
}

fn parse_audit(text: &str) -> Result<AuditTo, String> {
    match (text, text.strip_prefix("file:")) {
        ("stderr", _) => Ok(AuditTo::Stderr),
        ("stdout", _) => Ok(AuditTo::Stdout),
        (_, Some(path)) if !path.is_empty() => Ok(AuditTo::File(path.into())),
        _ => Err(format!("`{text}` is none of `stderr`, `stdout`, `file:PATH`")),
    }
}

fn read_shutdown(mut s: Section) -> ShutdownConfig {
    let grace = s.duration("grace").unwrap_or(Duration::from_secs(30));
    let streams = s.duration("streams");
    if streams.is_some_and(|streams| streams > grace) {
        s.problem("streams", "is longer than `grace`, which bounds everything");
    }
    let config = ShutdownConfig {
        delay: s.duration_or_off("delay").unwrap_or(None).unwrap_or_default(),
        grace,
        streams: streams.unwrap_or(Duration::from_secs(10)).min(grace),
        upgrade_timeout: s.duration("upgrade_timeout").unwrap_or(Duration::from_secs(60)),
    };
    s.finish();
    config
}

fn read_reload(mut s: Section) -> ReloadConfig {
    let config = ReloadConfig { watch: s.duration_or_off("watch").unwrap_or(Some(WATCH)) };
    if config.watch.is_some_and(|watch| watch < SHORTEST_WATCH) {
        s.problem("watch", "must be at least 100ms: each look reads all files");
    }
    s.finish();
    config
}

fn read_process(mut s: Section) -> ProcessConfig {
    let config = ProcessConfig { core_dumps: s.or("core_dumps", false) };
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

/// Claims are checked in one place.
fn check_no_store(store: &Section) {
    for key in store.keys() {
        store.problem(&key, "[remote] is set too, and then there is no store: keep one of them");
    }
}

/// Realms that are left out have no use elsewhere.
fn check_scope(root: &Section, config: &Config) {
    let scope = &config.store.hold.scope;
    let left_out = |realm: &Realm| !scope.has(realm.as_str());
    let ReservedRealms { admin, auth } = &config.realms;
    if !config.api.listen.is_empty() && left_out(admin) && left_out(auth) {
        root.problem(
            "store.realms",
            format_args!(
                "has neither `{admin}` nor `{auth}`, so nobody could use the API: add one, or say \
                 `listen = \"off\"` in [api]"
            ),
        );
    }
    for (i, route) in config.routes.iter().enumerate() {
        let Access::Allow(grants) = &route.access else { continue };
        for grant in grants {
            let realm = match grant {
                Grant::Anybody => continue,
                Grant::Realm(realm) => realm,
                Grant::Principal(principal) => &principal.realm,
            };
            if left_out(realm) {
                let key = format!("route[{i}].allow");
                root.problem(&key, format_args!("`store.realms` leaves `{realm}` out"));
            }
        }
    }
}

/// A file's text: a configuration or problems, each with its key.
///
/// # Panics
/// If a problem says nothing.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // No file of this machine is opened.
    let Ok(table) = text.parse::<Table>() else { return };
    if text.contains("_file") {
        return;
    }
    let mut root = Section::root(Files::Any, table, BTreeMap::default(), Vec::new());
    let _ = read(&mut root);
    for problem in root.problems() {
        assert!(!problem.message.is_empty());
    }
}

#[cfg(test)]
mod tests;
