//! What `deploy/` ships works with this program: its configurations load, its queries name what is there, its hardening
//! and bounds are those of the manual.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use otpgate::config::HeaderNames;
use serde_json::Value;

use crate::docs::{load_text, read};
use crate::harness::{Sandbox, output_within, python, run, stderr, stdout};
use crate::ops::every_metric;
use crate::peers::tls::Pki;
use crate::stacks::telling;

/// How long the service sleeps before a sidecar's gate is told to stop.
const SERVICE_SLEEPS: u64 = 5;
/// Labels that Prometheus adds, or keeps of histograms.
const ADDED: [&str; 3] = ["job", "instance", "le"];

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(path)
}

/// Every `otpgate.toml` there.
fn configurations() -> Vec<PathBuf> {
    let mut folders = vec![deploy("")];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with("otpgate.toml") {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 3, "{found:?}");
    found
}

/// The documents of a YAML file.
async fn yaml(path: &str) -> Vec<Value> {
    const TO_JSON: &str =
        "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let mut command = Command::new(python().await);
    command.args(["-c", TO_JSON]).arg(deploy(path));
    let read = output_within(Duration::from_secs(60), command).await;
    assert!(read.status.success(), "{path}: {}", stderr(&read));
    serde_json::from_str(&stdout(&read)).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// The documents of this kind.
fn of_kind<'a>(documents: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    documents.iter().filter(move |document| document["kind"] == kind)
}

/// Longer than a gate with this configuration of a folder may take to stop.
fn is_above_grace(seconds: u64, configuration: &str) -> bool {
    let sandbox = Sandbox::new();
    let text = with_files(&sandbox, &deploy(configuration));
    let shutdown = load_text(&text).unwrap().shutdown;
    Duration::from_secs(seconds) > shutdown.delay + shutdown.grace
}

/// Whether an image names its version.
fn is_pinned(image: &str) -> bool {
    let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
    tag.starts_with(|c: char| c.is_ascii_digit() || c == 'v') && tag.contains('.')
}

/// A configuration with files in a sandbox in place of those that it names.
fn with_files(sandbox: &Sandbox, path: &Path) -> String {
    let pki = Pki::new();
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let shipped = read(path);
    let mut config = shipped.clone();
    for line in shipped.lines() {
        let Some((key, value)) = line.split_once(" = ").filter(|(key, _)| key.ends_with("_file"))
        else {
            continue;
        };
        let contents = match key {
            "key_file" => data_encoding::BASE64.encode(&[7; 32]),
            "password_file" => "secret".to_owned(),
            "seed_file" => "JBSWY3DPEHPK3PXP".to_owned(),
            "ca_file" => read(&pki.ca_file),
            "tls_cert_file" => read(&pki.files.cert_file),
            "tls_key_file" => read(&pki.files.key_file),
            _ => panic!("{}: what is in {key}?", path.display()),
        };
        let file = sandbox.write(key, &contents);
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        config = config.replace(value, &format!("'{}'", file.display()));
    }
    config
}

#[test]
fn every_configuration_loads_and_is_safe() {
    for path in configurations() {
        let sandbox = Sandbox::new();
        let config = sandbox.write("otpgate.toml", &with_files(&sandbox, &path));
        let checked = run(&["check", "--strict", "--config", config.to_str().unwrap()]);
        let said = stderr(&checked);
        assert!(checked.status.success() && said.is_empty(), "{}: {said}", path.display());
    }
}

/// Whoever forgets to replace them has no gate, not an open one.
#[tokio::test]
async fn placeholders_of_secrets_are_refused() {
    let secrets = yaml("kubernetes/secrets.example.yaml").await;
    let keys: BTreeSet<_> =
        secrets.iter().filter_map(|secret| secret["stringData"]["store.key"].as_str()).collect();
    assert_eq!(keys.len(), 1);
    for key in keys {
        let sandbox = Sandbox::new();
        let file = sandbox.write("store.key", key);
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        let checked = run(&["check", "--key-file", file.to_str().unwrap()]);
        let said = stderr(&checked);
        assert!(!checked.status.success() && said.contains("is not a sealing key"), "{said}");
    }
    // Applying a folder never puts them over secrets.
    for folder in ["base", "monitoring", "remote"] {
        let kustomization = read(&format!("deploy/kubernetes/{folder}/kustomization.yaml"));
        assert!(!kustomization.contains("secrets.example"), "{folder}");
    }
}

