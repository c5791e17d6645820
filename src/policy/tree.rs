//! Routes by path and host: however many there are, a request costs what its path's segments cost. Only the
//! configuration puts anything into these tables, so that their hashes need not withstand attacks.

use fnv::FnvHashMap;

use super::path::{fold, folded_segments};
use super::{Route, is_below};

/// Prefixes of routes by their segments, as [`fold`] leaves them: on the way down along a path, all those lie
/// that it is below, and those that servers may take it to be below.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    /// The first one is `/`.
    nodes: Vec<Node>,
}

/// All prefixes that become the same by folding.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    /// How long they are then.
    pub(super) folded_len: usize,
    /// The longest first.
    pub(super) prefixes: Vec<Prefix>,
    /// By the next segment.
    children: FnvHashMap<Box<str>, usize>,
}

/// The routes of one path, as places in the policy's list, in its order.
#[derive(Clone, Debug, Default)]
pub(super) struct Prefix {
    pub(super) path: Box<str>,
    by_host: FnvHashMap<Box<str>, Vec<usize>>,
    for_all_hosts: Vec<usize>,
}

impl Tree {
    /// Of `routes`, those of one path in the order in which they are tried.
    pub(super) fn new(routes: &[Route]) -> Self {
        let mut tree = Self { nodes: vec![Node::default()] };
        for (place, route) in routes.iter().enumerate() {
            tree.node(&route.prefix).prefix(&route.prefix).add(route, place);
        }
        tree
    }

    /// The node of a prefix, made if need be.
    fn node(&mut self, prefix: &str) -> &mut Node {
        let (mut at, mut folded_len) = (0, 0);
        for segment in folded_segments(prefix) {
            let next = self.nodes.len();
            folded_len += "/".len() + segment.len();
            at = *self.nodes[at].children.entry((*segment).into()).or_insert(next);
            if at == next {
                self.nodes.push(Node { folded_len, ..Node::default() });
            }
        }
        debug_assert_eq!(folded_len, fold(prefix).len());
        &mut self.nodes[at]
    }

    /// The node of `/`.
    pub(super) fn root(&self) -> &Node {
        &self.nodes[0]
    }

    /// The nodes along `path`, from `/` downwards, as far as there are any.
    pub(super) fn along(&self, path: &str) -> impl Iterator<Item = &Node> {
        let mut segments = folded_segments(path);
        std::iter::successors(Some(self.root()), move |node| {
            if node.children.is_empty() {
                return None;
            }
            node.children.get(&*segments.next()?).map(|next| &self.nodes[*next])
        })
    }
}

impl Node {
    fn prefix(&mut self, path: &str) -> &mut Prefix {
        let at = self.prefixes.iter().position(|prefix| *prefix.path == *path);
        let at = at.unwrap_or_else(|| {
            let at = self.prefixes.partition_point(|prefix| prefix.path.len() >= path.len());
            self.prefixes.insert(at, Prefix { path: path.into(), ..Prefix::default() });
            at
        });
        &mut self.prefixes[at]
    }

    /// The routes among which the method decides, if the narrowest ones of `path` and `host` are here.
    pub(super) fn scope(&self, host: &str, path: &str) -> Option<&[usize]> {
        let mut here = self.prefixes.iter().filter(|prefix| is_below(path, &prefix.path));
        here.find_map(|prefix| prefix.scope(host))
    }
}

impl Prefix {
    fn add(&mut self, route: &Route, place: usize) {
        for host in &route.hosts {
            self.by_host.entry(host.as_str().into()).or_default().push(place);
        }
        if route.hosts.is_empty() {
            self.for_all_hosts.push(place);
        }
    }

    /// The routes for a host: its own before those for all. They are alternatives of each other; a wider
    /// scope is never fallen back to.
    pub(super) fn scope(&self, host: &str) -> Option<&[usize]> {
        let own = self.by_host.get(host).unwrap_or(&self.for_all_hosts);
        (!own.is_empty()).then_some(own)
    }
}
