//! Every metric, declared once. Labels are bounded sets; never a name, path or address.

use std::array::from_fn;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::clock::UnixTime;
use crate::otp::MatchedStep;
use crate::store::StoreError;

/// The label for realms that the configuration does not list.
const OTHER_REALM: &str = "other";

/// Buckets for what the gate itself takes: 1 µs to 1 s.
const GATE_SECONDS: &[f64] =
    &[1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 5e-3, 2.5e-2, 0.1, 1.0];
/// Buckets for what crosses a network: 250 µs to 60 s.
const NETWORK_SECONDS: &[f64] = &[
    2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
];
/// Labels of the requests that there are most of.
const USUAL: [[&str; 3]; 3] = [
    ["proxy", "protected", "allowed"],
    ["proxy", "protected", "unauthenticated"],
    ["proxy", "public", "public"],
];
/// Of answers; those without a class are broken ones.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

const STEP_OFFSETS: &[f64] = &[-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0];

/// Those of a metric's children that are counted for every request, once they are: without a lock and a hash.
type Once<M, const N: usize> = [OnceLock<M>; N];

/// The realms that are label values, with their counters of accepted tokens.
struct Realms {
    listed: BTreeMap<String, OnceLock<IntCounter>>,
    other: OnceLock<IntCounter>,
}

impl Realms {
    fn new(listed: impl IntoIterator<Item = String>) -> Self {
        let listed = listed.into_iter().map(|realm| (realm, OnceLock::new())).collect();
        Self { listed, other: OnceLock::new() }
    }

    fn get<'a>(&'a self, realm: &'a str) -> (&'a str, &'a OnceLock<IntCounter>) {
        self.listed.get(realm).map_or((OTHER_REALM, &self.other), |accepted| (realm, accepted))
    }
}

/// The process's metrics; one per process, handed to whoever counts.
pub struct Metrics {
    registry: Registry,
    realms: ArcSwap<Realms>,
    requests: IntCounterVec,
    usual_requests: Once<IntCounter, { USUAL.len() }>,
    verifications: IntCounterVec,
    /// Time from a request's head to the decision about it.
    pub gate_duration: Histogram,
    upstream_duration: HistogramVec,
    upstream_classes: Once<Histogram, { CLASSES.len() }>,
    upstream_failures: IntCounterVec,
    /// Upstream addresses by group-wide health: `healthy`, `unhealthy`.
    pub upstream_backends: IntGaugeVec,
    store_duration: HistogramVec,
    store_errors: IntCounterVec,
    step_offset: Histogram,
    /// Entries in the directory.
    pub directory_entries: IntGauge,
    /// Seconds since the directory was last proven current; +Inf before that.
    pub directory_staleness: Gauge,
    /// Times that all entries were loaded.
    pub directory_full_loads: IntCounter,
    /// Changes applied from the change log.
    pub directory_changes: IntCounter,
    /// Times that an entry could not be opened.
    pub directory_broken_entries: IntCounter,
    /// Entries in memory, not only their names.
    pub directory_held_entries: IntGauge,
    directory_fetches: IntCounterVec,
    /// Time from the acknowledgement of a write made here until it is in force here.
    pub directory_apply_lag: Histogram,
    remote_questions: IntCounterVec,
    remote_duration: HistogramVec,
    /// Claims that were passed because the remote server confirmed them a moment ago.
    pub remote_remembered: IntCounter,
    /// Seconds since the remote server last accepted the gate; +Inf before the first time, 0 without one.
    pub remote_staleness: Gauge,
    connections: IntGaugeVec,
    connections_refused: IntCounterVec,
    /// When a listener's certificate ends, by listener.
    pub certificate_expiry: GaugeVec,
    throttled: IntCounterVec,
    throttled_now: IntGaugeVec,
    /// Failures and successes that the store was not told of.
    pub throttle_unshared: IntCounter,
    previous_seeds: IntCounterVec,
    reloads: IntCounterVec,
    reload_successful: IntGauge,
    loaded_at: IntGauge,
    /// Panics caught; each is a bug.
    pub panics: IntCounter,
    /// Upgrades in which no new process took over.
    pub upgrade_failures: IntCounter,
    /// Audit events that went to standard error because they could not be written where they belong.
    pub audit_write_failures: IntCounter,
}