#[test]
fn promtool_accepts_configuration_rules_and_their_tests() {
    for args in [
        ["check", "config", "prometheus.yaml"],
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts_test.yaml"],
    ] {
        let mut promtool = Command::new("promtool");
        let done = promtool.args(args).current_dir(deploy("prometheus")).output().unwrap();
        assert!(done.status.success(), "{args:?}: {}{}", stdout(&done), stderr(&done));
    }
}

async fn alerts() -> Vec<Value> {
    let groups = yaml("prometheus/alerts.yaml").await;
    let rules = list(&groups[0]["groups"]).iter().flat_map(|group| list(&group["rules"]));
    rules.cloned().collect()
}

/// The anchors that a document's headings make.
fn anchors(document: &str) -> Vec<String> {
    let headings = document.lines().filter(|line| line.starts_with('#'));
    let slug = |heading: &str| {
        let words = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        words.chars().filter(|c| c.is_alphanumeric() || *c == '-').collect()
    };
    headings.map(slug).collect()
}

#[tokio::test]
async fn every_alert_is_tested_and_says_what_to_do() {
    let tests = yaml("prometheus/alerts_test.yaml").await;
    let tests = list(&tests[0]["tests"]);
    let alerts = alerts().await;
    assert!(alerts.len() > 10);
    for alert in &alerts {
        let name = text(&alert["alert"]);
        let own: Vec<_> = tests.iter().filter(|test| test["name"] == name).collect();
        assert!(!own.is_empty(), "{name} is not tested");
        for test in own {
            let [quiet, loud] = list(&test["promql_expr_test"]) else {
                panic!("{name}: not one look before and one after")
            };
            assert!(list(&quiet["exp_samples"]).is_empty(), "{name}");
            let fires = format!("{{alertname=\"{name}\"}}");
            assert!(list(&loud["exp_samples"]).iter().any(|one| one["labels"] == fires), "{name}");
        }
        assert!(["warning", "critical"].contains(&text(&alert["labels"]["severity"])), "{name}");
        let notes = &alert["annotations"];
        assert!(!text(&notes["summary"]).is_empty() && !text(&notes["description"]).is_empty());
        let (document, anchor) = text(&notes["runbook"]).split_once('#').unwrap();
        assert!(anchors(&read(document)).iter().any(|one| one == anchor), "{name}: {anchor}");
    }
    for test in tests {
        assert!(alerts.iter().any(|alert| alert["alert"] == test["name"]), "{}", test["name"]);
    }
}

/// The series that a gate shows, with their labels.
fn series() -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in every_metric().lines().filter(|line| !line.starts_with('#')) {
        let series = line.rsplit_once(' ').unwrap().0;
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels =
            labels.split(',').filter_map(|label| Some(label.split_once('=')?.0.to_owned()));
        all.entry(name.to_owned()).or_default().extend(labels);
    }
    all
}

/// What a query asks for that no gate shows.
fn unknown_in(query: &str, series: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut unknown = Vec::new();
    let mut known: BTreeSet<&str> = ADDED.into();
    for prefix in ["otpgate_", "process_"] {
        for (at, _) in query.match_indices(prefix) {
            let rest = &query[at..];
            let (name, rest) =
                rest.split_at(rest.find(|c: char| !is_word(c)).unwrap_or(rest.len()));
            let Some(labels) = series.get(name) else {
                unknown.push(name.to_owned());
                continue;
            };
            known.extend(labels.iter().map(String::as_str));
            let asked = rest.strip_prefix('{').and_then(|rest| rest.split('}').next());
            for label in asked.unwrap_or_default().split(',') {
                let label = label.split(['=', '!']).next().unwrap().trim();
                if !label.is_empty() && !labels.contains(label) && !ADDED.contains(&label) {
                    unknown.push(format!("{name}: {label}"));
                }
            }
        }
    }
    for grouping in ["by (", "without (", "ignoring ("] {
        for part in query.split(grouping).skip(1) {
            let labels = part.split(')').next().unwrap().split(',').map(str::trim);
            unknown.extend(labels.filter(|label| !known.contains(label)).map(str::to_owned));
        }
    }
    unknown
}

#[test]
fn queries_are_checked() {
    let series = series();
    for (query, expected) in [
        (
            "sum by (listener) (rate(otpgate_requests_total{outcome=\"x\", job=\"y\"}[5m]))",
            &[] as &[&str],
        ),
        ("otpgate_store_operation_duration_seconds_bucket{le=\"1\"}", &[]),
        ("otpgate_requests > 1", &["otpgate_requests"]),
        ("otpgate_requests_total{realm!=\"x\"}", &["otpgate_requests_total: realm"]),
        ("sum by (job, realm) (otpgate_requests_total)", &["realm"]),
    ] {
        assert_eq!(unknown_in(query, &series), expected, "{query}");
    }
}

