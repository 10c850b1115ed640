//! TLS of the API, with curl as the client.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
};

use axum::{Router, routing::get};
use order_service::{
    listener::{self, KEEP_ALIVE, Limits, MAX_STREAMS, OVERTIME, Shutdown, Tls, TlsFiles},
    metrics::ConnectionMetrics,
    workers::Workers,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    process::Command,
    time::timeout,
};

use crate::{
    peers::{closed, connect},
    support::{PATIENCE, Page, Process, scrape_until, server_command},
    traffic::Steady,
};

/// Alerts of TLS (RFC 8446, section 6).
const HANDSHAKE_FAILURE: u8 = 40;
const PROTOCOL_VERSION: u8 = 70;

/// A CA, and certificates that it signed, as PEM files.
pub struct Pki {
    dir: TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    pub fn new() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "a CA for tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let pki = Self { dir: tempfile::tempdir().unwrap(), ca };
        fs::write(pki.path("ca.pem"), pki.ca.pem()).unwrap();
        pki
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn ca(&self) -> &Issuer<'_, KeyPair> {
        &self.ca
    }

    /// Writes `NAME.pem` and `NAME.key` for a host.
    pub fn issue(&self, name: &str, host: &str) {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, host);
        self.issue_with(name, params, &self.ca);
    }

    /// The same with all that a certificate can say, by any CA.
    #[allow(clippy::needless_pass_by_value, reason = "each certificate has its own")]
    pub fn issue_with(&self, name: &str, params: CertificateParams, issuer: &Issuer<'_, KeyPair>) {
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, issuer).unwrap();
        // The key first: a server that looks in between sees two that do not belong together.
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
        fs::write(self.path(&format!("{name}.pem")), cert.pem()).unwrap();
    }

    fn flags(&self) -> Vec<String> {
        let file = |name| self.path(name).to_str().unwrap().to_owned();
        vec!["--tls-cert".into(), file("server.pem"), "--tls-key".into(), file("server.key")]
    }

    /// steady over both protocols, which trusts the CA and shows this certificate.
    fn steady(&self, server: &Process, client: &str) -> Steady {
        let file = |name: &str| self.path(name).to_str().unwrap().to_owned();
        let (cert, key) = (file(&format!("{client}.pem")), file(&format!("{client}.key")));
        let (api, ca) = (server.api.to_string(), file("ca.pem"));
        let target = ["-grpc", &api, "-http", &api, "-name", "orders.test"];
        Steady::start(&[&target[..], &["-ca", &ca, "-cert", &cert, "-key", &key]].concat())
    }

    pub async fn serve(&self, more: &[String]) -> Process {
        let flags = [self.flags(), more.to_vec()].concat();
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        Process::start("sqlite::memory:", &flags).await
    }

    /// curl of `/product` at a host that is this machine; its exit code and what it wrote.
    async fn curl(&self, api: SocketAddr, host: &str, flags: &[&str]) -> (Option<i32>, String) {
        let port = api.port();
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
        assert_eq!(
            pki.curl(server.api, "orders.test", &flags).await,
            (Some(0), expected.to_owned())
        );
    }
    let (code, _) = pki.curl(server.api, "orders.test", &["--tls-max", "1.2"]).await;
    assert_eq!(code, Some(0));
    // Plain HTTP is no handshake.
    let plain = reqwest::get(server.url("/product")).await;
    assert!(plain.is_err());
    let page = server.scrape().await;
    assert!(page.value("connections_refused_total", &["reason=\"tls\""]) >= 1.0);
}

