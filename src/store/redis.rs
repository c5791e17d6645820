//! The Redis backend, for Redis 6 or later and Valkey: one server, Sentinel or Cluster.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::streams::StreamRangeReply;
use redis::{TlsCertificates, Value};
use tracing::error;

use super::url::RedisUrl;
use super::{Backend, Feed, Inspection, Mutation, Nonce, Position, Row, StoreError, Version, log};
use crate::clock::Clock;
use crate::config::RedisConfig;
use crate::entry::{EntryId, PrincipalRef};

mod connect;
mod error;
mod feed;
mod inspect;
mod ledger;
mod line;
mod retry;
mod script;
mod sentinel;
mod transaction;
mod warnings;
mod writer;

pub use connect::Access;
use connect::Connector;
use error::{Fate, fate, store_error};
use line::{Line, Seat};
use retry::Retry;
use script::Keys;
use writer::{Way, Work, Writer};

/// Longest wait for an answer to anything but a follower's or the ledger's question.
const PATIENCE: Duration = Duration::from_secs(2);
/// Entries that one call of the list script returns at most: scripts block the server.
const PAGE: usize = 500;
/// Connections that are used by one at a time: for entries, and for the ledger, which requests wait for.
const OWN_CONNECTIONS: usize = 4;
const OWN_LEDGER_CONNECTIONS: usize = 8;
/// Records among which a write of unknown outcome is looked for.
const SEARCHED_RECORDS: usize = 1_000;

/// Entries in Redis.
pub struct Redis {
    connector: Arc<Connector>,
    keys: Keys,
    writer: Writer,
    config: RedisConfig,
    line: Line,
    /// Apart from the others: neither waits behind the other's answers.
    ledger_line: Line,
}

impl Redis {
    /// The store at `url`, under keys that start with `{prefix}`. Connects when it is used.
    #[must_use]
    pub fn new(
        url: RedisUrl,
        certificates: TlsCertificates,
        prefix: &str,
        config: RedisConfig,
    ) -> Self {
        let keys = Keys::new(prefix);
        let connector = Arc::new(Connector::new(url, certificates, keys.meta.clone()));
        Self::with(connector, keys, config)
    }

    fn with(connector: Arc<Connector>, keys: Keys, config: RedisConfig) -> Self {
        let line = Line::new(connector.clone(), PATIENCE, OWN_CONNECTIONS);
        let ledger_line = Line::new(connector.clone(), ledger::PATIENCE, OWN_LEDGER_CONNECTIONS);
        let writer = Writer::new(keys.clone(), config.writes);
        Self { connector, keys, writer, config, line, ledger_line }
    }

    /// A connection for a commit. `WAIT` speaks of what its own connection wrote, and blocks it.
    async fn seat(&self, way: Way) -> Result<Seat, StoreError> {
        self.line.seat(way == Way::Transactions || self.config.wait_replicas > 0).await
    }

    /// Waits until enough replicas have what was written on this connection.
    async fn replicated(&self, mut seat: Seat, version: u64) -> Result<Version, StoreError> {
        let RedisConfig { wait_replicas: wanted, wait_timeout, .. } = self.config;
        if wanted == 0 {
            self.line.release(seat);
            return Ok(Version(version));
        }
        let wait = redis::cmd("WAIT").arg(wanted).arg(wait_timeout.as_millis() as u64).to_owned();
        // For this question alone: the connection that is released is another handle to it.
        seat.conn.set_response_timeout(PATIENCE + wait_timeout);
        let told: Result<u32, _> = wait.query_async(&mut seat.conn).await;
        match told {
            Ok(count) => {
                self.line.release(seat);
                if count >= wanted {
                    return Ok(Version(version));
                }
                Err(StoreError::Unknown(format!(
                    "it is written, but {count} replicas of {wanted} (`store.wait_replicas`) have \
                     confirmed it: a failover may undo it"
                )))
            }
            Err(error) => {
                self.line.discard(seat).await;
                Err(StoreError::Unknown(format!(
                    "it is written, but no replica is known to have it ({}): a failover may undo it",
                    store_error(&error)
                )))
            }
        }
    }

