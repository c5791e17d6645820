//! `[store]`: where entries are and how they are sealed.

use std::path::PathBuf;
use std::time::Duration;

use super::peers::read_tls_files;
use super::reader::Section;
use super::{RedisConfig, RedisWrites, Sealing, StoreConfig};
use crate::directory::Hold;
use crate::entry::Realm;
use crate::store::Scope;
use crate::store::url::{Login, StoreUrl, Topology};

/// The time between two proofs that nothing happened, and the longest wait for an answer.
const MIN_MAX_STALE: Duration = Duration::from_secs(2);

/// How many entries a gate may keep in memory beside their names, and how many it does unless told.
const CACHED_ENTRIES: std::ops::RangeInclusive<usize> = 100..=100_000_000;
const USUAL_CACHED_ENTRIES: usize = 100_000;

/// Longest time that replicas may be waited for.
const MAX_WAIT: Duration = Duration::from_secs(10);

pub(super) fn read_store(mut s: Section) -> StoreConfig {
    let max_stale = s.duration("max_stale").unwrap_or(Duration::from_secs(15));
    if max_stale < MIN_MAX_STALE {
        s.problem(
            "max_stale",
            "must be at least 2s: a store in which nothing happens is asked less often",
        );
    }
    let prefix = s.or("prefix", "otpgate".to_owned());
    if prefix.is_empty()
        || prefix.len() > 64
        || !prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    {
        s.problem("prefix", "must be 1 to 64 letters, digits, `-`, `_`, `.` or `:`");
    }
    let hold = read_hold(&mut s);
    let url = s.secret("url");
    let mut url = match url.as_ref().map(|url| StoreUrl::parse(url.expose())) {
        Some(Ok(url)) => url,
        Some(Err(error)) => {
            s.problem("url", error);
            StoreUrl::Sqlite(PathBuf::new())
        }
        None => StoreUrl::Sqlite(PathBuf::from("otpgate.db")),
    };
    let username: Option<String> = s.get("username");
    let password = s.secret("password");
    let ca_file = s.file("ca_file");
    let client_tls = read_tls_files(&mut s);
    if let StoreUrl::Redis(redis) = &mut url {
        for (key, clash) in [
            ("username", username.is_some() && redis.username.is_some()),
            ("password", password.is_some() && redis.password.is_some()),
        ] {
            if clash {
                s.problem(key, "is also part of `store.url`: keep one");
            }
        }
        redis.username = redis.username.take().or(username);
        redis.password = redis.password.take().or(password);
        if matches!(redis.topology, Topology::Cluster(_)) && redis.database != 0 {
            s.problem("url", "a cluster has no database but 0");
        }
    } else {
        for (key, given) in [("username", username.is_some()), ("password", password.is_some())] {
            if given {
                s.problem(key, "is for Redis");
            }
        }
    }
    read_sentinel(&mut s, &mut url);
    let redis = read_redis(&mut s);
    let sealing = read_sealing(&mut s, &url);
    s.finish();
    StoreConfig { url, max_stale, hold, prefix, redis, sealing, ca_file, client_tls }
}

fn read_hold(s: &mut Section) -> Hold {
    let index = s.choice("hold", &[("all", false), ("index", true)]).unwrap_or(false);
    let cached = s.number("cached_entries", CACHED_ENTRIES);
    if cached.is_some() && !index {
        s.problem("cached_entries", "is for `hold = \"index\"`");
    }
    let realms =
        s.list("realms", |realm| Realm::parse(realm).map(|realm| realm.as_str().to_owned()));
    if realms.as_ref().is_some_and(Vec::is_empty) {
        s.problem("realms", "names no realm: leave it out to serve all of them");
    }
    Hold {
        cached_entries: index.then(|| cached.unwrap_or(USUAL_CACHED_ENTRIES)),
        scope: realms.map_or_else(Scope::default, Scope::only),
    }
}

/// What the Sentinels want.
fn read_sentinel(s: &mut Section, url: &mut StoreUrl) {
    let login =
        Login { username: s.get("sentinel_username"), password: s.secret("sentinel_password") };
    match url {
        StoreUrl::Redis(redis) if matches!(redis.topology, Topology::Sentinel { .. }) => {
            if login.username.is_some() && login.password.is_none() {
                s.problem("sentinel_username", "is set without `sentinel_password`");
            }
            redis.sentinel = login;
        }
        _ => {
            for (key, given) in [
                ("sentinel_username", login.username.is_some()),
                ("sentinel_password", login.password.is_some()),
            ] {
                if given {
                    s.problem(key, "is for `redis-sentinel://`");
                }
            }
        }
    }
}

fn read_redis(s: &mut Section) -> RedisConfig {
    let default = RedisConfig::default();
    let ways = [
        ("auto", RedisWrites::Auto),
        ("scripts", RedisWrites::Scripts),
        ("transactions", RedisWrites::Transactions),
    ];
    let wait_timeout = s.duration("wait_timeout").unwrap_or(default.wait_timeout);
    if wait_timeout > MAX_WAIT {
        s.problem("wait_timeout", "must be at most 10s: who writes waits for it");
    }
    RedisConfig {
        writes: s.choice("redis_writes", &ways).unwrap_or(default.writes),
        wait_replicas: s.number("wait_replicas", 0..=100).unwrap_or(default.wait_replicas),
        wait_timeout,
    }
}

fn read_sealing(s: &mut Section, url: &StoreUrl) -> Sealing {
    let on = s.choice("sealing", &[("on", true), ("off", false)]).unwrap_or(true);
    let old =
        s.list("old_key_files", |path| Ok::<_, String>(PathBuf::from(path))).unwrap_or_default();
    let named: Option<PathBuf> = s.get("key_file");
    if !on {
        if named.is_some() || !old.is_empty() {
            s.problem("key_file", "is set although `sealing` is off");
        }
        return Sealing::Off;
    }
    let all_named = old
        .iter()
        .map(|old| ("old_key_files", old))
        .chain(named.iter().map(|key| ("key_file", key)));
    for (key, path) in all_named {
        s.depends_on(key, path);
    }
    match (named, url) {
        (Some(path), _) => Sealing::KeyFile { path, old, make: false },
        (None, StoreUrl::Sqlite(file)) => {
            let mut path = file.clone().into_os_string();
            path.push(".key");
            let path = PathBuf::from(path);
            s.depends_on("key_file", &path);
            Sealing::KeyFile { path, old, make: true }
        }
        (None, StoreUrl::Redis(_)) => {
            s.problem(
                "key_file",
                "is missing: entries in Redis are sealed with a key that all gates share; make one with \
                 `openssl rand -base64 32`, or say `sealing = \"off\"`",
            );
            Sealing::Off
        }
    }
}
