//! Reads an export: checks all of it first, then gives single entries.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use data_encoding::BASE64;
use ring::digest::{Context, SHA256};
use serde::Deserialize;
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use super::{FORMAT, Header, Trailer};
use crate::clock::UnixTime;
use crate::entry::{Entry, EntryId, Principal};
use crate::seal::{KeyId, SealError, Sealer};
use crate::store::import::{Candidates, Gathering, Source};
use crate::store::payload;

/// Bytes of the longest line: several times what the largest entry takes.
pub const MAX_LINE: usize = 64 << 10;
/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// The most entries that do not open that are named.
const MAX_NAMED: usize = 1_000;
/// How the file and its last line begin.
const HEADER_START: &[u8] = b"{\"otpgate_export\":";
const TRAILER_START: &[u8] = b"{\"end\":";

/// Why a file cannot be imported. Nothing here quotes the file: it may hold seeds.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("cannot read it: {0}")]
    Input(#[from] io::Error),
    /// It was written by a newer otpgate.
    #[error("its format is number {0}, this otpgate knows number {FORMAT}")]
    Newer(u32),
    /// It has no trailer.
    #[error("it is cut off after line {0}: the end is missing")]
    Cut(u64),
    /// Something after the trailer.
    #[error("something follows the end of the export (line {0})")]
    Longer(u64),
    /// A line that is none of an export.
    #[error("line {0}: {1}")]
    Line(u64, String),
    /// The digest or the count differs.
    #[error("it was changed or damaged: its lines are not those that were written")]
    Changed,
    /// Two entries with one number.
    #[error("two entries in it have the id {0}")]
    TwoWithId(EntryId),
}

/// An entry that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unopened {
    /// Its number.
    pub id: EntryId,
    /// Whose it is.
    pub principal: Principal,
    /// Why.
    pub why: String,
}

/// What a file holds.
#[derive(Debug)]
pub struct Checked {
    /// When it was made.
    pub created_at: UnixTime,
    /// Whether seeds are sealed in it.
    pub sealed: bool,
    /// The store's version that it shows.
    pub version: u64,
    /// No entry of that store had this number or a larger one.
    pub next_id: EntryId,
    /// SHA-256 of its lines: says which export it is.
    pub sha256: String,
    /// The entries that can be used.
    pub candidates: Candidates,
    /// How many cannot.
    pub unopened: u64,
    /// The first of these.
    pub named: Vec<Unopened>,
}

/// A line about an entry.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Record<'a> {
    id: Option<u64>,
    #[serde(borrow)]
    realm: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    blob: Option<&'a str>,
    #[serde(borrow)]
    entry: Option<&'a RawValue>,
    #[serde(default)]
    deleted: bool,
}

/// What a record says, its form being good.
enum Content {
    Deleted(Principal),
    Entry(EntryId, Principal, Result<Entry, String>),
}

/// An export in a file.
pub struct ExportFile {
    file: BufReader<File>,
    /// Where in the file `file` is.
    at: u64,
    line: Zeroizing<Vec<u8>>,
    sealer: Sealer,
}

