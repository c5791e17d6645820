//! The command line, as typed.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use serde_json::Value;

use crate::harness::{ADMIN, Sandbox, otpgate, run, run_with_input, stderr, stdout};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn help_and_version_everywhere() {
    for args in [
        vec!["--help"],
        vec!["serve", "--help"],
        vec!["demo", "--help"],
        vec!["check", "--help"],
        vec!["token", "--help"],
        vec!["client", "--help"],
        vec!["client", "create", "--help"],
        vec!["store", "--help"],
        vec!["store", "bootstrap", "--help"],
        vec!["store", "rekey", "--help"],
        vec!["--version"],
    ] {
        let output = run(&args);
        assert!(output.status.success(), "{args:?}");
        assert!(stdout(&output).contains("otpgate"), "{args:?}");
    }
}

/// As on a full disk: no panic, and the exit code says it.
#[test]
fn results_that_nothing_takes_are_failures() {
    let sandbox = Sandbox::new();
    let seed = sandbox.write("seed", ADMIN);
    let dump = sandbox.write("dump.json", "[]");
    let (seed, dump, store) = (seed.to_str().unwrap(), dump.to_str().unwrap(), sandbox.store());
    for args in [
        &["token", "--seed-file", seed] as &[_],
        &["check"],
        &["store", "init", "--store", &store],
        &["store", "bootstrap", "--store", &store],
        &["store", "import", "--store", &store, dump],
        &["store", "rekey", "--store", &store],
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = otpgate().args(args).stdout(full).output().unwrap();
        let complaint = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {complaint}");
        // An audit line may come first.
        let last = complaint.lines().last().unwrap();
        assert!(last.starts_with("otpgate: cannot write the result: "), "{complaint}");
    }
}

#[test]
fn help_tells_every_way_to_say_who_calls() {
    let help = stdout(&run(&["client", "verify", "--help"]));
    for variable in [
        "OTPGATE_SERVER_URL",
        "UNGLEICHOTPSERVER",
        "OTPGATE_AUTH_NAME",
        "UNGLEICHOTPNAME",
        "OTPGATE_AUTH_REALM",
        "UNGLEICHOTPREALM",
        "OTPGATE_AUTH_SEED",
        "UNGLEICHOTPSEED",
        "OTPGATE_AUTH_SEED_FILE",
        "OTPGATE_AUTH_TOKEN",
    ] {
        assert!(help.contains(variable), "{variable} is not in {help}");
    }
}

