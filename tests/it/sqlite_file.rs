//! A SQLite file is one process's, by whatever name it is reached, and its WAL has a bound.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use order_service::{
    proto::{ListRequest, PlaceRequest},
    store::StoreError,
};
use rustix::fs::{CWD, Mode, mkfifoat};
use sqlx::{Connection as _, Executor as _, SqliteConnection};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tonic::Code;

use crate::{
    database::{Opened, later, new},
    support::{PATIENCE, Process, database_in},
    usage::refusal,
};

/// The documented limit, in bytes.
const WAL_LIMIT: u64 = 8 << 20;

/// So that an order that cannot be placed is soon answered.
const SOON: &[&str] = &["--request-timeout", "1s"];

/// The line of a process that refuses to start on this file.
async fn refused(path: &Path) -> String {
    let url = format!("sqlite://{}", path.display());
    let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    refusal(&[&ports[..], &["--database-url", &url]].concat(), &[], 1).await
}

async fn place(service: &Process) -> Result<(), tonic::Status> {
    let request = PlaceRequest { product_id: "book".into(), ..PlaceRequest::default() };
    service.grpc().await.place(request).await.map(drop)
}

/// Places orders until one succeeds.
async fn places_again(service: &Process) {
    let placing = async { while place(service).await.is_err() {} };
    timeout(PATIENCE, placing).await.expect("orders are placed again");
}

async fn listed(service: &Process) -> usize {
    let list = service.grpc().await.list(ListRequest::default()).await.unwrap();
    list.into_inner().orders.len()
}

async fn readyz(service: &Process) -> String {
    let answer = reqwest::get(format!("http://{}/readyz", service.admin)).await.unwrap();
    answer.text().await.unwrap()
}

#[tokio::test]
async fn no_other_name_of_a_file_lets_a_second_process_in() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("orders.db");
    let folder = dir.path().join("folder");
    symlink(dir.path(), &folder).unwrap();
    let link = dir.path().join("link.db");
    symlink(&real, &link).unwrap();
    let chain = dir.path().join("chain.db");
    symlink("link.db", &chain).unwrap();
    let dotted = dir.path().join("./folder/../").join(dir.path()).join("orders.db");

    // By a link to a file that is not there yet.
    let service = Process::start(&format!("sqlite://{}", chain.display()), &[]).await;
    place(&service).await.unwrap();
    assert!(real.is_file() && dir.path().join("orders.db.lock").is_file());
    for path in [&real, &link, &chain, &folder.join("orders.db"), &dotted] {
        let line = refused(path).await;
        assert!(line.contains("another process uses it"), "{line}");
    }
    assert_eq!(service.terminate().await, Some(0));
    Process::start(&format!("sqlite://{}", real.display()), &[]).await;
}

#[tokio::test]
async fn a_file_with_a_second_hard_link_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (real, other) = (dir.path().join("orders.db"), dir.path().join("other.db"));
    let service = Process::start_in(dir.path(), &[]).await;
    fs::hard_link(&real, &other).unwrap();
    let line = refused(&other).await;
    assert!(line.contains("one hard link, it has 2"), "{line}");
    assert_eq!(service.terminate().await, Some(0));
    assert!(refused(&real).await.contains("one hard link"));
    fs::remove_file(&other).unwrap();
    Process::start_in(dir.path(), &[]).await;
}

#[tokio::test]
async fn a_lock_file_that_is_removed_is_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let lock = dir.path().join("orders.db.lock");
    let mut service = Process::start_in(dir.path(), &[]).await;
    for _ in 0..2 {
        fs::remove_file(&lock).unwrap();
        let waiting = async {
            while !lock.exists() {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, waiting).await.expect("it is there again");
        service.logged("lock file removed or replaced: locked again").await;
        let line = refused(&dir.path().join("orders.db")).await;
        assert!(line.contains("another process uses it"), "{line}");
        place(&service).await.unwrap();
    }
}

#[tokio::test]
async fn without_the_lock_no_order_is_placed() {
    let dir = tempfile::tempdir().unwrap();
    let service = Process::start_in(dir.path(), SOON).await;
    place(&service).await.unwrap();
    // What another process does that starts after the lock file was removed.
    let other = dir.path().join("other.lock");
    let file = File::create(&other).unwrap();
    file.lock().unwrap();
    fs::rename(&other, dir.path().join("orders.db.lock")).unwrap();
    assert_eq!(place(&service).await.unwrap_err().code(), Code::Unavailable);
    let body = readyz(&service).await;
    assert!(body.contains("the store fails") && body.contains("another process"), "{body}");
    drop(file);
    places_again(&service).await;
    assert_eq!(readyz(&service).await, "ok\n");
}

#[tokio::test]
async fn into_a_file_that_was_moved_away_no_order_is_placed() {
    let dir = tempfile::tempdir().unwrap();
    let (real, aside) = (dir.path().join("orders.db"), dir.path().join("aside.db"));
    let service = Process::start_in(dir.path(), SOON).await;
    place(&service).await.unwrap();
    fs::rename(&real, &aside).unwrap();
    assert_eq!(place(&service).await.unwrap_err().code(), Code::Unavailable);
    assert!(readyz(&service).await.contains("not at its path"));
    fs::write(&real, "").unwrap();
    assert_eq!(place(&service).await.unwrap_err().code(), Code::Unavailable);
    fs::rename(&aside, &real).unwrap();
    places_again(&service).await;
}

