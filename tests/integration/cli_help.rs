//! What helps at the command line: health checks, completions, manual pages, explained decisions.

use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{ADMIN, Sandbox, otpgate, run, stderr, stdout};
use crate::peers::echo::Echo;

#[tokio::test(flavor = "multi_thread")]
async fn healthcheck_tells_by_its_exit_code() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let settings = format!("[proxy]\nupstream = '{}'\n[shutdown]\ndelay = '1h'\n", echo.address);
    let gate = sandbox.serve(&settings).ready().await;
    let ops = gate.ops.strip_prefix("http://").unwrap().to_owned();
    let healthy = run(&["healthcheck", "--ops", &ops]);
    assert_eq!((healthy.status.code(), stdout(&healthy).as_str()), (Some(0), "healthy\n"));
    // It is not ready while it drains, but lives.
    gate.signal(libc::SIGTERM);
    let draining = || async {
        let asked = run(&["healthcheck", "--ops", &ops, "--json"]);
        (asked.status.code() == Some(1)).then(|| stdout(&asked))
    };
    let told = crate::harness::eventually("it drains", draining).await;
    let told: Value = serde_json::from_str(&told).unwrap();
    let expected = json!({ "healthy": false, "status": 503, "reason": "the gate is stopping" });
    assert_eq!(told, expected);
    assert!(run(&["healthcheck", "--ops", &ops, "--live"]).status.success());
}

/// Found in the configuration: on a socket, and with TLS by a certificate for another name.
#[tokio::test(flavor = "multi_thread")]
async fn healthcheck_finds_every_kind_of_listener() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let upstream = format!("[proxy]\nupstream = '{}'\n", echo.address);
    let socket = format!("listen = 'unix:{}'\n", sandbox.path("ops.sock").display());
    crate::redis_server::make_certificates(&sandbox.path(""));
    let files = [("tls_cert_file", "server.pem"), ("tls_key_file", "server.key")]
        .map(|(key, file)| format!("{key} = '{}'\n", sandbox.path(file).display()));
    let tls = format!("listen = '0.0.0.0:{}'\n{}", crate::harness::free_port(), files.concat());
    for (name, ops) in [("socket.toml", socket), ("tls.toml", tls)] {
        let settings = format!("{upstream}[ops]\n{ops}");
        let config = sandbox.write(name, &settings);
        let _gate = sandbox.serve(&settings);
        let config = config.to_str().unwrap();
        let healthy = || async {
            let asked = run(&["healthcheck", "--config", config]);
            asked.status.success().then_some(())
        };
        crate::harness::eventually("it is healthy", healthy).await;
    }
}

