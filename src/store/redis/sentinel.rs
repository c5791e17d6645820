//! What Sentinels say about the primary.
//!
//! One Sentinel may be cut off together with an old primary, and know as little of the new one. So half
//! of them, rounded up, must answer: a failover needs more than half, so one of those that answer took
//! part in the last one, or hears of it within seconds. Of what they say, that of the latest failover
//! counts (`config-epoch`), and nothing else: the others name a server that may still think that it is a
//! primary, and cannot be reached by whom it would hear otherwise from.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use redis::RedisError;
use redis::aio::MultiplexedConnection;

use super::connect::{CONNECT_TIMEOUT, Connector, Node, login};
use super::error::store_error;
use crate::clock::{Clock, SystemClock};
use crate::store::StoreError;
use crate::store::url::Login;

/// How long the others are waited for once enough have answered.
const GRACE: Duration = Duration::from_millis(20);

/// What a Sentinel says.
struct Opinion {
    /// The failover that made the primary one.
    epoch: u64,
    primary: Node,
    /// How many Sentinels there are, that one included.
    sentinels: usize,
}

/// Who is the primary.
#[derive(Clone)]
pub(super) struct Verdict {
    /// That of the latest failover, in all ways in which Sentinels write it: by name, by address.
    pub(super) primaries: Vec<Node>,
    /// They were asked then.
    pub(super) asked: Instant,
}

impl Verdict {
    /// Whether `node` is the primary.
    pub(super) fn is_for(&self, node: Option<&Node>) -> bool {
        node.is_some_and(|node| self.primaries.contains(node))
    }
}

/// The Sentinels of one primary.
pub(super) struct Sentinels {
    nodes: Vec<Node>,
    service: String,
    /// To each, where one is open.
    connections: Vec<Mutex<Option<MultiplexedConnection>>>,
    /// What they said last, and when that was heard. Who asks holds the lock: the others wait for what
    /// it hears.
    heard: tokio::sync::Mutex<Option<(Instant, Result<Verdict, StoreError>)>>,
    /// How many there are, as they say.
    there: AtomicUsize,
}

impl Sentinels {
    pub(super) fn new(nodes: &[Node], service: &str) -> Self {
        Self {
            nodes: nodes.to_vec(),
            service: service.to_owned(),
            connections: nodes.iter().map(|_| Mutex::default()).collect(),
            heard: tokio::sync::Mutex::default(),
            there: AtomicUsize::new(0),
        }
    }

    /// The primary, as Sentinels said at most `age` ago.
    pub(super) async fn primary(
        &self,
        connector: &Connector,
        age: Duration,
    ) -> Result<Verdict, StoreError> {
        let came = SystemClock.monotonic();
        let mut heard = self.heard.lock().await;
        match &*heard {
            Some((_, Ok(verdict))) if verdict.asked + age >= came => return Ok(verdict.clone()),
            // Whoever waited for it would only wait for the same once more.
            Some((heard_at, Err(error))) if *heard_at >= came => return Err(error.clone()),
            _ => *heard = None,
        }
        let asked = SystemClock.monotonic();
        let told = self.opinions(connector).await.map(|opinions| self.judge(&opinions, asked));
        *heard = Some((SystemClock.monotonic(), told.clone()));
        told
    }

    fn judge(&self, opinions: &[Opinion], asked: Instant) -> Verdict {
        let there = opinions.iter().map(|opinion| opinion.sentinels).max().unwrap_or(0);
        self.there.store(there, Ordering::Relaxed);
        let latest = opinions.iter().map(|opinion| opinion.epoch).max();
        let mut primaries: Vec<Node> = Vec::new();
        for Opinion { epoch, primary, .. } in opinions {
            if Some(*epoch) == latest && !primaries.contains(primary) {
                primaries.push(primary.clone());
            }
        }
        Verdict { primaries, asked }
    }

