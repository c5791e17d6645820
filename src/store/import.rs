//! Takes entries of another place over, with their numbers, in memory that grows by a few dozen bytes an
//! entry: it is remembered where each is to be read, not what it says.

use std::collections::HashMap;

use super::digest::NamePrint;
use super::export::ReadError;
use super::{MAX_BATCH, Store, StoreError, Stored};
use crate::entry::{Entry, EntryId, Principal};

/// Entries of the store that are looked at at once.
const PAGE: usize = 1_000;
/// The most clashes that are named.
const MAX_NAMED: usize = 1_000;

/// Where the entries of an import are read.
pub trait Source {
    /// The entry at a place that the source named. Cheapest in the order of places.
    ///
    /// # Errors
    /// If it is not there any more.
    fn entry(&mut self, place: u64) -> Result<Entry, ReadError>;
}

/// Why an import ended early.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file.
    #[error(transparent)]
    Source(#[from] ReadError),
}

/// Entries as they are found, a later one of a principal in place of the one before.
#[derive(Debug, Default)]
pub struct Gathering {
    /// Of every principal: number, place, and whether the entry can be used.
    latest: HashMap<NamePrint, (EntryId, u64, bool)>,
}

impl Gathering {
    /// An entry at `place`.
    pub fn put(&mut self, principal: &Principal, id: EntryId, place: u64, usable: bool) {
        self.latest.insert(NamePrint::of(principal.into()), (id, place, usable));
    }

    /// No entry any more.
    pub fn remove(&mut self, principal: &Principal) {
        self.latest.remove(&NamePrint::of(principal.into()));
    }

    /// The entries that can be used, and the places of those that cannot.
    ///
    /// # Errors
    /// A number that two of them have.
    pub fn sort(self) -> Result<(Candidates, Vec<u64>), EntryId> {
        let all = self.latest.into_iter().map(|(print, (id, place, usable))| {
            let fate = if usable { Fate::New } else { Fate::Unusable };
            Candidate { id, place, print, fate }
        });
        let mut list: Vec<_> = all.collect();
        list.sort_unstable_by_key(|one| one.id);
        if let Some(twice) = list.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(twice[0].id);
        }
        let unusable = list.iter().filter(|one| one.fate == Fate::Unusable);
        let mut unusable: Vec<_> = unusable.map(|one| one.place).collect();
        unusable.sort_unstable();
        list.retain(|one| one.fate != Fate::Unusable);
        let mut by_name: Vec<_> = (0..list.len()).collect();
        by_name.sort_unstable_by_key(|index| list[*index].print);
        Ok((Candidates { list, by_name }, unusable))
    }
}

/// An entry to be imported.
#[derive(Debug)]
struct Candidate {
    id: EntryId,
    place: u64,
    print: NamePrint,
    fate: Fate,
}

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It cannot be read.
    Unusable,
    /// The store does not have it.
    New,
    /// The store has it already.
    Present,
    /// The store has another entry of its principal.
    NameTaken,
    /// The store uses its number otherwise.
    IdTaken,
}

/// The entries to be imported, each principal and each number once.
#[derive(Debug, Default)]
pub struct Candidates {
    /// By number.
    list: Vec<Candidate>,
    /// Indexes of the list, by print.
    by_name: Vec<usize>,
}

/// What the store has of the entries to be imported.
#[derive(Debug, Default)]
pub struct Compared {
    /// It lacks so many.
    pub new: u64,
    /// It has so many already.
    pub present: u64,
    /// So many clash with what it has.
    pub clashes: u64,
    /// The first of these and why.
    pub named: Vec<(String, &'static str)>,
}

impl Candidates {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.list.len() as u64
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Settles what an entry of the store means for those to be imported.
    fn meet(
        &mut self,
        stored: &Stored,
        source: &mut dyn Source,
        same: fn(&Entry, &Entry) -> bool,
    ) -> Result<(), ReadError> {
        let print = NamePrint::of((&stored.principal).into());
        let of_name = self.by_name.binary_search_by_key(&print, |index| self.list[*index].print);
        let of_name = of_name.ok().map(|found| self.by_name[found]);
        if let Some(index) = of_name {
            let new = source.entry(self.list[index].place)?;
            let is_same = stored.entry.as_ref().is_ok_and(|old| same(old, &new));
            self.list[index].fate = if is_same { Fate::Present } else { Fate::NameTaken };
        }
        let of_id = self.list.binary_search_by_key(&stored.id, |one| one.id).ok();
        if let Some(index) = of_id.filter(|index| Some(*index) != of_name)
            && self.list[index].fate == Fate::New
        {
            self.list[index].fate = Fate::IdTaken;
        }
        Ok(())
    }

    fn summary(&self, source: &mut dyn Source) -> Result<Compared, ReadError> {
        let mut compared = Compared::default();
        for one in &self.list {
            let why = match one.fate {
                Fate::Unusable => continue,
                Fate::New => {
                    compared.new += 1;
                    continue;
                }
                Fate::Present => {
                    compared.present += 1;
                    continue;
                }
                Fate::NameTaken => "the store has another entry of that name",
                Fate::IdTaken => "the store uses that id otherwise",
            };
            compared.clashes += 1;
            if compared.named.len() < MAX_NAMED {
                let principal = source.entry(one.place)?.principal;
                compared.named.push((format!("id {} ({principal})", one.id), why));
            }
        }
        Ok(compared)
    }
}

impl Store {
    /// Closes a new or empty store to everybody but what is returned, until [`Self::end_import`]; see
    /// [`super::Backend::begin_import`]. `None` if it has entries.
    ///
    /// # Errors
    /// As the backend.
    pub async fn begin_import(&self, tag: &str) -> Result<Option<Self>, StoreError> {
        let importer = self.timed("begin_import", self.backend.begin_import(tag)).await?;
        Ok(importer.map(|backend| Self { backend, ..self.clone() }))
    }

