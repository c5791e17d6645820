//! A proxy of another make with the configuration that `deploy/` ships for it, and the gate that it asks.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use tokio::net::TcpStream;

use crate::docs::read;
use crate::harness::{ALICE, BOB, Gate, Sandbox, Server, address, free_port, token};
use crate::peers::until;

/// Who may pass where.
const ROUTES: &str = r#"
[[route]]
path = "/"
allow = ["*"]
[[route]]
path = "/public"
public = true
[[route]]
path = "/admin"
allow = ["lab"]
[[route]]
path = "/methods"
methods = ["DELETE"]
allow = ["lab"]
[[route]]
path = "/methods"
methods = ["POST", "PUT"]
allow = ["*"]
[[route]]
path = "/"
hosts = ["lab.example"]
allow = ["lab"]
"#;

/// Proxies that Debian packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Make {
    Nginx,
    Caddy,
    HaProxy,
}

impl Make {
    /// How long its file lets it wait for an answer of the gate, and what makes that short.
    pub(super) fn waits(self) -> (&'static str, &'static str) {
        let (file, wait, short) = match self {
            Self::Nginx => {
                ("nginx/otpgate.conf", "proxy_read_timeout 5s", "proxy_read_timeout 200ms")
            }
            Self::Caddy => {
                ("caddy/Caddyfile", "response_header_timeout 5s", "response_header_timeout 200ms")
            }
            Self::HaProxy => ("haproxy/otpgate.lua", "TIMEOUT_MS = 2500", "TIMEOUT_MS = 50"),
        };
        assert!(read(&format!("deploy/{file}")).contains(wait), "{file}");
        (wait, short)
    }

    /// What to replace for HTTP/2 without TLS.
    pub(super) fn h2c(self) -> (&'static str, &'static str) {
        match self {
            Self::Nginx => ("listen 127.0.0.1:8000", "listen 127.0.0.1:8000 http2"),
            Self::Caddy => {
                ("http://:8000 {", "{\nservers {\nprotocols h1 h2c\n}\n}\nhttp://:8000 {")
            }
            Self::HaProxy => ("bind 127.0.0.1:8000", "bind 127.0.0.1:8000 proto h2"),
        }
    }
}

/// A running proxy.
pub(super) struct Front {
    pub(super) address: SocketAddr,
    _server: Server,
    _sandbox: Sandbox,
}

impl Front {
    /// Starts one in front of `service`, which asks the gate whose API is at `api`: the shipped file with these
    /// addresses in place of its own.
    pub(super) async fn start(make: Make, api: SocketAddr, service: SocketAddr) -> Self {
        Self::start_with(make, api, service, None).await
    }

    /// The same with one text in it replaced.
    pub(super) async fn start_with(
        make: Make,
        api: SocketAddr,
        service: SocketAddr,
        change: Option<(&str, &str)>,
    ) -> Self {
        let sandbox = Sandbox::new();
        let own = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let ship = |file: &str, changes: &[(&str, String)]| {
            let mut text = read(&format!("deploy/{file}"));
            if let Some((shipped, ours)) = change {
                text = text.replace(shipped, ours);
            }
            for (shipped, ours) in changes {
                assert!(text.contains(shipped), "{file} has no {shipped}");
                text = text.replace(shipped, ours);
            }
            let name = Path::new(file).file_name().unwrap().to_str().unwrap();
            sandbox.write(name, &text)
        };
        let addresses = [
            (":8000", format!(":{}", own.port())),
            ("127.0.0.1:8081", api.to_string()),
            ("127.0.0.1:9000", service.to_string()),
        ];
        let folder = sandbox.path("").display().to_string();
        let mut command = match make {
            Make::Nginx => {
                ship("nginx/otpgate.conf", &addresses);
                // What Debian's own nginx.conf has around it, in a place of ours.
                let main = format!(
                    "daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\n\
                     events {{}}\nhttp {{ access_log off; client_body_temp_path {folder}/b;\n\
                     proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;\n\
                     uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n\
                     include {folder}/otpgate.conf; }}\n"
                );
                let main = sandbox.write("nginx.conf", &main);
                let mut command = Command::new(program("nginx"));
                command.arg("-e").arg(sandbox.path("error.log")).arg("-c").arg(main);
                command
            }
            Make::Caddy => {
                let file = ship("caddy/Caddyfile", &addresses);
                let mut command = Command::new(program("caddy"));
                command.args(["run", "--adapter", "caddyfile", "--config"]).arg(file);
                let admin = sandbox.path("admin.sock");
                command
                    .env("HOME", &folder)
                    .env("CADDY_ADMIN", format!("unix/{}", admin.display()));
                command
            }
            Make::HaProxy => {
                let script = ship("haproxy/otpgate.lua", &[]).display().to_string();
                let script = [("/etc/haproxy/otpgate.lua", script)];
                let file = ship("haproxy/haproxy.cfg", &[&addresses[..], &script].concat());
                let mut command = Command::new(program("haproxy"));
                command.arg("-db").arg("-f").arg(file);
                command
            }
        };
        let server = Server::spawn(command.current_dir(&folder), &sandbox.path("log"));
        until("the proxy listens", || async { TcpStream::connect(own).await.is_ok() }).await;
        Self { address: own, _server: server, _sandbox: sandbox }
    }
}

/// Where Debian installs it, whatever the path says.
fn program(name: &str) -> String {
    let system = format!("/usr/sbin/{name}");
    if Path::new(&system).exists() { system } else { name.to_owned() }
}

/// A gate that answers this machine's proxies, and nothing else.
pub(super) async fn gate(more: &str) -> (Gate, Sandbox) {
    let sandbox = Sandbox::with_entries();
    let settings = format!(
        "[proxy]\nlisten = 'off'\n[api]\ntrusted_proxies = ['127.0.0.1']\n{more}\n{ROUTES}"
    );
    (sandbox.serve(&settings).ready().await, sandbox)
}

/// A proxy, its gate and a service.
pub(super) struct Stack {
    pub(super) front: Front,
    pub(super) gate: Gate,
    _sandbox: Sandbox,
}

impl Stack {
    pub(super) async fn start(make: Make, service: SocketAddr) -> Self {
        let (gate, sandbox) = gate("").await;
        let front = Front::start(make, address(&gate.api), service).await;
        Self { front, gate, _sandbox: sandbox }
    }
}

/// Header lines that prove alice, who may not pass at `/admin`.
pub(super) fn alice() -> String {
    proof("alice", "shop", &token(ALICE))
}

/// The same of bob, who may.
pub(super) fn bob() -> String {
    proof("bob", "lab", &token(BOB))
}

pub(super) fn proof(name: &str, realm: &str, token: &str) -> String {
    format!("X-Auth-Name: {name}\r\nX-Auth-Realm: {realm}\r\nX-Auth-Token: {token}\r\n")
}
