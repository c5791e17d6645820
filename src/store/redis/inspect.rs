//! Looks at all keys of the store while others write to it: what belongs together changes together, so
//! what is read in one step can be judged, and what cannot is looked at again.

use redis::Value;
use redis::streams::StreamRangeReply;

use super::connect::is_of_primary;
use super::feed::record;
use super::writer::Work;
use super::{PAGE, Redis, raw_page, script};
use crate::entry::EntryId;
use crate::store::verify::LogWalk;
use crate::store::{Inspection, Nonce, Position, Problems, Row, StoreError, Version, log};

/// Records of the log that are read at once; each may name many entries.
const RECORDS: usize = 100;
/// Keys that a step of `SCAN` looks at.
const SCANNED: usize = 1_000;
/// How often something that others may just be changing is looked at.
const LOOKS: usize = 5;

/// Where the log and the numbers end.
pub(super) struct Ends {
    pub(super) head: Position,
    pub(super) next_id: EntryId,
    /// The last record of the log.
    last: Option<Position>,
}

impl Redis {
    pub(super) async fn ends(&self) -> Result<Ends, StoreError> {
        let question = redis::pipe()
            .get(&self.keys.meta)
            .cmd("HMGET")
            .arg(&[&self.keys.head, "v", "n", "id"])
            .cmd("XREVRANGE")
            .arg(&[&self.keys.log, "+", "-", "COUNT", "1"])
            .cmd("HELLO")
            .to_owned();
        let question = &question;
        type Head = (Option<u64>, Option<String>, Option<u64>);
        type Answer = (Option<String>, Head, StreamRangeReply, Value);
        let ask = |mut conn| async move {
            let answer: Answer = question.query_async(&mut conn).await?;
            is_of_primary(&answer.3)?;
            Ok(answer)
        };
        let (meta, head, log, _) = self.line.ask(ask).await?;
        self.keys.check_meta(meta.as_deref())?;
        let (Some(version), Some(nonce), Some(next_id)) = head else {
            return Err(script::headless());
        };
        let last = log.ids.into_iter().next().map(record).transpose()?;
        Ok(Ends {
            head: Position { version: Version(version), nonce: Nonce(nonce) },
            next_id: EntryId(next_id),
            last: last
                .map(|last| Position { version: Version(last.version), nonce: Nonce(last.nonce) }),
        })
    }

    pub(super) async fn inspect_all(
        &self,
        take: &mut (dyn FnMut(Row) + Send),
    ) -> Result<Inspection, StoreError> {
        let mut problems = Problems::default();
        let before = self.ends().await?.head;
        self.inspect_entries(take, &mut problems).await?;
        let mut left_out = Vec::new();
        if let Err(error) = self.look_for_orphans(&mut problems).await? {
            left_out.push(format!("entries that no number leads to: SCAN is refused ({error})"));
        }
        self.inspect_log(&mut problems).await?;
        let ends = self.check_ends(&mut problems).await?;
        Ok(Inspection { before, after: ends.head, next_id: ends.next_id, problems, left_out })
    }

    /// Numbers and the entries that they lead to.
    async fn inspect_entries(
        &self,
        take: &mut (dyn FnMut(Row) + Send),
        problems: &mut Problems,
    ) -> Result<(), StoreError> {
        let mut after = 0;
        loop {
            let work = Work::List { after, last: EntryId::MAX.0, limit: PAGE };
            let reply: Vec<Value> = self.line.work(&self.writer, &work).await?;
            let page = raw_page(reply)?;
            let Some((_, last, _)) = page.last() else { return Ok(()) };
            after = last.0;
            for (member, id, value) in &page {
                let Some(principal) = log::principal_of(member) else {
                    problems.add(format!("id {id} has an impossible name or realm"));
                    continue;
                };
                match value.as_deref().map(script::own_id) {
                    None => problems.add(format!("the entry of {principal} (id {id}) is gone")),
                    Some(own) if own.is_some_and(|own| own != *id) => {
                        problems.add(format!("the entry of {principal} has another id than {id}"))
                    }
                    // What does not say its number does not open either.
                    Some(_) => {}
                }
                take(script::row(principal, Some(*id), value.as_deref()));
            }
        }
    }

