//! What errors of Redis mean for the store. Nothing of what is shown can hold a secret: servers do
//! not repeat passwords, and redis-rs does not show them.

use redis::{ErrorKind, RedisError};

use crate::store::StoreError;

/// What a failed command says about its connection and about whether it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The server refused it: it did not run, and the connection is good.
    Refused,
    /// This is not the server to ask (any more): it did not run, another connection is needed.
    Elsewhere,
    /// No answer came: it may have run, another connection is needed.
    Silent,
}

pub(super) fn fate(error: &RedisError) -> Fate {
    match code_and_text(error) {
        Some((code, _)) => match code.as_str() {
            "MOVED" | "ASK" | "READONLY" | "CLUSTERDOWN" | "MASTERDOWN" | "TRYAGAIN"
            | "UNBLOCKED" | "LOADING" => Fate::Elsewhere,
            _ => Fate::Refused,
        },
        None if error.kind() == ErrorKind::AuthenticationFailed => Fate::Refused,
        None => Fate::Silent,
    }
}

pub(super) fn store_error(error: &RedisError) -> StoreError {
    let Some((code, text)) = code_and_text(error) else {
        return match error.kind() {
            ErrorKind::AuthenticationFailed => {
                StoreError::Denied("Redis does not accept the user or the password".into())
            }
            ErrorKind::InvalidClientConfig => StoreError::Denied(error.to_string()),
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType => {
                StoreError::Corrupt(format!("Redis answered something unexpected ({error})"))
            }
            _ => StoreError::Unreachable(error.to_string()),
        };
    };
    let text = format!("{code} {text}");
    match code.as_str() {
        "NOAUTH" => StoreError::Denied("Redis wants a password, none is configured".into()),
        "WRONGPASS" | "NOPERM" | "DENIED" => StoreError::Denied(text),
        // So Redis 7.0 says NOPERM inside a script.
        "ERR" if text.contains("can't run this command") || text.contains("can't access") => {
            StoreError::Denied(text)
        }
        "OOM" | "READONLY" | "MISCONF" | "NOREPLICAS" => StoreError::ReadOnly(text),
        "WRONGTYPE" | "CROSSSLOT" => StoreError::Corrupt(text),
        _ => StoreError::Unreachable(text),
    }
}

/// The first error that the server itself sent.
fn code_and_text(error: &RedisError) -> Option<(String, String)> {
    let errors = error.clone().into_server_errors()?;
    let (_, first) = errors.first()?;
    Some((first.code().to_owned(), first.details().unwrap_or_default().to_owned()))
}
