//! TLS of a listener, and of its clients if they must show a certificate; the files are re-read
//! when they change or on request.
//!
//! rustls with ring: it builds with a C compiler alone, where aws-lc wants CMake, too.

use std::{
    fmt, fs,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
        server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
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
    files: Arc<TlsFiles>,
    /// What was in the files when `current` was made first.
    loaded: Arc<Contents>,
    current: Arc<RwLock<Arc<ServerConfig>>>,
    reload: Arc<Notify>,
}

/// The files of [`Tls`], all of them PEM.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The CA of the clients: with it, clients must show a certificate that it signed, and no
    /// session is resumed. rustls verifies the certificate in full handshakes only, so that a
    /// session would outlive a certificate that has expired or was revoked.
    pub client_ca: Option<PathBuf>,
    /// CRLs (RFC 5280, section 5) of the clients' CAs; of no effect without `client_ca`. A
    /// certificate is refused if it or an intermediate CA above it is revoked, or if one of their
    /// issuers has no CRL here.
    ///
    /// A CRL past its `nextUpdate` stays in force: it refuses what it lists, and nothing else. To
    /// refuse every client instead, as OpenSSL does, would turn a CA that publishes late into an
    /// outage. No peer can hold back an update, since the file is local.
    pub client_crl: Option<PathBuf>,
}

/// The bytes of the files, to tell whether they changed.
#[derive(PartialEq, Eq)]
struct Contents {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
    client_crl: Option<Vec<u8>>,
}

/// Shows no key.
impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contents").finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// If a file cannot be read or used, or the key is not the certificate's.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let loaded = files.read()?;
        let config = files.config(&loaded)?;
        Ok(Self {
            files: files.into(),
            loaded: loaded.into(),
            current: Arc::new(RwLock::new(config)),
            reload: Arc::default(),
        })
    }

    /// The same, with the files read again at each notification, too.
    #[must_use]
    pub fn reload_on(self, reload: Arc<Notify>) -> Self {
        Self { reload, ..self }
    }

    /// For the next handshake.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }

    /// Reads the files again and again, for ever. Connections that are open stay as they are; files
    /// that cannot be used, perhaps for being half written, leave the last ones in use and are
    /// logged once. Each request to read them is answered by a line of its own.
    pub(super) async fn reload_on_change(self) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let Self { files, loaded: mut used, current, reload } = self;
        let mut told = None;
        loop {
            let requested = tokio::select! {
                () = reload.notified() => true,
                _ = looks.tick() => false,
            };
            let (files, last) = (files.clone(), used.clone());
            // A file system that hangs, or a long CRL, holds no worker of the runtime.
            let reading = tokio::task::spawn_blocking(move || files.read_changed(&last));
            let Ok(read) = reading.await else { return };
            match read {
                Ok(Some((contents, config))) => {
                    *current.write().unwrap_or_else(PoisonError::into_inner) = config;
                    (used, told) = (Arc::new(contents), None);
                    tracing::info!("the certificates were re-read");
                }
                Ok(None) => {
                    told = None;
                    if requested {
                        tracing::info!("the certificates have not changed");
                    }
                }
                Err(error) => {
                    let line = error.to_string();
                    if requested || told.as_ref() != Some(&line) {
                        tracing::error!(cause = line, "changed certificates are not used");
                        told = Some(line);
                    }
                }
            }
        }
    }
}

impl TlsFiles {
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
            client_crl: match &self.client_crl {
                Some(file) => Some(read("--tls-client-crl", file)?),
                None => None,
            },
        })
    }

    /// What is in the files now and the configuration made of it, unless they are as they were.
    fn read_changed(
        &self,
        last: &Contents,
    ) -> Result<Option<(Contents, Arc<ServerConfig>)>, TlsError> {
        let contents = self.read()?;
        if contents == *last {
            return Ok(None);
        }
        let config = self.config(&contents)?;
        Ok(Some((contents, config)))
    }

    fn error(&self, flag: &'static str, cause: &str) -> TlsError {
        let file = match flag {
            "--tls-cert" => &self.cert,
            "--tls-key" => &self.key,
            "--tls-client-crl" => self.client_crl.as_ref().unwrap_or(&self.cert),
            _ => self.client_ca.as_ref().unwrap_or(&self.cert),
        };
        TlsError { flag, file: file.clone(), cause: cause.to_owned() }
    }

    fn config(&self, contents: &Contents) -> Result<Arc<ServerConfig>, TlsError> {
        let certs = self.pem("--tls-cert", &contents.cert, "certificates in PEM")?;
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
                for cert in self.pem("--tls-client-ca", pem, "certificates in PEM")? {
                    roots.add(cert).map_err(|error| bad(&error.to_string()))?;
                }
                let crls: Vec<CertificateRevocationListDer<'static>> = match &contents.client_crl {
                    Some(pem) => self.pem("--tls-client-crl", pem, "CRLs in PEM")?,
                    None => Vec::new(),
                };
                // By default it checks the whole chain and refuses what no CRL tells of.
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .with_crls(crls)
                        .build()
                        .map_err(|error| match error {
                            VerifierBuilderError::InvalidCrl(error) => self
                                .error("--tls-client-crl", &format!("expected a CRL: {error:?}")),
                            error => bad(&error.to_string()),
                        })?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(certs, key).map_err(|error| {
            self.error("--tls-key", &format!("expected the key of {:?}: {error}", self.cert))
        })?;
        if contents.client_ca.is_some() {
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// All of a file's sections of one kind.
    fn pem<T: PemObject>(
        &self,
        flag: &'static str,
        pem: &[u8],
        expected: &str,
    ) -> Result<Vec<T>, TlsError> {
        let sections: Result<Vec<_>, _> = T::pem_slice_iter(pem).collect();
        match sections {
            Ok(sections) if !sections.is_empty() => Ok(sections),
            _ => Err(self.error(flag, &format!("expected {expected}"))),
        }
    }
}
