//! Log lines: `tracing` events and the `log` records of our dependencies, as text or JSON on stderr.
//!
//! Dependencies that handle requests are held at INFO whatever the settings say: below it pingora and
//! h2 log headers, tokens included. pingora's HTTP app is silenced wholly: it logs requests that it
//! cannot parse.

use std::io::IsTerminal;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, FilterFn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogConfig, LogFormat};

/// The target of access lines: one a request.
pub const ACCESS: &str = "otpgate::access";
/// The target of audit events: one a management action.
pub const AUDIT: &str = "otpgate::audit";

/// Crates that see requests and log them below INFO.
const NOSY: &[&str] = &["pingora", "h2", "hyper", "reqwest", "rustls", "axum", "tower", "redis"];

/// Starts logging. The first call of a process wins.
pub fn init(config: &LogConfig) {
    let access = config.access;
    let level = EnvFilter::builder().parse_lossy(&config.level);
    let guard =
        FilterFn::new(move |metadata| is_safe(metadata) && (access || metadata.target() != ACCESS));
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

fn is_safe(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    if target.starts_with("pingora_core::apps::http_app") {
        return false;
    }
    *metadata.level() <= Level::INFO || !NOSY.iter().any(|name| is_of(target, name))
}

/// Whether a target is of the crate `name` or one whose name starts with `name_`.
fn is_of(target: &str, name: &str) -> bool {
    target.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['_', ':']))
}

#[cfg(test)]
mod tests {
    use super::*;

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
