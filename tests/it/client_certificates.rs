//! Certificates of clients that expire or are revoked: no TLS session outlives them.

use std::{
    fs,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        version::{TLS12, TLS13},
    },
};

use crate::{
    peers::connect,
    support::{PATIENCE, Process, scrape_until},
    tls::Pki,
};

/// A client that resumes its sessions where the server lets it.
struct Client(TlsConnector);

impl Client {
    /// One that shows the certificate chain of `NAME.pem`, if it is to show any.
    fn new(pki: &Pki, version: &'static SupportedProtocolVersion, name: Option<&str>) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(pki.path("ca.pem")).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_protocol_versions(&[version]).unwrap();
        let builder = builder.with_root_certificates(roots);
        let config = match name {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let chain = CertificateDer::pem_file_iter(pki.path(&format!("{name}.pem")));
                let chain = chain.unwrap().map(Result::unwrap).collect();
                let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{name}.key"))).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        Self(Arc::new(config).into())
    }

    /// Places an order on a new connection; returns the kind of its handshake.
    async fn place(&self, server: &Process) -> Result<HandshakeKind, String> {
        let exchange = async {
            let host = "orders.test".try_into().unwrap();
            let mut stream = self.0.connect(host, connect(server.api).await).await?;
            let request =
                b"GET /product HTTP/1.1\r\nhost: orders.test\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            assert!(answer.ends_with("\r\n\r\nOrder placed!"), "{answer}");
            Ok(stream.get_ref().1.handshake_kind().unwrap())
        };
        let ended = timeout(PATIENCE, exchange).await.expect("the server answers or refuses");
        ended.map_err(|error: std::io::Error| error.to_string())
    }

    /// Checks that its handshake is refused, and counted as such.
    async fn is_refused(&self, server: &Process) {
        let refused = ["reason=\"tls\""];
        let before = server.scrape().await.value("connections_refused_total", &refused);
        self.place(server).await.unwrap_err();
        scrape_until(server.admin, |page| {
            page.value("connections_refused_total", &refused) == before + 1.0
        })
        .await;
    }
}

fn versions() -> [&'static SupportedProtocolVersion; 2] {
    [&TLS12, &TLS13]
}

fn valid_for(time: Duration) -> CertificateParams {
    let mut params = CertificateParams::new(["client.test".to_owned()]).unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    params.not_after = date_time_ymd(1970, 1, 1) + now + time;
    params
}

fn with_serial(serial: u64) -> CertificateParams {
    let mut params = CertificateParams::new(["client.test".to_owned()]).unwrap();
    params.serial_number = Some(serial.into());
    params
}

/// A CRL that revokes these serial numbers, with a `nextUpdate` in this year.
fn crl(issuer: &Issuer<'_, KeyPair>, revoked: &[u64], next_update: i32) -> String {
    let revoked = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: date_time_ymd(2020, 1, 1),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2020, 1, 1),
        next_update: date_time_ymd(next_update, 1, 1),
        crl_number: 1.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).unwrap().pem().unwrap()
}

/// A CA, the server's certificate, and those of the clients `good` (serial number 1) and `bad` (2).
fn pki() -> Pki {
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    pki.issue_with("good", with_serial(1), pki.ca());
    pki.issue_with("bad", with_serial(2), pki.ca());
    pki
}

async fn serve(pki: &Pki, with_crl: bool) -> Process {
    let file = |name: &str| pki.path(name).to_str().unwrap().to_owned();
    let mut flags = vec!["--tls-client-ca".to_owned(), file("ca.pem")];
    if with_crl {
        flags.extend(["--tls-client-crl".to_owned(), file("crl.pem")]);
    }
    pki.serve(&flags).await
}

#[tokio::test]
async fn sessions_are_resumed_without_a_client_ca_and_never_with_one() {
    let pki = pki();
    let open = pki.serve(&[]).await;
    let mutual = serve(&pki, false).await;
    for version in versions() {
        for (server, name, again) in
            [(&open, None, HandshakeKind::Resumed), (&mutual, Some("good"), HandshakeKind::Full)]
        {
            let client = Client::new(&pki, version, name);
            assert_eq!(client.place(server).await, Ok(HandshakeKind::Full));
            assert_eq!(client.place(server).await, Ok(again), "{version:?} {name:?}");
        }
    }
}

#[tokio::test]
async fn a_certificate_that_has_expired_cannot_connect_again() {
    let pki = pki();
    let server = serve(&pki, false).await;
    let validity = Duration::from_secs(6);
    pki.issue_with("brief", valid_for(validity), pki.ca());
    let issued = tokio::time::Instant::now();
    let clients = versions().map(|version| Client::new(&pki, version, Some("brief")));
    for client in &clients {
        client.place(&server).await.unwrap();
    }
    // The rest of its validity, which counts whole seconds.
    tokio::time::sleep_until(issued + validity + Duration::from_secs(1)).await;
    for client in &clients {
        client.is_refused(&server).await;
    }
}

