//! Settings that change while the gate runs: on SIGHUP, and when one of their files has changed.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::signal::unix::Signal;
use tracing::{error, info, warn};

use super::live::Live;
use super::source::Source;
use super::warn_of;
use crate::audit::Event;
use crate::clock::Clock;
use crate::config::load::Problem;
use crate::config::warnings::warnings;
use crate::logging::LevelHandle;
use crate::metrics::Metrics;
use crate::policy::Mode;

/// Has settings read again, and says what came of it.
pub(super) struct Reloader {
    pub(super) source: Source,
    pub(super) live: Live,
    pub(super) level: LevelHandle,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Arc<dyn Clock>,
    /// Of SIGHUP.
    pub(super) hangups: Signal,
}

impl Reloader {
    /// Goes on for ever. However often it is asked meanwhile, one reading follows the other.
    pub(super) async fn run(mut self) {
        loop {
            let trigger = tokio::select! {
                _ = self.hangups.recv() => "SIGHUP",
                () = self.source.changed(self.live.config.reload.watch) => "files",
            };
            let outcome = self.reload().await;
            self.metrics.reloaded(outcome.is_ok(), self.clock.now().unix);
            match outcome {
                Ok(kept) => {
                    for key in kept {
                        warn!(key, "needs a restart: `{key}`");
                    }
                    info!(trigger, "settings reloaded");
                    let reports = self.live.config.proxy.mode == Mode::Report;
                    note("reloaded", reports.then_some("report_mode"));
                }
                Err(problems) => {
                    for Problem { key, message } in problems {
                        error!(trigger, key, "settings not reloaded, the old ones stay: {message}");
                    }
                    note("refused", None);
                }
            }
        }
    }

    async fn reload(&mut self) -> Result<Vec<&'static str>, Vec<Problem>> {
        let wanted = self.source.read().await?;
        let known: BTreeSet<_> =
            warnings(&self.live.config).iter().map(ToString::to_string).collect();
        let kept = self.live.take_over(wanted).await?;
        self.source.settle();
        self.level.set(&self.live.config.log);
        let warnings = warnings(&self.live.config);
        warnings.iter().filter(|warning| !known.contains(&warning.to_string())).for_each(warn_of);
        Ok(kept)
    }
}

/// Adds to the audit trail that other settings are in force, or could not be used.
fn note(outcome: &'static str, reason: Option<&'static str>) {
    Event { action: "settings", outcome, reason, ..Event::default() }.log();
}
