//! Sockets: everything between the kernel and a pingora HTTP application.
//!
//! One accept loop serves all three listeners, and hands connections to the threads that serve them. It binds
//! before anything runs, so that bind errors are real and port 0 is known; caps connections, of each source too; ends TLS; and wraps every connection in a guard that
//! bounds heads in time and size, idling and stalled writes, which pingora leaves unbounded.
//! pingora's `Server` is not used.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use futures_util::future::join_all;
use pingora::apps::HttpServerApp;
use tokio::sync::watch;

use crate::config::{Address, Limits, Listen, TrustedPeer};
use crate::metrics::Metrics;

mod accept;
mod body_watch;
mod client;
mod connection;
mod drain;
pub mod framing;
mod guard;
mod http;
pub mod inherited;
mod pace;
pub mod service;
mod socket;
mod sources;
mod terms;
mod tls;
mod workers;

pub use body_watch::BodyWatch;
pub use client::{client_address, is_trusted};
pub use connection::{Connection, Extent, STOPPING, new_request_id, refusal_body};
pub use drain::{Drain, LAST_CHANCE};
pub use guard::BodyTooSlow;
pub use inherited::{Handle, Inherited};
pub use sources::source_of;
pub use terms::{NewTerms, TermsHandle};
pub use tls::{Certificate, TlsError};
pub use workers::Workers;

use accept::{AcceptLoop, Occasional, Slots};
pub(crate) use socket::KEEPALIVE;
use socket::Socket;
use sources::Sources;
use terms::{Terms, note_certificates};

/// Why an address of a listener cannot be opened.
#[derive(Debug)]
pub struct BindError {
    /// `proxy`, `api` or `ops`.
    pub listener: &'static str,
    /// Where it was to listen.
    pub address: Address,
    /// Why it cannot.
    pub cause: BindCause,
}

/// What stands in the way.
#[derive(Debug, thiserror::Error)]
pub enum BindCause {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] std::io::Error),
    /// Another process listens on that Unix socket.
    #[error("another process listens there")]
    InUse,
    /// A file that is not a socket stands in the way.
    #[error("there is a file that is not a socket")]
    NotASocket,
    /// What was opened for us is not a socket that listens there.
    #[error("what was handed over for it does not listen there")]
    NotListening,
    /// The certificate or key.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { listener, address, cause } = self;
        write!(f, "`{listener}.listen`: cannot listen on `{address}`: {cause}{}", cause.advice())
    }
}

impl BindCause {
    /// What to do about it.
    fn advice(&self) -> &'static str {
        use std::io::ErrorKind as Kind;
        let kind = match self {
            Self::Socket(error) => error.kind(),
            Self::InUse => Kind::AddrInUse,
            Self::NotASocket | Self::NotListening | Self::Tls(_) => return "",
        };
        match kind {
            Kind::AddrInUse => ": stop what listens there, or give another address",
            Kind::AddrNotAvailable => ": this machine has no such address",
            Kind::NotFound => ": make its folder first",
            Kind::PermissionDenied => {
                ": ports below 1024 need CAP_NET_BIND_SERVICE, sockets a folder that the gate may write"
            }
            _ => "",
        }
    }
}

impl std::error::Error for BindError {}

/// One bound address.
struct Bound {
    /// As configured: port 0 stays 0.
    configured: Address,
    socket: Arc<Socket>,
    terms: Arc<ArcSwap<Terms>>,
}

/// The bound sockets of one listener; [`Self::run`] serves them.
pub struct Listener {
    name: &'static str,
    bound: Vec<Bound>,
    metrics: Arc<Metrics>,
    drain: Arc<Drain>,
}

