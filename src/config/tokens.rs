//! `[totp]` and `[realms]`: how tokens are checked, and which realms have powers.

use std::collections::HashMap;
use std::num::NonZeroU32;

use toml::Value;

use super::ReservedRealms;
use super::reader::Section;
use crate::directory::{RealmRules, TokenRules};
use crate::entry::{Algorithm, DIGITS, PERIOD_SECONDS, Realm};
use crate::otp::{Reuse, TokenParams};

/// The most time steps accepted on either side: each one is another guess that counts.
const MAX_SKEW_STEPS: u8 = 10;
/// The largest budget of a token: every use is remembered until the token's end.
const MAX_BUDGET: u32 = 10_000;

pub(super) fn read_rules(s: &mut Section, default: RealmRules) -> RealmRules {
    let algorithms =
        [Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512].map(|a| (a.as_str(), a));
    RealmRules {
        params: TokenParams {
            algorithm: s.choice("algorithm", &algorithms).unwrap_or(default.params.algorithm),
            digits: s.number("digits", DIGITS).unwrap_or(default.params.digits),
            step_seconds: s.number("period", PERIOD_SECONDS).unwrap_or(default.params.step_seconds),
        },
        skew_steps: s.number("skew", 0..=MAX_SKEW_STEPS).unwrap_or(default.skew_steps),
        reuse: read_reuse(s).unwrap_or(default.reuse),
    }
}

/// `"window"`, `"once"` or `{ budget = N }`.
pub(super) fn read_reuse(s: &mut Section) -> Option<Reuse> {
    match s.take("reuse")? {
        Value::Table(table) => {
            let mut t = s.child("reuse", table);
            if !t.has("budget") {
                t.problem("budget", "is missing");
            }
            let budget = t.number("budget", 1..=MAX_BUDGET);
            t.finish();
            budget.and_then(NonZeroU32::new).map(Reuse::Times)
        }
        Value::String(text) if text == "window" => Some(Reuse::Window),
        Value::String(text) if text == "once" => Some(Reuse::ONCE),
        _ => {
            s.problem("reuse", "must be \"window\", \"once\" or { budget = N }");
            None
        }
    }
}

pub(super) fn read_realms(mut s: Section, default: RealmRules) -> (ReservedRealms, TokenRules) {
    // A realm may itself be called `admin` or `auth`: then its key holds a table.
    let reserved = |s: &mut Section, key: &str, default: &str| {
        let named = if s.other_tables().iter().any(|t| t == key) {
            None
        } else {
            s.parse(key, Realm::parse)
        };
        named.unwrap_or_else(|| Realm::parse(default).expect("a valid realm"))
    };
    let realms = ReservedRealms {
        admin: reserved(&mut s, "admin", "ungleich-admin"),
        auth: reserved(&mut s, "auth", "ungleich-auth"),
    };
    if realms.admin == realms.auth {
        s.problem("auth", "must differ from `realms.admin`: verifying must not mean managing");
    }
    let mut rules = TokenRules { default, realms: HashMap::new() };
    for name in s.other_tables() {
        let mut r = s.section(&name);
        match Realm::parse(&name) {
            Ok(realm) => {
                let read = read_rules(&mut r, default);
                if rules.realms.insert(realm.as_str().to_owned(), read).is_some() {
                    s.problem(&name, format_args!("the realm `{realm}` is there already"));
                }
            }
            Err(error) => s.problem(&name, format_args!("the realm's name {error}")),
        }
        r.finish();
    }
    s.finish();
    (realms, rules)
}
