//! Data flows one way: who may import whom.

use std::path::Path;

/// Modules from the bottom up; each may use those before it.
const LAYERS: &[&[&str]] = &[
    &["clock", "secret", "credentials", "hardening"],
    &["entry"],
    &["seal", "otp", "audit"],
    &["client", "checker"],
    &["store", "enrolment"],
    &["policy"],
    &["metrics"],
    &["directory"],
    &["config"],
    &["logging"],
    &["net"],
    &["throttle", "remote"],
    &["verifier"],
    &["decision"],
    &["proxy", "api", "ops"],
    &["commands", "fuzzing"],
    &["cli"],
];

/// Uses against the flow, each with its reason.
const EXCEPTIONS: &[(&str, &str)] = &[
    // A store is opened from its part of the configuration; the configuration holds parsed URLs.
    ("store", "config"),
    // A store counts its operations.
    ("store", "metrics"),
    // Panics are counted.
    ("logging", "metrics"),
    // Commands report failures and read settings through the command line's types.
    ("commands", "cli"),
];

fn layer(module: &str) -> usize {
    LAYERS.iter().position(|l| l.contains(&module)).unwrap_or_else(|| panic!("no layer: {module}"))
}

/// A file's code, without comments; what tests import does not count.
fn code_of(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap();
    let code: Vec<_> = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    code.join("\n")
}

/// The module at the top that a file of `src` belongs to.
fn module_of<'a>(src: &Path, path: &'a Path) -> &'a str {
    let first = path.strip_prefix(src).unwrap().iter().next().unwrap();
    first.to_str().unwrap().trim_end_matches(".rs")
}

fn files(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn modules_use_only_those_below_them() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    files(&src, &mut paths);
    assert!(paths.len() > 20);
    let mut wrong = Vec::new();
    for path in paths {
        let module = module_of(&src, &path);
        if matches!(module, "lib" | "main") {
            continue;
        }
        for used in code_of(&path).split("crate::").skip(1) {
            let used: String =
                used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let allowed = used == module
                || EXCEPTIONS.contains(&(module, &used))
                || layer(&used) < layer(module);
            if !allowed {
                wrong.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

const OF_GATE: &str = "feature = \"server\"";

/// The names of all modules at the top: those that are always there, and those of the feature `server`.
fn modules_of_client_and_gate(src: &Path) -> (Vec<String>, Vec<String>) {
    let names = |code: &str| {
        let name = |line: &str| Some(line.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned());
        code.lines().filter_map(name).collect::<Vec<_>>()
    };
    let lib = code_of(&src.join("lib.rs"));
    let always = names(&always_there(&lib));
    let of_gate = names(&lib).into_iter().filter(|name| !always.contains(name)).collect();
    (always, of_gate)
}

/// Code without the lines that only the feature `server` adds.
fn always_there(code: &str) -> String {
    let lines: Vec<_> = code.lines().collect();
    let is_there = |n: &usize| {
        !lines[*n].contains(OF_GATE)
            && (*n == 0 || !(lines[n - 1].contains(OF_GATE) && lines[n - 1].contains("#[cfg(")))
    };
    (0..lines.len()).filter(is_there).map(|n| lines[n]).collect::<Vec<_>>().join("\n")
}

/// Services build the client without the feature `server`: no module that is there then uses what is not.
/// (`make check` builds it.)
#[test]
fn the_client_alone_uses_nothing_of_the_gate() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let src = root.join("src");
    let manifest: toml::Table =
        std::fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    let crates = manifest["features"]["server"].as_array().unwrap().iter();
    let crates = crates.map(|dep| dep.as_str().unwrap().replace("dep:", "").replace('-', "_"));
    let (of_client, of_gate) = modules_of_client_and_gate(&src);
    assert!(of_client.iter().any(|module| module == "client") && of_gate.len() > of_client.len());
    let of_gate = of_gate.iter().map(|module| format!("crate::{module}"));
    let absent: Vec<_> = crates.map(|name| format!("{name}::")).chain(of_gate).collect();
    let mut paths = Vec::new();
    files(&src, &mut paths);
    paths.retain(|path| of_client.iter().any(|module| module == module_of(&src, path)));
    let mut wrong = Vec::new();
    for path in paths {
        let code = always_there(&code_of(&path));
        let words: Vec<_> =
            code.split(|c: char| !c.is_alphanumeric() && !"_:".contains(c)).collect();
        for name in absent.iter().filter(|name| words.iter().any(|w| w.starts_with(*name))) {
            wrong.push(format!("{} uses {name}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