impl Listener {
    /// Binds every address; port 0 becomes a free port. Needs a tokio runtime around it. Nothing is
    /// accepted before [`Self::run`], but the kernel already queues connections.
    ///
    /// `name` is the listener's name in logs and metrics: `proxy`, `api` or `ops`.
    ///
    /// # Errors
    /// One for each address that cannot be opened, certificates included; none stays open then.
    pub fn bind(
        name: &'static str,
        listen: &[Listen],
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Vec<BindError>> {
        Self::open(name, listen, limits, metrics, &mut Inherited::default())
    }

    /// As [`Self::bind`], but takes the sockets that were opened for it.
    ///
    /// # Errors
    /// As there; also for a socket that does not fit.
    pub fn open(
        name: &'static str,
        listen: &[Listen],
        limits: Limits,
        metrics: Arc<Metrics>,
        inherited: &mut Inherited,
    ) -> Result<Self, Vec<BindError>> {
        let mut bound = Vec::new();
        let mut errors = Vec::new();
        for place in listen {
            match Bound::open(name, place, limits, inherited) {
                Ok(one) => bound.push(one),
                Err(cause) => {
                    errors.push(BindError {
                        listener: name,
                        address: place.address.clone(),
                        cause,
                    });
                }
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let terms: Vec<_> = bound.iter().map(|bound| bound.terms.load()).collect();
        note_certificates(name, terms.iter().map(|terms| &***terms), &metrics);
        Ok(Self { name, bound, metrics, drain: Arc::default() })
    }

    /// Exempts peers from `limits.max_connections_per_source`: proxies, which bring everybody's
    /// requests.
    #[must_use]
    pub fn trusting(self, proxies: &[TrustedPeer]) -> Self {
        for terms in self.bound.iter().map(|bound| &bound.terms) {
            let trusted = proxies.to_vec();
            terms.store(Arc::new(Terms { trusted, ..Terms::clone(&terms.load()) }));
        }
        self
    }

    /// Shares what tells its connections how to end.
    #[must_use]
    pub fn draining(mut self, drain: &Arc<Drain>) -> Self {
        self.drain = drain.clone();
        self
    }

    /// Its sockets, to hand them to a successor while it runs.
    #[must_use]
    pub fn handles(&self) -> Vec<Handle> {
        let handle =
            |bound: &Bound| Handle::new(self.name, bound.configured.clone(), &bound.socket);
        self.bound.iter().map(handle).collect()
    }

    /// Where it listens, with real ports.
    #[must_use]
    pub fn addresses(&self) -> Vec<Address> {
        self.bound.iter().map(|bound| bound.socket.address()).collect()
    }

    /// To change its terms while it runs.
    #[must_use]
    pub fn terms(&self) -> TermsHandle {
        let places = self.bound.iter().map(|bound| bound.terms.clone()).collect();
        TermsHandle { listener: self.name, places, metrics: self.metrics.clone() }
    }

    /// As [`Self::run_on`], on the caller's runtime.
    pub async fn run<A>(self, app: Arc<A>, stop: watch::Receiver<bool>)
    where
        A: HttpServerApp + Send + Sync + 'static,
    {
        self.run_on(Workers::here(), || app.clone(), stop).await;
    }

    /// Serves until `stop` turns true; then closes the sockets and idle connections, and waits
    /// for the requests in flight. The caller bounds that with a time-out: dropping the future cuts
    /// what is left.
    ///
    /// Each of the workers has its own `app`, made at once, which must call [`Connection::head_done`] as soon as a
    /// request's head is read.
    pub fn run_on<A>(
        self,
        workers: Arc<Workers>,
        app: impl Fn() -> Arc<A>,
        stop: watch::Receiver<bool>,
    ) -> impl Future<Output = ()>
    where
        A: HttpServerApp + Send + Sync + 'static,
    {
        let apps: Arc<[_]> = (0..workers.count()).map(|_| app()).collect();
        self.serve(workers, apps, stop)
    }

    async fn serve<A>(self, workers: Arc<Workers>, apps: Arc<[Arc<A>]>, stop: watch::Receiver<bool>)
    where
        A: HttpServerApp + Send + Sync + 'static,
    {
        let (slots, sources) = (Arc::new(Slots::default()), Arc::new(Sources::default()));
        let open = self.metrics.open_connections(self.name);
        join_all(self.bound.into_iter().map(|bound| {
            AcceptLoop {
                listener: self.name,
                terms: bound.terms,
                metrics: self.metrics.clone(),
                slots: slots.clone(),
                sources: sources.clone(),
                refusals: Occasional::default(),
                open: open.clone(),
                drain: self.drain.clone(),
                workers: workers.clone(),
                apps: apps.clone(),
                stop: stop.clone(),
            }
            .run(bound.socket)
        }))
        .await;
    }
}

impl Bound {
    fn open(
        listener: &'static str,
        place: &Listen,
        limits: Limits,
        inherited: &mut Inherited,
    ) -> Result<Self, BindCause> {
        let terms = Arc::new(ArcSwap::from_pointee(Terms::read(place, limits, &[])?));
        let socket = match inherited.take(listener, &place.address) {
            Some((socket, file)) => Socket::adopt(&place.address, socket, file, place.unix_mode),
            None => Socket::bind(&place.address, place.unix_mode),
        };
        Ok(Self { configured: place.address.clone(), socket: Arc::new(socket?), terms })
    }
}
