//! TLS of listeners: certificates and the CAs of clients from PEM files.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pingora::listeners::tls::Acceptor;
use pingora::protocols::IO;
use pingora::protocols::tls::TlsStream;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig};
use x509_parser::parse_x509_certificate;

use crate::clock::UnixTime;
use crate::config::ListenTls;

/// Why a certificate or key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read `{path}`: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A file is not the PEM that it should be.
    #[error("`{path}` contains no usable {what}: {cause}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// `certificate` or `private key`.
        what: &'static str,
        /// Why.
        cause: String,
    },
    /// The key is not the certificate's.
    #[error("the key in `{key}` does not belong to the certificate in `{cert}`: {cause}")]
    Mismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        cause: rustls::Error,
    },
}

/// What a listener needs for TLS, read from files.
pub struct Certificate {
    acceptor: Acceptor,
    expires_at: UnixTime,
}

impl Certificate {
    /// Reads and checks all files.
    ///
    /// # Errors
    /// Which file is wrong, and how.
    pub fn load(tls: &ListenTls) -> Result<Self, TlsError> {
        let files = &tls.files;
        let chain = read_certificates(&files.cert_file)?;
        let (_, parsed) = parse_x509_certificate(&chain[0])
            .map_err(|error| bad_certificate(&files.cert_file, &error))?;
        let expires_at = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        let key_text = zeroize::Zeroizing::new(slurp(&files.key_file)?);
        let key = PrivateKeyDer::from_pem_slice(&key_text).map_err(|error| TlsError::Pem {
            path: files.key_file.clone(),
            what: "private key",
            cause: error.to_string(),
        })?;
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|cause| {
            TlsError::Mismatch { cert: files.cert_file.clone(), key: files.key_file.clone(), cause }
        })?;
        let clients = tls.client_ca_file.as_deref().map(read_client_verifier).transpose()?;
        let acceptor = Acceptor::from_server_config(Arc::new(server_config(key, clients)));
        Ok(Self { acceptor, expires_at })
    }

    /// When it ends.
    #[must_use]
    pub fn expires_at(&self) -> UnixTime {
        self.expires_at
    }

    /// Does the handshake with a client.
    pub(super) async fn accept<S: IO + 'static>(&self, stream: S) -> pingora::Result<TlsStream<S>> {
        self.acceptor.tls_handshake(stream).await
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}

/// TLS 1.2 and 1.3, HTTP/2 before HTTP/1.1.
fn server_config(key: CertifiedKey, clients: Option<Arc<dyn ClientCertVerifier>>) -> ServerConfig {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("ring knows TLS 1.2 and 1.3");
    let key = Arc::new(SingleCertAndKey::from(key));
    let mut config = match clients {
        None => builder.with_no_client_auth().with_cert_resolver(key),
        Some(clients) => {
            let mut config = builder.with_client_cert_verifier(clients).with_cert_resolver(key);
            // A resumed session is not verified again: a certificate would outlive its end.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            config
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Demands a certificate that one of the CAs in the file signed.
fn read_client_verifier(path: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots.add(certificate).map_err(|error| bad_certificate(path, &error))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| bad_certificate(path, &error))
}

/// The certificates of a file; at least one.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&slurp(path)?)
        .collect::<Result<_, _>>()
        .map_err(|error| bad_certificate(path, &error))?;
    if chain.is_empty() {
        return Err(bad_certificate(path, &pem::Error::NoItemsFound));
    }
    Ok(chain)
}

fn bad_certificate(path: &Path, cause: &dyn fmt::Display) -> TlsError {
    TlsError::Pem { path: path.to_owned(), what: "certificate", cause: cause.to_string() }
}

fn slurp(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|cause| TlsError::Read { path: path.to_owned(), cause })
}
