//! Documents that must not drift from the code.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use otpgate::config::load::load;
use otpgate::store::Quota;

use crate::harness::{Sandbox, run, stderr, stdout};
use crate::peers::echo::Echo;

pub(crate) fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

pub(crate) fn load_text(text: &str) -> Result<otpgate::config::Config, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    load(Some(file.path()), [], &[]).map_err(|e| e.to_string())
}

/// The manual's settings, commented in, but those of one section, whose place another one takes. Files that it
/// names are examples and do not exist.
fn uncommented_without(section: &str) -> String {
    let setting = |line: &str| {
        let key = line.strip_prefix('#')?.split([' ', '=']).next()?;
        let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        let is_setting = line.contains(" = ") && plain && !line.starts_with("# ");
        let table = line.starts_with("#[");
        let example =
            key == "cached_entries" || key.ends_with("_file") || key.ends_with("username");
        ((is_setting && !example) || table).then(|| line[1..].to_owned())
    };
    let manual = read("config/otpgate.toml");
    let mut is_left_out = false;
    let mut lines = Vec::new();
    for line in manual.lines() {
        if line.starts_with('[') {
            is_left_out = line == section;
        }
        if !is_left_out {
            lines.push(setting(line).unwrap_or_else(|| line.to_owned()));
        }
    }
    lines.join("\n")
}

fn uncommented() -> String {
    uncommented_without("[remote]")
}

/// With the files that it needs.
fn with_remote(sandbox: &Sandbox) -> String {
    let seed = sandbox.write("gate.seed", "JBSWY3DPEHPK3PXP");
    let files = format!("[remote]\nseed_file = '{}'\n", seed.display());
    uncommented_without("[store]").replace("[remote]\n", &files)
}

#[test]
fn every_line_of_the_manual_works() {
    let text = uncommented();
    assert!(text.contains("\nmax_stale = \"15s\"") && text.contains("\n[[route]]"), "{text}");
    let config = load_text(&text).unwrap();
    assert_eq!(config.routes.len(), 4);
}

/// What the manual shows for settings with a default is that default.
#[test]
fn the_manual_shows_the_defaults() {
    let shown = load_text(&uncommented()).unwrap();
    let default = load_text("").unwrap();
    let settings = |mut config: otpgate::config::Config| {
        // Where nothing is the default, the manual shows an example, and says so.
        for limits in [&mut config.proxy.limits, &mut config.api.limits, &mut config.ops.limits] {
            limits.max_body_bytes = None;
        }
        config.headers.identity_principal = None;
        [
            format!("{:?}", (config.proxy.limits, config.api.limits, config.ops.limits)),
            format!("{:?}", (config.proxy.timeouts, config.api.reveal_seeds, config.realms)),
            format!("{:?}", (config.store.max_stale, config.rules.default, config.headers)),
            format!("{:?}", config.store.redis),
            format!("{:?}", (config.shutdown.grace, config.log, config.throttle)),
            format!("{:?}", (config.shutdown.streams, config.shutdown.upgrade_timeout)),
            format!("{:?}", (config.api.rotate_overlap, config.process, config.reload)),
            format!("{:?}", (config.proxy.health.interval, config.proxy.health.dns_interval)),
        ]
    };
    assert_eq!(settings(shown), settings(default));
}

#[test]
fn the_manual_of_a_remote_server_works_and_shows_the_defaults() {
    let shown = load_text(&with_remote(&Sandbox::new())).unwrap().remote.unwrap();
    let least = "[remote]\nurl = 'https://a'\nname = 'a'\nseed = 'AAAA'\n";
    let default = load_text(least).unwrap().remote.unwrap();
    let settings = |config: otpgate::config::RemoteConfig| {
        let bounds = (config.max_in_flight, config.cache_entries);
        (config.realm, config.timeout, config.max_stale, bounds)
    };
    assert_eq!(settings(shown), settings(default));
}