impl Metrics {
    /// Declares and registers every metric. Only `realms` become label values; others are `other`.
    ///
    /// # Panics
    /// If two metrics have one name: a bug, found by any test.
    #[must_use]
    pub fn new(realms: impl IntoIterator<Item = String>) -> Self {
        let registry = Registry::new();
        let r = Declare(&registry);
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect("the process metrics are registered once");
        let build =
            r.gauges("build_info", "Always 1; the labels describe the build.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        let metrics = Self {
            realms: ArcSwap::from_pointee(Realms::new(realms)),
            requests: r.counters(
                "requests_total",
                "Requests answered, by listener, kind of route and outcome.",
                &["listener", "route", "outcome"],
            ),
            verifications: r.counters(
                "verifications_total",
                "Tokens checked, by the claimed realm (only configured ones, else `other`) and result.",
                &["realm", "reason"],
            ),
            usual_requests: from_fn(|_| OnceLock::new()),
            upstream_classes: from_fn(|_| OnceLock::new()),
            gate_duration: r.histogram(
                "gate_duration_seconds",
                "Time from a request's head, or another proxy's question, to the decision about it.",
                GATE_SECONDS,
            ),
            upstream_duration: r.histograms(
                "upstream_duration_seconds",
                "Time from forwarding a request to the end of its response.",
                &["status"],
                NETWORK_SECONDS,
            ),
            upstream_failures: r.counters(
                "upstream_failures_total",
                "Requests that an upstream failed, by what failed.",
                &["cause"],
            ),
            upstream_backends: r.int_gauges(
                "upstream_backends",
                "Upstream addresses, by health.",
                &["state"],
            ),
            store_duration: r.histograms(
                "store_operation_duration_seconds",
                "Time that store operations take.",
                &["store", "operation"],
                NETWORK_SECONDS,
            ),
            store_errors: r.counters(
                "store_errors_total",
                "Store operations that failed, by kind of failure.",
                &["store", "operation", "cause"],
            ),
            step_offset: r.histogram(
                "matched_step_offset",
                "Time steps between an accepted token and the gate's clock: the drift of callers.",
                STEP_OFFSETS,
            ),
            directory_entries: r.int_gauge("directory_entries", "Entries in the directory."),
            directory_staleness: r.gauge(
                "directory_staleness_seconds",
                "Time since the directory was last proven current; +Inf before the first time.",
            ),
            directory_full_loads: r
                .counter("directory_full_loads_total", "Times that all entries were loaded."),
            directory_changes: r
                .counter("directory_changes_total", "Changes applied from the change log."),
            directory_broken_entries: r.counter(
                "directory_broken_entries_total",
                "Times that a stored entry could not be opened.",
            ),
            directory_held_entries: r.int_gauge(
                "directory_held_entries",
                "Entries in memory; fewer than there are where `store.hold` is `index`.",
            ),
            directory_fetches: r.counters(
                "directory_fetches_total",
                "Entries that were not in memory and were asked of the store, by outcome.",
                &["outcome"],
            ),
            directory_apply_lag: r.histogram(
                "directory_apply_lag_seconds",
                "Time from the acknowledgement of a write made here until it is in force here.",
                NETWORK_SECONDS,
            ),
            remote_questions: r.counters(
                "remote_questions_total",
                "Questions to the remote server, about claims and about the gate itself, by outcome.",
                &["about", "outcome"],
            ),
            remote_duration: r.histograms(
                "remote_question_duration_seconds",
                "Time until the remote server answered, or the gate gave up, waiting for a turn included.",
                &["about"],
                NETWORK_SECONDS,
            ),
            remote_remembered: r.counter(
                "remote_remembered_total",
                "Claims that passed because the remote server had confirmed them in the same time step.",
            ),
            remote_staleness: r.gauge(
                "remote_staleness_seconds",
                "Time since the remote server last accepted the gate; +Inf before the first time, 0 without one.",
            ),
            connections: r.int_gauges("connections", "Open downstream connections.", &["listener"]),
            connections_refused: r.counters(
                "connections_refused_total",
                "Connections, or HTTP/2 requests, ended before an answer, by listener and cause.",
                &["listener", "cause"],
            ),
            certificate_expiry: r.gauges(
                "certificate_expiry_timestamp_seconds",
                "When a listener's certificate ends, in Unix time.",
                &["listener"],
            ),
            throttled: r.counters(
                "throttled_total",
                "Attempts refused unseen because too many failed before, by what they failed under.",
                &["by"],
            ),
            throttled_now: r.int_gauges(
                "throttled",
                "Buckets of failed attempts that are closed on this gate now.",
                &["by"],
            ),
            throttle_unshared: r.counter(
                "throttle_unshared_total",
                "Times that failed attempts or successes could not be shared through the store.",
            ),
            previous_seeds: r.counters(
                "previous_seed_verifications_total",
                "Accepted tokens that were made with a seed that is being rotated out, by realm.",
                &["realm"],
            ),
            upgrade_failures: r.counter(
                "upgrade_failures_total",
                "Upgrades of the program that failed, so that this process went on.",
            ),
            audit_write_failures: r.counter(
                "audit_write_failures_total",
                "Audit events that could not be written where they belong.",
            ),
            reloads: r.counters(
                "config_reloads_total",
                "Times that the settings were read again while the gate ran, by outcome.",
                &["outcome"],
            ),
            reload_successful: r.int_gauge(
                "config_last_reload_successful",
                "Whether the settings that were last read are in force.",
            ),
            loaded_at: r.int_gauge(
                "config_last_reload_success_timestamp_seconds",
                "When settings were last read and came into force, in Unix time.",
            ),
            panics: r.counter("panics_total", "Panics caught; each is a bug worth a report."),
            registry: registry.clone(),
        };
        metrics.directory_staleness.set(f64::INFINITY);
        for outcome in ["ok", "failed"] {
            // There from the start, so that the first failure shows as an increase.
            metrics.reloads.with_label_values(&[outcome]);
        }
        metrics
    }

