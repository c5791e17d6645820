//! TLS of listeners: certificates from PEM files, reloadable while serving.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use x509_parser::parse_x509_certificate;

use crate::clock::UnixTime;
use crate::config::TlsFiles;

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

/// A listener's certificate and key.
#[derive(Debug)]
pub struct Certificate {
    files: TlsFiles,
    current: ArcSwap<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    key: Arc<CertifiedKey>,
    expires_at: UnixTime,
}

impl Certificate {
    /// Reads and checks both files.
    ///
    /// # Errors
    /// Which file is wrong, and how.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let current = ArcSwap::from_pointee(read(&files)?);
        Ok(Self { files, current })
    }

    /// Reads both files again, for connections to come.
    ///
    /// # Errors
    /// As [`Self::load`]; the old certificate stays then.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.current.store(Arc::new(read(&self.files)?));
        Ok(())
    }

    /// When it ends.
    #[must_use]
    pub fn expires_at(&self) -> UnixTime {
        self.current.load().expires_at
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load().key.clone())
    }
}

/// TLS 1.2 and 1.3, HTTP/2 before HTTP/1.1.
pub(super) fn server_config(certificate: Arc<Certificate>) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("ring knows TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read(files: &TlsFiles) -> Result<Loaded, TlsError> {
    let bad = |what, cause: String| TlsError::Pem { path: files.cert_file.clone(), what, cause };
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(&slurp(&files.cert_file)?)
            .collect::<Result<_, _>>()
            .map_err(|error| bad("certificate", error.to_string()))?;
    let first =
        chain.first().ok_or_else(|| bad("certificate", pem::Error::NoItemsFound.to_string()))?;
    let (_, parsed) =
        parse_x509_certificate(first).map_err(|error| bad("certificate", error.to_string()))?;
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
    Ok(Loaded { key: Arc::new(key), expires_at })
}

fn slurp(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|cause| TlsError::Read { path: path.to_owned(), cause })
}
