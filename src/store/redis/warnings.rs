//! What an operator should know about a Redis that may forget what it acknowledged.

use super::Redis;

/// What `CONFIG GET appendfsync` says.
enum Appendfsync {
    Is(String),
    /// The server does not say.
    Hidden,
}

/// Sentences for the log; empty if all is well.
pub(super) async fn look(redis: &Redis) -> Vec<String> {
    let info = redis::cmd("INFO");
    let info = &info;
    let info: String =
        match redis.line.ask(|mut conn| async move { info.query_async(&mut conn).await }).await {
            Ok(info) => info,
            Err(error) => return vec![format!("cannot see how Redis keeps its data: {error}")],
        };
    let config = redis::cmd("CONFIG").arg("GET").arg("appendfsync").to_owned();
    let config = &config;
    let told: Result<Option<(String, String)>, _> =
        redis.line.ask(|mut conn| async move { config.query_async(&mut conn).await }).await;
    let appendfsync = match told {
        Ok(Some((_, value))) => Appendfsync::Is(value),
        _ => Appendfsync::Hidden,
    };
    let mut warnings = judge(&info, &appendfsync, redis.config.wait_replicas);
    warnings.extend(redis.connector.warning());
    warnings
}

fn judge(info: &str, appendfsync: &Appendfsync, wait_replicas: u32) -> Vec<String> {
    let field = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    let mut warnings = Vec::new();
    let lost = "a lost delete makes a revoked seed valid again";
    match (field("aof_enabled"), appendfsync) {
        (Some("0"), _) => warnings.push(format!(
            "Redis keeps no append-only file: writes that it acknowledged are lost in a crash, and \
             {lost}; set `appendonly yes` and `appendfsync always`"
        )),
        (_, Appendfsync::Is(policy)) if policy != "always" => warnings.push(format!(
            "Redis has `appendfsync {policy}`: writes of the last second or more are lost in a power \
             cut, and {lost}; set `appendfsync always`"
        )),
        (_, Appendfsync::Hidden) => warnings.push(
            "Redis does not let this user see `appendfsync`: make sure that it is `always`, or know \
             that a power cut loses the last writes"
                .into(),
        ),
        _ => {}
    }
    if field("aof_last_write_status").is_some_and(|status| status != "ok") {
        warnings.push(
            "Redis could not write its append-only file the last time (`aof_last_write_status`): is \
             its disk full?"
                .into(),
        );
    }
    let replicas: u32 = field("connected_slaves").and_then(|n| n.parse().ok()).unwrap_or(0);
    if replicas < wait_replicas {
        warnings.push(format!(
            "`store.wait_replicas` is {wait_replicas}, the number of connected replicas {replicas}: the \
             outcome of every write will be unknown"
        ));
    }
    let policy = field("maxmemory_policy").unwrap_or("noeviction");
    let evicted = match policy {
        "noeviction" => None,
        _ if policy.starts_with("volatile") => Some("marks of used tokens and failed attempts"),
        _ => Some("entries, and marks of used tokens and failed attempts"),
    };
    if let Some(evicted) = evicted {
        warnings.push(format!(
            "Redis has `maxmemory-policy {policy}` and may evict {evicted}: set `noeviction`"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALWAYS: &str = "always";

    fn judged(info: &str, appendfsync: Option<&str>, wait_replicas: u32) -> Vec<String> {
        let appendfsync =
            appendfsync.map_or(Appendfsync::Hidden, |value| Appendfsync::Is(value.into()));
        judge(info, &appendfsync, wait_replicas)
    }

    #[test]
    fn only_forgetful_servers_are_warned_about() {
        let info =
            |aof, policy| format!("# X\r\naof_enabled:{aof}\r\nmaxmemory_policy:{policy}\r\n");
        let good = info("1", "noeviction");
        assert!(judged(&good, Some(ALWAYS), 0).is_empty());
        let hidden = judged(&good, None, 0);
        assert!(hidden.len() == 1 && hidden[0].contains("does not let"), "{hidden:?}");
        assert!(judged(&info("0", "noeviction"), Some(ALWAYS), 0)[0].contains("appendonly yes"));
        assert!(judged(&good, Some("everysec"), 0)[0].contains("everysec"));
        for (policy, evicted) in
            [("allkeys-lru", "evict entries, and marks"), ("volatile-ttl", "evict marks of used")]
        {
            let warned = judged(&info("1", policy), Some(ALWAYS), 0);
            assert!(warned[0].contains(evicted), "{policy}");
        }
        assert_eq!(judged(&info("0", "allkeys-lru"), None, 0).len(), 2);
    }

    #[test]
    fn failed_writes_and_missing_replicas_are_told() {
        let info = |status, replicas| {
            format!(
                "aof_enabled:1\r\naof_last_write_status:{status}\r\nconnected_slaves:{replicas}\r\n"
            )
        };
        assert!(judged(&info("ok", 0), Some(ALWAYS), 0).is_empty());
        assert!(judged(&info("ok", 2), Some(ALWAYS), 2).is_empty());
        let few = judged(&info("ok", 1), Some(ALWAYS), 2);
        assert!(few.len() == 1 && few[0].contains("replicas 1:"), "{few:?}");
        let failed = judged(&info("err", 0), Some(ALWAYS), 0);
        assert!(failed.len() == 1 && failed[0].contains("aof_last_write_status"), "{failed:?}");
    }
}
