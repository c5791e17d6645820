//! Seals every entry anew with the writing key, beside gates that run and admins that write.

use super::{Action, Blob, Expect, Mutation, Row, Store, StoreError, open_with, payload};
use crate::entry::{EntryId, Principal};
use crate::seal::{KeyId, SealError, Sealer};

/// Entries read and written at once.
const BATCH: usize = 200;
/// How often one entry is tried again that others keep changing.
const ATTEMPTS: u32 = 100;
/// The most entries that are named in a report.
const MAX_NAMED: usize = 1_000;

/// What became of a store's entries.
#[derive(Debug, Default)]
pub struct Rekeyed {
    /// Sealed anew.
    pub rekeyed: u64,
    /// Left alone: sealed with the writing key.
    pub already: u64,
    /// Left alone: they cannot be opened.
    pub unopened: u64,
    /// The first of these.
    pub named: Vec<Unopened>,
    /// Each old key, in the order of the settings, and how many entries bear it now.
    pub old_keys: Vec<(KeyId, u64)>,
}

/// An entry that cannot be opened.
#[derive(Debug)]
pub struct Unopened {
    /// Its number.
    pub id: EntryId,
    /// Whose it is.
    pub principal: Principal,
    /// Why.
    pub why: String,
}

impl Rekeyed {
    /// Whether every entry is sealed with the writing key.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.unopened == 0 && self.old_keys.iter().all(|(_, entries)| *entries == 0)
    }

    fn could_not_open(&mut self, row: Row, error: StoreError) {
        self.unopened += 1;
        if self.named.len() < MAX_NAMED {
            let why = match error {
                StoreError::Sealed { cause, .. } => cause.to_string(),
                other => other.to_string(),
            };
            self.named.push(Unopened { id: row.id, principal: row.principal, why });
        }
    }
}

impl Store {
    /// Seals every entry anew that does not bear the writing key; nothing else of it changes. Whatever
    /// ends this early, calling it again goes on. With `seal_plain` entries that are not sealed are
    /// taken for good. `progress` hears how many entries were looked at. Sealing must be on.
    ///
    /// # Errors
    /// As the backend; what was done until then stays done.
    pub async fn rekey(
        &self,
        seal_plain: bool,
        mut progress: impl FnMut(u64),
    ) -> Result<Rekeyed, StoreError> {
        debug_assert!(self.sealer.load().is_on());
        let mut report = Rekeyed::default();
        let (mut after, mut seen) = (None, 0);
        while let Some(rows) = self.page(&mut after).await? {
            seen += rows.len() as u64;
            self.rekey_rows(rows, seal_plain, &mut report).await?;
            progress(seen);
        }
        report.old_keys = self.count_old_keys().await?;
        Ok(report)
    }

    async fn rekey_rows(
        &self,
        rows: Vec<Row>,
        seal_plain: bool,
        report: &mut Rekeyed,
    ) -> Result<(), StoreError> {
        let reseal = |row| self.resealed(row, seal_plain, report);
        let batch: Vec<_> = rows.into_iter().filter_map(reseal).collect();
        if batch.is_empty() {
            return Ok(());
        }
        match self.timed("commit", self.backend.commit(&batch)).await {
            Ok(_) => report.rekeyed += batch.len() as u64,
            // Somebody changed one of them in between, or nobody knows: one by one, as they are now.
            Err(StoreError::Conflict | StoreError::Unknown(_)) => {
                for mutation in batch {
                    let Action::Put { id, .. } = mutation.action else { continue };
                    self.rekey_one(id, seal_plain, report).await?;
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn rekey_one(
        &self,
        id: EntryId,
        seal_plain: bool,
        report: &mut Rekeyed,
    ) -> Result<(), StoreError> {
        for _ in 0..ATTEMPTS {
            let row = self.timed("get", self.backend.get_by_id(id)).await?;
            // Deleted meanwhile, or done.
            let Some(row) = row else { return Ok(()) };
            let Some(mutation) = self.resealed(row, seal_plain, report) else { return Ok(()) };
            match self.timed("commit", self.backend.commit(&[mutation])).await {
                Ok(_) => {
                    report.rekeyed += 1;
                    return Ok(());
                }
                Err(StoreError::Conflict | StoreError::Unknown(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Conflict)
    }

    /// What to write in place of `row`; if nothing, the report says why.
    fn resealed(&self, row: Row, seal_plain: bool, report: &mut Rekeyed) -> Option<Mutation> {
        let sealer = self.sealer.load();
        // Also what bears the writing key: it may be damaged.
        let payload = match open_with(&sealer, &row) {
            Err(StoreError::Sealed { cause: SealError::NotSealed, .. }) if seal_plain => {
                open_with(&Sealer::off(), &row).and_then(|payload| {
                    // Sealing makes it look like ours: at least it must be an entry.
                    match payload::read(row.id, &row.principal, &payload) {
                        Ok(_) => Ok(payload),
                        Err(what) => Err(StoreError::Corrupt(what)),
                    }
                })
            }
            opened => opened,
        };
        let payload = match payload {
            Ok(payload) => payload,
            Err(error) => {
                report.could_not_open(row, error);
                return None;
            }
        };
        if KeyId::of(&row.blob.0) == sealer.key_ids().first().copied() {
            report.already += 1;
            return None;
        }
        let blob = Blob(sealer.seal(&row.principal, row.id, &payload));
        let action = Action::Put { id: row.id, blob };
        Some(Mutation { principal: row.principal, expect: Expect::At(row.revision), action })
    }

    /// Looks at all entries once more: gates may have written with an old key meanwhile.
    async fn count_old_keys(&self) -> Result<Vec<(KeyId, u64)>, StoreError> {
        let keys = self.sealer.load().key_ids();
        let mut counts: Vec<_> = keys[1..].iter().map(|key| (*key, 0)).collect();
        let mut after = None;
        while let Some(rows) = self.page(&mut after).await? {
            for key in rows.iter().filter_map(|row| KeyId::of(&row.blob.0)) {
                // A file may name the writing key again.
                for (_, count) in counts.iter_mut().filter(|(old, _)| *old == key && key != keys[0])
                {
                    *count += 1;
                }
            }
        }
        Ok(counts)
    }

    /// The next rows after the number `after`, which moves on; `None` after the last.
    async fn page(&self, after: &mut Option<EntryId>) -> Result<Option<Vec<Row>>, StoreError> {
        let rows = self.timed("list", self.backend.list(*after, BATCH)).await?;
        let Some(last) = rows.last() else { return Ok(None) };
        *after = Some(last.id);
        Ok(Some(rows))
    }
}
