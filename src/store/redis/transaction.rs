//! The scripts' work without scripts: `WATCH` what is read, decide here, write between `MULTI` and `EXEC`.
//! Answers are those of the scripts.
//!
//! A transaction is opened together with the reading, and nothing is written before the server has said
//! that it watches and that it is open: a user who may not `MULTI` would else write at once, unwatched.
//! What `EXEC` begins it ends, whatever fails on the way, so all that could fail is looked at before.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{FromRedisValue, Pipeline, RedisError, Value};

use super::connect::is_of_primary;
use super::retry::Retry;
use super::script::{FORMAT, Keys, millis};
use super::writer::Work;
use crate::entry::EntryId;
use crate::store::log::{self, RETENTION};
use crate::store::{Action, Expect, Failure, Mutation, Nonce, Spending};

/// How long others may be quicker, over and over.
const RACES: Duration = Duration::from_secs(1);

/// Does `work`, on a connection that nobody else uses meanwhile. After an error the connection may be
/// within a transaction: it must not be used again.
pub(super) async fn run(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    work: &Work<'_>,
) -> Result<Value, RedisError> {
    let mut retry = Retry::racing(RACES);
    loop {
        if let Some(answer) = attempt(conn, keys, work).await? {
            return Ok(answer);
        }
        if !retry.again().await {
            return Ok(words(&["busy"]));
        }
    }
}

/// `None`: somebody else changed meanwhile what was looked at.
async fn attempt(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    work: &Work<'_>,
) -> Result<Option<Value>, RedisError> {
    match work {
        Work::Init => init(conn, keys).await,
        Work::Commit { batch, nonce } => commit(conn, keys, batch, nonce).await,
        Work::Reserve => reserve(conn, keys).await,
        Work::Raise(next) => raise(conn, keys, *next).await,
        Work::BeginImport { importing } => begin_import(conn, keys, importing).await,
        Work::EndImport => end_import(conn, keys).await,
        Work::List { after, last, limit } => list(conn, keys, (*after, *last), *limit).await,
        Work::Spend(spending) => spend(conn, keys, spending).await,
        Work::Count(failures) => count(conn, keys, failures).await,
        Work::Remember { remembered, keep } => remember(conn, keys, remembered, *keep).await,
        Work::Remembers(key) => remembers(conn, keys, key).await,
    }
}

async fn init(conn: &mut MultiplexedConnection, keys: &Keys) -> Result<Option<Value>, RedisError> {
    let mut reads = redis::pipe();
    reads.cmd("EXISTS").arg(&keys.fixed()[1..]);
    let (meta, answers) = open(conn, keys, &keys.fixed(), reads).await?;
    let (there,): (u64,) = read(answers)?;
    let answer = match meta.as_deref() {
        Some(meta) if meta == keys.format => words(&["ok", "0"]),
        Some(meta) => words(&["foreign", meta]),
        None if there > 0 => words(&["remains"]),
        None => {
            let mut writes = redis::pipe();
            begin_history(&mut writes, keys);
            writes.set(&keys.meta, &keys.format);
            return write(conn, writes, "1").await;
        }
    };
    abandon(conn, answer).await
}

async fn reserve(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
) -> Result<Option<Value>, RedisError> {
    let answer = match open_counter(conn, keys).await? {
        Err(refusal) => refusal,
        Ok(id) if id >= EntryId::MAX.0 => words(&["full"]),
        Ok(id) => {
            let mut writes = redis::pipe();
            writes.cmd("HINCRBY").arg(&[&keys.head, "id", "1"]);
            return write(conn, writes, &id.to_string()).await;
        }
    };
    abandon(conn, answer).await
}

