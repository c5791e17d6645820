//! Which realms' entries a follower keeps.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::log;

/// All realms, or those that are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope(Option<Arc<Listed>>);

#[derive(Debug, PartialEq, Eq)]
struct Listed {
    realms: BTreeSet<String>,
    /// As they stand before the slash of [`log::key_of`].
    encoded: BTreeSet<String>,
}

impl Scope {
    /// These realms alone.
    #[must_use]
    pub fn only(realms: impl IntoIterator<Item = String>) -> Self {
        let realms: BTreeSet<_> = realms.into_iter().collect();
        let encoded = realms.iter().map(|realm| log::encode(realm)).collect();
        Self(Some(Arc::new(Listed { realms, encoded })))
    }

    /// The listed realms; `None`: all.
    #[must_use]
    pub fn realms(&self) -> Option<&BTreeSet<String>> {
        self.0.as_deref().map(|listed| &listed.realms)
    }

    /// Whether entries of `realm` are kept.
    #[must_use]
    pub fn has(&self, realm: &str) -> bool {
        self.realms().is_none_or(|realms| realms.contains(realm))
    }

    /// Whether the entry with that key is kept.
    pub(super) fn has_key(&self, key: &str) -> bool {
        let Some(listed) = &self.0 else { return true };
        key.split_once('/').is_some_and(|(realm, _)| listed.encoded.contains(realm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Principal;

    #[test]
    fn keys_belong_to_their_realm() {
        let scope = Scope::only(["a/b".to_owned(), "c".to_owned()]);
        for (realm, kept) in [("a/b", true), ("c", true), ("a", false), ("b", false), ("cc", false)]
        {
            let who = Principal::parse("c/d", realm).unwrap();
            assert_eq!(scope.has_key(&log::key_of((&who).into())), kept, "{realm}");
            assert_eq!(scope.has(realm), kept, "{realm}");
            assert!(Scope::default().has_key(&log::key_of((&who).into())));
        }
    }
}