    /// As [`Self::replicated`], for what another connection wrote: this one writes something later.
    async fn found(&self, version: Version) -> Result<Version, StoreError> {
        if self.config.wait_replicas == 0 {
            return Ok(version);
        }
        let unknown = |error: StoreError| StoreError::Unknown(error.to_string());
        let mut seat = self.line.seat(true).await.map_err(unknown)?;
        let later = redis::cmd("SET").arg(&[&self.keys.later, "", "PX", "1000"]).to_owned();
        match later.exec_async(&mut seat.conn).await {
            Ok(()) => self.replicated(seat, version.0).await,
            Err(error) => {
                self.line.discard(seat).await;
                Err(unknown(store_error(&error)))
            }
        }
    }

    /// Finds out, or decides, what became of a commit that was sent without getting an answer.
    ///
    /// Doing it again is safe: whichever of the two comes second finds its expectations broken.
    async fn settle(&self, work: &Work<'_>, nonce: &Nonce) -> Result<Version, StoreError> {
        let unknown = |error: StoreError| StoreError::Unknown(error.to_string());
        // First, because what it made may have been deleted again since: then a create would fit.
        if let Some(version) = self.find(nonce).await.map_err(unknown)? {
            return self.found(version).await;
        }
        let way = self.writer.way();
        let mut seat = self.seat(way).await.map_err(unknown)?;
        match self.writer.attempt(&mut seat.conn, way, work).await {
            Ok(reply) => match script::understand(reply) {
                // The first one may have come through between the search and now.
                Err(StoreError::Conflict) => {
                    self.line.release(seat);
                    let version = self.find(nonce).await.map_err(unknown)?;
                    self.found(version.ok_or(StoreError::Conflict)?).await
                }
                Ok(version) => self.replicated(seat, version).await,
                Err(error) => {
                    self.line.release(seat);
                    Err(match error {
                        StoreError::Unreachable(why) => StoreError::Unknown(why),
                        error => error,
                    })
                }
            },
            Err(error) => {
                self.line.discard(seat).await;
                Err(unknown(store_error(&error)))
            }
        }
    }

    /// The version that a recent write with that nonce got.
    async fn find(&self, nonce: &Nonce) -> Result<Option<Version>, StoreError> {
        let search = redis::cmd("XREVRANGE")
            .arg(&[&self.keys.log, "+", "-", "COUNT"])
            .arg(SEARCHED_RECORDS)
            .to_owned();
        let search = &search;
        let reply: StreamRangeReply =
            self.line.ask(|mut conn| async move { search.query_async(&mut conn).await }).await?;
        for id in reply.ids {
            let record = feed::record(id)?;
            if record.nonce == nonce.0 {
                return Ok(Some(Version(record.version)));
            }
        }
        Ok(None)
    }

    /// Up to `limit` rows with numbers above `after` up to `last`, in order of number.
    async fn range(&self, after: u64, last: u64, limit: usize) -> Result<Vec<Row>, StoreError> {
        let mut rows = Vec::new();
        let mut after = after;
        while rows.len() < limit {
            let page = PAGE.min(limit - rows.len());
            let work = Work::List { after, last, limit: page };
            let reply: Vec<Value> = self.line.work(&self.writer, &work).await?;
            let found = listed(reply)?;
            let end = found.len() < page;
            after = found.last().map_or(last, |(id, _)| id.0);
            rows.extend(found.into_iter().filter_map(|(_, row)| row));
            if end {
                break;
            }
        }
        Ok(rows)
    }
}