async fn raise(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    next: EntryId,
) -> Result<Option<Value>, RedisError> {
    let answer = match open_counter(conn, keys).await? {
        Err(refusal) => refusal,
        Ok(id) if id >= next.0 => words(&["ok", "1"]),
        Ok(_) => {
            let mut writes = redis::pipe();
            writes.cmd("HSET").arg(&[&keys.head, "id"]).arg(next.0);
            return write(conn, writes, "1").await;
        }
    };
    abandon(conn, answer).await
}

/// Opens a transaction on the counter of numbers, and reads the next one; or why there is none.
async fn open_counter(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
) -> Result<Result<u64, Value>, RedisError> {
    let mut reads = redis::pipe();
    reads.cmd("HGET").arg(&[&keys.head, "id"]);
    let (meta, answers) = open(conn, keys, &[&keys.meta, &keys.head], reads).await?;
    let (id,): (Option<u64>,) = read(answers)?;
    Ok(match refusal(keys, meta) {
        Some(refusal) => Err(refusal),
        None => id.ok_or_else(|| words(&["headless"])),
    })
}

/// Nothing was written yet, and the first number is 1.
fn begin_history(writes: &mut Pipeline, keys: &Keys) {
    writes.cmd("HSET").arg(&[&keys.head, "v", "0", "n", Nonce::ORIGIN, "id", "1"]);
}

async fn begin_import(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    importing: &Keys,
) -> Result<Option<Value>, RedisError> {
    let mut reads = redis::pipe();
    reads.exists(&keys.ids).cmd("EXISTS").arg(&keys.fixed()[1..]);
    let (meta, answers) = open(conn, keys, &keys.fixed(), reads).await?;
    let (entries, there): (u64, u64) = read(answers)?;
    let answer = match meta.as_deref() {
        Some(meta) if meta == importing.format => words(&["ok", "1"]),
        Some(meta) if meta != keys.format => words(&["foreign", meta]),
        Some(_) if entries > 0 => words(&["ok", "0"]),
        None if there > 0 => words(&["remains"]),
        found => {
            let mut writes = redis::pipe();
            if found.is_none() {
                begin_history(&mut writes, keys);
            }
            writes.set(&keys.meta, &importing.format);
            return write(conn, writes, "1").await;
        }
    };
    abandon(conn, answer).await
}

async fn end_import(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
) -> Result<Option<Value>, RedisError> {
    let (meta, _) = open(conn, keys, &[&keys.meta, &keys.log], redis::pipe()).await?;
    let answer = match (meta.as_deref() == Some(FORMAT), refusal(keys, meta)) {
        (true, _) => words(&["ok", "0"]),
        (false, Some(refusal)) => refusal,
        (false, None) => {
            let mut writes = redis::pipe();
            writes.del(&keys.log).set(&keys.meta, FORMAT);
            return write(conn, writes, "1").await;
        }
    };
    abandon(conn, answer).await
}

/// What a commit reads: head, last record, values of its entries, then what `ids` says.
type Before = (Head, Vec<(String, BTreeMap<String, String>)>, Vec<Option<Vec<u8>>>, Ids);
type Head = (Option<u64>, Option<String>, Option<u64>);
/// For each mutation its score, and, for a put, who has its number.
type Ids = Vec<(Option<String>, Vec<String>)>;

