//! `[proxy]`, `[api]` and `[ops]`: the listeners, their bounds, and what is behind the gate.

use std::num::NonZeroU32;
use std::time::Duration;

use super::peers::{parse_host, parse_upstreams, read_listen, read_trusted, read_upstream};
use super::reader::Section;
use super::routes::{MODES, SIMILAR_PATHS};
use super::{
    API_MAX_BODY_BYTES, ApiConfig, HealthCheck, Limits, OpsConfig, ProxyConfig, Upstream,
    UpstreamTimeouts,
};
use crate::entry::MAX_OVERLAP_SECONDS;

/// More would not help, and the system may not give them.
const MAX_THREADS: usize = 1024;
/// Each takes a file descriptor, of which a process has no more.
const MAX_CONNECTIONS: usize = 1 << 20;
/// Time to bring a new seed to all callers.
const ROTATE_OVERLAP: Duration = Duration::from_secs(3600);
/// A bound against trickles, no promise of speed: faster clients have bad moments too.
const MAX_BODY_RATE: u32 = 1 << 20;

pub(super) fn read_proxy(mut s: Section, upstreams: &mut Vec<Upstream>) -> ProxyConfig {
    let limits = read_limits(&mut s, Limits::default());
    let listen = read_listen(&mut s, "127.0.0.1:8080", false);
    let upstream = match s.take("upstream") {
        Some(value) => read_upstream(&s, "upstream", value),
        None => parse_upstreams(&["127.0.0.1:9000".to_owned()]).ok(),
    };
    upstreams.extend(upstream);
    let mode = s.choice("mode", MODES).unwrap_or_default();
    let similar_paths = s.choice("similar_paths", SIMILAR_PATHS).unwrap_or_default();
    let trusted_proxies = read_trusted(&mut s, "trusted_proxies");
    let threads = s.number("threads", 1..=MAX_THREADS);
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
            let is_path = text.starts_with('/') && text.parse::<http::uri::PathAndQuery>().is_ok();
            is_path.then(|| text.to_owned()).ok_or_else(|| format!("`{text}` is no path"))
        }),
        dns_interval: h.duration("dns_interval").unwrap_or(default.dns_interval),
    };
    h.finish();
    s.finish();
    ProxyConfig {
        listen,
        upstreams: Vec::new(),
        mode,
        similar_paths,
        trusted_proxies,
        limits,
        timeouts,
        health,
        threads,
    }
}

/// `default_address`: where it listens unless set.
pub(super) fn read_api(mut s: Section, default_address: &str) -> ApiConfig {
    // Bodies are held in memory, unlike the proxy's.
    let default = Limits {
        max_connections: 1_000,
        max_connections_per_source: Some(100),
        max_body_bytes: Some(API_MAX_BODY_BYTES),
        ..Limits::default()
    };
    let config = ApiConfig {
        limits: read_limits(&mut s, default),
        // gRPC needs it.
        listen: read_listen(&mut s, default_address, true),
        trusted_proxies: read_trusted(&mut s, "trusted_proxies"),
        allowed_hosts: s.list("allowed_hosts", parse_host).unwrap_or_default(),
        reveal_seeds: s.or("reveal_seeds", true),
        rotate_overlap: s.duration("rotate_overlap").unwrap_or(ROTATE_OVERLAP),
    };
    if config.rotate_overlap.as_secs() > MAX_OVERLAP_SECONDS {
        s.problem("rotate_overlap", "must be at most 90 days");
    }
    s.finish();
    config
}

pub(super) fn read_ops(mut s: Section) -> OpsConfig {
    let default = Limits {
        max_connections: 256,
        max_connections_per_source: Some(100),
        max_body_bytes: Some(0),
        ..Limits::default()
    };
    let config = OpsConfig {
        limits: read_limits(&mut s, default),
        listen: read_listen(&mut s, "127.0.0.1:9464", false),
    };
    s.finish();
    config
}

pub(super) fn read_limits(s: &mut Section, default: Limits) -> Limits {
    let mut l = s.section("limits");
    let limits = Limits {
        max_connections: l
            .number("max_connections", 1..=MAX_CONNECTIONS)
            .unwrap_or(default.max_connections),
        max_connections_per_source: l
            .number("max_connections_per_source", 0..=MAX_CONNECTIONS)
            .map_or(default.max_connections_per_source, |n| Some(n).filter(|n| *n > 0)),
        head_timeout: l.duration("head_timeout").unwrap_or(default.head_timeout),
        keepalive_timeout: l.duration("keepalive_timeout").unwrap_or(default.keepalive_timeout),
        body_timeout: l.duration("body_timeout").unwrap_or(default.body_timeout),
        write_timeout: l.duration("write_timeout").unwrap_or(default.write_timeout),
        min_body_rate: l
            .number("min_body_rate", 0..=MAX_BODY_RATE)
            .map_or(default.min_body_rate, NonZeroU32::new),
        max_head_bytes: l
            .bytes("max_head_bytes")
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(default.max_head_bytes),
        max_headers: l.number("max_headers", 8..=256).unwrap_or(default.max_headers),
        max_body_bytes: l.bytes("max_body_bytes").or(default.max_body_bytes),
    };
    if !(1024..=1 << 20).contains(&limits.max_head_bytes) {
        l.problem("max_head_bytes", "must be between 1KiB and 1MiB");
    }
    l.finish();
    limits
}
