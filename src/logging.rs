//! Log lines: `tracing` events and the `log` records of our dependencies, as text or JSON on stderr.
//!
//! Dependencies that handle requests are held at INFO whatever the settings say: below it pingora and
//! h2 log headers, tokens included. Some parts of pingora are silenced wholly: its HTTP app logs requests
//! that it cannot parse, the others call clients that leave errors, or say again what the gate says.

use std::io::IsTerminal;
use std::time::Duration;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, FilterFn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogConfig, LogFormat};

/// The target of access lines: one a request.
pub const ACCESS: &str = "otpgate::access";

/// Crates that see requests and log them below INFO.
const NOSY: &[&str] = &["pingora", "h2", "hyper", "reqwest", "rustls", "axum", "tower", "redis"];

/// Parts of dependencies that never log.
const SILENT: &[&str] = &[
    "pingora_core::apps::http_app",
    // Each connection that breaks off, as an error.
    "pingora_proxy",
    // An error for an idle connection that closed in the moment of its reuse; another is made then.
    "pingora_core::connectors",
    // Warnings about single frames, which clients send as many of as they like.
    "h2",
    // Each change of health, a second time.
    "pingora_load_balancing",
];

/// Starts logging. The first call of a process wins.
pub fn init(config: &LogConfig) {
    let access = config.access;
    let level = EnvFilter::builder().parse_lossy(&config.level);
    let guard = FilterFn::new(move |metadata: &Metadata<'_>| {
        is_safe(metadata.target(), *metadata.level()) && (access || metadata.target() != ACCESS)
    });
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_ansi(false).boxed(),
    };
    // Only tests start logging twice.
    let _ = tracing_subscriber::registry().with(level).with(guard).with(lines).try_init();
}

/// Makes panics log where they happened and count, but not what they said: a message may quote data.
pub fn log_panics(metrics: std::sync::Arc<crate::metrics::Metrics>) {
    std::panic::set_hook(Box::new(move |info| {
        metrics.panics.inc();
        let place = info.location().map(ToString::to_string);
        tracing::error!(place, "panic: a bug, please report it");
    }));
}

/// Milliseconds for a log line, to the microsecond: more digits are noise, and may look like a token.
#[must_use]
pub fn millis(took: Duration) -> f64 {
    (took.as_secs_f64() * 1e6).round() / 1e3
}

fn is_safe(target: &str, level: Level) -> bool {
    !SILENT.iter().any(|part| is_of(target, part))
        && (level <= Level::INFO || !NOSY.iter().any(|name| is_of(target, name)))
}

/// Whether a target is of the crate or module `name`, or one whose name starts with `name_`.
fn is_of(target: &str, name: &str) -> bool {
    target.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['_', ':']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_say_no_more_than_they_should() {
        for (target, level, is) in [
            ("pingora_core::protocols", Level::INFO, true),
            ("pingora_core::protocols", Level::DEBUG, false),
            ("pingora_core::connectors", Level::ERROR, false),
            ("pingora_core::apps::http_app", Level::ERROR, false),
            ("pingora_core::apps", Level::ERROR, true),
            ("pingora_proxy", Level::ERROR, false),
            ("pingora_load_balancing::health_check", Level::WARN, false),
            ("otpgate::proxy", Level::TRACE, true),
        ] {
            assert_eq!(is_safe(target, level), is, "{target} {level}");
        }
    }

    #[test]
    fn durations_are_short() {
        for (nanos, text) in
            [(83_490_001, "83.49"), (64_975, "0.065"), (0, "0"), (1_234_567_890_123, "1234567.89")]
        {
            assert_eq!(millis(Duration::from_nanos(nanos)).to_string(), text);
        }
    }

    #[test]
    fn crates_are_told_apart_by_whole_names() {
        for target in ["pingora_core::protocols", "pingora", "h2::codec", "hyper_util::client"] {
            assert!(NOSY.iter().any(|name| is_of(target, name)), "{target}");
        }
        for target in ["otpgate::proxy", "h2x", "rediscovered"] {
            assert!(!NOSY.iter().any(|name| is_of(target, name)), "{target}");
        }
    }
}
