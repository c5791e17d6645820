//! Uses of tokens, failed attempts and recent successes, by the server's clock.
//!
//! Where an answer is lost the script is called once more. That is the same use for `spend`; it may
//! count a failure twice, which closes a bucket sooner and never later.

use std::time::Duration;

use async_trait::async_trait;

use super::{Redis, script};
use crate::clock::UnixTime;
use crate::store::ledger::{check, in_time};
use crate::store::{Failure, Ledger, Spending, StoreError};

/// Longest wait for one answer: short enough to try again before the caller gives up.
pub(super) const PATIENCE: Duration = Duration::from_millis(400);

#[async_trait]
impl Ledger for Redis {
    async fn spend(&self, spending: &Spending, _now: UnixTime) -> Result<bool, StoreError> {
        let arguments = script::spend_arguments(&self.keys, spending);
        let reply = in_time(self.ledger_line.ask_script(&self.scripts.spend, &arguments)).await?;
        Ok(script::understand(reply)? == 1)
    }

    async fn count_failures(
        &self,
        failures: &[Failure],
        _now: UnixTime,
    ) -> Result<Vec<Duration>, StoreError> {
        check(failures.iter().map(|failure| &failure.bucket))?;
        let arguments = script::count_arguments(&self.keys, failures);
        let reply = in_time(self.ledger_line.ask_script(&self.scripts.count, &arguments)).await?;
        let closed = script::understand_all(reply)?;
        if closed.len() != failures.len() {
            return Err(StoreError::Corrupt("a script answered with something odd".into()));
        }
        Ok(closed.into_iter().map(Duration::from_micros).collect())
    }

    async fn remember(
        &self,
        keys: &[String],
        keep: Duration,
        _now: UnixTime,
    ) -> Result<(), StoreError> {
        check(keys.iter())?;
        let arguments = script::remember_arguments(&self.keys, keys, keep);
        let reply =
            in_time(self.ledger_line.ask_script(&self.scripts.remember, &arguments)).await?;
        script::understand(reply).map(drop)
    }

    async fn remembers(&self, key: &str, _now: UnixTime) -> Result<bool, StoreError> {
        let arguments = script::remembers_arguments(&self.keys, key);
        let reply =
            in_time(self.ledger_line.ask_script(&self.scripts.remembers, &arguments)).await?;
        Ok(script::understand(reply)? == 1)
    }
}
