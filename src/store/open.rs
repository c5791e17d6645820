//! Makes a [`Store`] from its settings: reads keys and certificates, builds the backend. Nothing
//! connects yet.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redis::{ClientTlsConfig, ConnectionAddr, TlsCertificates};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::redis::{Access, Redis};
use super::sqlite::Sqlite;
use super::url::{RedisUrl, StoreUrl};
use super::{Backend, Store, private_file};
use crate::config::{Sealing, StoreConfig};
use crate::seal::{SealError, Sealer};

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A key or certificate file cannot be read or made.
    #[error("`[store]`: cannot use the file `{}`: {cause}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A key file holds no key.
    #[error("`{}` {cause}", path.display())]
    Key {
        /// Which one.
        path: PathBuf,
        /// Why.
        cause: SealError,
    },
    /// The database is there, its key is not.
    #[error(
        "the sealing key `{}` is missing, though the database `{}` is there: restore the key from a backup, without it no entry opens",
        key.display(), database.display()
    )]
    KeyLost {
        /// The missing key file.
        key: PathBuf,
        /// The database that it belongs to.
        database: PathBuf,
    },
    /// Certificates for TLS to Redis that cannot be used.
    #[error("certificates for `{url}`: {cause}")]
    Tls {
        /// The URL without its password.
        url: String,
        /// Why.
        cause: String,
    },
    /// redis-rs would log in as the default user then.
    #[error("`store.username` is set without a password: ACL users need one")]
    UserWithoutPassword,
    /// A prefix of keys that would break the hash tag.
    #[error("`store.prefix` must be 1 to 64 visible ASCII characters without braces")]
    Prefix,
}

impl Store {
    /// Builds the store that `config` describes. A missing sealing key is made only where the
    /// settings allow it and the SQLite database does not exist yet. Connects to nothing.
    ///
    /// # Errors
    /// Files that are missing or useless. No error shows a secret.
    pub fn open(config: &StoreConfig) -> Result<Self, OpenError> {
        if let Some(path) = missing_key(config)? {
            let text = Zeroizing::new(format!("{}\n", *Sealer::random_key()));
            private_file::create(path, text.as_bytes())
                .map_err(|cause| OpenError::File { path: path.to_owned(), cause })?;
        }
        let sealer = sealer(config)?;
        Ok(Self::new(backend(config)?, sealer))
    }

    /// As [`Self::open`], to read only what is there: makes no key.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as_it_is(config: &StoreConfig) -> Result<Self, OpenError> {
        let sealer = match missing_key(config)? {
            // There is no database either.
            Some(_) => Sealer::off(),
            None => sealer(config)?,
        };
        Ok(Self::new(backend(config)?, sealer))
    }

    /// Whether [`Self::open`] would succeed; makes no key.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn check(config: &StoreConfig) -> Result<(), OpenError> {
        match missing_key(config)? {
            // A file without a name, gone at once: shows whether the key could be made.
            Some(path) => tempfile::tempfile_in(private_file::directory_of(path))
                .map(drop)
                .map_err(|cause| OpenError::File { path: path.to_owned(), cause })?,
            None => drop(sealer(config)?),
        }
        backend(config).map(drop)
    }
}

/// What of an open store can be replaced: the keys of entries, and what servers want to see.
pub struct Renewal {
    sealer: Sealer,
    access: Option<Access>,
}

impl Renewal {
    /// Reads keys and certificates.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn read(config: &StoreConfig) -> Result<Self, OpenError> {
        let access = match &config.url {
            StoreUrl::Sqlite(_) => None,
            StoreUrl::Redis(url) => {
                check_login(url)?;
                Some(Access::new(url, certificates(config, url)?))
            }
        };
        Ok(Self { sealer: sealer(config)?, access })
    }
}

impl Store {
    /// Takes keys, and what servers want to see, over from settings that are of this store otherwise.
    /// Tells whether the keys are others than before.
    pub fn renew(&self, Renewal { sealer, access }: Renewal) -> bool {
        if let Some(access) = access {
            self.backend.set_access(access);
        }
        let keys = sealer.key_ids();
        self.sealer.swap(Arc::new(sealer)).key_ids() != keys
    }
}

fn backend(config: &StoreConfig) -> Result<Arc<dyn Backend>, OpenError> {
    match &config.url {
        StoreUrl::Sqlite(path) => Ok(Arc::new(Sqlite::new(path))),
        StoreUrl::Redis(url) => {
            check_prefix(&config.prefix)?;
            check_login(url)?;
            let certificates = certificates(config, url)?;
            let (url, redis) = (url.clone(), config.redis.clone());
            Ok(Arc::new(Redis::new(url, certificates, &config.prefix, redis)))
        }
    }
}

