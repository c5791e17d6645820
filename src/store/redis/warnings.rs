//! What an operator should know about a Redis that may forget what it acknowledged.

use super::Redis;

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
    let appendfsync: Option<(String, String)> =
        redis.line.ask(|mut conn| async move { config.query_async(&mut conn).await }).await.ok();
    judge(&info, appendfsync.as_ref().map(|(_, value)| value.as_str()))
}

fn judge(info: &str, appendfsync: Option<&str>) -> Vec<String> {
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
        (_, Some(policy)) if policy != "always" => warnings.push(format!(
            "Redis has `appendfsync {policy}`: writes of the last second or more are lost in a power \
             cut, and {lost}; set `appendfsync always`"
        )),
        _ => {}
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

    #[test]
    fn only_forgetful_servers_are_warned_about() {
        let info =
            |aof, policy| format!("# X\r\naof_enabled:{aof}\r\nmaxmemory_policy:{policy}\r\n");
        assert!(judge(&info("1", "noeviction"), Some("always")).is_empty());
        assert!(judge(&info("1", "noeviction"), None).is_empty());
        assert!(judge(&info("0", "noeviction"), Some("always"))[0].contains("appendonly yes"));
        assert!(judge(&info("1", "noeviction"), Some("everysec"))[0].contains("everysec"));
        for (policy, evicted) in
            [("allkeys-lru", "evict entries, and marks"), ("volatile-ttl", "evict marks of used")]
        {
            assert!(judge(&info("1", policy), Some("always"))[0].contains(evicted), "{policy}");
        }
        assert_eq!(judge(&info("0", "allkeys-lru"), None).len(), 2);
    }
}
