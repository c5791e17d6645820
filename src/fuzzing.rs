//! What the fuzz targets in `fuzz/` run, and what must hold for any bytes. The targets' seeds are run by
//! the tests too.
//!
//! Parts that nobody outside sees have a function `fuzz` of their own, beside them.

use percent_encoding::percent_decode_str;

use crate::entry::{Name, Principal, Realm, Seed};
use crate::otp::Token;
use crate::policy::{Access, Authority, Governing, Grant, NormalPath, Policy, RequestPath, Route};
use crate::secret::Secret;
use crate::store::url::StoreUrl;

pub use crate::api::fuzz as body;
pub use crate::api::fuzz_call as call;
pub use crate::config::load::fuzz as config;
pub use crate::decision::fuzz as credentials;
pub use crate::store::{fuzz_blob as blob, fuzz_log as log};

/// A target's name, and what it runs.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 8] = [
    ("credentials", credentials),
    ("path", path),
    ("body", body),
    ("call", call),
    ("config", config),
    ("blob", blob),
    ("log", log),
    ("text", text),
];

/// Paths: read in one way, and decided as the upstream will read what it is sent.
///
/// # Panics
/// If that does not hold.
pub fn path(data: &[u8]) {
    let Ok(raw) = std::str::from_utf8(data) else { return };
    let Ok(path) = NormalPath::parse(raw) else { return };
    let sent = path.encoded();
    assert_eq!(NormalPath::parse(sent).as_ref(), Ok(&path), "another reading of what is sent");
    assert!(sent.is_ascii() && sent.starts_with('/') && !sent.contains(['\\', '#', '?', ' ']));
    let realm = Realm::parse("staff").expect("a realm");
    let policy = Policy::new(vec![
        Route::new("/", Access::Public),
        Route::new("/admin", Access::Allow(vec![Grant::Realm(realm)])),
        Route::new("/admin/open", Access::Public),
    ]);
    let path = RequestPath::Normal(path.clone());
    let Governing::Route(route) = policy.govern("GET", "h", &path) else { return };
    // However little an upstream minds, what it takes for the closed part is not open here.
    let mut read = sent.to_owned();
    for _ in 0..4 {
        read = resolve(&percent_decode_str(&read).decode_utf8_lossy());
        for read in [&read, &careless(&read)] {
            let closed = below(read, "/admin") && !below(read, "/admin/open");
            assert!(!(closed && route.is_public()), "{sent} is public, and {read} to an upstream");
        }
    }
}

fn below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// As file systems do that mind neither case nor what ends a name.
fn careless(path: &str) -> String {
    let name = |segment: &str| segment.trim_end_matches(['.', ' ']).to_ascii_lowercase();
    path.split('/').map(name).collect::<Vec<_>>().join("/")
}

/// RFC 3986 section 5.2.4, without parameters and empty segments, backslashes as slashes.
fn resolve(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for segment in path.split(['/', '\\']) {
        match segment.split(';').next().unwrap_or_default() {
            "" | "." => {}
            ".." => drop(kept.pop()),
            name => kept.push(name),
        }
    }
    format!("/{}", kept.join("/"))
}

/// Names, hosts, seeds, tokens, URLs: parsing what was parsed changes nothing, and passwords do not show.
///
/// # Panics
/// If that does not hold.
pub fn text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(name) = Name::parse(text) {
        assert_eq!(Name::parse(name.as_str()), Ok(name.clone()));
        assert!(!name.as_str().chars().any(char::is_control));
        let who = Principal::parse(text, "r").expect("a name with a realm");
        assert_eq!(who.name, name);
    }
    if let Ok(seed) = Seed::parse(text) {
        assert_eq!(Seed::parse(seed.expose()), Ok(seed.clone()));
        assert!(!seed.bytes().is_empty());
    }
    if let Some(host) = Authority::parse(text) {
        assert_eq!(Authority::parse(host.as_str()), Some(host.clone()));
        assert!(host.as_str().is_ascii() && !host.as_str().contains(['/', '@', ' ', '?', '#']));
    }
    if Token::parse(text).is_some() {
        assert!((6..=8).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit()));
    }
    if let Ok(url) = StoreUrl::parse(text) {
        let mut other = url.clone();
        if let StoreUrl::Redis(redis) = &mut other
            && let Some(password) = &mut redis.password
        {
            *password = Secret::new("another".to_owned());
        }
        assert_eq!(url.to_string(), other.to_string(), "the password shows");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_target_has_its_program() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
        for (target, _) in TARGETS {
            let program = fuzz.join(format!("fuzz_targets/{target}.rs"));
            let code = std::fs::read_to_string(program).unwrap();
            assert!(code.contains(&format!("otpgate::fuzzing::{target}(data)")), "{target}");
            assert!(manifest.contains(&format!("name = \"{target}\"")), "{target}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    }

    /// Cargo would add what is missing there, and leave a changed file behind.
    #[test]
    fn the_lock_file_of_the_targets_knows_every_dependency() {
        let read = |path: &str| -> toml::Table {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
            std::fs::read_to_string(path).unwrap().parse().unwrap()
        };
        let (manifest, lock) = (read("Cargo.toml"), read("fuzz/Cargo.lock"));
        let packages = lock["package"].as_array().unwrap();
        let otpgate = packages.iter().find(|p| p["name"].as_str() == Some("otpgate")).unwrap();
        let locked: HashSet<_> = otpgate["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .map(|package| package.as_str().unwrap().split(' ').next().unwrap())
            .collect();
        let named = manifest["dependencies"].as_table().unwrap().keys().map(String::as_str);
        assert_eq!(locked, named.collect());
    }

    /// Also what fuzzing has found once stays found.
    #[test]
    fn seeds_hold() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (target, run) in TARGETS {
            let files: Vec<_> = std::fs::read_dir(corpora.join(target))
                .unwrap_or_else(|e| panic!("{target}: {e}"))
                .map(|file| file.unwrap().path())
                .collect();
            assert!(files.len() >= 5, "{target} has too few seeds");
            for file in files {
                run(&std::fs::read(&file).unwrap());
            }
        }
    }
}
