//! Addresses: where listeners listen and upstreams are reached.

use std::path::PathBuf;

use ipnet::IpNet;
use toml::Value;

use super::reader::Section;
use super::{
    Address, Listen, ListenTls, Target, TlsFiles, TrustedPeer, UNIX_MODE, Upstream, UpstreamHttp,
    UpstreamTls,
};
use crate::policy::Authority;

/// What the addresses of a listener have in common unless one says otherwise.
#[derive(Clone)]
struct Common {
    files: Option<TlsFiles>,
    client_ca_file: Option<PathBuf>,
    h2c: bool,
    allow_from: Vec<IpNet>,
    unix_mode: u32,
}

impl Common {
    /// Reads what `s` says; the rest is as in `default`.
    fn read(s: &mut Section, default: &Self) -> Self {
        Self {
            files: read_tls_files(s).or_else(|| default.files.clone()),
            client_ca_file: s.file("tls_client_ca_file").or_else(|| default.client_ca_file.clone()),
            h2c: s.or("h2c", default.h2c),
            allow_from: if s.has("allow_from") {
                read_networks(s, "allow_from")
            } else {
                // Known, though nobody set it.
                s.take("allow_from");
                default.allow_from.clone()
            },
            unix_mode: s.parse("unix_mode", parse_mode).unwrap_or(default.unix_mode),
        }
    }

    /// # Errors
    /// If clients were to prove who they are, but without TLS nothing asks them.
    fn at(self, address: Address) -> Result<Listen, String> {
        let Self { files, client_ca_file, h2c, allow_from, unix_mode } = self;
        if files.is_none() && client_ca_file.is_some() {
            return Err(format!(
                "`{address}` has no TLS: beside `tls_client_ca_file`, set `tls_cert_file` and \
                 `tls_key_file`"
            ));
        }
        let tls = files.map(|files| ListenTls { files, client_ca_file });
        Ok(Listen { address, h2c: h2c && tls.is_none(), tls, allow_from, unix_mode })
    }
}

/// `h2c`: whether plain addresses take HTTP/2 unless set otherwise.
pub(super) fn read_listen(s: &mut Section, default: &str, h2c: bool) -> Vec<Listen> {
    let nothing = Common {
        files: None,
        client_ca_file: None,
        h2c,
        allow_from: Vec::new(),
        unix_mode: UNIX_MODE,
    };
    let common = Common::read(s, &nothing);
    let items = match s.take("listen").unwrap_or_else(|| Value::String(default.to_owned())) {
        Value::String(off) if off == "off" => Vec::new(),
        Value::Array(items) => items,
        single => vec![single],
    };
    let mut listen = Vec::new();
    for item in items {
        let parsed = match item {
            Value::String(text) => {
                parse_address(&text).and_then(|address| common.clone().at(address))
            }
            Value::Table(table) => {
                let mut t = s.child("listen", table);
                let own = Common::read(&mut t, &common);
                let address = t.required("address", parse_address);
                t.finish();
                match address {
                    Some(address) => own.at(address),
                    None => continue,
                }
            }
            other => Err(format!("expected a string or a table, found {}", other.type_str())),
        };
        match parsed {
            Ok(one) => listen.push(one),
            Err(error) => s.problem("listen", error),
        }
    }
    listen
}

/// Permissions of a socket, as chmod takes them. Without the owner's nobody could connect.
fn parse_mode(text: &str) -> Result<u32, String> {
    let is_octal =
        (3..=4).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    let mode = is_octal.then(|| u32::from_str_radix(text, 8).ok()).flatten();
    mode.filter(|mode| mode & !0o777 == 0 && mode & 0o600 == 0o600)
        .ok_or_else(|| format!("`{text}` is no mode of a socket such as `0600` or `0660`"))
}

pub(super) fn read_tls_files(s: &mut Section) -> Option<TlsFiles> {
    match (s.file("tls_cert_file"), s.file("tls_key_file")) {
        (Some(cert_file), Some(key_file)) => Some(TlsFiles { cert_file, key_file }),
        (None, None) => None,
        (Some(_), None) => {
            s.problem("tls_key_file", "is missing beside `tls_cert_file`");
            None
        }
        (None, Some(_)) => {
            s.problem("tls_cert_file", "is missing beside `tls_key_file`");
            None
        }
    }
}

fn parse_address(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return socket_path(path).map(Address::Unix);
    }
    text.parse()
        .map(Address::Tcp)
        .map_err(|_| format!("`{text}` is no address: use IP:PORT, [IPv6]:PORT, unix:/PATH or off"))
}

/// The path of a Unix socket; the system takes no longer ones.
fn socket_path(path: &str) -> Result<PathBuf, String> {
    let is_path = path.starts_with('/') && path.len() <= 107 && !path.contains('\0');
    is_path.then(|| PathBuf::from(path)).ok_or_else(|| {
        format!("`unix:{path}`: a socket's path is absolute and has up to 107 bytes")
    })
}

pub(super) fn read_networks(s: &mut Section, key: &str) -> Vec<IpNet> {
    s.list(key, parse_network).unwrap_or_default()
}

/// Networks, and `unix`.
pub(super) fn read_trusted(s: &mut Section, key: &str) -> Vec<TrustedPeer> {
    let parse = |text: &str| match text {
        "unix" => Ok(TrustedPeer::Unix),
        text => parse_network(text).map(TrustedPeer::Network),
    };
    s.list(key, parse).unwrap_or_default()
}