#[test]
fn the_manual_names_every_setting() {
    let manual = read("config/otpgate.toml");
    let sections = [
        "proxy",
        "proxy.limits",
        "proxy.timeouts",
        "proxy.health",
        "api",
        "ops",
        "store",
        "remote",
        "totp",
        "realms",
        "headers",
        "throttle",
        "log",
        "shutdown",
        "reload",
        "process",
    ];
    for section in sections {
        let problems = load_text(&format!("[{section}]\nnonsense = 1\n")).unwrap_err();
        let known = problems.split("known here: ").nth(1).unwrap().lines().next().unwrap().trim();
        let start =
            manual.find(&format!("\n[{section}]\n")).unwrap_or_else(|| panic!("[{section}]"));
        let part = &manual[start + 2..];
        let part = &part[..part.find("\n[").unwrap_or(part.len())];
        for key in known.split(", ") {
            let is_table = manual.contains(&format!("[{section}.{key}]"));
            // A secret may come as `key` or `key_file`; the manual shows the better one.
            let shown = [format!("#{key} = "), format!("#{key}_file = "), format!("`{key}`")];
            let named = shown.iter().any(|s| part.contains(s));
            assert!(is_table || named, "[{section}] {key} is not in the manual");
        }
    }
    let route = load_text("[[route]]\nnonsense = 1\n").unwrap_err();
    let known = route.split("route[0].nonsense: unknown key; known here: ").nth(1).unwrap();
    for key in known.lines().next().unwrap().split(", ") {
        assert!(manual.contains(&format!("#{key} = ")), "[[route]] {key} is not in the manual");
    }
}

#[test]
fn the_readme_example_works() {
    let readme = read("README.md");
    let example = readme.split("```toml").nth(1).unwrap().split("```").next().unwrap();
    let sandbox = Sandbox::new();
    let folder = sandbox.path("");
    let example = example.replace("/etc/otpgate", folder.to_str().unwrap());
    sandbox.write("redis-password", "secret");
    sandbox.write("store.key", &data_encoding::BASE64.encode(&[7; 32]));
    std::fs::set_permissions(sandbox.path("store.key"), Permissions::from_mode(0o600)).unwrap();
    assert_eq!(load_text(&example).unwrap().routes.len(), 2);
    let config = sandbox.write("example.toml", &example);
    let checked = run(&["check", "--strict", "--config", config.to_str().unwrap()]);
    assert!(checked.status.success() && checked.stderr.is_empty(), "{}", stderr(&checked));
}

/// The lines of README, in its order, in one shell; a gate on free ports stands for the default one.
#[tokio::test(flavor = "multi_thread")]
async fn the_readme_lines_work_when_pasted() {
    let readme = read("README.md");
    let by_hand = readme.split("## By hand, without a file").nth(1).unwrap();
    let by_hand = by_hand.split("## What callers").next().unwrap();
    let mut blocks: Vec<_> =
        by_hand.split("```sh\n").skip(1).map(|b| b.split("```").next().unwrap()).collect();
    assert_eq!(blocks.remove(1), "otpgate serve --upstream 127.0.0.1:9000\n");
    let bootstrap = blocks.remove(0);

    let sandbox = Sandbox::new();
    let shell = |text: &str| {
        let program = Path::new(env!("CARGO_BIN_EXE_otpgate")).parent().unwrap();
        let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
        let mut shell = std::process::Command::new("sh");
        shell.args(["-euc", text]).current_dir(sandbox.path("")).env_clear().env("PATH", path);
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{text}: {}", stderr(&output));
        stdout(&output)
    };
    shell(bootstrap);
    let echo = Echo::start().await;
    let gate = sandbox.serve(&format!("[proxy]\nupstream = '{}'\n", echo.address)).ready().await;
    let rest = blocks
        .concat()
        .replace("http://127.0.0.1:8080", &gate.proxy)
        .replace("http://127.0.0.1:8081", &gate.api);
    let shown = tokio::task::block_in_place(|| shell(&rest));
    assert_eq!(shown.matches("HTTP/1.1 200 OK").count(), 2, "{shown}");
    assert!(shown.contains("2   ops             alice\n"), "{shown}");
    assert!(shown.ends_with("{\"status\":\"OK\"}"), "{shown}");
    assert_eq!(echo.seen(), 1);
}

