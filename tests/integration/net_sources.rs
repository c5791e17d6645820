//! Who may connect, and how often at once.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;

use otpgate::config::Limits;
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::{ADMIN, Sandbox, http, otpgate, output_within, stderr, stdout};
use crate::peers::echo::Echo;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::wire::Connection;
use crate::peers::{LIMIT, until};

/// A connection from one of the many addresses of loopback.
async fn from(source: [u8; 4], to: SocketAddr) -> Connection<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::from(source), 0).into()).unwrap();
    Connection::over(socket.connect(to).await.unwrap())
}

async fn gate(change: impl FnOnce(&mut Setup)) -> (Echo, Gate) {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    change(&mut setup);
    (echo, setup.start().await)
}

fn refused(gate: &Gate, cause: &str) -> f64 {
    let line = format!("otpgate_connections_refused_total{{cause=\"{cause}\",listener=\"proxy\"}}");
    gate.metric(&line)
}

#[tokio::test]
async fn only_allowed_sources_are_served() {
    let (_echo, gate) = gate(|setup| setup.allow_from = vec!["127.0.0.2/32", "127.1.0.0/16"]).await;
    for source in [[127, 0, 0, 2], [127, 1, 200, 7]] {
        let answer = from(source, gate.tcp()).await.ask(gate.get("/")).await;
        assert_eq!(answer.unwrap().status, 200, "{source:?}");
    }
    for source in [[127, 0, 0, 1], [127, 2, 0, 1]] {
        assert!(from(source, gate.tcp()).await.ask(gate.get("/")).await.is_none(), "{source:?}");
    }
    assert_eq!(refused(&gate, "source"), 2.0);
}

/// On a socket for both families an IPv4 peer shows as an IPv6 address.
#[tokio::test]
async fn mapped_addresses_are_ipv4_addresses() {
    let (_echo, gate) = gate(|setup| {
        setup.listen = otpgate::config::Address::Tcp("[::]:0".parse().unwrap());
        setup.allow_from = vec!["127.0.0.2/32", "::1/128"];
    })
    .await;
    let port = gate.tcp().port();
    let v4 = SocketAddr::from(([127, 0, 0, 1], port));
    let allowed = from([127, 0, 0, 2], v4).await.ask(gate.get("/")).await;
    assert_eq!(allowed.unwrap().status, 200);
    assert!(from([127, 0, 0, 1], v4).await.ask(gate.get("/")).await.is_none());
    let v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port));
    assert_eq!(Connection::to(v6).await.ask(gate.get("/")).await.unwrap().status, 200);
}

#[tokio::test]
async fn refusals_are_logged_now_and_then() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("[proxy]\nallow_from = ['10.0.0.0/8']\n").ready().await;
    for _ in 0..50 {
        let answer = http().get(&gate.proxy).send().await;
        assert!(answer.is_err());
    }
    let line = gate.wait_for_log(|line| line["message"] == "connection refused").unwrap();
    assert_eq!((&line["cause"], &line["client"]), (&"source".into(), &"127.0.0.1".into()));
    assert_eq!(gate.log_text().matches("connection refused").count(), 1);
}

#[tokio::test]
async fn a_source_has_its_own_cap_and_gets_its_slots_back() {
    let limits = Limits { max_connections_per_source: Some(3), ..Limits::default() };
    let (_echo, gate) = gate(|setup| setup.limits = limits).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut connection = from([127, 0, 0, 5], gate.tcp()).await;
        assert_eq!(connection.ask(gate.get("/")).await.unwrap().status, 200);
        held.push(connection);
    }
    assert!(from([127, 0, 0, 5], gate.tcp()).await.ask(gate.get("/")).await.is_none());
    assert_eq!(refused(&gate, "source_limit"), 1.0);
    let other = from([127, 0, 0, 6], gate.tcp()).await.ask(gate.get("/")).await;
    assert_eq!(other.unwrap().status, 200);
    drop(held.pop());
    until("the slot is free again", || async {
        from([127, 0, 0, 5], gate.tcp()).await.ask(gate.get("/")).await.is_some()
    })
    .await;
}