impl ExportFile {
    /// Whether a file begins as an export does.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn is_one(path: &Path) -> io::Result<bool> {
        let mut start = [0; HEADER_START.len()];
        match File::open(path)?.read_exact(&mut start) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            read => read.map(|()| start == HEADER_START),
        }
    }

    /// Opens a file; `None` if it is no export. Entries are opened with the keys of `sealer`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn open(path: &Path, sealer: Sealer) -> io::Result<Option<Self>> {
        if !Self::is_one(path)? {
            return Ok(None);
        }
        let file = BufReader::with_capacity(CHUNK, File::open(path)?);
        let line = Zeroizing::new(Vec::with_capacity(MAX_LINE + 1));
        Ok(Some(Self { file, at: 0, line, sealer }))
    }

    /// Reads all of it. `progress` hears how many bytes were read.
    ///
    /// # Errors
    /// If it is not exactly what was exported once, or no store could hold it.
    pub fn check(&mut self, mut progress: impl FnMut(u64)) -> Result<Checked, ReadError> {
        let header = self.header()?;
        let mut digest = Context::new(&SHA256);
        digest.update(&self.line);
        let (mut number, mut records) = (1, 0);
        let mut found = Gathering::default();
        let trailer: Trailer = loop {
            let place = self.at;
            if !self.next()? {
                return Err(ReadError::Cut(number));
            }
            number += 1;
            if self.line.starts_with(TRAILER_START) {
                break self.parse(number)?;
            }
            digest.update(&self.line);
            records += 1;
            match self.content(number, header.sealed)? {
                Content::Deleted(principal) => found.remove(&principal),
                Content::Entry(id, principal, entry) => {
                    found.put(&principal, id, place, entry.is_ok());
                }
            }
            progress(self.at);
        };
        if self.next()? || !self.line.is_empty() {
            return Err(ReadError::Longer(number + 1));
        }
        if trailer.sha256 != trailer.sum(digest) || trailer.records != records || !trailer.end {
            return Err(ReadError::Changed);
        }
        let (candidates, unopened) = found.sort().map_err(ReadError::TwoWithId)?;
        let mut named = Vec::new();
        for place in unopened.iter().take(MAX_NAMED) {
            if let Content::Entry(id, principal, Err(why)) = self.content_at(*place)? {
                named.push(Unopened { id, principal, why });
            }
        }
        Ok(Checked {
            created_at: header.created_at,
            sealed: header.sealed,
            version: trailer.version,
            next_id: EntryId(trailer.next_id),
            sha256: trailer.sha256,
            candidates,
            unopened: unopened.len() as u64,
            named,
        })
    }

    fn header(&mut self) -> Result<Header, ReadError> {
        self.seek(0)?;
        if !self.next()? {
            return Err(ReadError::Cut(0));
        }
        // Read before the rest: that may be otherwise in another format.
        let digits = self.line[HEADER_START.len()..].iter().take_while(|b| b.is_ascii_digit());
        let digits: String = digits.map(|b| char::from(*b)).collect();
        match digits.parse() {
            Ok(FORMAT) => self.parse(1),
            Ok(other) => Err(ReadError::Newer(other)),
            Err(_) => Err(ReadError::Line(1, "not the beginning of an export".to_owned())),
        }
    }

    /// Reads the next line; `false` if there is none. A line without an end is none.
    fn next(&mut self) -> Result<bool, ReadError> {
        self.line.clear();
        let limit = MAX_LINE as u64 + 1;
        let read = self.file.by_ref().take(limit).read_until(b'\n', &mut self.line)?;
        self.at += read as u64;
        if read > MAX_LINE {
            return Err(ReadError::Changed);
        }
        Ok(self.line.ends_with(b"\n"))
    }

    fn seek(&mut self, place: u64) -> io::Result<()> {
        match (i64::try_from(self.at), i64::try_from(place)) {
            // Keeps what was read ahead.
            (Ok(from), Ok(to)) => self.file.seek_relative(to - from)?,
            _ => drop(self.file.seek(SeekFrom::Start(place))?),
        }
        self.at = place;
        Ok(())
    }

    fn parse<'a, T: Deserialize<'a>>(&'a self, number: u64) -> Result<T, ReadError> {
        // serde's message may quote a seed: say only where it stopped.
        serde_json::from_slice(&self.line).map_err(|e| {
            ReadError::Line(number, format!("not as in an export (column {})", e.column()))
        })
    }

    /// What the line says that was read last. An entry that does not open may be replaced later.
    fn content(&self, number: u64, sealed: bool) -> Result<Content, ReadError> {
        let record: Record<'_> = self.parse(number)?;
        let bad = |why: &str| ReadError::Line(number, why.to_owned());
        let principal = Principal::parse(&record.name, &record.realm)
            .ok()
            .filter(|p| p.name.as_str() == record.name && p.realm.as_str() == record.realm)
            .ok_or_else(|| bad("an impossible name or realm"))?;
        let id = record.id.map(EntryId);
        if id.is_some_and(|id| id.0 == 0 || id > EntryId::MAX) {
            return Err(bad("an impossible id"));
        }
        match (record.deleted, id, record.blob, record.entry) {
            (true, None, None, None) => Ok(Content::Deleted(principal)),
            (false, Some(id), Some(blob), None) => {
                let entry = self.unseal(id, &principal, blob);
                Ok(Content::Entry(id, principal, entry))
            }
            (false, Some(_), None, Some(_)) if sealed => {
                Err(bad("a plain entry, though the file says that all are sealed"))
            }
            (false, Some(id), None, Some(plain)) => {
                let entry = payload::read(id, &principal, plain.get().as_bytes());
                Ok(Content::Entry(id, principal, entry))
            }
            _ => Err(bad("neither an entry nor a deletion")),
        }
    }

    fn unseal(&self, id: EntryId, principal: &Principal, blob: &str) -> Result<Entry, String> {
        let blob = BASE64.decode(blob.as_bytes()).map_err(|_| "its blob is not base64")?;
        if blob.is_empty() {
            return Err("the store had lost it when it was exported".to_owned());
        }
        if KeyId::of(&blob).is_none() {
            return Err("it is not sealed".to_owned());
        }
        let payload = self.sealer.open(principal, id, &blob).map_err(|error| match error {
            SealError::UnknownKey(key) => {
                format!("sealed with the key `{key}`: name its file with `--export-key-file`")
            }
            other => other.to_string(),
        })?;
        payload::read(id, principal, &payload)
    }

    fn content_at(&mut self, place: u64) -> Result<Content, ReadError> {
        self.seek(place)?;
        if !self.next()? {
            return Err(ReadError::Changed);
        }
        self.content(0, false)
    }
}

impl Source for ExportFile {
    fn entry(&mut self, place: u64) -> Result<Entry, ReadError> {
        match self.content_at(place)? {
            Content::Entry(_, _, Ok(entry)) => Ok(entry),
            // It did a moment ago.
            _ => Err(ReadError::Changed),
        }
    }
}
