//! Everything that must be done at once, in one of two ways: by Lua scripts, or by transactions where the
//! server has no scripts. Both use the same keys and formats and give the same answers, so gates of
//! either kind share a store.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Cmd, FromRedisValue, RedisError, Value};
use tracing::info;

use super::connect::is_of_primary;
use super::error::lacks_scripts;
use super::script::{self, Arguments, Keys, Script, Scripts};
use super::transaction;
use crate::config::RedisWrites;
use crate::entry::EntryId;
use crate::store::{Failure, Mutation, Nonce, Spending};

/// One thing to do.
pub(super) enum Work<'a> {
    /// Make an empty store.
    Init,
    /// Do a batch or nothing.
    Commit { batch: &'a [Mutation], nonce: &'a Nonce },
    /// Give out the next number.
    Reserve,
    /// Give out no number below this one.
    Raise(EntryId),
    /// Close a new or empty store for an import, which has these keys.
    BeginImport { importing: &'a Keys },
    /// Open the store after it.
    EndImport,
    /// Entries with a number above `after`, up to and including `last`, as one consistent picture.
    List { after: u64, last: u64, limit: usize },
    /// Record a use of a token, if its budget allows.
    Spend(&'a Spending),
    /// Count failures.
    Count(&'a [Failure]),
    /// Remember keys for a while.
    Remember { remembered: &'a [String], keep: Duration },
    /// Whether a key is remembered.
    Remembers(&'a str),
}

impl Work<'_> {
    fn script<'s>(&self, scripts: &'s Scripts) -> &'s Script {
        match self {
            Self::Init => &scripts.init,
            Self::Commit { .. } => &scripts.commit,
            Self::Reserve => &scripts.reserve,
            Self::Raise(_) => &scripts.raise,
            Self::BeginImport { .. } => &scripts.begin,
            Self::EndImport => &scripts.end,
            Self::List { .. } => &scripts.list,
            Self::Spend(_) => &scripts.spend,
            Self::Count(_) => &scripts.count,
            Self::Remember { .. } => &scripts.remember,
            Self::Remembers(_) => &scripts.remembers,
        }
    }

    /// A replica would do it too.
    fn only_reads(&self) -> bool {
        matches!(self, Self::List { .. } | Self::Remembers(_))
    }

    fn arguments(&self, keys: &Keys) -> Arguments {
        match self {
            Self::Init => script::init_arguments(keys),
            Self::Commit { batch, nonce } => script::commit_arguments(keys, batch, nonce),
            Self::Reserve => script::reserve_arguments(keys),
            Self::Raise(next) => script::raise_arguments(keys, *next),
            Self::BeginImport { importing } => script::begin_arguments(keys, importing),
            Self::EndImport => script::end_arguments(keys),
            Self::List { after, last, limit } => {
                script::list_arguments(keys, *after, *last, *limit)
            }
            Self::Spend(spending) => script::spend_arguments(keys, spending),
            Self::Count(failures) => script::count_arguments(keys, failures),
            Self::Remember { remembered, keep } => {
                script::remember_arguments(keys, remembered, *keep)
            }
            Self::Remembers(key) => script::remembers_arguments(keys, key),
        }
    }
}

/// How work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Scripts,
    /// On a connection that nobody else uses meanwhile.
    Transactions,
}

/// Does [`Work`] on connections that others hold.
pub(super) struct Writer {
    keys: Keys,
    scripts: Scripts,
    writes: RedisWrites,
    /// The server said that it has no scripts for us: never asked again.
    without_scripts: AtomicBool,
}

impl Writer {
    pub(super) fn new(keys: Keys, writes: RedisWrites) -> Self {
        let without_scripts = AtomicBool::new(writes == RedisWrites::Transactions);
        Self { keys, scripts: Scripts::new(), writes, without_scripts }
    }

    /// How work is to be done now.
    pub(super) fn way(&self) -> Way {
        if self.without_scripts.load(Ordering::Relaxed) { Way::Transactions } else { Way::Scripts }
    }

    /// Does it once. After an error, [`Self::way`] may be another one: then nothing was done.
    pub(super) async fn attempt<T: FromRedisValue>(
        &self,
        conn: &mut MultiplexedConnection,
        way: Way,
        work: &Work<'_>,
    ) -> Result<T, RedisError> {
        if way == Way::Transactions {
            let answer = transaction::run(conn, &self.keys, work).await?;
            return Ok(redis::from_redis_value(answer)?);
        }
        let (script, arguments) = (work.script(&self.scripts), work.arguments(&self.keys));
        let answer = evaluate(conn, script, &arguments, work.only_reads()).await;
        if let Err(error) = &answer
            && self.writes == RedisWrites::Auto
            && lacks_scripts(error)
            && !self.without_scripts.swap(true, Ordering::Relaxed)
        {
            info!(%error, "Redis has no scripts for this user: from now on it is written to by transactions");
        }
        answer
    }
}

/// Calls a script once; sends its code where the server does not know it.
async fn evaluate<T: FromRedisValue>(
    conn: &mut MultiplexedConnection,
    script: &Script,
    arguments: &Arguments,
    on_primary: bool,
) -> Result<T, RedisError> {
    match call(conn, script.call(true, arguments), on_primary).await {
        Err(error) if error.code() == Some("NOSCRIPT") => {
            call(conn, script.call(false, arguments), on_primary).await
        }
        answer => answer,
    }
}

/// Sends one command; with `on_primary`, its answer counts only there.
async fn call<T: FromRedisValue>(
    conn: &mut MultiplexedConnection,
    command: Cmd,
    on_primary: bool,
) -> Result<T, RedisError> {
    if !on_primary {
        return command.query_async(conn).await;
    }
    let mut question = redis::pipe();
    question.add_command(command).cmd("HELLO");
    let (answer, hello): (T, Value) = question.query_async(conn).await?;
    is_of_primary(&hello)?;
    Ok(answer)
}
