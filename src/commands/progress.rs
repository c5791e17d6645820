//! How far long work is: a bar on a terminal; a line now and then where standard error is something else,
//! such as a log.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::store::Store;

/// Entries between two lines.
const LINE_EVERY: u64 = 1_000;
/// How often a bar is drawn at most, in a second.
const DRAWN: u8 = 10;

/// Shows the progress of one piece of work; taken away when dropped.
pub(super) struct Progress {
    /// `None` where there is no terminal.
    bar: Option<ProgressBar>,
    /// What the last line said.
    told: u64,
}

impl Progress {
    /// Of all entries of a store; `what` is done with them.
    pub(super) async fn of_store(what: &'static str, store: &Store) -> Self {
        // A user of Redis may do the work that may not count.
        Self::new(what, store.count().await.ok())
    }

    /// Of `total` entries, if that is known.
    pub(super) fn new(what: &'static str, total: Option<u64>) -> Self {
        let template = match total {
            Some(_) => "{msg} {wide_bar} {human_pos}/{human_len} entries, {eta} left",
            None => "{msg} {spinner} {human_pos} entries",
        };
        Self::with(what, total, template)
    }

    /// Of `total` bytes.
    pub(super) fn of_bytes(what: &'static str, total: u64) -> Self {
        Self::with(what, Some(total), "{msg} {wide_bar} {bytes}/{total_bytes}, {eta} left")
    }

    fn with(what: &'static str, total: Option<u64>, template: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
            bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(DRAWN));
            bar.set_style(ProgressStyle::with_template(template).expect("a good template"));
            bar.set_message(what);
            bar
        });
        Self { bar, told: 0 }
    }

    /// So much of it is done.
    pub(super) fn reach(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if done / LINE_EVERY > self.told / LINE_EVERY {
            self.told = done;
            super::note(format_args!("{done} entries done"));
        }
    }

    /// As [`Self::reach`], of what is not worth a line.
    pub(super) fn show(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