/// Every text under this key, wherever it is.
fn all_under<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                found.extend(value.as_str().filter(|_| name == key));
                all_under(value, key, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| all_under(value, key, found)),
        _ => {}
    }
}

#[tokio::test]
async fn every_query_names_metrics_and_labels_that_exist() {
    let series = series();
    let alerts = Value::from(alerts().await);
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana/otpgate.json")).unwrap();
    for (place, queries, key) in [
        ("alerts", &alerts, "expr"),
        ("panels", &dashboard, "expr"),
        ("variables", &dashboard, "query"),
    ] {
        let mut found = Vec::new();
        all_under(queries, key, &mut found);
        assert!(found.len() > 1, "{place}");
        for query in found {
            assert_eq!(unknown_in(query, &series), [""; 0], "{place}: {query}");
        }
    }
    // Every metric of the gate has its place on the dashboard, but for what only says how it was built.
    let mut shown = Vec::new();
    all_under(&dashboard, "expr", &mut shown);
    for name in series.keys().filter(|name| name.starts_with("otpgate_")) {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let base = base.unwrap_or(name);
        let is_shown = shown.iter().any(|query| query.contains(base));
        assert!(is_shown || base == "otpgate_build_info", "{base} is on no panel");
    }
}

#[tokio::test]
async fn the_compose_file_is_locked_down_and_gives_redis_the_published_rights() {
    let compose = yaml("docker/compose.yaml").await.remove(0);
    let services = compose["services"].as_object().unwrap();
    assert_eq!(services.len(), 4);
    for (name, service) in services {
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(service["cap_drop"], serde_json::json!(["ALL"]), "{name}");
        let options = &service["security_opt"];
        assert_eq!(options, &serde_json::json!(["no-new-privileges:true"]), "{name}");
        assert!(is_pinned(text(&service["image"])), "{name}");
        for volume in list(&service["volumes"]) {
            let source = text(volume).split(':').next().unwrap();
            let is_there = deploy("docker").join(source).exists();
            assert!(!source.starts_with('.') || is_there, "{name}: {source}");
        }
    }
    let grace = text(&services["otpgate"]["stop_grace_period"]);
    assert!(is_above_grace(grace.trim_end_matches('s').parse().unwrap(), "docker/otpgate.toml"));

    let manual = read("docs/operations.md");
    let published = manual.split("ACL SETUSER manager on >PASSWORD ").nth(1).unwrap();
    let published = published.lines().next().unwrap();
    let redis = text(&services["redis"]["command"][0]);
    let given = redis.split("user manager on #$$sum ").nth(1).unwrap().lines().next().unwrap();
    assert_eq!(given.strip_suffix(" +config|get").unwrap(), published);
    assert!(redis.contains("--appendonly yes --appendfsync always"));
    assert!(redis.contains("--maxmemory-policy noeviction") && redis.contains("user default off"));
}