    /// From now on `realms` are label values. What was counted under others stays.
    pub fn set_realms(&self, realms: impl IntoIterator<Item = String>) {
        self.realms.store(Arc::new(Realms::new(realms)));
    }

    /// Notes that settings were read again, at `now`, and whether they are in force.
    pub fn reloaded(&self, ok: bool, now: UnixTime) {
        self.reloads.with_label_values(&[if ok { "ok" } else { "failed" }]).inc();
        self.reload_successful.set(i64::from(ok));
        if ok {
            self.loaded_at.set(i64::try_from(now).unwrap_or(i64::MAX));
        }
    }

    /// Notes that the settings of the start are in force, at `now`.
    pub fn started(&self, now: UnixTime) {
        self.reload_successful.set(1);
        self.loaded_at.set(i64::try_from(now).unwrap_or(i64::MAX));
    }

    /// Counts a request. All labels come from fixed sets.
    pub fn request(&self, listener: &str, route: &str, outcome: &str) {
        let labels = [listener, route, outcome];
        let counter = || self.requests.with_label_values(&labels);
        match USUAL.iter().position(|usual| *usual == labels) {
            Some(usual) => self.usual_requests[usual].get_or_init(counter).inc(),
            None => counter().inc(),
        }
    }

    /// Counts an accepted token.
    pub fn verified(&self, realm: &str, step: Option<MatchedStep>) {
        if let Some(step) = step {
            self.step_offset.observe(f64::from(step.offset));
        }
        let realms = self.realms.load();
        let (label, accepted) = realms.get(realm);
        accepted.get_or_init(|| self.verifications.with_label_values(&[label, "ok"])).inc();
    }

    /// Counts an accepted token of a seed that is being rotated out.
    pub fn previous_seed(&self, realm: &str) {
        self.previous_seeds.with_label_values(&[self.realm_label(realm)]).inc();
    }

    /// Counts an attempt that was refused unseen; `by` from a fixed set.
    pub fn throttled(&self, by: &str) {
        self.throttled.with_label_values(&[by]).inc();
    }

    /// Notes how many buckets are closed; `by` from a fixed set.
    pub fn set_throttled(&self, by: &str, closed: usize) {
        self.throttled_now.with_label_values(&[by]).set(i64::try_from(closed).unwrap_or(i64::MAX));
    }

    /// Counts an entry that was asked of the store; `outcome` from a fixed set.
    pub fn directory_fetched(&self, outcome: &str) {
        self.directory_fetches.with_label_values(&[outcome]).inc();
    }

    /// Counts a refused token.
    pub fn refused(&self, realm: &str, reason: &str) {
        self.verifications.with_label_values(&[self.realm_label(realm), reason]).inc();
    }

    /// Counts a question to the remote server; `about` and `outcome` from fixed sets.
    pub fn remote_question(&self, about: &str, outcome: &str, took: Duration) {
        self.remote_questions.with_label_values(&[about, outcome]).inc();
        self.remote_duration.with_label_values(&[about]).observe(took.as_secs_f64());
    }

    /// Notes a finished upstream exchange by its status class.
    pub fn upstream(&self, status: u16, took: Duration) {
        let class = match status / 100 {
            class @ 1..=5 => usize::from(class) - 1,
            _ => CLASSES.len() - 1,
        };
        let histogram = || self.upstream_duration.with_label_values(&[CLASSES[class]]);
        self.upstream_classes[class].get_or_init(histogram).observe(took.as_secs_f64());
    }

    /// Counts a failure of an upstream; `cause` from a fixed set.
    pub fn upstream_failure(&self, cause: &str) {
        self.upstream_failures.with_label_values(&[cause]).inc();
    }