async fn commit(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    batch: &[Mutation],
    nonce: &Nonce,
) -> Result<Option<Value>, RedisError> {
    let members: Vec<_> = batch.iter().map(|m| log::key_of((&m.principal).into())).collect();
    let entries: Vec<_> = members.iter().map(|member| keys.entry(member)).collect();
    let watched: Vec<&str> =
        keys.fixed().into_iter().chain(entries.iter().map(String::as_str)).collect();
    let reads = before(keys, batch, &members, &entries);
    let (meta, answers) = open(conn, keys, &watched, reads).await?;
    if let Some(refusal) = refusal(keys, meta) {
        return abandon(conn, refusal).await;
    }
    let (head, last, values, ids) = understand_before(answers, batch)?;
    let (Some(version), Some(head_nonce), Some(mut next_id)) = head else {
        return abandon(conn, words(&["headless"])).await;
    };
    // As the script does: the log may be ahead of head.
    let (version, previous) = match last.into_iter().next() {
        Some((id, mut record)) => match logged(&id) {
            Some(logged) if logged >= version => (logged, record.remove("n").unwrap_or(head_nonce)),
            _ => (version, head_nonce),
        },
        None => (version, head_nonce),
    };
    let is_deletion = |m: &Mutation| matches!(m.action, Action::Delete);
    let deleted: HashSet<&String> =
        batch.iter().zip(&members).filter(|(m, _)| is_deletion(m)).map(|(_, name)| name).collect();
    for (((mutation, member), value), (score, owners)) in
        batch.iter().zip(&members).zip(values).zip(&ids)
    {
        if !fits(mutation.expect, value.as_deref(), score.is_some()) {
            return abandon(conn, words(&["conflict"])).await;
        }
        if owners.iter().any(|owner| owner != member && !deleted.contains(owner)) {
            return abandon(conn, words(&["conflict"])).await;
        }
        if let Action::Put { id, .. } = mutation.action {
            next_id = next_id.max(id.0 + 1);
        }
    }

    let version = (version + 1).to_string();
    let mut writes = redis::pipe();
    // The log first: followers notice even what would fail behind it.
    writes.cmd("XADD").arg(&[&keys.log, "MAXLEN", "~"]).arg(RETENTION).arg(format!("{version}-0"));
    writes.arg(&["n", &nonce.0, "p", &previous, "k", &log::keys_text(batch)]);
    writes.cmd("HSET").arg(&[&keys.head, "v", &version, "n", &nonce.0, "id"]).arg(next_id);
    for ((mutation, member), entry) in batch.iter().zip(&members).zip(&entries) {
        if is_deletion(mutation) {
            writes.del(entry).zrem(&keys.ids, member);
        }
    }
    for ((mutation, member), entry) in batch.iter().zip(&members).zip(&entries) {
        if let Action::Put { id, blob } = &mutation.action {
            let value = [format!("{version}:{id}:").as_bytes(), &blob.0].concat();
            writes.zadd(&keys.ids, member, id.0).set(entry, value);
        }
    }
    let Some(done) = execute_all(conn, writes).await? else { return Ok(None) };
    Ok(Some(match first_error(&done) {
        None => words(&["ok", &version]),
        Some(error) => words(&["half", &error.to_string()]),
    }))
}

/// The questions whose answers [`understand_before`] takes.
fn before(keys: &Keys, batch: &[Mutation], members: &[String], entries: &[String]) -> Pipeline {
    let mut reads = redis::pipe();
    reads.cmd("HMGET").arg(&[&keys.head, "v", "n", "id"]);
    reads.cmd("XREVRANGE").arg(&[&keys.log, "+", "-", "COUNT", "1"]);
    // Takes a key of another type for none, as the script does.
    reads.cmd("MGET").arg(entries);
    for (Mutation { action, .. }, member) in batch.iter().zip(members) {
        reads.zscore(&keys.ids, member);
        if let Action::Put { id, .. } = action {
            reads.cmd("ZRANGEBYSCORE").arg(&keys.ids).arg(id.0).arg(id.0);
        }
    }
    reads
}

fn understand_before(answers: Vec<Value>, batch: &[Mutation]) -> Result<Before, RedisError> {
    let mut answers = answers.into_iter();
    let mut next = || answers.next().unwrap_or(Value::Nil);
    let (head, last, values) = (next(), next(), next());
    let mut ids = Vec::with_capacity(batch.len());
    for Mutation { action, .. } in batch {
        let score = redis::from_redis_value(next())?;
        let owners = match action {
            Action::Put { .. } => redis::from_redis_value(next())?,
            Action::Delete => Vec::new(),
        };
        ids.push((score, owners));
    }
    let (head, last) = (redis::from_redis_value(head)?, redis::from_redis_value(last)?);
    Ok((head, last, redis::from_redis_value(values)?, ids))
}