#[tokio::test]
async fn pods_are_restricted_and_gates_are_probed() {
    let mut gates = 0;
    for part in ["sidecar", "api"] {
        let documents = yaml(&format!("kubernetes/base/{part}/deployment.yaml")).await;
        let deployment = of_kind(&documents, "Deployment").next().unwrap();
        let pod = &deployment["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(pod["automountServiceAccountToken"], false);
        let service_first = if part == "sidecar" { SERVICE_SLEEPS } else { 0 };
        let own = pod["terminationGracePeriodSeconds"].as_u64().unwrap() - service_first;
        assert!(is_above_grace(own, &format!("kubernetes/base/{part}/otpgate.toml")), "{part}");
        for container in list(&pod["initContainers"]).iter().chain(list(&pod["containers"])) {
            let name = text(&container["name"]);
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(security["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(security["capabilities"]["drop"], serde_json::json!(["ALL"]), "{name}");
            assert!(container["resources"]["limits"]["memory"].is_string(), "{name}");
            if name == "otpgate" {
                gates += 1;
                for (probe, path) in
                    [("startup", "/startupz"), ("liveness", "/livez"), ("readiness", "/readyz")]
                {
                    assert_eq!(container[format!("{probe}Probe")]["httpGet"]["path"], path);
                }
            } else {
                assert!(is_pinned(text(&container["image"])), "{name}");
            }
        }
        if part == "sidecar" {
            let sleep = &pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"];
            assert_eq!(sleep.as_u64(), Some(SERVICE_SLEEPS));
            assert_eq!(pod["initContainers"][0]["restartPolicy"], "Always");
        } else {
            assert_eq!(of_kind(&documents, "PodDisruptionBudget").count(), 1);
        }
    }
    assert_eq!(gates, 2);
    let base = yaml("kubernetes/base/kustomization.yaml").await.remove(0);
    assert!(text(&base["images"][0]["newTag"]).contains('.'));
    for map in list(&base["configMapGenerator"]) {
        let file = text(&map["files"][0]);
        assert!(configurations().contains(&deploy("kubernetes/base").join(file)), "{file}");
    }
}

/// What the overlay replaces is where it thinks.
#[tokio::test]
async fn gates_without_seeds_reach_the_api_in_place_of_redis() {
    let overlay = yaml("kubernetes/remote/kustomization.yaml").await.remove(0);
    let base = yaml("kubernetes/base/kustomization.yaml").await.remove(0);
    let replaced = &overlay["configMapGenerator"][0]["name"];
    assert!(list(&base["configMapGenerator"]).iter().any(|map| map["name"] == *replaced));
    let policy = yaml("kubernetes/base/sidecar/networkpolicy.yaml").await.remove(0);
    assert_eq!(policy["metadata"]["name"], overlay["patches"][1]["target"]["name"]);
    assert_eq!(policy["spec"]["egress"][1]["ports"][0]["port"], 6379);
    let api = yaml("kubernetes/base/api/networkpolicy.yaml").await.remove(0);
    let admitted = &api["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"];
    assert_eq!(admitted["otpgate/api-client"], "true");
    assert!(text(&overlay["patches"][0]["patch"]).contains("otpgate~1api-client"));
    let hosts = read("deploy/kubernetes/base/api/otpgate.toml");
    let url = read("deploy/kubernetes/remote/otpgate.toml");
    let host = url.split("https://").nth(1).unwrap().split('"').next().unwrap();
    assert!(hosts.contains(&format!("\"{host}\"")), "{host}");
}

#[test]
fn the_image_is_pinned_and_runs_as_a_numbered_user() {
    let dockerfile = read("deploy/docker/Dockerfile");
    let base = dockerfile.lines().find_map(|line| line.strip_prefix("FROM ")).unwrap();
    assert!(is_pinned(base.split(' ').next().unwrap()), "{base}");
    // Its versions are those of Debian.
    assert!(dockerfile.contains("\nARG RUNTIME=gcr.io/distroless/cc-debian12:nonroot\n"));
    assert!(dockerfile.contains("\nUSER 65532:65532\n"));
    assert!(dockerfile.contains("CMD [\"/usr/local/bin/otpgate\", \"healthcheck\"]"));
    let version = concat!("\nARG VERSION=", env!("CARGO_PKG_VERSION"), "\n");
    assert!(dockerfile.contains(version), "{version}");
}

#[test]
fn the_unit_lets_requests_finish_and_has_files_enough() {
    let unit = read("deploy/systemd/otpgate.service");
    let setting = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("no {key}"))
    };
    let stop = setting("TimeoutStopSec").trim_end_matches('s').parse().unwrap();
    assert!(is_above_grace(stop, "systemd/otpgate.toml"));
    let config = load_text("").unwrap();
    let limits = [&config.proxy.limits, &config.api.limits, &config.ops.limits];
    let connections: usize = limits.iter().map(|limits| limits.max_connections).sum();
    assert!(setting("LimitNOFILE").parse::<usize>().unwrap() > 2 * connections);
    assert_eq!(setting("LimitCORE"), "0");
    assert_eq!(setting("NoNewPrivileges"), "yes");
    assert_eq!(setting("ProtectSystem"), "strict");

    assert_eq!(setting("Type"), "notify");

    // Its own words for it, where systemd is.
    let sandbox = Sandbox::new();
    let unit = unit.replace("/usr/local/bin/otpgate", env!("CARGO_BIN_EXE_otpgate"));
    let service = sandbox.write("otpgate.service", &unit);
    let socket = sandbox.write("otpgate.socket", &read("deploy/systemd/otpgate.socket"));
    let verify = Command::new("systemd-analyze").arg("verify").args([service, socket]).output();
    let Ok(verified) = verify else { return };
    // It looks at units of the machine too.
    let said = stderr(&verified);
    assert!(verified.status.success() && !said.contains("otpgate."), "{said}");
}

/// Any other would keep the gate from starting.
#[test]
fn the_sockets_of_systemd_are_those_of_its_configuration() {
    let config = load_text(&read("deploy/systemd/otpgate.toml")).unwrap();
    let listen = [config.proxy.listen, config.api.listen, config.ops.listen].concat();
    let configured: BTreeSet<_> = listen.iter().map(|one| one.address.to_string()).collect();
    let unit = read("deploy/systemd/otpgate.socket");
    let opened: BTreeSet<_> = unit
        .lines()
        .filter_map(|line| line.strip_prefix("ListenStream="))
        .map(|at| if at.starts_with('/') { format!("unix:{at}") } else { at.to_owned() })
        .collect();
    assert_eq!(opened, configured);
}

/// Envoy's own reading, by its published messages.
#[tokio::test]
async fn envoy_knows_every_setting_and_nothing_is_let_pass_by_default() {
    let mut command = Command::new(python().await);
    let files = ["envoy/envoy.yaml", "envoy/envoy-grpc.yaml"];
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/envoy_config.py");
    command.arg(script).args(files.map(deploy));
    let read = output_within(Duration::from_secs(60), command).await;
    assert!(read.status.success(), "{}", stderr(&read));
    for file in files {
        let config = yaml(file).await.remove(0);
        let manager = &config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0];
        let manager = &manager["typed_config"];
        for key in ["normalize_path", "merge_slashes", "use_remote_address"] {
            assert_eq!(manager[key], true, "{file}: {key}");
        }
        assert_eq!(manager["upgrade_configs"], serde_json::json!([{"upgrade_type": "websocket"}]));
        let [ask, router] = list(&manager["http_filters"]) else { panic!("{file}: two filters") };
        assert_eq!(router["name"], "envoy.filters.http.router", "{file}");
        let ask = &ask["typed_config"];
        assert_eq!(ask["failure_mode_allow"], false, "{file}");
        assert!(ask["with_request_body"].is_null() && ask["filter_enabled"].is_null(), "{file}");
        assert!(ask["http_service"].is_object() != ask["grpc_service"].is_object(), "{file}");
        let names = HeaderNames::default();
        let removed = list(&manager["route_config"]["request_headers_to_remove"]);
        assert!(removed.contains(&names.token.as_str().into()), "{file}");
        for name in telling() {
            assert!(removed.contains(&name.as_str().into()), "{file}: {name}");
        }
        if let Some(service) = ask["http_service"].as_object() {
            assert_eq!(service["path_prefix"], "/authz/ext-authz");
            let copied = &service["authorization_response"]["allowed_upstream_headers"]["patterns"];
            let copied: Vec<_> = list(copied).iter().map(|header| text(&header["exact"])).collect();
            assert_eq!(copied, [names.identity_name.as_str(), names.identity_realm.as_str()]);
        } else {
            // What is not shown cannot be refused.
            assert!(ask["encode_raw_headers"] == true && ask["allowed_headers"].is_null());
        }
    }
}

