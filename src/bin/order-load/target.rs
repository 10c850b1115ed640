//! Where the service is and how it is spoken to.

use std::sync::Arc;

use http::{Uri, uri::Scheme};
use tokio_rustls::rustls::{ClientConfig, pki_types::ServerName};

use crate::{
    args::{Args, Protocol, without_userinfo},
    tls,
};

/// The service.
#[derive(Debug, Clone)]
pub struct Target {
    /// Name or address to look up, without the brackets of an IPv6 address.
    pub host: String,
    pub port: u16,
    /// Scheme and authority, as requests carry them.
    pub base: Base,
    pub protocol: Protocol,
    pub tls: Option<Secure>,
}

/// Scheme and authority of every request's URI.
#[derive(Debug, Clone)]
pub struct Base {
    pub scheme: Scheme,
    pub authority: http::uri::Authority,
}

/// What a TLS handshake needs.
#[derive(Debug, Clone)]
pub struct Secure {
    pub config: Arc<ClientConfig>,
    pub name: ServerName<'static>,
}

impl Target {
    /// Of the flags `--target`, `--protocol` and `--tls-*`.
    ///
    /// # Errors
    /// One line: the flag, its value without a password, and what is expected.
    pub fn new(args: &Args) -> Result<Self, String> {
        let url = &args.target;
        let bad = || {
            let shown = without_userinfo(url);
            format!("--target {shown:?}: expected http://HOST:PORT or https://HOST:PORT")
        };
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(bad());
        };
        let secure = *scheme == Scheme::HTTPS;
        let plain_path = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let known = secure || *scheme == Scheme::HTTP;
        if !known || !plain_path || authority.as_str().contains('@') || authority.host().is_empty()
        {
            return Err(bad());
        }
        // What http makes of a port that is none is no port at all.
        let port = match authority.as_str()[authority.host().len()..].strip_prefix(':') {
            None => Some(if secure { 443 } else { 80 }),
            Some(port) => port.parse().ok().filter(|port| *port > 0),
        };
        let port = port.ok_or_else(bad)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();

        let tls = if secure {
            let name = ServerName::try_from(host.clone()).map_err(|_| bad())?;
            Some(Secure { config: tls::config(args)?, name })
        } else {
            let files = [
                ("--tls-ca", &args.tls_ca),
                ("--tls-cert", &args.tls_cert),
                ("--tls-key", &args.tls_key),
            ];
            if let Some((flag, Some(file))) = files.into_iter().find(|(_, file)| file.is_some()) {
                return Err(format!("{flag} {file:?}: expected a --target of https:// with it"));
            }
            None
        };
        let base = Base { scheme: scheme.clone(), authority: authority.clone() };
        Ok(Self { host, port, base, protocol: args.protocol, tls })
    }
}

impl Base {
    /// The URI of a path on the target.
    ///
    /// # Panics
    /// If the path is none that a URI can have; ours are.
    pub fn uri(&self, path: &str) -> Uri {
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query(path)
            .build()
            .expect("paths of the API make a URI")
    }
}
