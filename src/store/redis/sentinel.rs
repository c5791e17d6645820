//! What Sentinels say about the primary.
//!
//! One Sentinel may be cut off together with an old primary, and know as little of the new one. So half
//! of them, rounded up, must answer: a failover needs more than half, so one of those that answer took
//! part in the last one, or hears of it within seconds. Of what they say, that of the latest failover
//! counts (`config-epoch`).

use std::collections::HashMap;
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

/// A primary that a Sentinel names, and the failover that made it one.
type Opinion = (u64, Node);

/// Who is the primary.
#[derive(Clone)]
pub(super) struct Verdict {
    /// Named by Sentinels, that of the latest failover first. Others come next only while Sentinels
    /// differ, as during a failover.
    pub(super) primaries: Vec<Node>,
    /// They were asked then.
    pub(super) asked: Instant,
}

impl Verdict {
    /// Whether `node` is the primary beyond doubt.
    pub(super) fn is_for(&self, node: Option<&Node>) -> bool {
        self.primaries.first() == node
    }
}

/// The Sentinels of one primary.
pub(super) struct Sentinels {
    nodes: Vec<Node>,
    service: String,
    /// To each, where one is open.
    connections: Vec<Mutex<Option<MultiplexedConnection>>>,
    /// What they said last. Who asks holds the lock: the others wait for what it hears.
    heard: tokio::sync::Mutex<Option<Verdict>>,
}

impl Sentinels {
    pub(super) fn new(nodes: &[Node], service: &str) -> Self {
        Self {
            nodes: nodes.to_vec(),
            service: service.to_owned(),
            connections: nodes.iter().map(|_| Mutex::default()).collect(),
            heard: tokio::sync::Mutex::default(),
        }
    }

    /// The primary, as Sentinels said at most `age` ago.
    pub(super) async fn primary(
        &self,
        connector: &Connector,
        age: Duration,
    ) -> Result<Verdict, StoreError> {
        let came = SystemClock.now().monotonic;
        let mut heard = self.heard.lock().await;
        if let Some(verdict) = heard.as_ref().filter(|verdict| verdict.asked + age >= came) {
            return Ok(verdict.clone());
        }
        *heard = None;
        let asked = SystemClock.now().monotonic;
        let mut opinions = self.opinions(connector).await?;
        // Stable: of two that name the same failover, the first to answer comes first.
        opinions.sort_by_key(|(epoch, _)| std::cmp::Reverse(*epoch));
        let mut primaries: Vec<Node> = Vec::new();
        for (_, node) in opinions {
            if !primaries.contains(&node) {
                primaries.push(node);
            }
        }
        let verdict = Verdict { primaries, asked };
        *heard = Some(verdict.clone());
        Ok(verdict)
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
            Ok((Some(node), state)) => {
                let epoch = state.get("config-epoch").and_then(|epoch| epoch.parse().ok());
                Ok(epoch.map(|epoch| (epoch, node)).ok_or_else(unknown))
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
