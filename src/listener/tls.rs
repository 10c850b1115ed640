//! TLS of a listener, and of its clients if they must show a certificate; the files are re-read when
//! they change.
//!
//! rustls with ring: it builds with a C compiler alone, where aws-lc wants CMake, too.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        server::WebPkiClientVerifier,
    },
};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Why TLS cannot be had: one line, with the flag, the file, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {file:?}: {cause}")]
pub struct TlsError {
    flag: &'static str,
    file: PathBuf,
    cause: String,
}

/// TLS 1.2 and 1.3, with HTTP/2 and HTTP/1.1 by ALPN.
#[derive(Debug, Clone)]
pub struct Tls {
    files: Arc<Files>,
    /// What was in the files when `current` was made first.
    loaded: Arc<Contents>,
    current: Arc<RwLock<Arc<ServerConfig>>>,
}

#[derive(Debug)]
struct Files {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// The bytes of the files, to tell whether they changed.
#[derive(PartialEq, Eq)]
struct Contents {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// Shows no key.
impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contents").finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads a certificate chain and its key, and, if clients must show a certificate, the CA that
    /// signs theirs. All are PEM.
    ///
    /// # Errors
    /// If a file cannot be read or used, or the key is not the certificate's.
    pub fn load(cert: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let files =
            Files { cert: cert.into(), key: key.into(), client_ca: client_ca.map(Into::into) };
        let loaded = files.read()?;
        let config = files.config(&loaded)?;
        Ok(Self {
            files: files.into(),
            loaded: loaded.into(),
            current: Arc::new(RwLock::new(config)),
        })
    }

    /// For the next handshake.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }

    /// Looks at the files for ever. Connections that are open stay as they are; files that cannot be
    /// used, perhaps for being half written, leave the last ones in use and are told of once.
    pub(super) async fn reload_on_change(self) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let Self { files, loaded: mut used, current } = self;
        let mut told = None;
        loop {
            looks.tick().await;
            let looking = files.clone();
            // A file system that hangs holds no worker of the runtime.
            let Ok(read) = tokio::task::spawn_blocking(move || looking.read()).await else {
                return;
            };
            let config = match read {
                Ok(contents) if *used == contents => {
                    told = None;
                    continue;
                }
                Ok(contents) => files.config(&contents).map(|config| (contents, config)),
                Err(error) => Err(error),
            };
            match config {
                Ok((contents, config)) => {
                    *current.write().unwrap_or_else(PoisonError::into_inner) = config;
                    (used, told) = (Arc::new(contents), None);
                    tracing::info!("the certificates were re-read");
                }
                Err(error) => {
                    let line = error.to_string();
                    if told.as_ref() != Some(&line) {
                        tracing::error!(cause = line, "changed certificates are not used");
                        told = Some(line);
                    }
                }
            }
        }
    }
}

impl Files {
    fn read(&self) -> Result<Contents, TlsError> {
        let read = |flag, file: &PathBuf| {
            fs::read(file).map_err(|error| self.error(flag, &format!("cannot be read: {error}")))
        };
        Ok(Contents {
            cert: read("--tls-cert", &self.cert)?,
            key: read("--tls-key", &self.key)?,
            client_ca: match &self.client_ca {
                Some(file) => Some(read("--tls-client-ca", file)?),
                None => None,
            },
        })
    }

    fn error(&self, flag: &'static str, cause: &str) -> TlsError {
        let file = match flag {
            "--tls-cert" => &self.cert,
            "--tls-key" => &self.key,
            _ => self.client_ca.as_ref().unwrap_or(&self.cert),
        };
        TlsError { flag, file: file.clone(), cause: cause.to_owned() }
    }

    fn config(&self, contents: &Contents) -> Result<Arc<ServerConfig>, TlsError> {
        let certs = self.certificates("--tls-cert", &contents.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|_| self.error("--tls-key", "expected a private key in PEM"))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("ring has the cipher suites of TLS 1.2 and 1.3");
        let builder = match &contents.client_ca {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let bad = |cause: &str| self.error("--tls-client-ca", cause);
                let mut roots = RootCertStore::empty();
                for cert in self.certificates("--tls-client-ca", pem)? {
                    roots.add(cert).map_err(|error| bad(&error.to_string()))?;
                }
                let roots = Arc::new(roots);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(|error| bad(&error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(certs, key).map_err(|error| {
            self.error("--tls-key", &format!("expected the key of {:?}: {error}", self.cert))
        })?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn certificates(
        &self,
        flag: &'static str,
        pem: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        match certs {
            Ok(certs) if !certs.is_empty() => Ok(certs),
            _ => Err(self.error(flag, "expected certificates in PEM")),
        }
    }
}