    /// Opens what [`Self::begin_import`] closed.
    ///
    /// # Errors
    /// As the backend.
    pub async fn end_import(&self) -> Result<(), StoreError> {
        self.timed("end_import", self.backend.end_import()).await
    }

    /// See [`super::Backend::raise_next_id`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn raise_next_id(&self, next: EntryId) -> Result<(), StoreError> {
        self.timed("raise_next_id", self.backend.raise_next_id(next)).await
    }

    /// Finds out which of `candidates` the store lacks; `same` says whether it has one already.
    /// `progress` hears how many entries of the store were looked at. A store that is not there lacks all.
    ///
    /// # Errors
    /// As the backend, or if the source fails.
    pub async fn compare(
        &self,
        candidates: &mut Candidates,
        source: &mut dyn Source,
        same: fn(&Entry, &Entry) -> bool,
        mut progress: impl FnMut(u64),
    ) -> Result<Compared, ImportError> {
        candidates.list.iter_mut().for_each(|one| one.fate = Fate::New);
        let (mut after, mut seen) = (None, 0);
        loop {
            let page = match self.list(after, PAGE).await {
                Err(StoreError::NotInitialised) => Vec::new(),
                page => page?,
            };
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            seen += page.len() as u64;
            for stored in &page {
                candidates.meet(stored, source, same)?;
            }
            progress(seen);
        }
        Ok(candidates.summary(source)?)
    }

    /// Inserts the entries that the store lacks, in batches of which each is inserted as a whole.
    /// `progress` hears how large each was.
    ///
    /// # Errors
    /// As the backend, [`StoreError::Conflict`] if somebody else uses a name or number since; or if the
    /// source fails. What was inserted stays.
    pub async fn take_over(
        &self,
        candidates: &Candidates,
        source: &mut dyn Source,
        mut progress: impl FnMut(usize),
    ) -> Result<(), ImportError> {
        let new = candidates.list.iter().filter(|one| one.fate == Fate::New);
        let mut places: Vec<_> = new.map(|one| one.place).collect();
        places.sort_unstable();
        for places in places.chunks(MAX_BATCH) {
            let batch: Result<Vec<_>, _> =
                places.iter().map(|place| source.entry(*place)).collect();
            self.insert(&batch?).await?;
            progress(places.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Seed;
    use crate::store::Version;

    struct Memory(Vec<Entry>);

    impl Source for Memory {
        fn entry(&mut self, place: u64) -> Result<Entry, ReadError> {
            Ok(self.0[place as usize].clone())
        }
    }

    fn entry(id: u64, name: &str) -> Entry {
        Entry::new(EntryId(id), Principal::parse(name, "r").unwrap(), Seed::random(), 1)
    }

    fn stored(entry: &Entry) -> Stored {
        let (id, principal) = (entry.id, entry.principal.clone());
        Stored { id, principal, revision: Version(1), entry: Ok(entry.clone()) }
    }

    #[test]
    fn the_latest_of_a_principal_counts_and_numbers_are_used_once() {
        let (a, b) = (entry(1, "a"), entry(2, "b"));
        let mut found = Gathering::default();
        found.put(&a.principal, EntryId(1), 10, true);
        found.put(&b.principal, EntryId(2), 20, false);
        found.put(&a.principal, EntryId(3), 30, true);
        found.remove(&b.principal);
        found.put(&b.principal, EntryId(1), 40, true);
        found.put(&entry(9, "c").principal, EntryId(9), 50, false);
        let (candidates, unusable) = found.sort().unwrap();
        let places: Vec<_> = candidates.list.iter().map(|one| (one.id.0, one.place)).collect();
        assert_eq!((places, unusable), (vec![(1, 40), (3, 30)], vec![50]));

        let mut twice = Gathering::default();
        twice.put(&a.principal, EntryId(1), 10, true);
        twice.put(&b.principal, EntryId(1), 20, true);
        assert_eq!(twice.sort().unwrap_err(), EntryId(1));
    }

    #[test]
    fn what_the_store_has_decides() {
        let mut source = Memory(["same", "other", "new", "taken"].map(|n| entry(0, n)).to_vec());
        let mut found = Gathering::default();
        for (place, entry) in source.0.iter_mut().enumerate() {
            entry.id = EntryId(place as u64 + 1);
            found.put(&entry.principal, entry.id, place as u64, true);
        }
        let (mut candidates, _) = found.sort().unwrap();
        // Its number is taken, and then, which says more, its name.
        let renamed = Entry { id: EntryId(2), ..entry(2, "else") };
        for old in [source.0[0].clone(), renamed, entry(7, "other"), entry(4, "somebody")] {
            candidates.meet(&stored(&old), &mut source, |a, b| a == b).unwrap();
        }
        let compared = candidates.summary(&mut source).unwrap();
        assert_eq!((compared.new, compared.present, compared.clashes), (1, 1, 2));
        assert_eq!(
            compared.named,
            [
                ("id 2 (other@r)".to_owned(), "the store has another entry of that name"),
                ("id 4 (taken@r)".to_owned(), "the store uses that id otherwise"),
            ]
        );
    }
}