/// The version in the id of a record.
fn logged(id: &str) -> Option<u64> {
    id.split_once('-')?.0.parse().ok()
}

/// Whether an entry is as expected: revision 0 is a value that is gone, though it is in `ids`, or does
/// not say.
fn fits(expect: Expect, value: Option<&[u8]>, is_in_ids: bool) -> bool {
    let revision = value.map(|value| {
        let digits = value.iter().take_while(|byte| byte.is_ascii_digit()).count();
        match (digits, value.get(digits)) {
            (1.., Some(b':')) => String::from_utf8_lossy(&value[..digits]).into_owned(),
            _ => "0".to_owned(),
        }
    });
    match (expect, revision) {
        (Expect::Absent, revision) => revision.is_none(),
        (Expect::At(version), Some(revision)) => version.to_string() == revision,
        (Expect::At(version), None) => version.0 == 0 && is_in_ids,
    }
}

async fn list(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    (after, last): (u64, u64),
    limit: usize,
) -> Result<Option<Value>, RedisError> {
    let mut reads = redis::pipe();
    reads.cmd("ZRANGEBYSCORE").arg(&keys.ids).arg(format!("({after}")).arg(last);
    reads.arg(&["WITHSCORES", "LIMIT", "0"]).arg(limit);
    // Every change of entries is in the log.
    let (meta, answers) = watch(conn, keys, &[&keys.meta, &keys.log], reads).await?;
    let (found,): (Vec<(String, String)>,) = read(answers)?;
    let entries: Vec<_> = found.iter().map(|(member, _)| keys.entry(member)).collect();
    let mut question = redis::pipe();
    if !entries.is_empty() {
        question.cmd("MGET").arg(entries);
    }
    // Read before, not between: a server without free memory queues nothing, not even questions. What an
    // empty transaction says is whether nothing changed.
    question.cmd("MULTI").cmd("EXEC").cmd("HELLO");
    let mut answers = ask(conn, &question).await?;
    is_of_primary(&answers.pop().unwrap_or(Value::Nil))?;
    if answers.pop() == Some(Value::Nil) {
        return Ok(None);
    }
    if let Some(refusal) = refusal(keys, meta) {
        return Ok(Some(refusal));
    }
    let values = match answers.into_iter().next() {
        Some(Value::Array(values)) => values,
        _ => Vec::new(),
    };
    let mut answer = vec![text("ok")];
    for ((member, score), value) in found.iter().zip(values) {
        answer.extend([text(member), text(score), value]);
    }
    Ok(Some(Value::Array(answer)))
}

async fn spend(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    spending: &Spending,
) -> Result<Option<Value>, RedisError> {
    let used = keys.uses(spending);
    let mut reads = redis::pipe();
    reads.sismember(&used, &spending.by).scard(&used);
    let (meta, answers) = open(conn, keys, &[&keys.meta, &used], reads).await?;
    let (is_used, uses): (bool, u32) = read(answers)?;
    let answer = match refusal(keys, meta) {
        Some(refusal) => refusal,
        None if is_used => words(&["ok", "1"]),
        None if uses >= spending.budget => words(&["ok", "0"]),
        None => {
            let mut writes = redis::pipe();
            writes.sadd(&used, &spending.by);
            // From the first use on: the token ends then, however often it is used.
            if uses == 0 {
                writes.cmd("PEXPIRE").arg(&used).arg(millis(spending.keep).to_string());
            }
            return write(conn, writes, "1").await;
        }
    };
    abandon(conn, answer).await
}

