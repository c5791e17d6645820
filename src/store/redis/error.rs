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
    /// It reads its data from its disk: it did not run. It may soon on this connection.
    Loading,
    /// No answer came: it may have run, another connection is needed.
    Silent,
}

pub(super) fn fate(error: &RedisError) -> Fate {
    match code_and_text(error) {
        Some((code, text)) => match code.as_str() {
            "MOVED" | "ASK" | "READONLY" | "CLUSTERDOWN" | "MASTERDOWN" | "TRYAGAIN"
            | "UNBLOCKED" => Fate::Elsewhere,
            "LOADING" => Fate::Loading,
            // A key that only the script knows is being moved to another node of a cluster.
            "ERR" if text.contains("access a non local key") => Fate::Elsewhere,
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

/// Whether the server says that it knows no scripts, or none for this user.
pub(super) fn lacks_scripts(error: &RedisError) -> bool {
    let Some((code, text)) = code_and_text(error) else { return false };
    let text = text.to_ascii_lowercase();
    // Not what it repeats of the arguments.
    let text = text.split("with args").next().unwrap_or_default();
    let why = ["unknown command", "no permissions", "not allowed", "not supported", "unsupported"];
    let is_about_calls =
        ["'eval", "`eval", "\"eval", " eval"].iter().any(|name| text.contains(name));
    let is_code = matches!(code.as_str(), "ERR" | "NOPERM");
    is_code && is_about_calls && why.iter().any(|why| text.contains(why))
}

/// The first error that the server itself sent.
fn code_and_text(error: &RedisError) -> Option<(String, String)> {
    let errors = error.clone().into_server_errors()?;
    let (_, first) = errors.first()?;
    let (code, text) = (first.code(), first.details().unwrap_or_default());
    let (code, text) = match text.split_once("because of: ") {
        Some((_, cause)) if code == "EXECABORT" => cause.split_once(' ').unwrap_or((cause, "")),
        _ => (code, text),
    };
    Some((code.to_owned(), text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use redis::parse_redis_value;

    fn error(line: &str) -> RedisError {
        let value = parse_redis_value(format!("-{line}\r\n").as_bytes()).unwrap();
        value.extract_error().unwrap_err()
    }

    #[test]
    fn servers_without_scripts_are_known_by_what_they_say() {
        for line in [
            "ERR unknown command 'EVALSHA', with args beginning with: 'x' ",
            "ERR unknown command `EVAL`, with args beginning with: `x`",
            "NOPERM this user has no permissions to run the 'evalsha' command or its subcommand",
            "NOPERM User gate has no permissions to run the 'eval' command",
            "ERR command EVAL is not allowed",
        ] {
            assert!(lacks_scripts(&error(line)), "{line}");
        }
        for line in [
            "ERR unknown command 'WATCH', with args beginning with: 'eval' ",
            "ERR Unknown Redis command called from script script: x",
            "NOPERM User gate has no permissions to run the 'xadd' command",
            "NOPERM No permissions to access a key",
            "NOSCRIPT No matching script. Please use EVAL.",
            "OOM command not allowed when used memory > 'maxmemory'.",
            "READONLY You can't write against a read only replica.",
        ] {
            assert!(!lacks_scripts(&error(line)), "{line}");
        }
    }

    #[test]
    fn aborted_transactions_say_why() {
        let abort = |why| error(&format!("EXECABORT Transaction discarded because of: {why}"));
        assert!(matches!(store_error(&abort("OOM no memory")), StoreError::ReadOnly(_)));
        assert_eq!(fate(&abort("MOVED 1 127.0.0.1:1")), Fate::Elsewhere);
        assert_eq!(fate(&abort("OOM no memory")), Fate::Refused);
        let plain = error("EXECABORT Transaction discarded because of previous errors.");
        assert_eq!(fate(&plain), Fate::Refused);
    }
}