#[test]
fn healthcheck_names_what_it_could_not_ask() {
    let config = Sandbox::new();
    let off = config.write("off.toml", "[ops]\nlisten = 'off'\n");
    let nothing = run(&["healthcheck", "--config", off.to_str().unwrap()]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(stderr(&nothing).contains("`ops.listen` is off"), "{}", stderr(&nothing));
    let port = crate::harness::free_port();
    let nobody = run(&["healthcheck", "--ops", &format!("127.0.0.1:{port}")]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(stderr(&nobody).contains(&format!("127.0.0.1:{port} does not answer")));
    assert_eq!(run(&["healthcheck", "--ops", "nowhere"]).status.code(), Some(1));
}

#[test]
fn completions_are_scripts_that_shells_take() {
    let bash = run(&["completions", "bash"]);
    assert!(bash.status.success());
    let folder = Sandbox::new();
    let script = folder.write("complete.bash", &stdout(&bash));
    let ask = format!(
        "source '{}' && COMP_WORDS=(otpgate store re) COMP_CWORD=2 && _otpgate otpgate re store && \
         echo \"${{COMPREPLY[*]}}\"",
        script.display()
    );
    let asked = Command::new("bash").args(["-c", &ask]).output().unwrap();
    assert_eq!(stdout(&asked).trim(), "rekey", "{}", stderr(&asked));
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(stdout(&run(&["completions", shell])).contains("rekey"), "{shell}");
    }
}

#[test]
fn manual_pages_tell_of_every_command() {
    let page = run(&["man"]);
    assert!(page.status.success() && stdout(&page).starts_with(".ie \\n(.g"), "{}", stdout(&page));
    let folder = Sandbox::new();
    let out = folder.path("pages");
    assert!(run(&["man", "--out", out.to_str().unwrap()]).status.success());
    let written: Vec<_> = std::fs::read_dir(&out)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    for name in ["otpgate.1", "otpgate-serve.1", "otpgate-store-rekey.1", "otpgate-client-list.1"] {
        assert!(written.contains(&name.to_owned()), "{name} is not among {written:?}");
    }
}

/// The command says what the gate does.
#[tokio::test(flavor = "multi_thread")]
async fn explanations_agree_with_the_gate() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let settings = format!(
        "[proxy]\nupstream = '{}'\n\
         [[route]]\npath = '/'\nallow = ['shop']\n\
         [[route]]\npath = '/open/'\npublic = true\n\
         [[route]]\npath = '/admin/'\nmethods = ['GET']\nallow = ['admin@ungleich-admin']\n\
         [[route]]\npath = '/trial/'\nallow = ['staff']\nmode = 'report'\n",
        echo.address
    );
    let config = sandbox.write("explained.toml", &settings);
    let gate = sandbox.serve(&settings).ready().await;
    let explain = |method: &str, path: &str, who: Option<&str>| -> (i32, Value) {
        let mut command = otpgate();
        command.args(["explain", "--json", "--config"]).arg(&config).args([method, path]);
        if let Some(who) = who {
            command.args(["--as", who]);
        }
        let told = command.output().unwrap();
        let text = stdout(&told);
        let value =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text} {}", stderr(&told)));
        (told.status.code().unwrap(), value)
    };
    let admin = ("admin", "ungleich-admin", ADMIN);
    for (method, path, outcome, status, route) in [
        ("GET", "/", "refused", json!(403), json!("route[0]")),
        ("GET", "/open/x", "forwarded", json!(null), json!("route[1]")),
        ("GET", "/admin/", "forwarded", json!(null), json!("route[2]")),
        ("GET", "/admin", "forwarded", json!(null), json!("route[2]")),
        ("POST", "/admin/", "refused", json!(403), json!(null)),
        ("GET", "/ADMIN/", "refused", json!(400), json!(null)),
        ("GET", "/trial/", "reported", json!(403), json!("route[3]")),
        ("GET", "/a%zz", "refused", json!(400), json!(null)),
    ] {
        let (code, told) = explain(method, path, Some("admin@ungleich-admin"));
        let said = (&told["outcome"], &told["status"], &told["route"]);
        assert_eq!(said, (&json!(outcome), &status, &route), "{method} {path}: {told}");
        assert_eq!(code == 0, outcome != "refused");
        let token = crate::harness::token(admin.2);
        let url = format!("{}{path}", gate.proxy);
        let request = crate::harness::http()
            .request(method.parse().unwrap(), url)
            .header("x-auth-name", admin.0)
            .header("x-auth-realm", admin.1)
            .header("x-auth-token", token);
        let answered = request.send().await.unwrap().status().as_u16();
        let expected = status.as_u64().filter(|_| outcome == "refused").unwrap_or(200);
        assert_eq!(u64::from(answered), expected, "{method} {path}");
    }
    assert_eq!(explain("GET", "/", None).1["status"], 401);
    let usage = run(&["explain", "GET", "/", "--as", "nobody"]);
    assert_eq!(usage.status.code(), Some(2), "{}", stderr(&usage));
    let text =
        run(&["explain", "--config", config.to_str().unwrap(), "GET", "http://h.example/open/"]);
    assert_eq!(
        stdout(&text),
        "forwarded\nwhy    the route is public\nroute  route[1], counted from 0\npath   /open/\n"
    );
}