#[tokio::test]
async fn the_cap_is_exact_when_many_come_at_once() {
    let limits = Limits { max_connections_per_source: Some(20), ..Limits::default() };
    let (_echo, gate) = gate(|setup| setup.limits = limits).await;
    let (address, request) = (gate.tcp(), gate.get("/"));
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let request = request.clone();
            tokio::spawn(async move {
                let mut connection = Connection::to(address).await;
                connection.ask(request).await.map(|answer| (answer.status, connection))
            })
        })
        .collect();
    let mut served = Vec::new();
    for task in tasks {
        served.extend(task.await.unwrap());
    }
    assert_eq!(served.len(), 20);
    assert_eq!(refused(&gate, "source_limit"), 80.0);
}

#[tokio::test]
async fn trusted_proxies_bring_as_many_as_they_like() {
    let limits = Limits { max_connections_per_source: Some(1), ..Limits::default() };
    let (_echo, gate) = gate(|setup| {
        setup.limits = limits;
        setup.trusted = vec!["127.0.0.9/32"];
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..5 {
        let mut connection = from([127, 0, 0, 9], gate.tcp()).await;
        assert_eq!(connection.ask(gate.get("/")).await.unwrap().status, 200);
        held.push(connection);
    }
}

/// Management that only the owner of a socket's file reaches, by the commands.
#[tokio::test(flavor = "multi_thread")]
async fn management_on_a_unix_socket_alone() {
    let sandbox = Sandbox::with_entries();
    let socket = sandbox.path("api.sock");
    let url = format!("unix:{}", socket.display());
    // Nobody's address is allowed, and no source may come twice: neither says anything here.
    let settings = "allow_from = ['192.0.2.1']\nlimits = { max_connections_per_source = 1 }";
    let gate = sandbox.serve(&format!("[api]\nlisten = '{url}'\n{settings}\n")).ready().await;
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let client = async |args: &[&str]| {
        let mut command = otpgate();
        command.args(["client", "--server-url", &url, "--auth-name", "admin"]);
        command.args(["--auth-realm", "ungleich-admin"]).args(args);
        command.env("OTPGATE_AUTH_SEED", ADMIN);
        output_within(LIMIT, command).await
    };
    let made = client(&["create", "--name", "carol", "--realm", "shop"]).await;
    assert!(made.status.success(), "{}", stderr(&made));
    let listed = client(&["list"]).await;
    assert!(stdout(&listed).contains("carol"), "{}", stderr(&listed));
    drop(gate);
    let gone = client(&["list"]).await;
    assert_eq!(gone.status.code(), Some(1));
    assert!(stderr(&gone).contains("cannot be reached"), "{}", stderr(&gone));
}

#[tokio::test]
async fn the_mode_of_a_socket_can_be_set() {
    let sandbox = Sandbox::with_entries();
    let [proxy, ops] = ["proxy.sock", "ops.sock"].map(|name| sandbox.path(name));
    let gate = sandbox.serve(&format!(
        "[proxy]\nlisten = 'unix:{}'\nunix_mode = '0660'\n[ops]\nlisten = ['127.0.0.1:0', \
         {{ address = 'unix:{}', unix_mode = '666' }}]\n",
        proxy.display(),
        ops.display()
    ));
    for (path, mode) in [(&proxy, 0o660), (&ops, 0o666)] {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, mode);
    }
    drop(gate);
    for bad in ["0400", "9", "rw", "07777", "1777"] {
        let output = sandbox.try_serve(&format!("[proxy]\nunix_mode = '{bad}'\n")).err().unwrap();
        assert!(stderr(&output).contains("proxy.unix_mode: `"), "{bad}: {}", stderr(&output));
    }
}
