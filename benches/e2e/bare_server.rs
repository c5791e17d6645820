//! The child that is bare pingora: in pingora's own server, or on the gate's listener.

use std::net::SocketAddr;
use std::sync::Arc;

use otpgate::config::{Address, Limits, Listen, ListenTls, TlsFiles};
use otpgate::metrics::Metrics;
use otpgate::net::{Listener, Workers};
use pingora::apps::HttpServerOptions;
use pingora::listeners::tls::TlsSettings;
use pingora::proxy::{http_proxy, http_proxy_service};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::bare::{Bare, Does, conf};
use crate::stand::{Files, Places};

/// The child's name.
pub(crate) const CHILD: &str = "bare";
/// Where it finds its [`Task`].
pub(crate) const TASK: &str = "BENCH_BARE";

/// Where it listens and forwards to.
#[derive(Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) places: Places,
    pub(crate) upstream: SocketAddr,
    pub(crate) files: Files,
    pub(crate) does: Does,
    pub(crate) threads: usize,
    /// Whether its threads take work from each other, as pingora's do unless told otherwise.
    pub(crate) steals: bool,
}

impl Task {
    fn proxy(&self) -> Bare {
        Bare { upstream: self.upstream, does: self.does }
    }
}

/// Serves until it is told to end.
pub(crate) fn run() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let task = std::env::var(TASK).expect("a task");
    let task: Task = serde_json::from_str(&task).expect("JSON");
    if task.does == Does::Nothing { serve(&task) } else { serve_on_ours(&task) }
}

fn serve(task: &Task) {
    let conf = || ServerConf { work_stealing: task.steals, ..conf(task.threads) };
    let mut server = Server::new_with_opt_and_conf(None, conf());
    let conf = Arc::new(conf());
    server.bootstrap();
    let mut plain = http_proxy_service(&conf, task.proxy());
    plain.add_tcp(&at(task.places.plain).to_string());
    let (certificate, key) = (task.files.certificate.display(), task.files.key.display());
    let mut tls = TlsSettings::intermediate(&certificate.to_string(), &key.to_string());
    tls.as_mut().expect("a certificate").enable_h2();
    plain.add_tls_with_settings(&at(task.places.tls).to_string(), None, tls.expect("as above"));
    let mut h2c = http_proxy_service(&conf, task.proxy());
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    h2c.app_logic_mut().expect("its application").server_options = Some(options);
    h2c.add_tcp(&at(task.places.h2c).to_string());
    server.add_service(plain);
    server.add_service(h2c);
    server.run_forever();
}

fn serve_on_ours(task: &Task) {
    let (cert_file, key_file) = (task.files.certificate.clone(), task.files.key.clone());
    let tls = ListenTls { files: TlsFiles { cert_file, key_file }, client_ca_file: None };
    let place = |port| Listen::at(Address::Tcp(at(port)));
    let places = [
        place(task.places.plain),
        Listen { h2c: true, ..place(task.places.h2c) },
        Listen { tls: Some(tls), ..place(task.places.tls) },
    ];
    let app = || Arc::new(http_proxy(&Arc::new(conf(task.threads)), task.proxy()));
    let mut threads = tokio::runtime::Builder::new_current_thread();
    let runtime = threads.enable_all().build().expect("a runtime");
    let (_stop, stopped) = watch::channel(false);
    runtime.block_on(async {
        let metrics = Arc::new(Metrics::new([]));
        let limits = Limits { max_connections_per_source: None, ..Limits::default() };
        let listener = Listener::bind("proxy", &places, limits, metrics).expect("the ports");
        let workers = Workers::start(task.threads).expect("threads");
        listener.run_on(workers, app, stopped).await;
    });
}

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}
