//! Raw routes: which of them can do no harm.
//!
//! Nobody but the upstream knows what a raw path means: `/files/../admin` is as good as `/admin`. So a raw
//! route is safe only if it lets nobody get further than by asking for the other path directly.

use std::collections::BTreeSet;

use super::{Policy, Route, is_below};

/// Why a raw route is unsafe: to which path it would lead, and past what.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RawConflict {
    /// Past a stricter route.
    #[error("a raw path may become one below `{0}`, which is stricter")]
    Stricter(String),
    /// To where nothing is open.
    #[error("a raw path may become one below `{0}` that no route governs")]
    Nothing(String),
}

impl Policy {
    /// Whether a raw path that `raw`, a raw route of this policy, governs may become one at the upstream
    /// that fewer may ask for. If no other route leads to its upstream servers (`own_servers`), only what
    /// is configured below its path counts.
    #[must_use]
    pub fn raw_conflict(&self, raw: &Route, own_servers: bool) -> Option<RawConflict> {
        let [mut paths, mut hosts, mut methods] = [(); 3].map(|()| BTreeSet::from([""]));
        for route in &self.routes {
            paths.insert(&route.prefix);
            hosts.extend(route.hosts.iter().map(String::as_str));
            methods.extend(route.methods.iter().map(String::as_str));
        }
        // The empty ones stand for those that no route names. Between prefixes nothing changes, so that
        // these combinations are all that there are.
        hosts.retain(|host| raw.governs_host(host));
        methods.retain(|method| raw.governs_method(method));
        paths.retain(|path| !own_servers || is_below(path, &raw.prefix));
        let outcomes = paths.iter().flat_map(|path| {
            let who =
                hosts.iter().flat_map(|host| methods.iter().map(move |method| (host, method)));
            who.map(move |(host, method)| (path, self.find(method, host, path)))
        });
        let shown = |path: &str| if path.is_empty() { "/".to_owned() } else { path.to_owned() };
        for (path, rule) in outcomes {
            match rule {
                None => return Some(RawConflict::Nothing(shown(path))),
                Some(rule) if !raw.is_as_strict_as(rule) => {
                    return Some(RawConflict::Stricter(shown(path)));
                }
                Some(_) => {}
            }
        }
        None
    }
}