fn parse_network(text: &str) -> Result<IpNet, String> {
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from));
    match net {
        // Peers are compared as what they are, whatever socket they came in by.
        Ok(IpNet::V6(net)) if net.addr().to_ipv4_mapped().is_some() => {
            Err(format!("`{text}` is an IPv4 network: write it as one"))
        }
        net => net.map_err(|_| format!("`{text}` is no network such as 10.0.0.0/8")),
    }
}

pub(super) fn read_upstream(s: &Section, key: &str, value: Value) -> Option<Upstream> {
    let Value::Table(table) = value else {
        return urls(value)
            .and_then(|urls| parse_upstreams(&urls))
            .map_err(|e| s.problem(key, e))
            .ok();
    };
    let mut t = s.child(key, table);
    let group = match t.take("url").map(|v| urls(v).and_then(|urls| parse_upstreams(&urls))) {
        Some(Ok(group)) => Some(group),
        Some(Err(error)) => {
            t.problem("url", error);
            None
        }
        None => {
            t.problem("url", "is missing");
            None
        }
    };
    let http = t.choice(
        "http",
        &[("1.1", UpstreamHttp::Http1), ("2", UpstreamHttp::Http2), ("auto", UpstreamHttp::Auto)],
    );
    let ca_file = t.file("ca_file");
    let server_name = t.parse("server_name", |name| {
        let known = rustls::pki_types::ServerName::try_from(name);
        known.map(|_| name.to_owned()).map_err(|_| format!("`{name}` is no name of a server"))
    });
    let group = group.map(|mut group| {
        group.http = http.unwrap_or(group.http);
        match &mut group.tls {
            Some(tls) => {
                tls.ca_file = ca_file;
                tls.server_name =
                    server_name.unwrap_or_else(|| std::mem::take(&mut tls.server_name));
            }
            None if ca_file.is_some() || server_name.is_some() => {
                t.problem("ca_file", "`ca_file` and `server_name` are for https:// upstreams");
            }
            None => {}
        }
        group
    });
    t.finish();
    group
}

fn urls(value: Value) -> Result<Vec<String>, String> {
    let items = match value {
        Value::Array(items) => items,
        single => vec![single],
    };
    let texts = items.into_iter().map(|item| match item {
        Value::String(text) => Ok(text),
        other => Err(format!("expected a string, found {}", other.type_str())),
    });
    texts.collect()
}

/// `HOST:PORT`, `http://`, `https://`, `h2c://` (HTTP/2 without TLS), `h2://` (with) or `unix:/PATH`;
/// a list is of one kind.
pub(super) fn parse_upstreams(urls: &[String]) -> Result<Upstream, String> {
    let mut group: Option<Upstream> = None;
    for url in urls {
        let one = parse_upstream(url)?;
        match &mut group {
            None => group = Some(one),
            Some(group) if (&group.tls, group.http) == (&one.tls, one.http) => {
                group.targets.extend(one.targets);
            }
            Some(_) => {
                return Err(format!(
                    "`{url}` differs in scheme or TLS name from the others of its list"
                ));
            }
        }
    }
    group.ok_or_else(|| "names no upstream".to_owned())
}

fn parse_upstream(url: &str) -> Result<Upstream, String> {
    if let Some(path) = url.strip_prefix("unix:") {
        let targets = vec![Target::Unix(socket_path(path)?)];
        return Ok(Upstream { targets, http: UpstreamHttp::Http1, tls: None });
    }
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (http, tls, default_port) = match scheme {
        "" => (UpstreamHttp::Http1, false, None),
        "http" => (UpstreamHttp::Http1, false, Some(80)),
        "https" => (UpstreamHttp::Http1, true, Some(443)),
        "h2c" => (UpstreamHttp::Http2, false, Some(80)),
        "h2" => (UpstreamHttp::Http2, true, Some(443)),
        _ => return Err(format!("`{url}`: the scheme is none of http, https, h2c, h2, unix")),
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains('@') {
        // Not repeated: there may be a password in it.
        return Err("an upstream takes no user and no password".to_owned());
    }
    let (host, port) = split_authority(authority, default_port).ok_or_else(|| {
        format!("`{url}` is no upstream: use HOST:PORT, a URL without a path, or unix:/PATH")
    })?;
    let tls = tls.then(|| UpstreamTls { server_name: host.clone(), ca_file: None });
    Ok(Upstream { targets: vec![Target::Host(host, port)], http, tls })
}

/// A host name or address as requests name it, without a port; in lower case.
pub(super) fn parse_host(text: &str) -> Result<String, String> {
    // As requests are read, so that both sides of a comparison have one form.
    Authority::parse(text)
        .filter(|parsed| parsed.host() == parsed.as_str())
        .map(|parsed| parsed.host().to_owned())
        .ok_or_else(|| format!("`{text}` is no host name without a port"))
}

fn is_of_host(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-[]:".contains(c)
}

fn split_authority(text: &str, default_port: Option<u16>) -> Option<(String, u16)> {
    let authority: http::uri::Authority = text.parse().ok()?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = match authority.port() {
        Some(port) => port.as_u16(),
        None if text.ends_with(':') => return None,
        None => default_port?,
    };
    let is_host = !host.is_empty() && host.chars().all(is_of_host);
    (is_host && port > 0).then_some((host, port))
}