/// By hand: no library speaks TLS 1.1 any more.
#[tokio::test]
async fn tls_1_1_is_refused_by_name() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    let server = pki.serve(&[]).await;
    for (minor, alert) in [(2, PROTOCOL_VERSION), (3, HANDSHAKE_FAILURE)] {
        let mut peer = connect(server.api).await;
        // A ClientHello of this version: a random of zeros, no session, one cipher suite that is of
        // both versions and of no use here (TLS_RSA_WITH_AES_128_CBC_SHA), no compression, and one
        // extension, that signatures may be of ECDSA with P-256.
        let suites = [0, 0, 2, 0, 0x2f, 1, 0];
        let extensions = [0, 8, 0, 13, 0, 4, 0, 2, 4, 3];
        let hello = [&[3, minor][..], &[0; 32], &suites, &extensions].concat();
        let length = u8::try_from(hello.len()).unwrap();
        let record = [&[22, 3, 1, 0, length + 4, 1, 0, 0, length][..], &hello].concat();
        peer.write_all(&record).await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, peer.read_to_end(&mut answer)).await.expect("it is refused").unwrap();
        // One fatal alert.
        assert_eq!(
            (answer[0], &answer[5..]),
            (21, &[2, alert][..]),
            "TLS 1.{} {answer:?}",
            minor - 1
        );
    }
}

#[tokio::test]
#[ignore = "needs curl; run by make test"]
async fn with_a_client_ca_clients_must_show_a_certificate() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    pki.issue("client", "client.test");
    let ca = pki.path("ca.pem").to_str().unwrap().to_owned();
    let server = pki.serve(&["--tls-client-ca".to_owned(), ca]).await;
    assert_ne!(pki.curl(server.api, "orders.test", &[]).await.0, Some(0));
    let stranger = Pki::new();
    stranger.issue("client", "client.test");
    for (pki_of, accepted) in [(&pki, true), (&stranger, false)] {
        let (cert, key) = (pki_of.path("client.pem"), pki_of.path("client.key"));
        let flags = ["--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()];
        let (code, text) = pki.curl(server.api, "orders.test", &flags).await;
        assert_eq!(code == Some(0), accepted, "{text}");
    }
}

#[tokio::test]
#[ignore = "needs curl; run by make test"]
async fn changed_files_are_used_and_broken_ones_are_not() {
    let pki = Pki::new();
    pki.issue("server", "old.test");
    let mut server = pki.serve(&[]).await;
    assert_eq!(pki.curl(server.api, "old.test", &[]).await.0, Some(0));

    fs::write(pki.path("server.pem"), "half a certif").unwrap();
    server.logged("changed certificates are not used").await;
    assert_eq!(pki.curl(server.api, "old.test", &[]).await.0, Some(0));

    pki.issue("server", "new.test");
    let renewed = async { while pki.curl(server.api, "new.test", &[]).await.0 != Some(0) {} };
    tokio::time::timeout(PATIENCE, renewed).await.expect("the new certificate is used");
    assert_ne!(pki.curl(server.api, "old.test", &[]).await.0, Some(0));
    let lines = server.log();
    let told = lines.iter().filter(|line| line["message"] == "changed certificates are not used");
    // Once for the broken file, and perhaps once for the key that was there before its certificate.
    assert!((1..=2).contains(&told.count()), "{lines:?}");
}

#[tokio::test]
#[ignore = "needs curl and steady; run by make test"]
async fn a_certificate_is_swapped_under_load_and_no_connection_drops() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    pki.issue("client", "client.test");
    let ca = pki.path("ca.pem").to_str().unwrap().to_owned();
    let server = pki.serve(&["--tls-client-ca".to_owned(), ca]).await;
    let steady = pki.steady(&server, "client");
    let placed = |page: &Page| page.value("product_order_total", &[]);
    let connections = |page: &Page| page.value("connections_accepted_total", &[]);
    let before = scrape_until(server.admin, |page| placed(page) >= 200.0).await;
    assert_eq!(connections(&before), 20.0);

    pki.issue("server", "swapped.test");
    let (cert, key) = (pki.path("client.pem"), pki.path("client.key"));
    let flags = ["--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()];
    let mut tries = 0.0;
    let swapped = async {
        loop {
            tries += 1.0;
            if pki.curl(server.api, "swapped.test", &flags).await.0 == Some(0) {
                return;
            }
        }
    };
    timeout(PATIENCE, swapped).await.expect("the new certificate is used");
    let now = server.scrape().await;
    let after = scrape_until(server.admin, |page| placed(page) >= placed(&now) + 200.0).await;
    assert_eq!(connections(&after), connections(&before) + tries);
    steady.none_failed(&["grpc", "http"]).await;
}

