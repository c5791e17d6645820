//! A follower's connection: reads the change log with blocking `XREAD`, and checks that nothing was
//! missed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use redis::streams::{StreamId, StreamRangeReply, StreamReadReply};
use redis::{FromRedisValue, Pipeline, RedisError, Value};
use tracing::error;

use super::connect::{Connector, Link, check_role};
use super::error::{Fate, fate, store_error};
use super::number;
use super::script::{self, Keys};
use crate::clock::{Clock, SystemClock};
use crate::entry::EntryId;
use crate::store::log::{self, Chain, RETENTION, Record};
use crate::store::{Feed, Nonce, Position, Row, Scope, Step, StoreError, Version};

/// How long the server waits for news.
const BLOCK: Duration = Duration::from_millis(500);
/// Longest wait for any answer on a follower's connection.
pub(super) const PATIENCE: Duration = BLOCK.saturating_add(Duration::from_secs(1));
/// Before a server that reads its data from its disk is asked again.
const LOADING_PAUSE: Duration = Duration::from_millis(50);
/// Records of one `XREAD`.
const RECORDS: usize = 1_000;
/// Keys of one `MGET`, and entries of one step of a full load.
const GROUP: usize = 1_000;

/// Entries by key and number, and the last number that was looked at.
type Members = (Vec<(String, EntryId)>, u64);

pub(super) struct RedisFeed {
    link: Link,
    connector: Arc<Connector>,
    keys: Keys,
    clock: Arc<dyn Clock>,
    /// What is followed.
    scope: Scope,
    /// Not polled on this connection, or since a full load or an error: the first answer should not wait
    /// for news.
    fresh: bool,
}

impl RedisFeed {
    pub(super) fn new(
        link: Link,
        connector: Arc<Connector>,
        keys: Keys,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { link, connector, keys, clock, scope: Scope::default(), fresh: true }
    }

    async fn ask<T: FromRedisValue>(&mut self, pipeline: &Pipeline) -> Result<T, StoreError> {
        let start = SystemClock.monotonic();
        loop {
            let answer: Result<T, RedisError> = pipeline.query_async(&mut self.link.conn).await;
            match answer {
                // Many gates that connected again and again would only make it longer.
                Err(error) if fate(&error) == Fate::Loading && start.elapsed() < PATIENCE => {
                    tokio::time::sleep(LOADING_PAUSE).await;
                }
                answer => return answer.map_err(|error| store_error(&error)),
            }
        }
    }

    /// Whether what was asked before these was asked of a primary that holds a store.
    fn check_place(&self, hello: &Value, meta: Option<&str>) -> Result<(), StoreError> {
        check_role(hello)?;
        self.keys.check_meta(meta)
    }

    /// The end of the log, from a server that is a primary and holds a store.
    async fn tail(&mut self) -> Result<Position, StoreError> {
        let question = redis::pipe()
            .cmd("HELLO")
            .get(&self.keys.meta)
            .cmd("HMGET")
            .arg(&[&self.keys.head, "v", "n"])
            .cmd("XREVRANGE")
            .arg(&[&self.keys.log, "+", "-", "COUNT", "1"])
            .to_owned();
        type Answer = (Value, Option<String>, (Option<u64>, Option<String>), StreamRangeReply);
        let (hello, meta, head, log): Answer = self.ask(&question).await?;
        self.check_place(&hello, meta.as_deref())?;
        let (Some(version), Some(nonce)) = head else {
            return Err(script::headless());
        };
        let head = Position { version: Version(version), nonce: Nonce(nonce) };
        let last = log.ids.into_iter().next().map(record).transpose()?;
        // As the commit script does: a log that was cut is behind `head`, never ahead for long.
        Ok(match last {
            Some(last) if last.version >= version => {
                Position { version: Version(last.version), nonce: Nonce(last.nonce) }
            }
            _ => head,
        })
    }