async fn count(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    failures: &[Failure],
) -> Result<Option<Value>, RedisError> {
    let buckets: Vec<_> = failures.iter().map(|failure| keys.bucket(&failure.bucket)).collect();
    let watched: Vec<_> = std::iter::once(&keys.meta).chain(&buckets).map(String::as_str).collect();
    let mut reads = redis::pipe();
    reads.cmd("TIME");
    for bucket in &buckets {
        reads.get(bucket);
    }
    let (meta, mut answers) = open(conn, keys, &watched, reads).await?;
    if let Some(refusal) = refusal(keys, meta) {
        return abandon(conn, refusal).await;
    }
    if failures.is_empty() {
        return abandon(conn, words(&["ok"])).await;
    }
    let (seconds, micros): (u128, u128) = redis::from_redis_value(answers.remove(0))?;
    let now = seconds * 1_000_000 + micros;
    let mut levels = BTreeMap::new();
    for (bucket, level) in buckets.iter().zip(answers) {
        levels.insert(bucket, redis::from_redis_value::<Option<u128>>(level)?.unwrap_or(0));
    }
    let (mut writes, mut answer) = (redis::pipe(), vec![text("ok")]);
    for (bucket, Failure { quota, .. }) in buckets.iter().zip(failures) {
        let (interval, horizon) = (quota.interval().as_micros(), quota.horizon().as_micros());
        let before = levels.get(bucket).copied().unwrap_or(0);
        let level = (before.max(now) + interval).min(now + horizon);
        levels.insert(bucket, level);
        // Gone when it has drained.
        let left = (level - now).div_ceil(1_000).to_string();
        writes.cmd("SET").arg(bucket).arg(level.to_string()).arg("PX").arg(left);
        let room = interval * u128::from(quota.failures.max(1) - 1);
        answer.push(text(&(level - now).saturating_sub(room).to_string()));
    }
    Ok(execute(conn, writes).await?.map(|_| Value::Array(answer)))
}

async fn remember(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    remembered: &[String],
    keep: Duration,
) -> Result<Option<Value>, RedisError> {
    let (meta, _) = open(conn, keys, &[&keys.meta], redis::pipe()).await?;
    if let Some(refusal) = refusal(keys, meta) {
        return abandon(conn, refusal).await;
    }
    let mut writes = redis::pipe();
    for key in remembered {
        writes.cmd("SET").arg(&[&keys.remembered(key), "", "PX", &millis(keep).to_string()]);
    }
    write(conn, writes, "1").await
}

async fn remembers(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    key: &str,
) -> Result<Option<Value>, RedisError> {
    let mut reads = redis::pipe();
    reads.get(&keys.meta).exists(keys.remembered(key)).cmd("HELLO");
    let (meta, is_there, hello): (_, u64, Value) = read(ask(conn, &reads).await?)?;
    is_of_primary(&hello)?;
    Ok(Some(refusal(keys, meta).unwrap_or_else(|| words(&["ok", &is_there.to_string()]))))
}

/// Watches keys, reads `meta` and more, and opens a transaction.
async fn open(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    watched: &[&str],
    mut reads: Pipeline,
) -> Result<(Option<String>, Vec<Value>), RedisError> {
    reads.cmd("MULTI");
    let (meta, mut answers) = watch(conn, keys, watched, reads).await?;
    answers.pop();
    Ok((meta, answers))
}

/// Watches keys, and reads `meta` and more.
async fn watch(
    conn: &mut MultiplexedConnection,
    keys: &Keys,
    watched: &[&str],
    reads: Pipeline,
) -> Result<(Option<String>, Vec<Value>), RedisError> {
    let mut question = redis::pipe();
    question.cmd("WATCH").arg(watched).get(&keys.meta);
    for read in reads.cmd_iter() {
        question.add_command(read.clone());
    }
    let mut answers = ask(conn, &question).await?;
    answers.remove(0);
    let meta = redis::from_redis_value(answers.remove(0))?;
    Ok((meta, answers))
}

