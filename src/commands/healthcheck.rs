//! `otpgate healthcheck`: asks a running gate for its health, for containers without a shell or curl.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::{Failure, Settings};
use crate::config::load::Flag;
use crate::config::{Address, Listen};

/// Longest answer that is read.
const MAX_ANSWER: usize = 64 << 10;

/// Arguments of `otpgate healthcheck`.
#[derive(Clone, Debug, Args)]
pub struct HealthcheckArgs {
    #[command(flatten)]
    settings: Settings,
    /// Where health is served: IP:PORT or unix:/PATH [default: the first address of `ops.listen`]
    #[arg(long, value_name = "ADDRESS")]
    ops: Option<String>,
    /// Only whether the process answers (`/livez`), not whether it can decide (`/readyz`)
    #[arg(long)]
    live: bool,
    /// Longest wait for the answer
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// For machines: {"healthy", "status", "reason"}
    #[arg(long)]
    json: bool,
}

/// Asks, and tells by its exit code: 0 healthy, 1 not.
///
/// # Errors
/// If nothing answers, or there is nothing to ask.
pub async fn run(args: HealthcheckArgs) -> Result<ExitCode, Failure> {
    let ops = Flag::given("--ops", "ops.listen", args.ops.as_ref());
    let listen = first_of(args.settings.load_with(ops.into_iter().collect())?.ops.listen)?;
    let path = if args.live { "/livez" } else { "/readyz" };
    let (status, reason) = ask(&listen, path, args.timeout).await.map_err(|e| {
        let address = &listen.address;
        format!(
            "{address} does not answer: {}; is it the gate's `ops.listen` (`--ops`)?",
            crate::client::chain(&*e)
        )
    })?;
    let healthy = status == 200;
    let text = match (args.json, &reason) {
        (true, _) => json!({ "healthy": healthy, "status": status, "reason": reason }).to_string(),
        (false, None) if healthy => "healthy".to_owned(),
        (false, None) => format!("not healthy: status {status}"),
        (false, Some(reason)) => format!("not healthy: {reason}"),
    };
    super::print(&text)?;
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn first_of(listen: Vec<Listen>) -> Result<Listen, Failure> {
    listen.into_iter().next().ok_or_else(|| {
        "`ops.listen` is off: health is served there; give it an address, such as 127.0.0.1:9464"
            .into()
    })
}

/// Status, and what is wrong if anything is.
async fn ask(
    listen: &Listen,
    path: &str,
    patience: Duration,
) -> Result<(u16, Option<String>), Failure> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .timeout(patience)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        // It says nothing secret, and the certificate is not for the loopback address.
        .tls_danger_accept_invalid_certs(true)
        .tls_certs_only([]);
    let host = match &listen.address {
        Address::Tcp(address) => reachable(*address).to_string(),
        Address::Unix(socket) => {
            builder = builder.unix_socket(socket.as_path());
            "localhost".to_owned()
        }
    };
    let scheme = if listen.tls.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{host}{path}");
    let mut answer = builder.build()?.get(url).send().await.map_err(reqwest::Error::without_url)?;
    let status = answer.status().as_u16();
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if body.len() + chunk.len() > MAX_ANSWER {
            break;
        }
        body.extend_from_slice(&chunk);
    }
    let reason = serde_json::from_slice::<Value>(&body)
        .ok()
        .and_then(|body| body["reason"].as_str().map(crate::client::printable));
    Ok((status, reason))
}

/// Where a listener on all addresses is reached from the same machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_asked_on_loopback() {
        for (listens, asked) in [
            ("0.0.0.0:9464", "127.0.0.1:9464"),
            ("[::]:9464", "[::1]:9464"),
            ("10.0.0.7:1", "10.0.0.7:1"),
        ] {
            assert_eq!(reachable(listens.parse().unwrap()).to_string(), asked);
        }
    }
}