/// What opens entries that were sealed elsewhere: with the keys of `config`, as far as there are any, and
/// those in the files of `more`.
///
/// # Errors
/// Files that are missing or useless.
pub fn opener(config: &StoreConfig, more: &[PathBuf]) -> Result<Sealer, OpenError> {
    let own: Vec<&PathBuf> = match &config.sealing {
        Sealing::Off => Vec::new(),
        // It is made when the store is.
        Sealing::KeyFile { path, old, make: true } if !path.exists() => old.iter().collect(),
        Sealing::KeyFile { path, old, .. } => std::iter::once(path).chain(old).collect(),
    };
    let files: Vec<&PathBuf> = own.into_iter().chain(more).collect();
    if files.is_empty() { Ok(Sealer::off()) } else { sealer_of(&files) }
}

fn sealer(config: &StoreConfig) -> Result<Sealer, OpenError> {
    match &config.sealing {
        Sealing::Off => Ok(Sealer::off()),
        Sealing::KeyFile { path, old, .. } => {
            sealer_of(&std::iter::once(path).chain(old).collect::<Vec<_>>())
        }
    }
}

/// Seals with the key in the first file, opens with all.
fn sealer_of(files: &[&PathBuf]) -> Result<Sealer, OpenError> {
    let mut keys = Vec::new();
    for path in files {
        let key = read(path).map(Zeroizing::new)?;
        // One by one, so that the error can say which file it is.
        let bad = |cause| OpenError::Key { path: path.to_path_buf(), cause };
        let text = std::str::from_utf8(&key).map_err(|_| bad(SealError::BadKey))?;
        Sealer::new(text, &[]).map_err(bad)?;
        keys.push(Zeroizing::new(text.to_owned()));
    }
    let texts: Vec<&str> = keys.iter().map(|key| key.as_str()).collect();
    Sealer::new(texts[0], &texts[1..])
        .map_err(|cause| OpenError::Key { path: files[0].clone(), cause })
}

/// The key of a new database, if it is to be made and is not there yet.
fn missing_key(config: &StoreConfig) -> Result<Option<&Path>, OpenError> {
    let (Sealing::KeyFile { path: key, make: true, .. }, StoreUrl::Sqlite(database)) =
        (&config.sealing, &config.url)
    else {
        return Ok(None);
    };
    let exists = |path: &Path| {
        path.try_exists().map_err(|cause| OpenError::File { path: path.to_owned(), cause })
    };
    // In this order: another process that starts now makes the key before the database.
    let has_database = exists(database)?;
    if exists(key)? {
        return Ok(None);
    }
    if has_database {
        return Err(OpenError::KeyLost { key: key.clone(), database: database.clone() });
    }
    Ok(Some(key))
}

fn check_login(url: &RedisUrl) -> Result<(), OpenError> {
    match (&url.username, &url.password) {
        (Some(_), None) => Err(OpenError::UserWithoutPassword),
        _ => Ok(()),
    }
}

fn check_prefix(prefix: &str) -> Result<(), OpenError> {
    let good = |c: char| c.is_ascii_graphic() && !matches!(c, '{' | '}');
    let fits = (1..=64).contains(&prefix.len()) && prefix.chars().all(good);
    if fits { Ok(()) } else { Err(OpenError::Prefix) }
}

fn certificates(config: &StoreConfig, url: &RedisUrl) -> Result<TlsCertificates, OpenError> {
    let root_cert = config.ca_file.as_deref().map(read).transpose()?;
    let client_tls = match &config.client_tls {
        None => None,
        Some(files) => Some(ClientTlsConfig {
            client_cert: read(&files.cert_file)?,
            client_key: read(&files.key_file)?,
        }),
    };
    let unusable = |cause: String| OpenError::Tls { url: url.to_string(), cause };
    // redis-rs would take it for a list of nobody, and trust nobody.
    if root_cert.as_ref().is_some_and(|pem| CertificateDer::pem_slice_iter(pem).next().is_none()) {
        return Err(unusable("`store.ca_file` holds no certificate".to_owned()));
    }
    let certificates = TlsCertificates { client_tls, root_cert };
    if url.tls {
        // Connecting would find it too, but a start with useless files should fail.
        let (host, port) = ("localhost".to_owned(), 1);
        let anywhere = ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None };
        redis::Client::build_with_tls(anywhere, certificates.clone())
            .map_err(|cause| unusable(cause.to_string()))?;
    }
    Ok(certificates)
}