    /// What an operator should know, where not all Sentinels are asked.
    pub(super) fn warning(&self) -> Option<String> {
        let (named, there) = (self.nodes.len(), self.there.load(Ordering::Relaxed));
        (named < there).then(|| {
            format!(
                "`store.url` names {named} of {there} Sentinels: a gate that is cut off together with \
                 these and an old primary does not notice, and revoked entries stay valid there; name all"
            )
        })
    }

    async fn opinions(&self, connector: &Connector) -> Result<Vec<Opinion>, StoreError> {
        let enough = self.nodes.len().div_ceil(2);
        let mut asking: FuturesUnordered<_> =
            (0..self.nodes.len()).map(|number| self.opinion(connector, number)).collect();
        let (mut opinions, mut trouble) = (Vec::new(), None);
        while opinions.len() < enough {
            match asking.next().await {
                Some(Ok(opinion)) => opinions.push(opinion),
                Some(Err(error)) => trouble = Some(error),
                None => return Err(too_few(opinions.len(), enough, trouble)),
            }
        }
        let rest = async {
            while let Some(answer) = asking.next().await {
                opinions.extend(answer);
            }
        };
        let _ = tokio::time::timeout(GRACE, rest).await;
        Ok(opinions)
    }

    async fn opinion(&self, connector: &Connector, number: usize) -> Result<Opinion, StoreError> {
        let connection = || self.connections[number].lock().unwrap_or_else(PoisonError::into_inner);
        let open = connection().take();
        if let Some(mut open) = open
            && let Ok(opinion) = self.ask(&mut open).await
        {
            *connection() = Some(open);
            return opinion;
        }
        let asked = async |login| {
            let address = connector.address(&self.nodes[number]);
            let mut conn = connector.dial(address, login, CONNECT_TIMEOUT).await?;
            let opinion = self.ask(&mut conn).await?;
            Ok::<_, RedisError>((conn, opinion))
        };
        let Login { username, password } = connector.sentinel_login();
        let mut answer = asked(login(username.as_deref(), password.as_ref())).await;
        // Sentinels usually take no password, and refuse one that they do not want.
        if password.is_none() && answer.as_ref().is_err_and(|e| e.code() == Some("NOAUTH")) {
            answer = asked(connector.login(0)).await;
        }
        let (conn, opinion) = answer.map_err(|error| match store_error(&error) {
            StoreError::Denied(why) => StoreError::Denied(format!("{why}, says a Sentinel")),
            error => error,
        })?;
        *connection() = Some(conn);
        opinion
    }

    /// The outer error: it gives no answer. The inner one: it does not know.
    async fn ask(
        &self,
        conn: &mut MultiplexedConnection,
    ) -> Result<Result<Opinion, StoreError>, RedisError> {
        let mut question = redis::pipe();
        question.cmd("SENTINEL").arg("get-master-addr-by-name").arg(&self.service);
        question.cmd("SENTINEL").arg("master").arg(&self.service);
        let answer: Result<(Option<Node>, HashMap<String, String>), _> =
            question.query_async(conn).await;
        let unknown = || StoreError::Unreachable("its Sentinel does not know the primary".into());
        match answer {
            Ok((Some(primary), state)) => {
                let number = |field| state.get(field).and_then(|n| n.parse::<u64>().ok());
                let others = number("num-other-sentinels").unwrap_or(0);
                let sentinels = usize::try_from(others).unwrap_or(0).saturating_add(1);
                let epoch = number("config-epoch").ok_or_else(unknown);
                Ok(epoch.map(|epoch| Opinion { epoch, primary, sentinels }))
            }
            Ok((None, _)) => Ok(Err(unknown())),
            // `No such master with that name`.
            Err(error) if error.code() == Some("ERR") => Ok(Err(unknown())),
            Err(error) => Err(error),
        }
    }
}

fn too_few(answered: usize, enough: usize, trouble: Option<StoreError>) -> StoreError {
    match trouble {
        Some(StoreError::Unreachable(why)) => {
            StoreError::Unreachable(format!("{answered} Sentinels answer, {enough} must ({why})"))
        }
        Some(error) => error,
        None => StoreError::Unreachable("no server is configured".into()),
    }
}
