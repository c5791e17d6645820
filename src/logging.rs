//! Log lines: `tracing` events and the `log` records of our dependencies, as text or JSON on stderr; audit
//! events there too, or apart.
//!
//! Dependencies that handle requests are held at INFO whatever the settings say: below it pingora and
//! h2 log headers, tokens included. Some parts of pingora are silenced wholly: its HTTP app logs requests
//! that it cannot parse, the others call clients that leave errors, or say again what the gate says.

use std::io;
use std::path::Path;
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, FilterExt as _, FilterFn, LevelFilter};
use tracing_subscriber::layer::{Filter, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use crate::audit;
use crate::config::{AuditTo, LogConfig, LogFormat};

mod trail;

use trail::Trail;

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

/// Whether standard error is a terminal that shows colours, and is allowed to (`NO_COLOR`).
fn shows_colours() -> bool {
    AutoStream::choice(&io::stderr()) != ColorChoice::Never
}

/// Which lines are written, in a form that can be replaced.
type Lines = Box<dyn Filter<Registry> + Send + Sync>;

/// What must live as long as there is something to log; its end waits for the last audit events.
#[must_use]
pub struct Logging(Option<Trail>);

/// Changes which lines are written.
pub struct LevelHandle {
    lines: reload::Handle<Lines, Registry>,
    /// Audit events have a place of their own.
    apart: bool,
}

impl LevelHandle {
    /// Has those lines written from now on that `config` asks for, in the form and to the places of the
    /// start.
    pub fn set(&self, config: &LogConfig) {
        // It fails only where nothing logs any more.
        let _ = self.lines.reload(filter(config, self.apart));
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        if let Some(trail) = &self.0 {
            trail.flush();
        }
    }
}

/// Starts logging. The first call of a process wins.
///
/// # Errors
/// If audit events cannot go where the settings say.
pub fn init(config: &LogConfig) -> io::Result<(Logging, LevelHandle)> {
    let trail = open_trail(&config.audit)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines.with_ansi(shows_colours()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_ansi(false).boxed(),
    };
    let apart = trail.is_some();
    let (filter, handle) = reload::Layer::new(filter(config, apart));
    let lines = lines.with_filter(filter);
    // Only tests start logging twice.
    let _ = tracing_subscriber::registry().with(lines).with(trail.clone().map(layer)).try_init();
    Ok((Logging(trail), LevelHandle { lines: handle, apart }))
}

/// Which lines are written; audit events whatever the level, unless they have a place `apart`.
///
/// The hints matter: without them every dependency would ask here about every trace line that it has.
fn filter(config: &LogConfig, apart: bool) -> Lines {
    let access = config.access;
    let level = EnvFilter::builder().parse_lossy(&config.level);
    let guard = FilterFn::new(move |metadata: &Metadata<'_>| {
        is_safe(metadata.target(), *metadata.level())
            && (access || metadata.target() != ACCESS)
            && metadata.target() != audit::TARGET
    });
    let audit =
        FilterFn::new(move |metadata: &Metadata<'_>| !apart && metadata.target() == audit::TARGET);
    let (guard, audit) = (
        guard.with_max_level_hint(LevelFilter::TRACE),
        audit.with_max_level_hint(LevelFilter::INFO),
    );
    Box::new(level.and(guard).or(audit))
}

/// Starts an audit trail that is a file, and logs nothing else: for commands, whose output is for whoever
/// runs them.
///
/// # Errors
/// If the file cannot be opened.
pub fn init_file_trail(config: &LogConfig) -> io::Result<Logging> {
    let trail = match &config.audit {
        AuditTo::File(_) => open_trail(&config.audit)?,
        AuditTo::Stderr | AuditTo::Stdout => None,
    };
    let _ = tracing_subscriber::registry().with(trail.clone().map(layer)).try_init();
    Ok(Logging(trail))
}

/// Where audit events go, if not among the other lines.
fn open_trail(audit: &AuditTo) -> io::Result<Option<Trail>> {
    match audit {
        AuditTo::Stderr => Ok(None),
        AuditTo::Stdout => Trail::to_stdout().map(Some),
        AuditTo::File(path) => {
            Trail::to_file(path).map(Some).map_err(|error| unwritable(path, &error))
        }
    }
}

/// Whether [`init`] would succeed; makes no file.
///
/// # Errors
/// As [`init`].
pub fn check(config: &LogConfig) -> io::Result<()> {
    match &config.audit {
        AuditTo::File(path) => trail::check(path).map_err(|error| unwritable(path, &error)),
        AuditTo::Stderr | AuditTo::Stdout => Ok(()),
    }
}

fn unwritable(path: &Path, error: &io::Error) -> io::Error {
    let text = format!("cannot write audit events to `{}`: {error}", path.display());
    io::Error::new(error.kind(), text)
}

fn layer<S>(trail: Trail) -> impl Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let is_audit = |metadata: &Metadata<'_>| metadata.target() == audit::TARGET;
    tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_ansi(false)
        .with_writer(trail)
        .with_filter(FilterFn::new(is_audit).with_max_level_hint(LevelFilter::INFO))
}

/// Lets failures to write audit events count.
pub fn count_audit_failures(metrics: &crate::metrics::Metrics) {
    trail::count_failures(&metrics.audit_write_failures);
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

    /// What nobody wants to read costs nothing.
    #[test]
    fn levels_below_the_one_that_is_set_are_off_everywhere() {
        for (level, expected) in [
            ("info", LevelFilter::INFO),
            ("error", LevelFilter::INFO), // for audit events
            ("info,otpgate=debug", LevelFilter::DEBUG),
        ] {
            let config = LogConfig {
                level: level.to_owned(),
                format: LogFormat::Text,
                access: true,
                audit: AuditTo::Stderr,
            };
            let filter = filter(&config, false);
            assert_eq!(Filter::max_level_hint(&filter), Some(expected), "{level}");
        }
    }

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

    /// In a process of its own: the hook is the process's.
    #[test]
    fn panics_are_logged_without_their_message() {
        const CHILD: &str = "OTPGATE_TEST_PANICS";
        if std::env::var_os(CHILD).is_some() {
            tracing_subscriber::fmt().with_writer(io::stderr).init();
            log_panics(std::sync::Arc::new(crate::metrics::Metrics::new([])));
            panic!("token {}", 12_345_678);
        }
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "logging::tests::panics_are_logged_without_their_message"]);
        let output = child.arg("--nocapture").env(CHILD, "1").output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!output.status.success());
        assert!(said.contains("panic: a bug") && said.contains("src/logging.rs:"), "{said}");
        assert!(!said.contains("12345678"), "{said}");
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