    async fn records(
        &mut self,
        after: Version,
        block: Option<Duration>,
    ) -> Result<Vec<Record>, StoreError> {
        let mut question = redis::pipe();
        question.cmd("XREAD").arg("COUNT").arg(RECORDS);
        if let Some(block) = block {
            question.arg("BLOCK").arg(block.as_millis() as u64);
        }
        question.arg("STREAMS").arg(&self.keys.log).arg(format!("{after}-0"));
        let (reply,): (StreamReadReply,) = self.ask(&question).await?;
        reply.keys.into_iter().flat_map(|key| key.ids).map(record).collect()
    }

    /// The rows of `members` as they are now, or later; the store was there after they were read.
    async fn rows<'a>(
        &mut self,
        members: impl ExactSizeIterator<Item = &'a String>,
    ) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let wanted = members.len();
        let mut question = redis::pipe();
        question.cmd("MGET");
        for member in members {
            question.arg(self.keys.entry(member));
        }
        question.cmd("HELLO").get(&self.keys.meta);
        type Answer = (Vec<Option<Vec<u8>>>, Value, Option<String>);
        let (values, hello, meta): Answer = self.ask(&question).await?;
        self.check_place(&hello, meta.as_deref())?;
        if values.len() != wanted {
            return Err(StoreError::Corrupt("MGET answered with too few values".into()));
        }
        Ok(values)
    }

    async fn changes(&mut self, chain: Chain, as_of: Instant) -> Result<Step, StoreError> {
        let members: Vec<_> =
            chain.keys.into_iter().filter(|key| self.scope.has_key(key)).collect();
        let mut rows = Vec::with_capacity(members.len());
        if members.is_empty() {
            // What is read with rows otherwise: that this is a primary, with a store.
            self.tail().await?;
        }
        for group in members.chunks(GROUP) {
            let values = self.rows(group.iter()).await?;
            for (member, value) in group.iter().zip(values) {
                let principal = log::principal_of(member)
                    .ok_or_else(|| StoreError::Corrupt("the change log names no entry".into()))?;
                let row = value.map(|value| script::row(principal.clone(), None, Some(&value)));
                rows.push((principal, row));
            }
        }
        Ok(Step::Changed { rows, position: chain.position, as_of })
    }

    /// The next entries with numbers above `after`, by number, and the last of these numbers; `None` at
    /// the end. The store was there after they were read.
    async fn members(&mut self, after: u64) -> Result<Option<Members>, StoreError> {
        let mut question = redis::pipe();
        question
            .cmd("ZRANGEBYSCORE")
            .arg(&self.keys.ids)
            .arg(format!("({after}"))
            .arg("+inf")
            .arg(&["WITHSCORES", "LIMIT", "0"])
            .arg(GROUP)
            .cmd("HELLO")
            .get(&self.keys.meta);
        type Answer = (Vec<(String, String)>, Value, Option<String>);
        let (found, hello, meta): Answer = self.ask(&question).await?;
        self.check_place(&hello, meta.as_deref())?;
        let numbered = |(member, score): (String, String)| Some((member, number(&score)?));
        let found: Option<Vec<_>> = found.into_iter().map(numbered).collect();
        let found = found.ok_or_else(|| StoreError::Corrupt("an entry's number is none".into()))?;
        let Some((_, last)) = found.last() else { return Ok(None) };
        let last = last.0;
        let kept = found.into_iter().filter(|(member, _)| self.scope.has_key(member)).collect();
        Ok(Some((kept, last)))
    }

    /// Hands the rows of `members` to `take`.
    async fn take_rows(
        &mut self,
        members: Vec<(String, EntryId)>,
        take: &mut (dyn FnMut(Row) + Send),
    ) -> Result<(), StoreError> {
        if members.is_empty() {
            return Ok(());
        }
        let values = self.rows(members.iter().map(|(member, _)| member)).await?;
        let mut missing = Vec::new();
        for ((member, id), value) in members.into_iter().zip(values) {
            match (log::principal_of(&member), value) {
                (Some(principal), Some(value)) => {
                    take(script::row(principal, Some(id), Some(&value)));
                }
                (Some(_), None) => missing.push((member, id)),
                (None, _) => note_impossible(id),
            }
        }
        if !missing.is_empty() {
            self.vanished(&missing).await?.into_iter().for_each(take);
        }
        Ok(())
    }

    /// Those of `missing` that should be there: evicted, or deleted by hand. What was properly deleted
    /// since they were listed is in the log and not in the set any more.
    async fn vanished(&mut self, missing: &[(String, EntryId)]) -> Result<Vec<Row>, StoreError> {
        let mut question = redis::pipe();
        for (member, _) in missing {
            question.zscore(&self.keys.ids, member);
        }
        let scores: Vec<Option<String>> = self.ask(&question).await?;
        let gone = missing.iter().zip(scores).filter(|(_, score)| score.is_some());
        Ok(gone
            .filter_map(|((member, id), _)| {
                Some(script::row(log::principal_of(member)?, Some(*id), None))
            })
            .collect())
    }
}