#[tokio::test]
#[ignore = "needs curl; run by make test"]
async fn a_certificate_that_changes_between_the_start_and_the_first_connection_is_used() {
    let pki = Pki::new();
    pki.issue("server", "old.test");
    let (cert, key) = (pki.path("server.pem"), pki.path("server.key"));
    let tls = Tls::load(TlsFiles { cert, key, client_ca: None, client_crl: None }).unwrap();
    // As while the program waits for its database.
    pki.issue("server", "new.test");
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let api = socket.local_addr().unwrap();
    let routes = Router::new().route("/product", get(async || "served"));
    let limits = Limits {
        max_connections: 10,
        evicts_idle: false,
        read_timeout: PATIENCE,
        max_age: None,
        overtime: OVERTIME,
        max_idle: None,
        keep_alive: KEEP_ALIVE,
        max_streams: MAX_STREAMS,
    };
    let metrics = ConnectionMetrics::new().unwrap();
    let (_phase, shutdown) = Shutdown::new();
    tokio::spawn(listener::serve(
        socket,
        Workers::here(),
        Some(tls),
        routes,
        limits,
        metrics,
        shutdown,
    ));
    let used = async { while pki.curl(api, "new.test", &[]).await.0 != Some(0) {} };
    timeout(PATIENCE, used).await.expect("the new certificate is used");
}

#[tokio::test]
async fn a_handshake_that_never_ends_is_refused_and_holds_no_drain() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    for bytes in [&b""[..], &[0x16, 3, 1, 2, 0, 1]] {
        let server = pki.serve(&["--read-timeout=300ms".to_owned()]).await;
        let mut peer = connect(server.api).await;
        peer.write_all(bytes).await.unwrap();
        closed(&mut peer).await;
        scrape_until(server.admin, |page| {
            page.value("connections_refused_total", &["reason=\"tls\""]) == 1.0
        })
        .await;
        assert_eq!(server.terminate().await, Some(0));
        // Nor one that has all the time to end.
        let server = pki.serve(&["--read-timeout=50s".to_owned()]).await;
        let mut peer = connect(server.api).await;
        peer.write_all(bytes).await.unwrap();
        scrape_until(server.admin, |page| page.value("connections_open", &[]) == 1.0).await;
        let begun = std::time::Instant::now();
        assert_eq!(server.terminate().await, Some(0));
        assert!(begun.elapsed().as_secs() < 15, "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_at_the_start() {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    pki.issue("other", "orders.test");
    fs::write(pki.path("empty.pem"), "").unwrap();
    let nonsense = "-----BEGIN X509 CRL-----\nbm9uc2Vuc2U=\n-----END X509 CRL-----\n";
    fs::write(pki.path("nonsense.pem"), nonsense).unwrap();
    let refused = async |flag: &str, name: &str, expected: &str| {
        let file = pki.path(name);
        let mut flags = pki.flags();
        flags.extend([format!("{flag}={}", file.display())]);
        if flag == "--tls-client-crl" {
            flags.extend([format!("--tls-client-ca={}", pki.path("ca.pem").display())]);
        }
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
    refused("--tls-client-crl", "missing.pem", "cannot be read").await;
    refused("--tls-client-crl", "empty.pem", "CRLs in PEM").await;
    refused("--tls-client-crl", "server.pem", "CRLs in PEM").await;
    refused("--tls-client-crl", "nonsense.pem", "expected a CRL").await;
}