#[tokio::test]
async fn traefik_asks_about_every_request_and_hides_the_token() {
    let config = yaml("traefik/dynamic.yaml").await.remove(0);
    let middlewares = config["http"]["middlewares"].as_object().unwrap();
    let ask = &middlewares["otpgate-ask"]["forwardAuth"];
    assert!(text(&ask["address"]).ends_with("/authz/forward-auth"));
    assert_eq!(ask["trustForwardHeader"], false);
    assert!(ask["authRequestHeaders"].is_null());
    let lower = |value: &Value| text(value).to_ascii_lowercase();
    let copied: Vec<_> = list(&ask["authResponseHeaders"]).iter().map(lower).collect();
    let names = HeaderNames::default();
    assert_eq!(copied, [names.identity_name.as_str(), names.identity_realm.as_str()]);
    let hidden =
        middlewares["otpgate-hide"]["headers"]["customRequestHeaders"].as_object().unwrap();
    let hidden: Vec<_> = hidden.iter().map(|(name, value)| (name.to_lowercase(), value)).collect();
    assert_eq!(hidden, [(names.token.as_str().to_owned(), &Value::from(""))]);
    let stripped = middlewares["otpgate-strip"]["headers"]["customRequestHeaders"].as_object();
    let stripped: Vec<_> = stripped.unwrap().keys().map(|name| name.to_lowercase()).collect();
    // This one Traefik writes itself.
    for name in telling().into_iter().filter(|name| name != "x-real-ip") {
        assert!(stripped.contains(&name), "{name}");
    }
    for (name, router) in config["http"]["routers"].as_object().unwrap() {
        let chain: Vec<_> = list(&router["middlewares"]).iter().map(text).collect();
        assert!(chain.iter().all(|name| middlewares.contains_key(*name)), "{name}");
        assert!(chain.starts_with(&["otpgate-strip"]), "{name}");
        assert!(chain.ends_with(&["otpgate-ask", "otpgate-hide"]), "{name}");
    }
}
