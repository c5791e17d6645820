//! The terms that connections come in under: TLS, who may connect, bounds. They can be replaced while a
//! listener serves; its addresses cannot.

use std::sync::Arc;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use super::tls::{Certificate, TlsError};
use crate::config::{Limits, Listen, TrustedPeer};
use crate::metrics::Metrics;

/// Terms of one address. A connection keeps its TLS; bounds are looked up again and again.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) tls: Option<Arc<Certificate>>,
    pub(super) h2c: bool,
    /// Peers that may connect; empty: any.
    pub(super) allow_from: Vec<IpNet>,
    pub(super) limits: Limits,
    /// Peers that `limits.max_connections_per_source` does not concern.
    pub(super) trusted: Vec<TrustedPeer>,
}

impl Terms {
    pub(super) fn read(
        place: &Listen,
        limits: Limits,
        trusted: &[TrustedPeer],
    ) -> Result<Self, TlsError> {
        let tls = place.tls.as_ref().map(Certificate::load).transpose()?.map(Arc::new);
        Ok(Self {
            h2c: place.h2c && tls.is_none(),
            tls,
            allow_from: place.allow_from.clone(),
            limits,
            trusted: trusted.to_vec(),
        })
    }
}

/// Sets the metric of when the first of a listener's certificates ends.
pub(super) fn note_certificates<'a>(
    listener: &str,
    terms: impl Iterator<Item = &'a Terms>,
    metrics: &Metrics,
) {
    let first = terms.filter_map(|terms| terms.tls.as_ref()).map(|tls| tls.expires_at()).min();
    match first {
        #[allow(clippy::cast_precision_loss, reason = "seconds since 1970 fit exactly")]
        Some(first) => {
            metrics.certificate_expiry.with_label_values(&[listener]).set(first as f64);
        }
        // There may have been none before.
        None => drop(metrics.certificate_expiry.remove_label_values(&[listener])),
    }
}

/// Replaces the terms of a listener, while it serves too.
#[derive(Clone)]
pub struct TermsHandle {
    pub(super) listener: &'static str,
    pub(super) places: Vec<Arc<ArcSwap<Terms>>>,
    pub(super) metrics: Arc<Metrics>,
}

/// Terms that can be put into force: all files are read.
pub struct NewTerms(Vec<Terms>);

impl TermsHandle {
    /// Reads what new terms need. `listen` has the listener's addresses, in their order. Nothing changes
    /// yet.
    ///
    /// # Errors
    /// One for each address whose certificate, key or CAs cannot be used.
    pub fn prepare(
        &self,
        listen: &[Listen],
        limits: Limits,
        trusted: &[TrustedPeer],
    ) -> Result<NewTerms, Vec<TlsError>> {
        debug_assert_eq!(listen.len(), self.places.len());
        let mut errors = Vec::new();
        let read = listen.iter().filter_map(|place| {
            Terms::read(place, limits, trusted).map_err(|error| errors.push(error)).ok()
        });
        let terms = NewTerms(read.collect());
        if errors.is_empty() { Ok(terms) } else { Err(errors) }
    }

    /// Puts new terms into force: their TLS for connections to come, time-outs and sizes from the next
    /// request of open ones on, those of HTTP/2 itself for connections to come. TLS sessions begun before
    /// cannot be resumed.
    pub fn apply(&self, NewTerms(terms): NewTerms) {
        note_certificates(self.listener, terms.iter(), &self.metrics);
        for (place, terms) in self.places.iter().zip(terms) {
            place.store(Arc::new(terms));
        }
    }
}
