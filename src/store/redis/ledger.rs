//! Uses of tokens, failed attempts and recent successes, by the server's clock.
//!
//! Where an answer is lost the work is done once more. That is the same use for `spend`; it may
//! count a failure twice, which closes a bucket sooner and never later.

use std::time::Duration;

use async_trait::async_trait;

use super::{Redis, Work, script};
use crate::clock::UnixTime;
use crate::store::ledger::{check, in_time};
use crate::store::{Failure, Ledger, Spending, StoreError};

/// Longest wait for one answer: short enough to try again before the caller gives up.
pub(super) const PATIENCE: Duration = Duration::from_millis(400);

#[async_trait]
impl Ledger for Redis {
    async fn spend(&self, spending: &Spending, _now: UnixTime) -> Result<bool, StoreError> {
        let reply = in_time(self.ledger_line.work(&self.writer, &Work::Spend(spending))).await?;
        Ok(script::understand(reply)? == 1)
    }

    async fn count_failures(
        &self,
        failures: &[Failure],
        _now: UnixTime,
    ) -> Result<Vec<Duration>, StoreError> {
        check(failures.iter().map(|failure| &failure.bucket))?;
        let reply = in_time(self.ledger_line.work(&self.writer, &Work::Count(failures))).await?;
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
        let work = Work::Remember { remembered: keys, keep };
        let reply = in_time(self.ledger_line.work(&self.writer, &work)).await?;
        script::understand(reply).map(drop)
    }

    async fn remembers(&self, key: &str, _now: UnixTime) -> Result<bool, StoreError> {
        let reply = in_time(self.ledger_line.work(&self.writer, &Work::Remembers(key))).await?;
        Ok(script::understand(reply)? == 1)
    }
}
