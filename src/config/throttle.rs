//! `[throttle]`: how often tokens may be wrong.

use std::time::Duration;

use super::ThrottleConfig;
use super::reader::Section;
use crate::store::Quota;

/// More would be no bound.
const MAX_FAILURES: u32 = 1_000_000;

pub(super) fn read_throttle(mut s: Section) -> ThrottleConfig {
    let default = ThrottleConfig::default();
    let config = ThrottleConfig {
        enabled: s.or("enabled", default.enabled),
        per_source: read_quota(&mut s, "per_source", default.per_source),
        per_entry: read_quota(&mut s, "per_entry", default.per_entry),
        per_address: read_quota(&mut s, "per_address", default.per_address),
        remember_success: s.duration("remember_success").unwrap_or(default.remember_success),
    };
    s.finish();
    config
}

fn read_quota(s: &mut Section, key: &str, default: Quota) -> Quota {
    let mut q = s.section(key);
    let quota = Quota {
        failures: q.number("failures", 1..=MAX_FAILURES).unwrap_or(default.failures),
        per: q.duration("per").unwrap_or(default.per),
    };
    if quota.per < Duration::from_millis(1) * quota.failures {
        q.problem("per", "must be at least 1ms for each of `failures`");
    }
    q.finish();
    quota
}
