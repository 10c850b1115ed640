//! TLS towards the target.

use std::{fs, path::Path, sync::Arc};

use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::args::{Args, Protocol};

/// TLS 1.2 and 1.3, with the one version of HTTP that the protocol takes.
///
/// # Errors
/// One line: the flag, its file and what is wrong with it.
pub fn config(args: &Args) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    match &args.tls_ca {
        Some(file) => {
            for cert in certificates("--tls-ca", file)? {
                roots.add(cert).map_err(|error| format!("--tls-ca {file:?}: {error}"))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                let target = &args.target;
                return Err(format!(
                    "--target {target:?}: expected --tls-ca with it, since this machine trusts no CA"
                ));
            }
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the cipher suites of TLS 1.2 and 1.3")
        .with_root_certificates(roots);
    let mut config = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => {
            let chain = certificates("--tls-cert", cert)?;
            let pem = read("--tls-key", key)?;
            let secret = PrivateKeyDer::from_pem_slice(&pem)
                .map_err(|_| format!("--tls-key {key:?}: expected a private key in PEM"))?;
            builder.with_client_auth_cert(chain, secret).map_err(|error| {
                format!("--tls-key {key:?}: expected the key of {cert:?}: {error}")
            })?
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![match args.protocol {
        Protocol::Grpc => b"h2".to_vec(),
        Protocol::Http => b"http/1.1".to_vec(),
    }];
    Ok(Arc::new(config))
}

fn read(flag: &str, file: &Path) -> Result<Vec<u8>, String> {
    fs::read(file).map_err(|error| format!("{flag} {file:?}: cannot be read: {error}"))
}

fn certificates(flag: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(flag, file)?;
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certs {
        Ok(certs) if !certs.is_empty() => Ok(certs),
        _ => Err(format!("{flag} {file:?}: expected certificates in PEM")),
    }
}
