//! TLS of listeners: who may speak to them, and in which version.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use otpgate::config::TlsFiles;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, date_time_ymd};
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, HandshakeKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::harness::{ADMIN, Sandbox, eventually, http, otpgate, output_within, stderr, stdout};
use crate::peers::echo::Echo;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::tls::Pki;
use crate::peers::wire::Connection;
use crate::peers::{LIMIT, bounded};

fn shown(path: &Path) -> std::path::Display<'_> {
    path.display()
}

/// What `[section]` needs for TLS with `pki`'s certificate.
fn tls_settings(section: &str, pki: &Pki, client_ca: &Path) -> String {
    format!(
        "[{section}]\ntls_cert_file = '{}'\ntls_key_file = '{}'\ntls_client_ca_file = '{}'\n",
        shown(&pki.files.cert_file),
        shown(&pki.files.key_file),
        shown(client_ca)
    )
}

/// Asks with curl; status 0 if there is no answer.
async fn curl(url: &str, pki: &Pki, identity: Option<&TlsFiles>) -> String {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--ipv4", "-o", "/dev/null", "-w", "%{http_code}", "--cacert"]);
    curl.arg(&pki.ca_file);
    if let Some(identity) = identity {
        curl.arg("--cert").arg(&identity.cert_file).arg("--key").arg(&identity.key_file);
    }
    curl.arg(url);
    stdout(&output_within(LIMIT, curl).await)
}