#[async_trait]
impl Backend for Redis {
    fn kind(&self) -> &'static str {
        "redis"
    }

    fn set_access(&self, access: Access) {
        self.connector.set_access(access);
    }

    async fn init(&self) -> Result<bool, StoreError> {
        let reply = self.line.work(&self.writer, &Work::Init).await?;
        Ok(script::understand(reply)? == 1)
    }

    async fn get(&self, principal: PrincipalRef<'_>) -> Result<Option<Row>, StoreError> {
        let member = log::key_of(principal);
        let get = redis::pipe()
            .get(&self.keys.meta)
            // Unlike GET, this takes a key of another type for none.
            .cmd("MGET")
            .arg(self.keys.entry(&member))
            .zscore(&self.keys.ids, &member)
            .cmd("HELLO")
            .to_owned();
        let get = &get;
        type Answer = (Option<String>, (Option<Vec<u8>>,), Option<String>, Value);
        let ask = |mut conn| async move {
            let answer: Answer = get.query_async(&mut conn).await?;
            connect::is_of_primary(&answer.3)?;
            Ok(answer)
        };
        let (meta, (value,), score, _) = self.line.ask(ask).await?;
        self.keys.check_meta(meta.as_deref())?;
        Ok(row_of(principal, score, value))
    }

    async fn get_since(
        &self,
        principal: PrincipalRef<'_>,
        position: &Position,
    ) -> Result<Option<Row>, StoreError> {
        let member = log::key_of(principal);
        let place = format!("{}-0", position.version);
        let history = |question: &mut redis::Pipeline| {
            question.cmd("HMGET").arg(&[&self.keys.head, "v", "n"]);
            question.cmd("XRANGE").arg(&[&self.keys.log, &place, &place]);
        };
        let mut question = redis::pipe();
        // Before and after the entry: else what is read could be of another history.
        history(&mut question);
        question
            .get(&self.keys.meta)
            .cmd("MGET")
            .arg(self.keys.entry(&member))
            .zscore(&self.keys.ids, &member);
        history(&mut question);
        let question = &question;
        type Log = StreamRangeReply;
        type Answer = (Head, Log, Option<String>, (Option<Vec<u8>>,), Option<String>, Head, Log);
        let (head, log, meta, (value,), score, later_head, later_log): Answer =
            self.line.ask(|mut conn| async move { question.query_async(&mut conn).await }).await?;
        self.keys.check_meta(meta.as_deref())?;
        if !(holds(position, head, log)? && holds(position, later_head, later_log)?) {
            return Err(StoreError::Unreachable(
                "its history is not the one that is followed".into(),
            ));
        }
        Ok(row_of(principal, score, value))
    }

    async fn get_by_id(&self, id: EntryId) -> Result<Option<Row>, StoreError> {
        if id > EntryId::MAX {
            return Ok(None);
        }
        Ok(self.range(id.0.saturating_sub(1), id.0, 1).await?.pop())
    }

    async fn list(&self, after: Option<EntryId>, limit: usize) -> Result<Vec<Row>, StoreError> {
        let after = after.map_or(0, |id| id.min(EntryId::MAX).0);
        self.range(after, EntryId::MAX.0, limit).await
    }

    async fn reserve_id(&self) -> Result<EntryId, StoreError> {
        let reply = self.line.work(&self.writer, &Work::Reserve).await?;
        script::understand(reply).map(EntryId)
    }

    async fn commit(&self, batch: &[Mutation]) -> Result<Version, StoreError> {
        log::check(batch)?;
        let nonce = Nonce::random();
        let work = Work::Commit { batch, nonce: &nonce };
        let mut retry = Retry::within(PATIENCE);
        loop {
            let way = self.writer.way();
            let mut seat = self.seat(way).await?;
            let error = match self.writer.attempt(&mut seat.conn, way, &work).await {
                Ok(reply) => match script::understand(reply) {
                    Ok(version) => return self.replicated(seat, version).await,
                    Err(error) => {
                        self.line.release(seat);
                        return Err(error);
                    }
                },
                Err(error) => error,
            };
            let again = match fate(&error) {
                Fate::Refused => self.writer.way() != way,
                Fate::Loading if retry.again().await => true,
                Fate::Elsewhere | Fate::Loading => {
                    self.line.discard(seat).await;
                    self.connector.doubt();
                    retry.again().await
                }
                Fate::Silent => {
                    self.line.discard(seat).await;
                    return self.settle(&work, &nonce).await;
                }
            };
            if !again {
                return Err(store_error(&error));
            }
        }
    }

    async fn count(&self) -> Result<u64, StoreError> {
        let question = redis::pipe().get(&self.keys.meta).zcard(&self.keys.ids).to_owned();
        let question = &question;
        let (meta, count): (Option<String>, u64) =
            self.line.ask(|mut conn| async move { question.query_async(&mut conn).await }).await?;
        self.keys.check_meta(meta.as_deref())?;
        Ok(count)
    }

    async fn next_id(&self) -> Result<EntryId, StoreError> {
        self.ends().await.map(|ends| ends.next_id)
    }

    async fn raise_next_id(&self, next: EntryId) -> Result<(), StoreError> {
        let work = Work::Raise(next.min(EntryId::MAX));
        let reply = self.line.work(&self.writer, &work).await?;
        script::understand(reply).map(drop)
    }

    async fn begin_import(&self, tag: &str) -> Result<Option<Arc<dyn Backend>>, StoreError> {
        let keys = self.keys.importing(tag);
        let reply = self.line.work(&self.writer, &Work::BeginImport { importing: &keys }).await?;
        let closed = script::understand(reply)? == 1;
        let importer = || Self::with(self.connector.clone(), keys, self.config.clone());
        Ok(closed.then(|| Arc::new(importer()) as Arc<dyn Backend>))
    }

    async fn end_import(&self) -> Result<(), StoreError> {
        let reply = self.line.work(&self.writer, &Work::EndImport).await?;
        script::understand(reply).map(drop)
    }

    async fn inspect(&self, take: &mut (dyn FnMut(Row) + Send)) -> Result<Inspection, StoreError> {
        self.inspect_all(take).await
    }

    async fn feed(&self, clock: Arc<dyn Clock>) -> Result<Box<dyn Feed>, StoreError> {
        let link = self.connector.connect(feed::PATIENCE).await?;
        let feed = feed::RedisFeed::new(link, self.connector.clone(), self.keys.clone(), clock);
        Ok(Box::new(feed))
    }

    async fn warnings(&self) -> Vec<String> {
        warnings::look(self).await
    }
}