/// What README says in Rust is what the compiled examples of the library say.
#[test]
fn the_readme_in_rust_is_that_of_the_library() {
    let readme = read("README.md");
    let block = readme.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    let library = read("src/client.rs");
    let lines: Vec<_> = library.lines().map(|l| l.trim_start_matches("//!").trim()).collect();
    let said: Vec<_> =
        block.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("//")).collect();
    assert!(said.len() > 8);
    for line in said {
        assert!(lines.contains(&line), "the library does not say `{line}`");
    }
}

/// What the gate alone needs is optional, so that services which want the client build little.
#[test]
fn the_client_needs_nothing_of_the_gate() {
    const OF_THE_CLIENT: &[&str] = &[
        "bytes",
        "data-encoding",
        "form_urlencoded",
        "http",
        "icu_normalizer",
        "reqwest",
        "ring",
        "rustls",
        "serde",
        "serde_json",
        "thiserror",
        "totp-rs",
        "zeroize",
    ];
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let dependencies = manifest["dependencies"].as_table().unwrap();
    let is_optional =
        |of: &toml::Value| of.get("optional").is_some_and(|o| o.as_bool() == Some(true));
    let always: Vec<_> =
        dependencies.iter().filter(|(_, of)| !is_optional(of)).map(|(name, _)| name).collect();
    assert_eq!(
        always, OF_THE_CLIENT,
        "optional, and in the feature `server`, or needed by the client?"
    );
}

#[test]
fn links_between_documents_lead_somewhere() {
    for document in [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/operations.md",
        "docs/conformance.md",
        "docs/failures.md",
        "docs/performance.md",
        "docs/requests.md",
        "deploy/README.md",
    ] {
        for link in read(document).split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if !target.is_empty() && !target.contains("://") {
                let base = Path::new(env!("CARGO_MANIFEST_DIR")).join(document);
                assert!(base.parent().unwrap().join(target).exists(), "{document}: {target}");
            }
        }
    }
}

/// Numbers that people rely on are those of the defaults.
#[test]
fn the_documents_tell_the_bounds_of_the_defaults() {
    let config = load_text("").unwrap();
    let throttle = config.throttle;
    let day = |quota: Quota| 86_400 / quota.interval().as_secs();
    let first = |quota: Quota| u64::from(quota.failures) + day(quota);
    let (entry, source) = (throttle.per_entry, throttle.per_source);
    let steps = u64::from(config.rules.default.skew_steps) * 2 + 1;
    let params = config.rules.default.params;
    let hit = (first(entry) * steps) as f64 / 10_f64.powi(params.digits.into()) * 100.0;
    let (seconds, stale) = (steps * u64::from(params.step_seconds), config.store.max_stale);
    let told = [
        ("SECURITY.md", format!("{} at once, then 400 a day", entry.failures)),
        (
            "SECURITY.md",
            format!("{} times on the first day and {} times", first(entry), day(entry)),
        ),
        ("SECURITY.md", format!("probability of {hit:.2} %")),
        ("SECURITY.md", format!("{} at once, then one a minute", source.failures)),
        (
            "SECURITY.md",
            format!(
                "{} at once, then one in {} s",
                throttle.per_address.failures,
                throttle.per_address.interval().as_secs()
            ),
        ),
        ("SECURITY.md", format!("{steps} of 1,000,000 tokens")),
        ("SECURITY.md", format!("({seconds} seconds by default)")),
        ("SECURITY.md", format!("`store.max_stale` | {} s", stale.as_secs())),
        ("README.md", format!("({seconds} seconds in all; `totp.skew`)")),
        ("README.md", format!("`store.max_stale` ({} s)", stale.as_secs())),
        (
            "docs/operations.md",
            format!("{} times on the first day and {} times", first(entry), day(entry)),
        ),
        ("docs/operations.md", format!("probability of {hit:.2} %")),
    ];
    for (document, text) in told {
        let words = read(document).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(&text), "{document} does not say `{text}`");
    }
    let known = first(source);
    assert_eq!((known, day(entry), source.interval().as_secs()), (1450, 400, 60));
}
