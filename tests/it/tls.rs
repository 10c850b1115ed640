//! TLS of the API, with curl as the client.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::{PATIENCE, Process, server_command};

/// A CA, and certificates that it signed, as PEM files.
struct Pki {
    dir: TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "a CA for tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let pki = Self { dir: tempfile::tempdir().unwrap(), ca };
        fs::write(pki.path("ca.pem"), pki.ca.pem()).unwrap();
        pki
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `NAME.pem` and `NAME.key` for a host.
    fn issue(&self, name: &str, host: &str) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, host);
        let cert = params.signed_by(&key, &self.ca).unwrap();
        // The key first: a server that looks in between sees two that do not belong together.
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
        fs::write(self.path(&format!("{name}.pem")), cert.pem()).unwrap();
    }

    fn flags(&self) -> Vec<String> {
        let file = |name| self.path(name).to_str().unwrap().to_owned();
        vec!["--tls-cert".into(), file("server.pem"), "--tls-key".into(), file("server.key")]
    }

    async fn serve(&self, more: &[String]) -> Process {
        let flags = [self.flags(), more.to_vec()].concat();
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        Process::start("sqlite::memory:", &flags).await
    }

    /// curl of `/product` at a host that is this machine; its exit code and what it wrote.
    async fn curl(&self, server: &Process, host: &str, flags: &[&str]) -> (Option<i32>, String) {
        let port = server.api.port();
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--resolve", &format!("{host}:{port}:127.0.0.1"), "--cacert"]);
        curl.arg(self.path("ca.pem")).args(flags).arg(format!("https://{host}:{port}/product"));
        let output = curl.output().await.expect("curl is installed");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }
}

#[tokio::test]
#[ignore = "needs curl; run by make test"]
async fn both_versions_of_http_are_chosen_by_alpn() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    let server = pki.serve(&[]).await;
    let version = ["-w", " over %{http_version}"];
    for (flag, expected) in
        [("--http1.1", "Order placed! over 1.1"), ("--http2", "Order placed! over 2")]
    {
        let flags = [&version[..], &[flag]].concat();
        assert_eq!(pki.curl(&server, "orders.test", &flags).await, (Some(0), expected.to_owned()));
    }
    let (code, _) = pki.curl(&server, "orders.test", &["--tls-max", "1.2"]).await;
    assert_eq!(code, Some(0));
    let (code, _) = pki.curl(&server, "orders.test", &["--tls-max", "1.1"]).await;
    assert_ne!(code, Some(0));
    // Plain HTTP is no handshake.
    let plain = reqwest::get(server.url("/product")).await;
    assert!(plain.is_err());
    let page = server.scrape().await;
    assert!(page.value("connections_refused_total", &["reason=\"tls\""]) >= 1.0);
}

#[tokio::test]
#[ignore = "needs curl; run by make test"]
async fn with_a_client_ca_clients_must_show_a_certificate() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    pki.issue("client", "client.test");
    let ca = pki.path("ca.pem").to_str().unwrap().to_owned();
    let server = pki.serve(&["--tls-client-ca".to_owned(), ca]).await;
    assert_ne!(pki.curl(&server, "orders.test", &[]).await.0, Some(0));
    let stranger = Pki::new();
    stranger.issue("client", "client.test");
    for (pki_of, accepted) in [(&pki, true), (&stranger, false)] {
        let (cert, key) = (pki_of.path("client.pem"), pki_of.path("client.key"));
        let flags = ["--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()];
        let (code, text) = pki.curl(&server, "orders.test", &flags).await;
        assert_eq!(code == Some(0), accepted, "{text}");
    }
}

#[tokio::test]
#[ignore = "needs curl; run by make test"]
async fn changed_files_are_used_and_broken_ones_are_not() {
    let pki = Pki::new();
    pki.issue("server", "old.test");
    let mut server = pki.serve(&[]).await;
    assert_eq!(pki.curl(&server, "old.test", &[]).await.0, Some(0));

    fs::write(pki.path("server.pem"), "half a certif").unwrap();
    server.logged("changed certificates are not used").await;
    assert_eq!(pki.curl(&server, "old.test", &[]).await.0, Some(0));

    pki.issue("server", "new.test");
    let renewed = async { while pki.curl(&server, "new.test", &[]).await.0 != Some(0) {} };
    tokio::time::timeout(PATIENCE, renewed).await.expect("the new certificate is used");
    assert_ne!(pki.curl(&server, "old.test", &[]).await.0, Some(0));
    let lines = server.log();
    let told = lines.iter().filter(|line| line["message"] == "changed certificates are not used");
    // Once for the broken file, and perhaps once for the key that was there before its certificate.
    assert!((1..=2).contains(&told.count()), "{lines:?}");
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_at_the_start() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    pki.issue("other", "orders.test");
    fs::write(pki.path("empty.pem"), "").unwrap();
    let refused = async |flag: &str, name: &str, expected: &str| {
        let file = pki.path(name);
        let mut flags = pki.flags();
        flags.extend([format!("{flag}={}", file.display())]);
        // The last of two is one too many: replace the first.
        if let Some(at) = flags.iter().position(|f| f == flag) {
            flags.drain(at..at + 2);
        }
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let output = server_command(&flags).stderr(Stdio::piped()).output().await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        let named = |path: &Path| stderr.contains(path.to_str().unwrap());
        assert!(stderr.contains(flag) && named(&file) && stderr.contains(expected), "{stderr}");
    };
    refused("--tls-cert", "missing.pem", "cannot be read").await;
    refused("--tls-cert", "empty.pem", "certificates in PEM").await;
    refused("--tls-key", "empty.pem", "private key in PEM").await;
    refused("--tls-key", "other.key", "expected the key of").await;
    refused("--tls-client-ca", "empty.pem", "certificates in PEM").await;
}
