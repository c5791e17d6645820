//! Which settings a running gate takes over, and which need a restart.

use super::{
    ApiConfig, Config, Listen, LogConfig, OpsConfig, ProcessConfig, ProxyConfig, RedisConfig,
    RemoteConfig, Sealing, StoreConfig,
};
use crate::client::ClientTls;
use crate::directory::Hold;
use crate::store::url::{RedisUrl, StoreUrl};

/// Key paths of settings that stay as they are until a restart.
#[derive(Default)]
struct Kept(Vec<&'static str>);

impl Kept {
    fn keep<T: Clone + PartialEq>(&mut self, key: &'static str, running: &T, wanted: &mut T) {
        if running != wanted {
            wanted.clone_from(running);
            self.0.push(key);
        }
    }
}

impl Config {
    /// These settings as far as a gate that runs with `running` can take them over; what it cannot is as
    /// in `running`, and named.
    #[must_use]
    pub fn as_far_as_running(mut self, running: &Self) -> (Self, Vec<&'static str>) {
        let mut kept = Kept::default();
        // Every part is named here, so that a new one cannot be forgotten.
        let Self {
            proxy,
            api,
            ops,
            store,
            remote,
            rules,
            realms: _,
            headers: _,
            throttle: _,
            log,
            shutdown: _,
            reload: _,
            process,
            routes: _,
        } = &mut self;
        keep_proxy(&mut kept, &running.proxy, proxy);
        keep_api(&mut kept, &running.api, api);
        keep_ops(&mut kept, &running.ops, ops);
        keep_store(&mut kept, &running.store, store);
        keep_remote(&mut kept, running.remote.as_ref(), remote);
        if running.remote.is_some() {
            kept.keep("totp", &running.rules, rules);
        }
        keep_log(&mut kept, &running.log, log);
        keep_process(&mut kept, &running.process, process);
        (self, kept.0)
    }
}

fn keep_proxy(kept: &mut Kept, running: &ProxyConfig, wanted: &mut ProxyConfig) {
    let ProxyConfig {
        listen,
        upstreams: _,
        mode: _,
        similar_paths: _,
        trusted_proxies: _,
        limits: _,
        timeouts: _,
        health: _,
        threads,
    } = wanted;
    keep_listen(kept, ["proxy.listen", "proxy.unix_mode"], &running.listen, listen);
    kept.keep("proxy.threads", &running.threads, threads);
}

fn keep_api(kept: &mut Kept, running: &ApiConfig, wanted: &mut ApiConfig) {
    let ApiConfig {
        listen,
        trusted_proxies: _,
        allowed_hosts: _,
        reveal_seeds: _,
        rotate_overlap: _,
        limits: _,
    } = wanted;
    keep_listen(kept, ["api.listen", "api.unix_mode"], &running.listen, listen);
}

fn keep_ops(kept: &mut Kept, running: &OpsConfig, wanted: &mut OpsConfig) {
    let OpsConfig { listen, limits: _ } = wanted;
    keep_listen(kept, ["ops.listen", "ops.unix_mode"], &running.listen, listen);
}

/// Sockets stay; TLS and who may connect are taken over, of each address that was there before.
fn keep_listen(
    kept: &mut Kept,
    [address, mode]: [&'static str; 2],
    running: &[Listen],
    wanted: &mut Vec<Listen>,
) {
    let addresses = |listen: &[Listen]| {
        let mut all: Vec<_> = listen.iter().map(|one| one.address.to_string()).collect();
        all.sort();
        all
    };
    if addresses(running) != addresses(wanted) {
        kept.0.push(address);
    }
    let mut modes_differ = false;
    let listen = running.iter().map(|old| {
        // Each only once: port 0 may stand there several times.
        let place = wanted.iter().position(|new| new.address == old.address);
        let new = place.map_or_else(|| old.clone(), |place| wanted.remove(place));
        modes_differ |= new.unix_mode != old.unix_mode;
        Listen { unix_mode: old.unix_mode, ..new }
    });
    *wanted = listen.collect();
    if modes_differ {
        kept.0.push(mode);
    }
}

/// What leads to another store stays, and with it whatever opens the one that is there.
fn keep_store(kept: &mut Kept, running: &StoreConfig, wanted: &mut StoreConfig) {
    let StoreConfig { url, max_stale: _, hold, prefix, redis, sealing, ca_file, client_tls } =
        wanted;
    let is_elsewhere = !is_same_place(&running.url, url) || running.prefix != *prefix;
    let is_sealed = |sealing: &Sealing| *sealing != Sealing::Off;
    if is_sealed(&running.sealing) != is_sealed(sealing) {
        kept.keep("store.sealing", &running.sealing, sealing);
    }
    kept.keep("store.prefix", &running.prefix, prefix);
    if is_elsewhere {
        kept.keep("store.url", &running.url, url);
        kept.keep("store.key_file", &running.sealing, sealing);
        kept.keep("store.ca_file", &running.ca_file, ca_file);
        kept.keep("store.tls_cert_file", &running.client_tls, client_tls);
    }
    let Hold { cached_entries, scope } = hold;
    if running.hold.cached_entries.is_some() != cached_entries.is_some() {
        kept.keep("store.hold", &running.hold.cached_entries, cached_entries);
    }
    kept.keep("store.cached_entries", &running.hold.cached_entries, cached_entries);
    kept.keep("store.realms", &running.hold.scope, scope);
    let RedisConfig { writes, wait_replicas, wait_timeout } = redis;
    kept.keep("store.redis_writes", &running.redis.writes, writes);
    kept.keep("store.wait_replicas", &running.redis.wait_replicas, wait_replicas);
    kept.keep("store.wait_timeout", &running.redis.wait_timeout, wait_timeout);
}

fn is_same_place(one: &StoreUrl, other: &StoreUrl) -> bool {
    match (one, other) {
        (StoreUrl::Redis(one), StoreUrl::Redis(other)) => {
            let RedisUrl { topology, database, tls, username: _, password: _, sentinel: _ } = one;
            (topology, database, tls) == (&other.topology, &other.database, &other.tls)
        }
        (one, other) => one == other,
    }
}

/// Nothing of it is taken over, nor how tokens are checked beside it.
fn keep_remote(kept: &mut Kept, running: Option<&RemoteConfig>, wanted: &mut Option<RemoteConfig>) {
    let (Some(running), Some(new)) = (running, wanted.as_mut()) else {
        kept.keep("remote.url", &running.cloned(), wanted);
        return;
    };
    let RemoteConfig {
        url,
        name,
        realm,
        seed,
        tls: ClientTls { ca_file, identity },
        timeout,
        max_stale,
        max_in_flight,
        cache_entries,
    } = new;
    kept.keep("remote.url", &running.url, url);
    kept.keep("remote.name", &running.name, name);
    kept.keep("remote.realm", &running.realm, realm);
    kept.keep("remote.seed", &running.seed, seed);
    kept.keep("remote.ca_file", &running.tls.ca_file, ca_file);
    kept.keep("remote.tls_cert_file", &running.tls.identity, identity);
    kept.keep("remote.timeout", &running.timeout, timeout);
    kept.keep("remote.max_stale", &running.max_stale, max_stale);
    kept.keep("remote.max_in_flight", &running.max_in_flight, max_in_flight);
    kept.keep("remote.cache_entries", &running.cache_entries, cache_entries);
}

fn keep_log(kept: &mut Kept, running: &LogConfig, wanted: &mut LogConfig) {
    let LogConfig { level: _, format, access: _, audit } = wanted;
    kept.keep("log.format", &running.format, format);
    kept.keep("log.audit", &running.audit, audit);
}

fn keep_process(kept: &mut Kept, running: &ProcessConfig, wanted: &mut ProcessConfig) {
    let ProcessConfig { core_dumps } = wanted;
    kept.keep("process.core_dumps", &running.core_dumps, core_dumps);
}