    /// Notes how long a store operation took.
    pub fn store_operation(&self, store: &str, operation: &str, took: Duration) {
        self.store_duration.with_label_values(&[store, operation]).observe(took.as_secs_f64());
    }

    /// Counts a failed store operation.
    pub fn store_error(&self, store: &str, operation: &str, error: &StoreError) {
        let cause = match error {
            StoreError::Unreachable(_) => "unreachable",
            StoreError::Denied(_) => "denied",
            StoreError::NotInitialised => "not_initialised",
            StoreError::Importing => "importing",
            StoreError::ReadOnly(_) => "read_only",
            StoreError::Corrupt(_) => "corrupt",
            StoreError::Sealed { .. } => "sealed",
            StoreError::Conflict => "conflict",
            StoreError::Refused(_) => "refused",
            StoreError::Unknown(_) => "unknown_outcome",
        };
        self.store_errors.with_label_values(&[store, operation, cause]).inc();
    }

    /// The gauge of a listener's open connections.
    #[must_use]
    pub fn open_connections(&self, listener: &str) -> IntGauge {
        self.connections.with_label_values(&[listener])
    }

    /// Counts a connection that was closed before a request; `cause` from a fixed set.
    pub fn connection_refused(&self, listener: &str, cause: &str) {
        self.connections_refused.with_label_values(&[listener, cause]).inc();
    }

    /// All metrics in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("what was registered can be written to memory");
        text
    }

    fn realm_label<'a>(&self, realm: &'a str) -> &'a str {
        if self.realms.load().listed.contains_key(realm) { realm } else { OTHER_REALM }
    }
}

/// Declares metrics in a registry, under the common prefix.
struct Declare<'a>(&'a Registry);

impl Declare<'_> {
    fn register<M: prometheus::core::Collector + Clone + 'static>(
        &self,
        metric: prometheus::Result<M>,
    ) -> M {
        let metric = metric.expect("the metric's declaration is valid");
        self.0.register(Box::new(metric.clone())).expect("no two metrics have one name");
        metric
    }

    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(format!("otpgate_{name}"), help)
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(Self::opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Self::opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(Self::opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(Self::opts(name, help), labels))
    }

    fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(Self::opts(name, help)))
    }

    fn int_gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Self::opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::from(Self::opts(name, help)).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let opts = HistogramOpts::from(Self::opts(name, help)).buckets(buckets.to_vec());
        self.register(HistogramVec::new(opts, labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(metrics: &Metrics, name: &str) -> Vec<String> {
        let text = String::from_utf8(metrics.render()).unwrap();
        text.lines().filter(|line| line.starts_with(name)).map(str::to_owned).collect()
    }

    #[test]
    fn what_is_counted_often_is_counted_as_all_else_and_there_only_then() {
        let metrics = Metrics::new(["staff".to_owned()]);
        for name in ["otpgate_requests", "otpgate_verifications", "otpgate_upstream_duration"] {
            assert_eq!(lines(&metrics, name), [""; 0], "{name}");
        }
        for labels in USUAL.into_iter().chain([["api", "verify", "ok"], USUAL[0]]) {
            let [listener, route, outcome] = labels;
            metrics.request(listener, route, outcome);
        }
        let counts = lines(&metrics, "otpgate_requests");
        let counts: Vec<_> = counts.iter().filter_map(|line| line.rsplit_once(' ')).collect();
        assert_eq!(
            counts.iter().map(|(_, count)| *count).collect::<Vec<_>>(),
            ["1", "2", "1", "1"]
        );

        for realm in ["staff", "staff", "guests"] {
            metrics.verified(realm, None);
        }
        metrics.set_realms(["guests".to_owned()]);
        for realm in ["staff", "guests"] {
            metrics.verified(realm, None);
        }
        assert_eq!(
            lines(&metrics, "otpgate_verifications"),
            ["guests", "other", "staff"].map(|realm| {
                let count = if realm == "guests" { 1 } else { 2 };
                format!(r#"otpgate_verifications_total{{realm="{realm}",reason="ok"}} {count}"#)
            })
        );

        for status in [101, 200, 204, 304, 404, 500, 600] {
            metrics.upstream(status, Duration::from_millis(1));
        }
        let counts = lines(&metrics, "otpgate_upstream_duration_seconds_count");
        let counts: Vec<_> = counts.iter().filter_map(|line| line.split_once('"')).collect();
        assert_eq!(
            counts.iter().map(|(_, rest)| *rest).collect::<Vec<_>>(),
            [r#"1xx"} 1"#, r#"2xx"} 2"#, r#"3xx"} 1"#, r#"4xx"} 1"#, r#"5xx"} 2"#]
        );
    }
}