    /// Entries that no number leads to. The inner error: this user may not look.
    async fn look_for_orphans(
        &self,
        problems: &mut Problems,
    ) -> Result<Result<(), StoreError>, StoreError> {
        let pattern = self.keys.all_entries();
        let mut cursor = "0".to_owned();
        loop {
            let scan = redis::cmd("SCAN")
                .arg(&[&cursor, "MATCH", &pattern, "COUNT"])
                .arg(SCANNED)
                .to_owned();
            let scan = &scan;
            let page: Result<(String, Vec<String>), _> =
                self.line.ask(|mut conn| async move { scan.query_async(&mut conn).await }).await;
            let (next, keys) = match page {
                Err(error @ (StoreError::Denied(_) | StoreError::Unreachable(_)))
                    if cursor == "0" =>
                {
                    return Ok(Err(error));
                }
                page => page?,
            };
            for orphan in self.orphans(keys).await? {
                problems.add(match log::principal_of(&orphan) {
                    Some(principal) => format!("no id leads to the entry of {principal}"),
                    None => "no id leads to a key with an impossible name".to_owned(),
                });
            }
            if next == "0" {
                return Ok(Ok(()));
            }
            cursor = next;
        }
    }

    /// Members of those of `keys` that are there without a number, whenever one looks.
    async fn orphans(&self, keys: Vec<String>) -> Result<Vec<String>, StoreError> {
        let member = |key: String| self.keys.member(&key).map(str::to_owned);
        let mut suspects: Vec<String> = keys.into_iter().filter_map(member).collect();
        for _ in 0..LOOKS {
            if suspects.is_empty() {
                break;
            }
            let mut question = redis::pipe();
            for member in &suspects {
                question.exists(self.keys.entry(member)).zscore(&self.keys.ids, member);
            }
            let question = &question;
            let answer: Vec<Value> = self
                .line
                .ask(|mut conn| async move { question.query_async(&mut conn).await })
                .await?;
            let mut orphan = answer
                .chunks_exact(2)
                .map(|pair| pair[0] == Value::Int(1) && pair[1] == Value::Nil);
            suspects.retain(|_| orphan.next().unwrap_or_default());
        }
        Ok(suspects)
    }

    async fn inspect_log(&self, problems: &mut Problems) -> Result<(), StoreError> {
        let mut walk = LogWalk::default();
        let mut start = "-".to_owned();
        loop {
            let range = redis::cmd("XRANGE")
                .arg(&[&self.keys.log, &start, "+", "COUNT"])
                .arg(RECORDS)
                .to_owned();
            let range = &range;
            let page: StreamRangeReply =
                self.line.ask(|mut conn| async move { range.query_async(&mut conn).await }).await?;
            let Some(last) = page.ids.last() else { return Ok(()) };
            // Of the same millisecond part, which is the version: a damaged log may hold several.
            start = match last.id.split_once('-').and_then(|(v, n)| Some((v, n.parse().ok()?))) {
                Some((version, n)) => format!("{version}-{}", u64::wrapping_add(n, 1)),
                None => {
                    problems.add("the change log holds something odd".into());
                    return Ok(());
                }
            };
            for id in page.ids {
                match record(id) {
                    Ok(record) => walk.push(record, problems),
                    Err(_) => problems.add("the change log holds something odd".into()),
                }
            }
        }
    }

    /// Whether the log ends where `head` says.
    async fn check_ends(&self, problems: &mut Problems) -> Result<Ends, StoreError> {
        let mut looks = 0;
        loop {
            looks += 1;
            let ends = self.ends().await?;
            // After an import, or where it was cut, it is empty.
            let agree = ends.last.as_ref().is_none_or(|last| *last == ends.head);
            if agree || looks == LOOKS {
                if !agree {
                    problems.add("the change log does not end where `head` says".into());
                }
                return Ok(ends);
            }
        }
    }
}