/// Version and nonce of `head`.
type Head = (Option<u64>, Option<String>);

/// Whether a server with this `head`, and these records at the version of `position`, has it in its
/// history.
fn holds(position: &Position, head: Head, log: StreamRangeReply) -> Result<bool, StoreError> {
    let (version, nonce) = (position.version.0, &position.nonce.0);
    // The log may have been cut, or never been written.
    if head == (Some(version), Some(nonce.clone())) {
        return Ok(true);
    }
    let record = log.ids.into_iter().next().map(feed::record).transpose()?;
    Ok(record.is_some_and(|record| record.version == version && record.nonce == *nonce))
}

/// The row of a principal, given its score in `ids` and its value.
fn row_of(
    principal: PrincipalRef<'_>,
    score: Option<String>,
    value: Option<Vec<u8>>,
) -> Option<Row> {
    let id = score.as_deref().and_then(number);
    let is_there = value.is_some() || id.is_some();
    is_there.then(|| script::row(principal.to_owned(), id, value.as_deref()))
}

/// What the list script found: numbers, and rows where there are principals.
fn listed(reply: Vec<Value>) -> Result<Vec<(EntryId, Option<Row>)>, StoreError> {
    let row = |(member, id, value): Found| {
        let principal = log::principal_of(&member);
        if principal.is_none() {
            error!(id = id.0, "a stored entry has an impossible name or realm, it is passed over");
        }
        (id, principal.map(|principal| script::row(principal, Some(id), value.as_deref())))
    };
    Ok(raw_page(reply)?.into_iter().map(row).collect())
}

/// A member of `ids`, its number, and its value if there is one.
type Found = (String, EntryId, Option<Vec<u8>>);

/// What the list script found.
fn raw_page(reply: Vec<Value>) -> Result<Vec<Found>, StoreError> {
    let text = |value: &Value| redis::from_redis_value_ref::<String>(value).unwrap_or_default();
    let Some((_, found)) = reply.split_first().filter(|(word, _)| text(word) == "ok") else {
        return Err(script::understand(reply.iter().map(text).collect())
            .err()
            .unwrap_or(StoreError::NotInitialised));
    };
    let odd = || StoreError::Corrupt("a number of an entry is none".into());
    let entry = |found: &[Value]| {
        let value: Option<Vec<u8>> = redis::from_redis_value_ref(&found[2]).ok().flatten();
        Ok((text(&found[0]), number(&text(&found[1])).ok_or_else(odd)?, value))
    };
    found.chunks_exact(3).map(entry).collect()
}

/// A score of `ids`.
fn number(score: &str) -> Option<EntryId> {
    score.parse().ok().filter(|id| *id <= EntryId::MAX.0).map(EntryId)
}

/// A value as `GET` gives it: damage is a row that does not open, not another entry.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(data: &[u8]) {
    let who = crate::entry::Principal::parse("alice", "staff").expect("a principal");
    let row = script::row(who.clone(), Some(EntryId(1)), Some(data));
    assert_eq!((row.principal, row.id), (who, EntryId(1)));
    assert!(row.blob.0.is_empty() || data.ends_with(&row.blob.0));
}
