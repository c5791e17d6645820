//! The export of a store, a file of JSON lines: a header, one line an entry, a trailer.
//!
//! ```text
//! {"otpgate_export":1,"sealed":true,"store":"redis","created_at":1790000000,"key":"1f2e3d4c"}
//! {"id":7,"realm":"shop","name":"alice","blob":"AR8uPUz…"}
//! {"realm":"shop","name":"bob","deleted":true}
//! {"end":true,"records":2,"unopened":0,"version":42,"next_id":9,"sha256":"…"}
//! ```
//!
//! Later lines of a principal replace earlier ones: what changes while the store is read comes after
//! it, so that the file is exact at the trailer's `version`, however long reading took. `blob` is what
//! the store holds, sealed, in base64; it opens only as that entry's. With seeds revealed there is
//! `entry` in its place, the plain payload. `sha256` is that of all lines, the trailer with `""` in its place:
//! a cut or changed file is noticed, but anybody can make one for a file of their own.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::Arc;

use data_encoding::{BASE64, HEXLOWER};
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Position, Row, Step, Store, StoreError, Version, payload};
use crate::clock::{Clock, UnixTime};
use crate::entry::{EntryId, Principal};
use crate::seal;

mod read;

pub use read::{Checked, ExportFile, MAX_LINE, ReadError, Unopened};

/// The version of the format.
const FORMAT: u32 = 1;
/// Bytes that are written at once.
const CHUNK: usize = 64 << 10;
/// How often the changes are read that came while changes were read.
const ROUNDS: usize = 1_000;

/// What was exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The file is the store at this version.
    pub version: Version,
    /// Entries that the store held when it was read.
    pub entries: u64,
    /// Changes that came while it was read.
    pub changes: u64,
    /// Lines whose entries cannot be opened; they are in the file as they are.
    pub unopened: u64,
}

/// Why there is no export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is written to.
    #[error("cannot write the export: {0}")]
    Output(#[from] io::Error),
    /// Its seed would be readable.
    #[error(
        "the entry of {0} is not sealed: run `otpgate store rekey --seal-plain`, or let the export \
         hold seeds"
    )]
    NotSealed(Principal),
    /// The place in the change log was lost.
    #[error("the store changes too fast to be exported ({0}): try again")]
    Restless(&'static str),
}

impl Store {
    /// Writes all entries to `out`, in bounded memory, while others may write to the store. With `reveal`
    /// seeds are written plainly. `progress` hears how many entries were written.
    ///
    /// # Errors
    /// Then what was written is no export: it has no trailer.
    pub async fn export(
        &self,
        out: &mut (dyn Write + Send),
        reveal: bool,
        clock: Arc<dyn Clock>,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<Exported, ExportError> {
        let mut feed = self.feed(clock.clone()).await?;
        let mut lines = Lines::new(self, out, reveal);
        lines.header(self, clock.now().unix)?;
        let mut entries = 0;
        // A failure cannot end the load; what comes after it is passed over.
        let mut written = Ok(());
        let mut take = |row: Row| {
            if written.is_ok() {
                written = lines.put(&row);
                entries += 1;
                progress(entries);
            }
        };
        let mut position = feed.load(&mut take).await?;
        written?;
        let mut changes = 0;
        // Rows may be newer than the position that they come with: then what made them so comes next.
        let mut newer: Option<HashSet<Principal>> = None;
        for _ in 0..ROUNDS {
            let (rows, next) = match feed.poll(&position).await? {
                Step::Current { .. } => {
                    return self.finish(lines, position, entries, changes).await;
                }
                Step::Lost(why) => return Err(ExportError::Restless(why)),
                Step::Changed { rows, position, .. } => (rows, position),
            };
            let settled = newer
                .as_ref()
                .is_some_and(|newer| rows.iter().all(|(principal, _)| !newer.contains(principal)));
            if settled {
                return self.finish(lines, position, entries, changes).await;
            }
            for (principal, row) in &rows {
                match row {
                    Some(row) => lines.put(row)?,
                    None => lines.deleted(principal)?,
                }
            }
            changes += rows.len() as u64;
            let is_newer = |row: &Option<Row>| {
                row.as_ref().is_none_or(|row| row.revision > next.version || row.revision.0 == 0)
            };
            let rows = rows.into_iter();
            newer = Some(rows.filter(|(_, row)| is_newer(row)).map(|(who, _)| who).collect());
            position = next;
        }
        Err(ExportError::Restless("entries change faster than they can be read"))
    }

    async fn finish(
        &self,
        lines: Lines<'_>,
        position: Position,
        entries: u64,
        changes: u64,
    ) -> Result<Exported, ExportError> {
        // Asked last, so that it is beyond every number in the file.
        let next_id = self.timed("next_id", self.backend.next_id()).await?;
        let unopened = lines.unopened;
        lines.trailer(position.version, next_id)?;
        Ok(Exported { version: position.version, entries, changes, unopened })
    }
}

/// Writes the lines of an export.
struct Lines<'a> {
    store: &'a Store,
    out: &'a mut (dyn Write + Send),
    reveal: bool,
    /// Not written yet.
    buffer: Zeroizing<Vec<u8>>,
    digest: Context,
    records: u64,
    unopened: u64,
}

