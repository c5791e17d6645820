//! The settings of what is measured: no access logs unless they are what is measured,
//! connections to upstreams kept alive.

use std::path::Path;

use crate::callers::STEP_SECONDS;
use crate::stand::{Files, Places};

/// The gate's.
pub(crate) fn gate(
    at: Places,
    upstream: u16,
    files: &Files,
    database: &Path,
    log: bool,
    threads: usize,
) -> String {
    let (cert, key) = (files.certificate.display(), files.key.display());
    let Places { plain, h2c, tls, api } = at;
    let database = database.display();
    // Failures are counted as ever, but nobody has to wait.
    let quota = "{ failures = 1000000, per = \"1000s\" }";
    format!(
        r#"
        [proxy]
        listen = [
            "127.0.0.1:{plain}",
            {{ address = "127.0.0.1:{h2c}", h2c = true }},
            {{ address = "127.0.0.1:{tls}", tls_cert_file = "{cert}", tls_key_file = "{key}" }},
        ]
        upstream = "127.0.0.1:{upstream}"
        threads = {threads}
        [api]
        listen = "127.0.0.1:{api}"
        trusted_proxies = ["127.0.0.0/8"]
        [ops]
        listen = "off"
        [store]
        url = "sqlite:{database}"
        [totp]
        period = {STEP_SECONDS}
        [throttle]
        per_source = {quota}
        per_entry = {quota}
        per_address = {quota}
        [log]
        format = "json"
        access = {log}
        "#
    )
}

/// What every nginx here begins with.
fn nginx(folder: &Path, http: &str) -> String {
    let at = folder.display();
    format!(
        "daemon off; master_process off; worker_processes 1; pid {at}/pid; error_log {at}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; sendfile on; tcp_nopush on;\n\
         client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f;\n\
         uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n{http}\n}}\n"
    )
}

/// The upstream: a few bytes, or the file `large` of `folder`.
pub(crate) fn upstream(folder: &Path, port: u16) -> String {
    let server = format!(
        "server {{ listen 127.0.0.1:{port}; root {}; default_type application/json;\n\
         location / {{ return 200 '{{}}\\n'; }} location = /large {{ }} }}",
        folder.display()
    );
    nginx(folder, &server)
}

/// nginx as proxy, which holds answers in memory alone; it asks the gate at `api`, if there is one.
pub(crate) fn nginx_proxy(
    folder: &Path,
    at: Places,
    upstream: u16,
    files: &Files,
    api: Option<u16>,
) -> String {
    let (cert, key) = (files.certificate.display(), files.key.display());
    let Places { plain, h2c, tls, .. } = at;
    let gate = api.map(|port| group("otpgate", port)).unwrap_or_default();
    let (server, location, question) = if api.is_some() { ASKS } else { ("", "", "") };
    let http = format!(
        "{gate}{}server {{ listen 127.0.0.1:{plain}; listen 127.0.0.1:{h2c} http2;\n\
         listen 127.0.0.1:{tls} ssl; ssl_certificate {cert}; ssl_certificate_key {key};\n\
         proxy_http_version 1.1; proxy_next_upstream off; proxy_max_temp_file_size 0; {server}\n\
         location / {{ proxy_pass http://service; proxy_set_header Host $http_host;\n\
         proxy_set_header Connection \"\"; {location} }}\n{question} }}",
        group("service", upstream)
    );
    nginx(folder, &http)
}

/// Connections that are kept to a server.
fn group(name: &str, port: u16) -> String {
    format!(
        "upstream {name} {{ server 127.0.0.1:{port}; keepalive 64;\n\
         keepalive_requests 1000000000; }}\n"
    )
}

/// In the server, in the location of the service, and the location that asks.
const ASKS: (&str, &str, &str) = (
    "auth_request /.otpgate; auth_request_set $otpgate_name $upstream_http_x_auth_name;\n\
     auth_request_set $otpgate_realm $upstream_http_x_auth_realm;",
    "proxy_set_header X-Auth-Name $otpgate_name; proxy_set_header X-Auth-Realm $otpgate_realm;\n\
     proxy_set_header X-Auth-Token \"\";",
    "location = /.otpgate { internal; auth_request off;\n\
     proxy_pass http://otpgate/authz/auth-request; proxy_pass_request_body off;\n\
     proxy_set_header Content-Length \"\"; proxy_set_header Connection \"\";\n\
     proxy_set_header X-Original-Method $request_method; proxy_set_header X-Original-URL \"\";\n\
     proxy_set_header X-Original-URI $request_uri; proxy_set_header X-Forwarded-Host $http_host;\n\
     proxy_set_header X-Forwarded-For $remote_addr; }",
);

/// Caddy that asks the gate, in the short form: the fastest.
pub(crate) fn caddy(at: Places, upstream: u16, files: &Files, api: u16) -> String {
    let (cert, key) = (files.certificate.display(), files.key.display());
    let Places { plain, h2c, tls, .. } = at;
    format!(
        "{{\n admin off\n auto_https off\n skip_install_trust\n\
         servers {{\n  protocols h1 h2 h2c\n }}\n}}\n\
         (all) {{\n forward_auth 127.0.0.1:{api} {{\n  uri /authz/forward-auth\n\
         copy_headers X-Auth-Name X-Auth-Realm\n }}\n\
         reverse_proxy 127.0.0.1:{upstream} {{\n  header_up -X-Auth-Token\n }}\n}}\n\
         http://:{plain}, http://:{h2c} {{\n bind 127.0.0.1\n import all\n}}\n\
         https://:{tls} {{\n bind 127.0.0.1\n tls {cert} {key}\n import all\n}}\n"
    )
}

/// HAProxy, plain.
pub(crate) fn haproxy(at: Places, upstream: u16, files: &Files, threads: usize) -> String {
    let Places { plain, h2c, tls, .. } = at;
    format!(
        "global\n nbthread {threads}\n maxconn 4096\n\
         defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
         http-reuse always\n\
         frontend callers\n bind 127.0.0.1:{plain}\n bind 127.0.0.1:{h2c} proto h2\n\
         bind 127.0.0.1:{tls} ssl crt {}\n default_backend service\n\
         backend service\n server service 127.0.0.1:{upstream}\n",
        files.both.display()
    )
}
