//! `[remote]`: who says whether claims are true, in place of a store.

use std::time::Duration;

use super::peers::read_tls_files;
use super::reader::Section;
use super::{RemoteConfig, TlsFiles};
use crate::client::{ClientTls, check_url};
use crate::entry::{Name, Realm, Seed};

/// How long a request may wait for the server's answer.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);
/// The server is asked three times within `max_stale`.
const MIN_MAX_STALE: Duration = Duration::from_secs(2);
/// Some 100 bytes each.
const CACHE_ENTRIES: std::ops::RangeInclusive<usize> = 0..=10_000_000;

/// `None`: the section is not there. `auth`: the realm that may verify, here and most likely there.
pub(super) fn read_remote(mut s: Section, auth: &Realm) -> Option<RemoteConfig> {
    if s.is_empty() {
        return None;
    }
    let url = s.required("url", |url| check_url(url).map(|()| url.trim().to_owned()));
    let name = s.required("name", Name::parse);
    let realm = s.parse("realm", Realm::parse).unwrap_or_else(|| auth.clone());
    let has_seed = s.has("seed") || s.has("seed_file");
    let seed = s.secret("seed");
    if !has_seed {
        s.problem("seed_file", "is missing: the file with the seed of `remote.name`");
    }
    let seed = seed.and_then(|seed| {
        Seed::parse(seed.expose()).map_err(|e| s.problem("seed", format_args!("the seed {e}"))).ok()
    });
    let ca_file = s.file("ca_file");
    let identity =
        read_tls_files(&mut s).map(|TlsFiles { cert_file, key_file }| (cert_file, key_file));
    let timeout = s.duration("timeout").unwrap_or(Duration::from_secs(2));
    if timeout > MAX_TIMEOUT {
        s.problem("timeout", "must be at most 30s: callers wait for it");
    }
    let max_stale = s.duration("max_stale").unwrap_or(Duration::from_secs(15));
    if max_stale < MIN_MAX_STALE {
        s.problem("max_stale", "must be at least 2s: the server is asked three times within it");
    }
    let max_in_flight = s.number("max_in_flight", 1..=10_000).unwrap_or(64);
    let cache_entries = s.number("cache_entries", CACHE_ENTRIES).unwrap_or(10_000);
    let tls = ClientTls { ca_file, identity };
    if url.as_ref().is_some_and(|url| !url.starts_with("https:")) {
        for (key, given) in
            [("ca_file", tls.ca_file.is_some()), ("tls_cert_file", tls.identity.is_some())]
        {
            if given {
                s.problem(key, "`remote.url` is not `https://`");
            }
        }
    }
    s.finish();
    Some(RemoteConfig {
        url: url?,
        name: name?,
        realm,
        seed: seed?,
        tls,
        timeout,
        max_stale,
        max_in_flight,
        cache_entries,
    })
}