/// Writes; `None`: somebody else changed what is watched, and nothing was written.
async fn execute(
    conn: &mut MultiplexedConnection,
    writes: Pipeline,
) -> Result<Option<Vec<Value>>, RedisError> {
    let done = execute_all(conn, writes).await?;
    match done.as_deref().and_then(first_error) {
        Some(error) => Err(error),
        None => Ok(done),
    }
}

/// As [`execute`]; answers `ok` and `result`.
async fn write(
    conn: &mut MultiplexedConnection,
    writes: Pipeline,
    result: &str,
) -> Result<Option<Value>, RedisError> {
    Ok(execute(conn, writes).await?.map(|_| words(&["ok", result])))
}

/// As [`execute`], where some may have failed though the others were done.
async fn execute_all(
    conn: &mut MultiplexedConnection,
    mut writes: Pipeline,
) -> Result<Option<Vec<Value>>, RedisError> {
    writes.cmd("EXEC");
    let mut answers = conn.req_packed_commands(&writes, 0, writes.len()).await?;
    match answers.pop() {
        Some(Value::Nil) => Ok(None),
        Some(Value::Array(done)) => Ok(Some(done)),
        // What was refused first says more than EXEC does.
        Some(Value::ServerError(error)) => {
            Err(first_error(&answers).unwrap_or_else(|| error.into()))
        }
        _ => Err(odd()),
    }
}

/// Ends a transaction without writing.
async fn abandon(
    conn: &mut MultiplexedConnection,
    answer: Value,
) -> Result<Option<Value>, RedisError> {
    redis::cmd("DISCARD").exec_async(conn).await?;
    Ok(Some(answer))
}

/// Answers to all questions, or the first error.
async fn ask(
    conn: &mut MultiplexedConnection,
    questions: &Pipeline,
) -> Result<Vec<Value>, RedisError> {
    let answers = conn.req_packed_commands(questions, 0, questions.len()).await?;
    match first_error(&answers) {
        Some(error) => Err(error),
        None if answers.len() == questions.len() => Ok(answers),
        None => Err(odd()),
    }
}

fn read<T: FromRedisValue>(answers: Vec<Value>) -> Result<T, RedisError> {
    Ok(redis::from_redis_value(Value::Array(answers))?)
}

fn first_error(answers: &[Value]) -> Option<RedisError> {
    answers.iter().find_map(|answer| match answer {
        Value::ServerError(error) => Some(error.clone().into()),
        _ => None,
    })
}

fn odd() -> RedisError {
    (redis::ErrorKind::UnexpectedReturnType, "a transaction was answered with something odd").into()
}

/// What the scripts answer where `meta` is not as it should be.
fn refusal(keys: &Keys, meta: Option<String>) -> Option<Value> {
    match meta {
        None => Some(words(&["absent"])),
        Some(meta) if meta != keys.format => Some(words(&["foreign", &meta])),
        Some(_) => None,
    }
}

fn words(words: &[&str]) -> Value {
    Value::Array(words.iter().map(|word| text(word)).collect())
}

fn text(text: &str) -> Value {
    Value::BulkString(text.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Version;

    #[test]
    fn expectations_are_judged_as_the_script_does() {
        let at = |version| Expect::At(Version(version));
        for (expect, value, is_in_ids, wanted) in [
            (Expect::Absent, None, false, true),
            // What was evicted may be made again.
            (Expect::Absent, None, true, true),
            (Expect::Absent, Some("1:2:b"), true, false),
            (Expect::Absent, Some(""), true, false),
            (at(12), Some("12:7:b"), true, true),
            (at(12), Some("13:7:b"), true, false),
            (at(12), None, true, false),
            (at(0), None, true, true),
            (at(0), None, false, false),
            (at(0), Some("junk"), true, true),
            (at(0), Some("12"), true, true),
            (at(0), Some(":1"), false, true),
        ] {
            let fits = fits(expect, value.map(str::as_bytes), is_in_ids);
            assert_eq!(fits, wanted, "{expect:?} {value:?} {is_in_ids}");
        }
    }
}
