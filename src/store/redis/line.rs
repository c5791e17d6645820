//! A connection that operations share: answers come in order, so none may block on it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, RedisError};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::connect::{Connector, Link};
use super::error::{Fate, fate, store_error};
use super::script::{Arguments, Script};
use crate::clock::{Clock, SystemClock};
use crate::store::StoreError;

/// Connects when it is used, and again after a failure.
pub(super) struct Line {
    connector: Arc<Connector>,
    /// Longest wait for an answer.
    patience: Duration,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    /// Counts connections, so that a failure is not blamed on a newer one.
    number: u64,
    /// When connecting last failed: who waited for that attempt does not make its own.
    failed: Option<(Instant, StoreError)>,
}

type Connection = (u64, MultiplexedConnection);

impl Line {
    pub(super) fn new(connector: Arc<Connector>, patience: Duration) -> Self {
        Self { connector, patience, state: Arc::default() }
    }

    /// The connection and its number.
    pub(super) async fn connection(&self) -> Result<Connection, StoreError> {
        let came = SystemClock.now().monotonic;
        let state = self.state.clone().lock_owned().await;
        match &state.link {
            Some(link) if !self.connector.must_confirm(link) => {
                return Ok((state.number, link.conn.clone()));
            }
            Some(_) => {}
            None => {
                if let Some((_, error)) = state.failed.as_ref().filter(|(when, _)| *when >= came) {
                    return Err(error.clone());
                }
            }
        }
        // A task of its own: if callers that give up ended it, connecting could never take longer than
        // they wait.
        let renewed = tokio::spawn(renew(self.connector.clone(), self.patience, state)).await;
        renewed.unwrap_or_else(|_| Err(StoreError::Unreachable("connecting ended early".into())))
    }

    /// Gives a connection up that did not serve.
    pub(super) async fn discard(&self, number: u64) {
        let mut state = self.state.lock().await;
        if state.number == number {
            state.link = None;
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
        let mut again = true;
        loop {
            let (number, conn) = self.connection().await?;
            let error = match question(conn).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if fate(&error) != Fate::Refused {
                self.discard(number).await;
                if std::mem::take(&mut again) {
                    continue;
                }
            }
            return Err(store_error(&error));
        }
    }

    /// Calls a script that may be called twice.
    pub(super) async fn ask_script<T: FromRedisValue>(
        &self,
        script: &Script,
        arguments: &Arguments,
    ) -> Result<T, StoreError> {
        self.ask(|mut conn| async move { evaluate(&mut conn, script, arguments).await }).await
    }
}

/// Confirms the connection or makes another one.
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
            state.failed = Some((SystemClock.now().monotonic, error.clone()));
            Err(error)
        }
    }
}

/// Calls a script once; sends its code where the server does not know it.
pub(super) async fn evaluate<T: FromRedisValue>(
    conn: &mut MultiplexedConnection,
    script: &Script,
    arguments: &Arguments,
) -> Result<T, RedisError> {
    match script.call(true, arguments).query_async(conn).await {
        Err(error) if error.code() == Some("NOSCRIPT") => {
            script.call(false, arguments).query_async(conn).await
        }
        answer => answer,
    }
}
