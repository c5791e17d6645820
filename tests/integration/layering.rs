//! Data flows one way: who may import whom.

use std::path::Path;

/// Modules from the bottom up; each may use those before it.
const LAYERS: &[&[&str]] = &[
    &["clock", "secret", "credentials", "hardening"],
    &["entry"],
    &["seal", "otp", "audit"],
    &["client"],
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
        let relative = path.strip_prefix(&src).unwrap();
        let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if matches!(module, "lib" | "main") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        // What tests import does not count.
        let code = text.split("#[cfg(test)]").next().unwrap();
        let code: Vec<_> = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        for used in code.join("\n").split("crate::").skip(1) {
            let used: String =
                used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let allowed = used == module
                || EXCEPTIONS.contains(&(module, &used))
                || layer(&used) < layer(module);
            if !allowed {
                wrong.push(format!("{} uses {used}", relative.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