fn read(path: &Path) -> Result<Vec<u8>, OpenError> {
    std::fs::read(path).map_err(|cause| OpenError::File { path: path.to_owned(), cause })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RedisConfig, TlsFiles};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    fn config(url: &str, sealing: Sealing) -> StoreConfig {
        StoreConfig {
            url: StoreUrl::parse(url).unwrap(),
            max_stale: Duration::from_secs(15),
            hold: Default::default(),
            prefix: "otpgate".into(),
            redis: RedisConfig::default(),
            sealing,
            ca_file: None,
            client_tls: None,
        }
    }

    fn key_file(path: &Path, make: bool) -> Sealing {
        Sealing::KeyFile { path: path.to_owned(), old: Vec::new(), make }
    }

    /// The error as operators see it.
    fn refusal(config: &StoreConfig) -> String {
        let checked = Store::check(config).expect_err("it should be refused").to_string();
        let opened = Store::open(config).map(drop).expect_err("it should be refused").to_string();
        assert_eq!(opened, checked, "checking tells what opening will say");
        opened
    }

    #[tokio::test]
    async fn a_new_sqlite_store_gets_a_private_key_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("o.db");
        let key = dir.path().join("o.db.key");
        let config = config(&format!("sqlite:{}", database.display()), key_file(&key, true));

        Store::check(&config).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "checking makes nothing");
        let store = Store::open(&config).unwrap();
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        let text = fs::read(&key).unwrap();
        assert!(store.init().await.unwrap());
        assert_eq!(store.warnings().await, Vec::<String>::new());

        Store::open(&config).unwrap();
        assert_eq!(fs::read(&key).unwrap(), text, "the key is not replaced");

        fs::remove_file(&key).unwrap();
        let lost = refusal(&config);
        assert!(lost.contains("is missing, though the database"), "{lost}");
        let nowhere = dir.path().join("absent/o.db");
        let url = format!("sqlite:{}", nowhere.display());
        let nowhere = refusal(&self::config(&url, key_file(&nowhere.with_extension("key"), true)));
        assert!(nowhere.contains("No such file"), "{nowhere}");
        assert!(!key.exists(), "no other key is made for a database that exists");
    }

    #[test]
    fn a_key_is_made_only_where_the_settings_allow_it() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        let sqlite = format!("sqlite:{}", dir.path().join("o.db").display());
        assert!(refusal(&config(&sqlite, key_file(&key, false))).contains("No such file"));
        assert!(refusal(&config("redis://h", key_file(&key, true))).contains("No such file"));
        assert!(!key.exists());
    }

    #[test]
    fn bad_keys_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
        fs::write(&good, &*Sealer::random_key()).unwrap();
        fs::write(&bad, b"s3cr3t").unwrap();
        let with = |path: &Path, old: &[&Path]| {
            let old = old.iter().map(|path| path.to_path_buf()).collect();
            config("sqlite:x", Sealing::KeyFile { path: path.to_owned(), old, make: false })
        };
        for refused in [with(&bad, &[]), with(&good, &[&bad])] {
            let text = refusal(&refused);
            assert!(text.contains("/bad` is not a sealing key"), "{text}");
            assert!(!text.contains("s3cr3t"), "{text}");
        }
        assert!(Store::open(&with(&good, &[])).is_ok());
    }

    #[test]
    fn prefixes_and_certificates_are_checked() {
        let mut config = config("rediss://h", Sealing::Off);
        assert!(Store::open(&config).is_ok());
        for prefix in ["", "a b", "{a}", "a}", "ü"] {
            config.prefix = prefix.into();
            assert!(matches!(Store::open(&config), Err(OpenError::Prefix)), "{prefix:?}");
        }
        config.prefix = "otpgate".into();
        config.url = StoreUrl::parse("rediss://user@h").unwrap();
        assert!(matches!(Store::open(&config), Err(OpenError::UserWithoutPassword)));
        config.url = StoreUrl::parse("rediss://h").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pem");
        config.ca_file = Some(file.clone());
        assert!(matches!(Store::open(&config), Err(OpenError::File { .. })));
        fs::write(&file, "junk").unwrap();
        assert!(matches!(Store::open(&config), Err(OpenError::Tls { .. })));
        config.ca_file = None;
        config.client_tls = Some(TlsFiles { cert_file: file.clone(), key_file: file });
        assert!(matches!(Store::open(&config), Err(OpenError::Tls { .. })));
    }
}
