//! Connections that operations share, and some that each is used by one at a time. Answers come in order,
//! so none may block on a shared one; what belongs to a connection, as watched keys do, needs an own one.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, RedisError};
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use super::connect::{Connector, Link};
use super::error::{Fate, fate, store_error};
use super::retry::Retry;
use super::writer::{Way, Work, Writer};
use crate::clock::{Clock, SystemClock};
use crate::store::StoreError;

/// Connects when it is used, and again after a failure.
pub(super) struct Line {
    connector: Arc<Connector>,
    /// Longest wait for an answer.
    patience: Duration,
    state: Arc<Mutex<State>>,
    /// How many own connections there may be.
    own: Arc<Semaphore>,
    /// Own connections that nobody uses now.
    idle: Arc<std::sync::Mutex<Vec<Link>>>,
}

/// How long nobody connects after that failed: calls may come by the thousand a second.
const QUIET: Duration = Duration::from_millis(20);

#[derive(Default)]
struct State {
    link: Option<Link>,
    /// Counts connections, so that a failure is not blamed on a newer one.
    number: u64,
    /// When connecting last failed: who waited for that attempt, or comes soon after, makes none.
    failed: Option<(Instant, StoreError)>,
}

type Connection = (u64, MultiplexedConnection);

/// A connection to work on: [`Line::release`] it, or [`Line::discard`] it. One of its own that is dropped
/// is closed.
pub(super) struct Seat {
    pub(super) conn: MultiplexedConnection,
    place: Place,
}

enum Place {
    /// The connection with that number.
    Shared(u64),
    Own {
        link: Link,
        _permit: OwnedSemaphorePermit,
    },
}

impl Line {
    pub(super) fn new(connector: Arc<Connector>, patience: Duration, own: usize) -> Self {
        Self {
            connector,
            patience,
            state: Arc::default(),
            own: Arc::new(Semaphore::new(own)),
            idle: Arc::default(),
        }
    }

    /// A connection; with `own`, one that nobody else uses meanwhile.
    pub(super) async fn seat(&self, own: bool) -> Result<Seat, StoreError> {
        if !own {
            let (number, conn) = self.connection().await?;
            return Ok(Seat { conn, place: Place::Shared(number) });
        }
        let permit = tokio::time::timeout(self.patience, self.own.clone().acquire_owned()).await;
        let Ok(Ok(permit)) = permit else {
            return Err(StoreError::Unreachable("all connections are busy".into()));
        };
        let idle = self.idle().pop();
        let link = match idle {
            Some(link) if !self.connector.must_confirm(&link) => link,
            idle => apart(confirmed(self.connector.clone(), self.patience, idle)).await?,
        };
        Ok(Seat { conn: link.conn.clone(), place: Place::Own { link, _permit: permit } })
    }

    /// Gives a connection back that served.
    pub(super) fn release(&self, seat: Seat) {
        if let Place::Own { link, .. } = seat.place {
            self.idle().push(link);
        }
    }

    /// Gives a connection up that did not serve; others to the same server would not either.
    pub(super) async fn discard(&self, seat: Seat) {
        match seat.place {
            Place::Own { .. } => self.idle().clear(),
            Place::Shared(number) => {
                let mut state = self.state.lock().await;
                if state.number == number {
                    state.link = None;
                }
            }
        }
    }

    /// Asks something that may be asked twice.
    pub(super) async fn ask<T, F>(
        &self,
        question: impl Fn(MultiplexedConnection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, RedisError>>,
    {
        self.ask_on(false, question).await
    }

    /// Does work that may be done twice.
    pub(super) async fn work<T: FromRedisValue>(
        &self,
        writer: &Writer,
        work: &Work<'_>,
    ) -> Result<T, StoreError> {
        let by = async |way: Way| {
            let own = way == Way::Transactions;
            self.ask_on(own, |mut conn| async move { writer.attempt(&mut conn, way, work).await })
                .await
        };
        let way = writer.way();
        match by(way).await {
            Err(_) if writer.way() != way => by(writer.way()).await,
            answer => answer,
        }
    }

    async fn ask_on<T, F>(
        &self,
        own: bool,
        question: impl Fn(MultiplexedConnection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, RedisError>>,
    {
        let mut retry = Retry::within(self.patience);
        let mut once_more = true;
        loop {
            let seat = self.seat(own).await?;
            let error = match question(seat.conn.clone()).await {
                Ok(answer) => {
                    self.release(seat);
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let again = match fate(&error) {
                Fate::Refused => false,
                Fate::Loading if retry.again().await => true,
                Fate::Elsewhere | Fate::Loading => {
                    self.discard(seat).await;
                    self.connector.doubt();
                    retry.again().await
                }
                Fate::Silent => {
                    self.discard(seat).await;
                    std::mem::take(&mut once_more)
                }
            };
            if !again {
                return Err(store_error(&error));
            }
        }
    }

    /// The shared connection and its number.
    async fn connection(&self) -> Result<Connection, StoreError> {
        let came = SystemClock.monotonic();
        let state = self.state.clone().lock_owned().await;
        match &state.link {
            Some(link) if !self.connector.must_confirm(link) => {
                return Ok((state.number, link.conn.clone()));
            }
            Some(_) => {}
            None => {
                let failed = state.failed.as_ref().filter(|(when, _)| *when + QUIET >= came);
                if let Some((_, error)) = failed {
                    return Err(error.clone());
                }
            }
        }
        apart(renew(self.connector.clone(), self.patience, state)).await
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Link>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects in a task of its own: if callers that give up ended it, it could never take longer than they
/// wait.
async fn apart<T: Send + 'static>(
    connecting: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    let connected = tokio::spawn(connecting).await;
    connected.unwrap_or_else(|_| Err(StoreError::Unreachable("connecting ended early".into())))
}

/// `idle` if it still leads to the primary, or else another one.
async fn confirmed(
    connector: Arc<Connector>,
    patience: Duration,
    idle: Option<Link>,
) -> Result<Link, StoreError> {
    if let Some(mut link) = idle
        && connector.confirm(&mut link).await.is_ok()
    {
        return Ok(link);
    }
    connector.connect(patience).await
}

/// Confirms the shared connection or makes another one.
async fn renew(
    connector: Arc<Connector>,
    patience: Duration,
    mut state: OwnedMutexGuard<State>,
) -> Result<Connection, StoreError> {
    if let Some(mut link) = state.link.take()
        && connector.confirm(&mut link).await.is_ok()
    {
        let conn = link.conn.clone();
        state.link = Some(link);
        return Ok((state.number, conn));
    }
    match connector.connect(patience).await {
        Ok(link) => {
            let conn = link.conn.clone();
            state.link = Some(link);
            state.number += 1;
            Ok((state.number, conn))
        }
        Err(error) => {
            state.failed = Some((SystemClock.monotonic(), error.clone()));
            Err(error)
        }
    }
}