#[tokio::test]
async fn a_certificate_that_a_reload_revokes_cannot_connect_again() {
    let pki = pki();
    fs::write(pki.path("crl.pem"), crl(pki.ca(), &[], 4000)).unwrap();
    let mut server = serve(&pki, true).await;
    let clients = |name| versions().map(|version| Client::new(&pki, version, Some(name)));
    let (good, bad) = (clients("good"), clients("bad"));
    for client in good.iter().chain(&bad) {
        client.place(&server).await.unwrap();
    }

    fs::write(pki.path("crl.pem"), crl(pki.ca(), &[2], 4000)).unwrap();
    server.signal(Signal::HUP);
    server.logged("the certificates were re-read").await;
    for (good, bad) in good.iter().zip(&bad) {
        good.place(&server).await.unwrap();
        bad.is_refused(&server).await;
    }
    assert_eq!(server.terminate().await, Some(0));
}

#[tokio::test]
async fn a_broken_crl_leaves_the_last_one_in_use_and_is_logged_once() {
    let pki = pki();
    let whole = crl(pki.ca(), &[2], 4000);
    fs::write(pki.path("crl.pem"), &whole).unwrap();
    let mut server = serve(&pki, true).await;
    let clients = |name| Client::new(&pki, &TLS13, Some(name));
    fs::write(pki.path("crl.pem"), &whole[..whole.len() / 2]).unwrap();
    let line = server.logged("changed certificates are not used").await;
    let cause = line["cause"].as_str().unwrap();
    assert!(cause.contains("--tls-client-crl") && cause.contains("crl.pem"), "{line}");
    clients("good").place(&server).await.unwrap();
    clients("bad").is_refused(&server).await;

    // Read at least once more, and refused for the same reason, which is not logged again.
    fs::write(pki.path("crl.pem"), &whole[..whole.len() / 3]).unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let log = server.log();
    let lines = log.iter().filter(|line| line["message"] == "changed certificates are not used");
    assert_eq!(lines.count(), 1, "{log:?}");

    // A new one is used.
    fs::write(pki.path("crl.pem"), crl(pki.ca(), &[1], 4000)).unwrap();
    server.logged("the certificates were re-read").await;
    clients("bad").place(&server).await.unwrap();
    clients("good").is_refused(&server).await;
}

/// To refuse every client would turn a CA that publishes late into an outage.
#[tokio::test]
async fn a_crl_past_its_next_update_stays_in_force() {
    let pki = pki();
    fs::write(pki.path("crl.pem"), crl(pki.ca(), &[2], 2021)).unwrap();
    let server = serve(&pki, true).await;
    Client::new(&pki, &TLS13, Some("good")).place(&server).await.unwrap();
    Client::new(&pki, &TLS13, Some("bad")).is_refused(&server).await;
}

#[tokio::test]
async fn every_ca_of_a_clients_chain_needs_its_crl() {
    let pki = pki();
    let mut params = CertificateParams::new([]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "an intermediate CA for tests");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.serial_number = Some(3.into());
    let key = KeyPair::generate().unwrap();
    let intermediate = CertifiedIssuer::signed_by(params, key, pki.ca()).unwrap();
    pki.issue_with("leaf", with_serial(4), &intermediate);
    let chain = fs::read_to_string(pki.path("leaf.pem")).unwrap() + &intermediate.pem();
    fs::write(pki.path("leaf.pem"), chain).unwrap();

    let of = |issuer: &Issuer<'_, KeyPair>, revoked: &[u64]| crl(issuer, revoked, 4000);
    for (crls, accepted) in [
        (of(pki.ca(), &[]) + &of(&intermediate, &[]), true),
        (of(&intermediate, &[]) + &of(pki.ca(), &[]), true),
        (of(pki.ca(), &[]), false),
        (of(&intermediate, &[]), false),
        (of(pki.ca(), &[3]) + &of(&intermediate, &[]), false),
        (of(pki.ca(), &[]) + &of(&intermediate, &[4]), false),
        // Serial numbers are the issuer's own.
        (of(pki.ca(), &[4]) + &of(&intermediate, &[3]), true),
    ] {
        fs::write(pki.path("crl.pem"), crls).unwrap();
        let server = serve(&pki, true).await;
        let client = Client::new(&pki, &TLS13, Some("leaf"));
        if accepted {
            client.place(&server).await.unwrap();
        } else {
            client.is_refused(&server).await;
        }
    }
}