#[test]
fn usage_errors_exit_with_2() {
    for args in [
        vec![],
        vec!["serve", "--nonsense"],
        vec!["token", "--digits", "5"],
        vec!["token"],
        vec!["store", "bootstrap", "--name", ""],
        vec!["client", "list"],
        vec!["nonsense"],
    ] {
        assert_eq!(run(&args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn check_names_every_problem_and_exits_with_1() {
    let sandbox = Sandbox::new();
    let config =
        sandbox.write("bad.toml", "[proxy]\nlisten = 'x'\nupstraem = 'y'\n[totp]\ndigits = 5\n");
    for command in ["check", "serve"] {
        let output = otpgate().args([command, "--config"]).arg(&config).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let complaint = stderr(&output);
        for key in ["proxy.listen: ", "proxy.upstraem: unknown key", "totp.digits: "] {
            assert!(complaint.contains(key), "{command}: {key} in {complaint}");
        }
    }
}

#[test]
fn check_is_content_with_the_shipped_configuration_and_with_none() {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/config/otpgate.toml");
    for args in [vec!["check", "--strict", "--config", shipped], vec!["check", "--strict"]] {
        let output = run(&args);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
    }
}

/// Callers and kubelet come over the network; the rest is the default.
#[test]
fn check_is_content_with_a_gate_in_a_pod() {
    let sandbox = Sandbox::new();
    let pod = sandbox.write(
        "pod.toml",
        "[proxy]\nlisten = '0.0.0.0:8080'\ntrusted_proxies = '10.0.0.0/8'\n\
         [ops]\nlisten = '[::]:9464'\n[log]\nformat = 'json'\naudit = 'stdout'\n",
    );
    let output = run(&["check", "--strict", "--config", pod.to_str().unwrap()]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
}

#[test]
fn check_names_unsafe_settings_and_serve_logs_the_same() {
    let sandbox = Sandbox::new();
    let settings = "[proxy]\nmode = 'report'\n[api]\nlisten = 'off'\n[store]\nsealing = 'off'\n";
    let config = sandbox.write("unsafe.toml", settings);
    let check = |more: &[&str]| {
        let mut command = otpgate();
        command.args(["check", "--store", &sandbox.store(), "--config"]).arg(&config).args(more);
        command.output().unwrap()
    };
    let checked = check(&[]);
    assert!(checked.status.success());
    let named: Vec<_> = stderr(&checked)
        .lines()
        .map(|line| line.strip_prefix("otpgate: unsafe: ").unwrap().to_owned())
        .collect();
    let keys: Vec<_> = named.iter().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(keys, ["proxy.mode", "store.url", "store.sealing"]);
    assert_eq!(stderr(&check(&["--quiet"])), stderr(&checked));

    let strict = check(&["--strict"]);
    assert_eq!(strict.status.code(), Some(1));
    assert!(stderr(&strict).ends_with("otpgate: the configuration is usable, but unsafe\n"));
    let listed = |output| -> Vec<String> {
        let report = json(&stdout(output));
        assert_eq!((&report["usable"], &report["problems"]), (&Value::Bool(true), &json("[]")));
        let text = |warning: &Value, field: &str| warning[field].as_str().unwrap().to_owned();
        let warnings = report["warnings"].as_array().unwrap();
        warnings.iter().map(|w| format!("{}: {}", text(w, "key"), text(w, "text"))).collect()
    };
    let machine = check(&["--json"]);
    assert_eq!((machine.status.code(), listed(&machine)), (Some(0), named.clone()));
    let machine = check(&["--json", "--strict"]);
    assert_eq!((machine.status.code(), listed(&machine)), (Some(1), named.clone()));

    let gate = sandbox.serve(settings);
    let logged: Vec<String> = gate
        .log_text()
        .lines()
        .map(json)
        .filter(|line| line["level"] == "WARN")
        .filter_map(|line| {
            let text = line["message"].as_str()?.strip_prefix("unsafe setting: ")?.to_owned();
            Some(format!("{}: {text}", line["key"].as_str()?))
        })
        .collect();
    assert_eq!(logged, named);
}

#[tokio::test]
async fn serve_warns_of_a_thing_once() {
    let sandbox = Sandbox::with_entries();
    let database = sandbox.path("otpgate.db");
    std::fs::set_permissions(&database, std::fs::Permissions::from_mode(0o644)).unwrap();
    let gate = sandbox.serve("").ready().await;
    gate.signal(libc::SIGTERM);
    gate.wait_for_log(|line| line["message"] == "stopped").unwrap();
    let log = gate.log_text();
    let told = log.lines().filter(|line| line.contains("every user of this machine may read"));
    assert_eq!(told.count(), 1, "{log}");
}

#[test]
fn check_looks_into_certificates() {
    let sandbox = Sandbox::new();
    let pem = sandbox.write("bad.pem", "no certificate");
    let path = pem.display();
    let config = sandbox
        .write("tls.toml", &format!("[api]\ntls_cert_file = '{path}'\ntls_key_file = '{path}'\n"));
    let output = otpgate().args(["check", "--config"]).arg(&config).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("bad.pem"), "{}", stderr(&output));
}

#[test]
fn check_and_init_also_answer_machines() {
    let sandbox = Sandbox::new();
    let config = sandbox.write("bad.toml", "[totp]\ndigits = 5\n");
    let output = run(&["check", "--json", "--config", config.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let answer = json(&stdout(&output));
    assert_eq!(answer["usable"], false);
    assert!(answer["problems"][0].as_str().unwrap().starts_with("totp.digits: "), "{answer}");
    let good = run(&["check", "--json"]);
    assert_eq!(
        json(&stdout(&good)),
        serde_json::json!({ "usable": true, "problems": [], "warnings": [] })
    );

    for created in [true, false] {
        let output = run(&["store", "init", "--json", "--store", &sandbox.store()]);
        assert_eq!(json(&stdout(&output)), serde_json::json!({ "created": created }));
    }
}

#[test]
fn bootstrap_makes_the_first_admin_once() {
    let sandbox = Sandbox::new();
    let store = sandbox.store();
    let first = run(&["store", "bootstrap", "--store", &store, "--json"]);
    assert!(first.status.success(), "{}", stderr(&first));
    let entry = json(&stdout(&first));
    assert_eq!(entry["name"], "admin");
    assert_eq!(entry["realm"], "ungleich-admin");
    assert_eq!(entry["id"], 1);
    assert_eq!(entry["seed"].as_str().map(str::len), Some(32));

    let again = run(&["store", "bootstrap", "--store", &store]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("admin@ungleich-admin already"), "{}", stderr(&again));
    assert!(!stderr(&again).contains(entry["seed"].as_str().unwrap()));

    let seed = sandbox.write("seed", ADMIN);
    let other = run(&[
        "store",
        "bootstrap",
        "--store",
        &store,
        "--name",
        "root",
        "--json",
        "--seed-file",
        seed.to_str().unwrap(),
    ]);
    assert_eq!(json(&stdout(&other))["seed"], ADMIN);
}

#[test]
fn a_store_without_its_key_is_refused() {
    let sandbox = Sandbox::with_entries();
    std::fs::remove_file(sandbox.path("otpgate.db.key")).unwrap();
    let output = run(&["store", "bootstrap", "--store", &sandbox.store(), "--name", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("otpgate.db.key"), "{}", stderr(&output));
}

#[test]
fn import_takes_what_it_can_and_tells_the_rest() {
    let sandbox = Sandbox::new();
    let dump = sandbox.write(
        "dump.json",
        r#"[
        {"model": "auth.user", "pk": 1, "fields": {"username": "x", "groups": []}},
        {"model": "other.thing", "pk": "x", "fields": {"name": null, "realm": 5, "seed": ["hunter2"]}},
        {"model": "other.bare", "pk": null},
        {"model": "otpauth.otpseed", "pk": 7, "fields": {"name": "a", "realm": "r", "seed": "JBSWY3DPEHPK3PXP"}},
        {"model": "otpauth.OTPSeed", "pk": 9, "fields": {"name": "b", "realm": "r", "seed": "gezdgnbvgy3tqojqgezdgnbvgy======"}},
        {"model": "otpauth.otpseed", "pk": 10, "fields": {"name": "bad", "realm": "r", "seed": "hunter2!"}},
        {"model": "otpauth.otpseed", "pk": 11, "fields": {"name": "a", "realm": "r", "seed": "JBSWY3DPEHPK3PXP"}},
        {"model": "otpauth.otpseed", "pk": 12, "fields": {"name": "\u001b[2J", "realm": "r", "seed": "JBSWY3DPEHPK3PXP"}},
        {"model": "otpauth.otpseed", "pk": 13, "fields": {"name": "c", "realm": "r", "seed": ["hunter2"]}}
    ]"#,
    );
    let dump = dump.to_str().unwrap();
    let import = |extra: &[&str]| {
        let store = sandbox.store();
        let output =
            run(&[&["store", "import", "--store", &store, "--json", dump], extra].concat());
        assert!(!(stdout(&output) + &stderr(&output)).contains("hunter2"));
        (output.status.code(), json(&stdout(&output)))
    };
    let (code, report) = import(&["--dry-run"]);
    assert_eq!((code, &report["imported"]), (Some(1), &Value::from(2)));
    let (_, report) = import(&[]);
    assert_eq!((&report["imported"], &report["present"]), (&Value::from(2), &Value::from(0)));
    let refused = report["refused"].as_array().unwrap();
    let reasons: Vec<_> = refused.iter().map(|r| r["reason"].as_str().unwrap()).collect();
    let expected = [
        "its seed is not base32",
        "stands twice in the file",
        "its name contains a control character",
        "its name, realm and seed are not all texts",
    ];
    assert_eq!(reasons, expected);
    let shown = stdout(&run(&["store", "import", "--store", &sandbox.store(), dump]));
    assert!(shown.contains("record 8") && !shown.contains('\x1b'), "{shown}");
    let (_, report) = import(&[]);
    assert_eq!((&report["imported"], &report["present"]), (&Value::from(0), &Value::from(2)));

    // Ids go on behind the imported ones.
    let next = run(&["store", "bootstrap", "--store", &sandbox.store(), "--json"]);
    assert_eq!(json(&stdout(&next))["id"], 10);
}

/// A database as Django makes it for ungleich-otp.
fn django_database(path: &std::path::Path, app: &str) -> rusqlite::Connection {
    let conn = rusqlite::Connection::open(path).unwrap();
    conn.execute_batch(&format!(
        "CREATE TABLE \"auth_user\" (\"id\" integer NOT NULL PRIMARY KEY AUTOINCREMENT, \"username\" varchar(150) NOT NULL);
         CREATE TABLE \"{app}_otpseed\" (\"id\" integer NOT NULL PRIMARY KEY AUTOINCREMENT, \"name\" varchar(128) NOT NULL,
             \"realm\" varchar(128) NOT NULL, \"seed\" varchar(128) NOT NULL);
         CREATE UNIQUE INDEX \"{app}_otpseed_name_realm\" ON \"{app}_otpseed\" (\"name\", \"realm\");"
    ))
    .unwrap();
    conn
}

#[test]
fn import_takes_the_database_of_ungleich_otp() {
    let sandbox = Sandbox::new();
    let file = sandbox.path("db.sqlite3");
    let django = django_database(&file, "otpauth");
    for (id, name, seed) in [
        (7, "a", "JBSWY3DPEHPK3PXP"),
        (9, "b", "gezdgnbvgy3tqojqgezdgnbvgy"),
        (10, "bad", "hunter2!"),
        (20, "gone", "JBSWY3DPEHPK3PXP"),
    ] {
        let sql = "INSERT INTO otpauth_otpseed VALUES (?1, ?2, 'r', ?3)";
        django.execute(sql, (id, name, seed)).unwrap();
    }
    django
        .execute("INSERT INTO otpauth_otpseed VALUES (11, x'00', 'r', 'JBSWY3DPEHPK3PXP')", [])
        .unwrap();
    django.execute("DELETE FROM otpauth_otpseed WHERE name = 'gone'", []).unwrap();
    let before = std::fs::read(&file).unwrap();
    let import = |extra: &[&str]| {
        let store = sandbox.store();
        let arguments = ["store", "import", "--store", &store, "--json", file.to_str().unwrap()];
        let output = run(&[&arguments, extra].concat());
        assert!(!(stdout(&output) + &stderr(&output)).contains("hunter2"));
        (output.status.code(), json(&stdout(&output)))
    };
    for (extra, imported, present) in [(&["--dry-run"][..], 2, 0), (&[], 2, 0), (&[], 0, 2)] {
        let (code, report) = import(extra);
        let counts = (&report["imported"], &report["present"]);
        assert_eq!((code, counts), (Some(1), (&Value::from(imported), &Value::from(present))));
        let reasons: Vec<_> =
            report["refused"].as_array().unwrap().iter().map(|r| r["reason"].clone()).collect();
        let expected = ["its seed is not base32", "its name, realm and seed are not all texts"];
        assert_eq!(reasons, expected);
    }
    assert!(std::fs::read(&file).unwrap() == before, "it is only read");
    // Also numbers of entries that are gone are not given again.
    let next = run(&["store", "bootstrap", "--store", &sandbox.store(), "--json"]);
    assert_eq!(json(&stdout(&next))["id"], 21);
}

#[test]
fn import_of_other_databases_is_refused() {
    let sandbox = Sandbox::new();
    let refusal = |file: &std::path::Path| {
        let output = run(&["store", "import", "--store", &sandbox.store(), file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        stderr(&output)
    };
    let other = sandbox.path("other.sqlite3");
    rusqlite::Connection::open(&other).unwrap().execute_batch("CREATE TABLE x (y)").unwrap();
    assert!(refusal(&other).contains("no table `..._otpseed`"));
    // A view could run what somebody else wrote.
    let view = sandbox.path("view.sqlite3");
    let sql = "CREATE VIEW a_otpseed AS SELECT 1 AS id, 'a' AS name, 'r' AS realm, 'JBSWY3DPEHPK3PXP' AS seed";
    rusqlite::Connection::open(&view).unwrap().execute_batch(sql).unwrap();
    assert!(refusal(&view).contains("no table `..._otpseed`"));
    let two = sandbox.path("two.sqlite3");
    drop(django_database(&two, "a"));
    let conn = rusqlite::Connection::open(&two).unwrap();
    conn.execute_batch("CREATE TABLE b_otpseed (id, name, realm, seed)").unwrap();
    assert!(refusal(&two).contains("(a_otpseed, b_otpseed)"), "{}", refusal(&two));
    let torn = sandbox.path("torn.sqlite3");
    std::fs::write(&torn, &std::fs::read(&two).unwrap()[..5000]).unwrap();
    assert!(refusal(&torn).contains("torn.sqlite3"));
    assert!(!sandbox.path("otpgate.db").exists(), "no store was made");
}

#[test]
fn import_of_something_else_is_refused() {
    let sandbox = Sandbox::new();
    let file = sandbox.write("x.json", "{\"seed\": \"hunter2\"}");
    let output = run(&["store", "import", "--store", &sandbox.store(), file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is neither an export nor a `dumpdata` file"));
    assert!(!stderr(&output).contains("hunter2"));
}

#[test]
fn tokens_are_those_of_oathtool() {
    let seeds = [
        "JBSWY3DPEHPK3PXP",
        "GEZDGNBVGY3TQOJQGEZDGNBVGY",
        "gezdgnbvgy3tqojqgezdgnbvgy3tqojq",
        "GEZDGNBVGY3TQOJQGEZDGNBVGY======",
    ];
    for (i, seed) in (0_u64..).zip(seeds) {
        for (algorithm, digits) in [("SHA1", "6"), ("SHA1", "8"), ("SHA256", "7"), ("SHA512", "6")]
        {
            let at = 1_700_000_000 + i * 12_345;
            let theirs = Command::new("oathtool")
                .args(["--base32", &format!("--totp={algorithm}"), "--digits", digits])
                .args(["--now", &format!("@{at}"), seed])
                .output()
                .expect("oathtool is installed");
            assert!(theirs.status.success(), "{}", stderr(&theirs));
            let mut ours = otpgate();
            ours.args(["token", "--seed-file", "-", "--algorithm", algorithm]).args([
                "--digits",
                digits,
                "--at",
                &at.to_string(),
            ]);
            let ours = run_with_input(ours, seed);
            assert_eq!(stdout(&ours), stdout(&theirs), "{seed} {algorithm} {digits} at {at}");
        }
    }
}

#[test]
fn token_takes_its_seed_from_the_environment_and_never_repeats_a_bad_one() {
    let output = otpgate()
        .args(["token", "--json", "--at", "59"])
        .env("OTPGATE_SEED", "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ")
        .output()
        .unwrap();
    let answer = json(&stdout(&output));
    assert_eq!((&answer["token"], &answer["seconds_left"]), (&"287082".into(), &1.into()));

    let bad = otpgate().arg("token").env("OTPGATE_SEED", "hunter2!").output().unwrap();
    assert_eq!(bad.status.code(), Some(1));
    assert!(stderr(&bad).contains("OTPGATE_SEED is not base32"), "{}", stderr(&bad));
    assert!(!stderr(&bad).contains("hunter2"));
}
