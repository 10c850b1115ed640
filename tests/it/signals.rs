//! Signals: those that end the process, the one that reloads, and those that must do nothing.

use std::{
    fs,
    time::{Duration, Instant},
};

use order_service::proto::PlaceRequest;
use rustix::process::{Resource, Rlimit, Signal, prlimit};
use tokio::{task::JoinHandle, time::timeout};
use tonic::{Code, Status};

use crate::{
    support::{PATIENCE, Process, scrape_until},
    tls::Pki,
};

/// An order that is being placed for a while.
async fn call_in_flight(server: &Process) -> JoinHandle<Result<(), Status>> {
    let mut grpc = server.grpc().await;
    let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
    let call = tokio::spawn(async move { grpc.place(order).await.map(drop) });
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    call
}

#[tokio::test]
async fn each_signal_to_end_drains() {
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
        let mut server = Process::start("sqlite::memory:", &["--processing-delay", "2s"]).await;
        let call = call_in_flight(&server).await;
        server.signal(signal);
        server.logged("draining: stopped accepting").await;
        call.await.unwrap().unwrap();
        assert_eq!(server.exited().await.code(), Some(0), "{signal:?}");
    }
}

#[tokio::test]
async fn each_signal_to_end_is_the_second_one_after_any_other() {
    let args = ["--processing-delay", "50s", "--request-timeout", "60s", "--drain-timeout", "60s"];
    for (first, second) in [
        (Signal::TERM, Signal::QUIT),
        (Signal::QUIT, Signal::TERM),
        (Signal::QUIT, Signal::QUIT),
        (Signal::INT, Signal::QUIT),
    ] {
        let mut server = Process::start("sqlite::memory:", &args).await;
        let call = call_in_flight(&server).await;
        server.signal(first);
        server.logged("draining: stopped accepting").await;
        server.signal(second);
        assert_eq!(server.exited().await.code(), Some(3), "{first:?}, {second:?}");
        call.await.unwrap().unwrap_err();
    }
}

/// The signals that would end a process and ask nothing of this one. SIGHUP is one of them without
/// TLS.
const HARMLESS: [Signal; 9] = [
    Signal::HUP,
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::PIPE,
    Signal::VTALARM,
    Signal::PROF,
    Signal::IO,
    Signal::XFSZ,
];

#[tokio::test]
async fn other_signals_change_nothing_not_for_calls_nor_in_the_drain() {
    let args = ["--processing-delay", "1s", "--drain-delay", "1s"];
    let mut server = Process::start("sqlite::memory:", &args).await;
    for signal in HARMLESS {
        let call = call_in_flight(&server).await;
        server.signal(signal);
        call.await.unwrap().unwrap();
    }
    assert_eq!(server.log().len(), 1, "{:?}", server.log());

    let call = call_in_flight(&server).await;
    server.signal(Signal::TERM);
    server.logged("draining: no longer ready").await;
    for signal in HARMLESS {
        server.signal(signal);
    }
    call.await.unwrap().unwrap();
    assert_eq!(server.exited().await.code(), Some(0));
}

/// From the first moment in which a peer could connect: the listeners' ports are in the kernel's
/// table before any line is logged.
#[tokio::test]
async fn signals_are_handled_before_a_socket_opens() {
    // A server that is waited for, so that the start takes its time.
    let database = "postgres://nobody@127.0.0.1:1/nowhere";
    let mut server = Process::spawn(database, &[], |_| {});
    let listening = format!("/proc/{}/net/tcp", server.id());
    let sockets = format!("/proc/{}/fd", server.id());
    let opened = || {
        let table = fs::read_to_string(&listening).unwrap();
        let listeners: Vec<_> = table
            .lines()
            .filter_map(|line| {
                let columns: Vec<_> = line.split_whitespace().collect();
                (columns.get(3) == Some(&"0A")).then(|| format!("socket:[{}]", columns[9]))
            })
            .collect();
        fs::read_dir(&sockets).unwrap().flatten().any(|entry| {
            fs::read_link(entry.path()).is_ok_and(|link| {
                listeners.iter().any(|listener| link.as_os_str() == &listener[..])
            })
        })
    };
    timeout(PATIENCE, async {
        while !opened() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it listens");
    for signal in HARMLESS {
        server.signal(signal);
    }
    server.signal(Signal::QUIT);
    server.logged("told to end before the store had answered").await;
    assert_eq!(server.exited().await.code(), Some(0));
}

#[tokio::test]
async fn a_hangup_reads_the_tls_files_at_once_and_says_so() {
    const ROUNDS: usize = 20;
    let pki = Pki::new();
    pki.issue("server", "orders.test");
    let mut server = pki.serve(&[]).await;
    server.signal(Signal::HUP);
    server.logged("the certificates have not changed").await;

    let read = "the certificates were re-read";
    let begun = Instant::now();
    for round in 1..=ROUNDS {
        pki.issue("server", "orders.test");
        server.signal(Signal::HUP);
        let seen = || server.log().iter().filter(|line| line["message"] == read).count() >= round;
        timeout(PATIENCE, async {
            while !seen() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the new certificate is read");
    }
    // Files that are only looked at each second would have taken as many seconds as there were
    // rounds.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());

    fs::write(pki.path("server.pem"), "half a certif").unwrap();
    server.signal(Signal::HUP);
    server.logged("changed certificates are not used").await;
    assert_eq!(server.terminate().await, Some(0));
}

/// A write beyond the limit of a file's size is a signal, too: SIGXFSZ.
#[tokio::test]
async fn a_limit_of_file_size_is_a_full_disk_and_not_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start_in(dir.path(), &["--request-timeout", "1s"]).await;
    let mut grpc = server.grpc().await;
    let mut place = async || {
        let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
        grpc.place(order).await.map(drop)
    };
    let limit = |bytes| {
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(server.pid()), Resource::Fsize, limit).unwrap();
    };
    place().await.unwrap();
    limit(Some(100_000));
    let refused = async {
        loop {
            if let Err(status) = place().await {
                return status;
            }
        }
    };
    let status = timeout(PATIENCE, refused).await.expect("the file is at its limit");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    limit(None);
    let placed = async { while place().await.is_err() {} };
    timeout(PATIENCE, placed).await.expect("orders are placed again");
    assert_eq!(server.terminate().await, Some(0));
}