/// Without the WAL, a restart would not find what only the WAL holds.
#[tokio::test]
async fn a_wal_that_is_removed_or_replaced_loses_no_acknowledged_order() {
    for replaced in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let wal = dir.path().join("orders.db-wal");
        let service = Process::start_in(dir.path(), SOON).await;
        for _ in 0..3 {
            place(&service).await.unwrap();
        }
        assert!(fs::metadata(&wal).unwrap().len() > 0);
        let empty = dir.path().join("empty");
        fs::write(&empty, "").unwrap();
        if replaced {
            fs::rename(&empty, &wal).unwrap();
        } else {
            fs::remove_file(&wal).unwrap();
        }
        assert_eq!(place(&service).await.unwrap_err().code(), Code::Unavailable);
        let body = readyz(&service).await;
        assert!(body.contains("the WAL") && body.contains("restart the service"), "{body}");
        service.kill_9().await;
        let service = Process::start_in(dir.path(), &[]).await;
        assert_eq!(listed(&service).await, 3);
        place(&service).await.unwrap();
        assert_eq!(service.terminate().await, Some(0));
    }
}

/// What the second-by-second check saves, without a further order.
#[tokio::test]
async fn an_idle_service_saves_a_wal_that_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = Process::start_in(dir.path(), &[]).await;
    place(&service).await.unwrap();
    fs::remove_file(dir.path().join("orders.db-wal")).unwrap();
    let line = service.logged("the store fails; it is tried again until it answers").await;
    assert!(line.to_string().contains("all orders are in the database file"), "{line}");
    service.kill_9().await;
    let service = Process::start_in(dir.path(), &[]).await;
    assert_eq!(listed(&service).await, 1);
}

#[tokio::test]
async fn a_named_pipe_in_place_of_a_file_is_refused_at_once() {
    for (pipe, named) in [("orders.db", "orders.db"), ("orders.db.lock", "orders.db.lock")] {
        let dir = tempfile::tempdir().unwrap();
        mkfifoat(CWD, dir.path().join(pipe), Mode::RUSR | Mode::WUSR).unwrap();
        let line = timeout(PATIENCE, refused(&dir.path().join("orders.db"))).await.unwrap();
        assert!(line.contains("expected a regular file") && line.contains(named), "{line}");
    }
}

/// Returns a function that reads the length of the WAL in bytes.
fn wal_length(dir: &Path) -> impl Fn() -> u64 {
    let wal = dir.join("orders.db-wal");
    move || fs::metadata(&wal).map_or(0, |file| file.len())
}

/// Places orders with keys, many at a time, while a condition holds; returns how many.
async fn place_while(opened: &Opened, condition: impl Fn() -> bool) -> usize {
    const AT_A_TIME: usize = 64;
    let mut placed = 0;
    while condition() {
        let calls = (0..AT_A_TIME).map(async |_| {
            let key = uuid::Uuid::new_v4().to_string();
            opened.store.place(new("book", Some(&key)), later()).await.unwrap();
        });
        futures_util::future::join_all(calls).await;
        placed += AT_A_TIME;
    }
    placed
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wal_is_bounded_under_readers_that_never_pause() {
    let dir = tempfile::tempdir().unwrap();
    let wal = wal_length(dir.path());
    let opened = Opened::new(&database_in(dir.path())).await.unwrap();
    place_while(&opened, || opened.placed() < 2000).await;
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for _ in 0..8 {
        let (store, stop) = (opened.store.clone(), stop.clone());
        readers.spawn(async move {
            let mut reads = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                match store.list(None, 1000, later()).await {
                    Ok(_) => reads += 1,
                    Err(error) => assert_eq!(error, StoreError::ReadersBusy),
                }
            }
            reads
        });
    }
    let (begun, longest) = (Instant::now(), std::cell::Cell::new(0));
    let placed = place_while(&opened, || {
        longest.set(longest.get().max(wal()));
        opened.placed() < 30_000
    });
    let placed = placed.await;
    stop.store(true, Ordering::Relaxed);
    let reads: u64 = readers.join_all().await.into_iter().sum();
    println!("{placed} orders, {reads} reads, {:?}: {} bytes", begun.elapsed(), longest.get());
    // With what is committed while the readers finish; without the limit it is 48 MB.
    assert!(longest.get() <= 3 * WAL_LIMIT, "{} bytes", longest.get());
    assert!(reads > 100, "{reads}");
    assert_eq!(opened.all().await.len() as u64, opened.placed());
    opened.close().await;
}

/// A backup, or somebody's shell.
#[tokio::test]
async fn the_wal_shrinks_once_another_programs_reader_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let wal = wal_length(dir.path());
    let opened = Opened::new(&database_in(dir.path())).await.unwrap();
    let mut other = SqliteConnection::connect(&database_in(dir.path())).await.unwrap();
    other.execute("BEGIN; SELECT COUNT(*) FROM orders").await.unwrap();
    place_while(&opened, || wal() < 3 * WAL_LIMIT).await;
    other.execute("COMMIT").await.unwrap();
    // Without a further order.
    let waiting = async {
        while wal() > WAL_LIMIT {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, waiting).await.expect("it is truncated");
    opened.store.place(new("book", None), later()).await.unwrap();
    assert_eq!(opened.all().await.len() as u64, opened.placed());
    opened.close().await;
}