#[async_trait]
impl Feed for RedisFeed {
    /// Walks the set of all entries, which every write changes together with the entries themselves:
    /// an entry that is in the set when the walk begins is either read or in the log after the
    /// returned position.
    async fn load(&mut self, take: &mut (dyn FnMut(Row) + Send)) -> Result<Position, StoreError> {
        self.connector.confirm(&mut self.link).await?;
        let position = self.tail().await?;
        let mut after = 0;
        while let Some((members, last)) = self.members(after).await? {
            after = last;
            self.take_rows(members, take).await?;
        }
        self.fresh = true;
        Ok(position)
    }

    async fn load_names(
        &mut self,
        take: &mut (dyn for<'k> FnMut(&'k str) + Send),
    ) -> Result<Position, StoreError> {
        self.connector.confirm(&mut self.link).await?;
        let position = self.tail().await?;
        let mut after = 0;
        while let Some((members, last)) = self.members(after).await? {
            after = last;
            for (member, id) in members {
                match log::principal_of(&member) {
                    Some(_) => take(&member),
                    None => note_impossible(id),
                }
            }
        }
        self.fresh = true;
        Ok(position)
    }

    fn narrow(&mut self, scope: Scope) {
        self.scope = scope;
    }

    async fn poll(&mut self, position: &Position) -> Result<Step, StoreError> {
        self.connector.confirm(&mut self.link).await?;
        let mut chain = Chain::from(position);
        // After an error, too: what is asked next should not wait for news.
        let mut block = (!std::mem::replace(&mut self.fresh, true)).then_some(BLOCK);
        let mut as_of = self.clock.monotonic();
        let mut behind = false;
        loop {
            let records = self.records(chain.position.version, block.take()).await?;
            let more = records.len() >= RECORDS;
            for record in records {
                if let Err(why) = chain.push(record) {
                    return Ok(Step::Lost(why));
                }
            }
            if chain.keys.len() as u64 > RETENTION {
                return Ok(Step::Lost("too far behind the change log"));
            }
            if more {
                continue;
            }
            if chain.position != *position {
                let as_of = self.connector.vouched(&self.link, as_of);
                let step = self.changes(chain, as_of).await?;
                self.fresh = false;
                return Ok(step);
            }
            as_of = self.clock.monotonic();
            let tail = self.tail().await?;
            if tail == *position {
                let as_of = self.connector.vouched(&self.link, as_of);
                self.fresh = false;
                return Ok(Step::Current { as_of });
            }
            // A record may have come since XREAD returned: then the next one returns it.
            if std::mem::replace(&mut behind, true) {
                return Ok(Step::Lost("the change log is not the one that was followed so far"));
            }
        }
    }
}

fn note_impossible(id: EntryId) {
    error!(id = id.0, "a stored entry has an impossible name or realm, it is passed over");
}

/// A record of the log.
pub(super) fn record(id: StreamId) -> Result<Record, StoreError> {
    let odd = || StoreError::Corrupt("the change log holds something odd".into());
    let text = |field: &str| -> Result<String, StoreError> {
        let value = id.map.get(field).ok_or_else(odd)?;
        redis::from_redis_value_ref(value).map_err(|_| odd())
    };
    let version = id.id.strip_suffix("-0").and_then(|v| v.parse().ok()).ok_or_else(odd)?;
    Ok(Record { version, nonce: text("n")?, previous: text("p")?, keys: text("k")? })
}