/// Whatever becomes of the CAs of clients while the gate runs, nobody gets in without a certificate of theirs.
#[tokio::test(flavor = "multi_thread")]
async fn cas_of_clients_are_replaced_and_never_left_out() {
    let sandbox = Sandbox::with_entries();
    let [server, first, second] = [(); 3].map(|()| Pki::new());
    let identities = [&first, &second].map(|pki| pki.identity("client"));
    let cas = [&first, &second].map(|pki| std::fs::read_to_string(&pki.ca_file).unwrap());
    let file = sandbox.write("clients.pem", &cas[0]);
    let settings = tls_settings("api", &server, &file);
    let gate = sandbox.serve(&format!("[reload]\nwatch = 'off'\n{settings}"));
    let url = gate.api.replace("http://127.0.0.1", "https://localhost") + "/openapi.json";
    let let_in = async || {
        let [one, two] = &identities;
        let mut all = Vec::new();
        for identity in [None, Some(one), Some(two)] {
            all.push(curl(&url, &server, identity).await == "200");
        }
        all
    };
    let reloads = |outcome: &str| {
        let event = format!(r#""action":"settings","outcome":"{outcome}""#);
        gate.log_text().matches(&event).count()
    };
    assert_eq!(let_in().await, [false, true, false]);
    for (number, bad) in [Some(""), Some("no certificate"), None].into_iter().enumerate() {
        match bad {
            Some(text) => drop(sandbox.write("clients.pem", text)),
            None => std::fs::remove_file(&file).unwrap(),
        }
        gate.signal(libc::SIGHUP);
        eventually("it is refused", || async { (reloads("refused") > number).then_some(()) }).await;
        assert_eq!(let_in().await, [false, true, false], "{bad:?}");
    }
    sandbox.write("clients.pem", &cas[1]);
    gate.signal(libc::SIGHUP);
    eventually("it is reloaded", || async { (reloads("reloaded") > 0).then_some(()) }).await;
    assert_eq!(let_in().await, [false, false, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_demand_client_certificates_of_any_named_ca() {
    let sandbox = Sandbox::with_entries();
    let [server, first, second, stranger] = [(); 4].map(|()| Pki::new());
    let bundle = [&first, &second].map(|pki| std::fs::read_to_string(&pki.ca_file).unwrap());
    let bundle = sandbox.write("clients.pem", &bundle.concat());
    let settings =
        ["api", "ops", "proxy"].map(|section| tls_settings(section, &server, &bundle)).concat();
    let gate = sandbox.serve(&settings);
    let url = |base: &str| base.replace("http://127.0.0.1", "https://localhost");
    for (base, path, status) in [
        (&gate.api, "/openapi.json", "200"),
        (&gate.ops, "/livez", "200"),
        (&gate.proxy, "/", "401"),
    ] {
        let url = url(base) + path;
        for known in [&first, &second] {
            let identity = known.identity("admin-laptop");
            assert_eq!(curl(&url, &server, Some(&identity)).await, status, "{url}");
        }
        let unknown = stranger.identity("stranger");
        assert_eq!(curl(&url, &server, Some(&unknown)).await, "000", "{url}");
        assert_eq!(curl(&url, &server, None).await, "000", "{url}");
    }
    let list = async |identity: Option<&TlsFiles>| -> Output {
        let mut command = otpgate();
        command.args(["client", "list", "--server-url", &url(&gate.api), "--ca-file"]);
        command.arg(&server.ca_file).args(["--auth-name", "admin"]);
        command.args(["--auth-realm", "ungleich-admin"]).env("OTPGATE_AUTH_SEED", ADMIN);
        if let Some(files) = identity {
            command.arg("--cert-file").arg(&files.cert_file);
            command.arg("--key-file").arg(&files.key_file);
        }
        output_within(LIMIT, command).await
    };
    let listed = list(Some(&first.identity("cli"))).await;
    assert!(listed.status.success(), "{}", stderr(&listed));
    assert_eq!(stdout(&listed).lines().count(), 5);
    assert_eq!(list(None).await.status.code(), Some(1));
}

/// One address of a listener may demand certificates while another, on a port of its own, does not.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_its_own_may_demand_certificates() {
    let (sandbox, pki) = (Sandbox::with_entries(), Pki::new());
    let gate = sandbox.serve(&format!(
        "[ops]\nlisten = ['127.0.0.1:0', {{ address = '127.0.0.1:0', tls_cert_file = '{}', \
         tls_key_file = '{}', tls_client_ca_file = '{}' }}]\n",
        shown(&pki.files.cert_file),
        shown(&pki.files.key_file),
        shown(&pki.ca_file)
    ));
    let (open, strict) = gate.ops.split_once(", ").unwrap();
    assert_eq!(http().get(format!("{open}/livez")).send().await.unwrap().status(), 200);
    let url = format!("https://localhost:{}/livez", strict.rsplit(':').next().unwrap());
    assert_eq!(curl(&url, &pki, None).await, "000");
    assert_eq!(curl(&url, &pki, Some(&pki.identity("scraper"))).await, "200");
    let metrics = http().get(format!("{open}/metrics")).send().await.unwrap().text().await.unwrap();
    let line = "otpgate_connections_refused_total{cause=\"tls\",listener=\"ops\"} 1\n";
    assert!(metrics.contains(line), "{metrics}");
}

async fn demanding(pki: &Pki, client_ca: &Path) -> (Echo, Gate) {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.tls = Some(pki.files.clone());
    setup.client_ca = Some(client_ca.to_owned());
    (echo, setup.start().await)
}

/// The status of a request, and how its handshake went; `None` if the gate does not take the client.
async fn ask(gate: &Gate, config: &Arc<ClientConfig>) -> Option<(u16, HandshakeKind)> {
    let tcp = TcpStream::connect(gate.tcp()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream =
        bounded("TLS", TlsConnector::from(config.clone()).connect(name, tcp)).await.ok()?;
    let mut connection = Connection::over(stream);
    let answer = connection.ask(gate.get("/")).await?;
    Some((answer.status, connection.stream.get_ref().1.handshake_kind()?))
}

#[tokio::test]
async fn no_session_is_resumed_where_certificates_are_demanded() {
    let pki = Pki::new();
    let (_echo, gate) = demanding(&pki, &pki.ca_file).await;
    let identity = pki.identity("client");
    for version in [&TLS12, &TLS13] {
        let config = pki.client_with(&identity, &[version]);
        for _ in 0..3 {
            assert_eq!(ask(&gate, &config).await, Some((200, HandshakeKind::Full)), "{version:?}");
        }
    }
    // Without the demand this client would resume.
    let mut setup = Setup::to(plain(gate.tcp()));
    setup.tls = Some(pki.files.clone());
    let open = setup.start().await;
    let config = pki.client_with(&identity, &[&TLS13]);
    assert_eq!(ask(&open, &config).await.unwrap().1, HandshakeKind::Full);
    assert_eq!(ask(&open, &config).await.unwrap().1, HandshakeKind::Resumed);
}

#[tokio::test]
async fn certificates_that_are_over_or_for_something_else_are_refused() {
    let pki = Pki::new();
    let (_echo, gate) = demanding(&pki, &pki.ca_file).await;
    type Change = fn(&mut CertificateParams);
    let cases: [(&str, Change, bool); 6] = [
        ("plain", |_| {}, true),
        (
            "client",
            |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
            true,
        ),
        ("expired", |params| params.not_after = date_time_ymd(2020, 1, 1), false),
        ("future", |params| params.not_before = date_time_ymd(4000, 1, 1), false),
        (
            "server",
            |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
            false,
        ),
        ("ca", |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), false),
    ];
    for (name, change, passes) in cases {
        let identity = pki.odd_identity(name, change);
        for version in [&TLS12, &TLS13] {
            let config = pki.client_with(&identity, &[version]);
            let status = ask(&gate, &config).await.map(|(status, _)| status);
            assert_eq!(status, passes.then_some(200), "{name} {version:?}");
        }
    }
}

#[tokio::test]
async fn a_reload_reads_the_cas_of_clients_too() {
    let (pki, old, new) = (Pki::new(), Pki::new(), Pki::new());
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("clients.pem");
    std::fs::copy(&old.ca_file, &ca_file).unwrap();
    let (_echo, gate) = demanding(&pki, &ca_file).await;
    let [of_old, of_new] =
        [&old, &new].map(|ca| pki.client_with(&ca.identity("client"), &[&TLS13]));
    assert!(ask(&gate, &of_old).await.is_some());
    assert!(ask(&gate, &of_new).await.is_none());
    std::fs::write(&ca_file, "nothing").unwrap();
    let error = gate.renew().unwrap_err().to_string();
    assert!(error.contains("clients.pem"), "{error}");
    assert!(ask(&gate, &of_old).await.is_some());
    std::fs::copy(&new.ca_file, &ca_file).unwrap();
    gate.renew().unwrap();
    assert!(ask(&gate, &of_old).await.is_none());
    assert!(ask(&gate, &of_new).await.is_some());
}

#[tokio::test]
async fn a_ca_without_tls_is_a_problem() {
    let (sandbox, pki) = (Sandbox::new(), Pki::new());
    let ca = shown(&pki.ca_file);
    for settings in [
        format!("[api]\ntls_client_ca_file = '{ca}'\n"),
        format!("[api]\nlisten = [{{ address = '127.0.0.1:0', tls_client_ca_file = '{ca}' }}]\n"),
    ] {
        let output = sandbox.try_serve(&settings).err().unwrap();
        let said = stderr(&output);
        assert!(said.contains("api.listen") && said.contains("has no TLS"), "{said}");
    }
    let output = sandbox.try_serve("[api]\ntls_client_ca_file = '/absent'\n").err().unwrap();
    assert!(stderr(&output).contains("api.tls_client_ca_file: cannot read"));
}

/// A ClientHello of this version with one cipher suite and one extension.
fn client_hello(version: [u8; 2]) -> Vec<u8> {
    let mut hello = vec![version[0], version[1]];
    hello.extend([7; 32]);
    // No session, TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression.
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    // signature_algorithms: ecdsa_secp256r1_sha256.
    hello.extend([0, 8, 0, 13, 0, 4, 0, 2, 4, 3]);
    let length = u8::try_from(hello.len()).unwrap();
    [&[22, 3, 1, 0, length + 4, 1, 0, 0, length], hello.as_slice()].concat()
}

#[tokio::test]
async fn nothing_below_tls_1_2_is_spoken() {
    let pki = Pki::new();
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.tls = Some(pki.files.clone());
    let gate = setup.start().await;
    let answer = async |bytes: &[u8]| {
        let mut tcp = TcpStream::connect(gate.tcp()).await.unwrap();
        tcp.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        // A reset after the alert is an end, too.
        let _ = bounded("the end", tcp.read_to_end(&mut answer)).await;
        answer
    };
    const FATAL: u8 = 2;
    const PROTOCOL_VERSION: u8 = 70;
    for old in [[3, 0], [3, 1], [3, 2]] {
        let answer = answer(&client_hello(old)).await;
        assert_eq!((answer[0], &answer[5..]), (21, &[FATAL, PROTOCOL_VERSION][..]), "{old:?}");
    }
    // The same of TLS 1.2 lacks something else.
    let modern = answer(&client_hello([3, 3])).await;
    assert!(modern[0] == 21 && modern[6] != PROTOCOL_VERSION, "{modern:?}");
    // SSLv2's hello, and no TLS at all.
    for junk in [
        &b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x01\x00\x80"[..],
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let answer = answer(junk).await;
        assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    }
    for version in [&TLS12, &TLS13] {
        let config = pki.client_with(&pki.identity("client"), &[version]);
        assert_eq!(ask(&gate, &config).await.map(|(status, _)| status), Some(200));
    }
}