/// The first line. A file is recognised by the beginning of this.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    otpgate_export: u32,
    sealed: bool,
    store: String,
    created_at: UnixTime,
    /// Which key the store writes with.
    key: Option<String>,
}

/// The last line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trailer {
    end: bool,
    records: u64,
    unopened: u64,
    version: u64,
    next_id: u64,
    sha256: String,
}

impl Trailer {
    /// As it stands in the file.
    fn text(&self) -> String {
        serde_json::to_string(self).expect("plain data serialises")
    }

    /// What `sha256` must be, given the digest of all lines before.
    fn sum(&self, mut digest: Context) -> String {
        let Self { end, records, unopened, version, next_id, .. } = *self;
        let open = Self { end, records, unopened, version, next_id, sha256: String::new() };
        digest.update(open.text().as_bytes());
        HEXLOWER.encode(digest.finish().as_ref())
    }
}

/// What begins every line of an entry.
#[derive(Serialize)]
struct Who<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<EntryId>,
    realm: &'a str,
    name: &'a str,
}

impl<'a> Lines<'a> {
    fn new(store: &'a Store, out: &'a mut (dyn Write + Send), reveal: bool) -> Self {
        // Never grows: growing would leave copies of seeds behind.
        let buffer = Zeroizing::new(Vec::with_capacity(CHUNK + MAX_LINE));
        Self { store, out, reveal, buffer, digest: Context::new(&SHA256), records: 0, unopened: 0 }
    }

    fn header(&mut self, store: &Store, now: UnixTime) -> io::Result<()> {
        let key = store.sealer.load().key_ids().first().map(ToString::to_string);
        let header = Header {
            otpgate_export: FORMAT,
            sealed: !self.reveal,
            store: store.kind().to_owned(),
            created_at: now,
            key,
        };
        let line = serde_json::to_string(&header).expect("plain data serialises");
        self.line(&[line.as_bytes()])
    }

    fn put(&mut self, row: &Row) -> Result<(), ExportError> {
        let opened = self.store.unseal(row);
        self.unopened += u64::from(opened.is_err());
        let who = who(Some(row.id), &row.principal);
        self.records += 1;
        match opened {
            Ok(entry) if self.reveal => {
                let payload = payload::write(&entry);
                Ok(self.line(&[who.as_bytes(), b",\"entry\":", &payload, b"}"])?)
            }
            _ if seal::is_plain(&row.blob.0) && !self.reveal => {
                Err(ExportError::NotSealed(row.principal.clone()))
            }
            _ => {
                let blob = BASE64.encode(&row.blob.0);
                Ok(self.line(&[who.as_bytes(), b",\"blob\":\"", blob.as_bytes(), b"\"}"])?)
            }
        }
    }

    fn deleted(&mut self, principal: &Principal) -> io::Result<()> {
        self.records += 1;
        self.line(&[who(None, principal).as_bytes(), b",\"deleted\":true}"])
    }

    fn trailer(mut self, version: Version, next_id: EntryId) -> io::Result<()> {
        self.flush()?;
        let (records, unopened) = (self.records, self.unopened);
        let (version, next_id, sha256) = (version.0, next_id.0, String::new());
        let mut trailer = Trailer { end: true, records, unopened, version, next_id, sha256 };
        trailer.sha256 = trailer.sum(self.digest.clone());
        self.line(&[trailer.text().as_bytes()])?;
        self.flush()?;
        self.out.flush()
    }

    fn line(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum::<usize>() + 1;
        if length > MAX_LINE {
            return Err(io::Error::other("an entry is longer than any can be"));
        }
        parts.iter().for_each(|part| self.buffer.extend_from_slice(part));
        self.buffer.push(b'\n');
        if self.buffer.len() >= CHUNK { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.digest.update(&self.buffer);
        self.out.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// The beginning of a line, still open.
fn who(id: Option<EntryId>, principal: &Principal) -> String {
    let (realm, name) = (principal.realm.as_str(), principal.name.as_str());
    let mut json = serde_json::to_string(&Who { id, realm, name }).expect("plain data serialises");
    json.pop();
    json
}
