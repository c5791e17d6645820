//! Uses of tokens, failed attempts and recent successes.

use std::time::Duration;

use async_trait::async_trait;

use super::Redis;
use crate::clock::UnixTime;
use crate::store::{Failure, Ledger, Spending, StoreError};

#[async_trait]
impl Ledger for Redis {
    async fn spend(&self, _: &Spending, _: UnixTime) -> Result<bool, StoreError> {
        unimplemented!()
    }

    async fn count_failures(
        &self,
        _: &[Failure],
        _: UnixTime,
    ) -> Result<Vec<Duration>, StoreError> {
        unimplemented!()
    }

    async fn remember(&self, _: &[String], _: Duration, _: UnixTime) -> Result<(), StoreError> {
        unimplemented!()
    }

    async fn remembers(&self, _: &str, _: UnixTime) -> Result<bool, StoreError> {
        unimplemented!()
    }
}
