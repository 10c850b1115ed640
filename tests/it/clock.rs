//! A clock that is wrong: orders carry its time, a jump is followed at once and logged once, and
//! pages hold whatever the replicas' clocks say. The clock is that of libfaketime.

use std::{
    collections::HashSet,
    fs,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use order_service::{
    order::OrderId,
    proto::{ListRequest, Order, PlaceRequest},
};
use tempfile::TempDir;

use crate::{
    postgres::PostgresServer,
    support::{Process, database_in},
};

const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;

/// The clock of one process: an offset to this machine's, in seconds.
struct Clock(TempDir);

impl Clock {
    fn new() -> Self {
        let clock = Self(tempfile::tempdir().unwrap());
        clock.set(0);
        clock
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("offset")
    }

    fn set(&self, seconds: i64) {
        // Whole at each moment: the process reads it whenever it reads the clock.
        let next = self.0.path().join("next");
        fs::write(&next, format!("{seconds:+}\n")).unwrap();
        fs::rename(next, self.file()).unwrap();
    }

    async fn start(&self, database: &str) -> Process {
        let library = fs::read_dir("/usr/lib").unwrap().find_map(|entry| {
            let path = entry.unwrap().path().join("faketime/libfaketimeMT.so.1");
            path.exists().then_some(path)
        });
        let library = library.expect("Debian's package libfaketime is installed");
        Process::start_command(database, &["--max-connection-age", "0s"], |command| {
            command.env("LD_PRELOAD", library);
            command.env("FAKETIME_TIMESTAMP_FILE", self.file());
            command.env("FAKETIME_NO_CACHE", "1");
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            command.env("DONT_FAKE_MONOTONIC", "1");
        })
        .await
    }
}

async fn place(service: &Process) -> Order {
    let request = PlaceRequest { product_id: "book".into(), ..Default::default() };
    service.grpc().await.place(request).await.unwrap().into_inner().order.unwrap()
}

/// Seconds by which a time is ahead of this machine's clock.
fn ahead(time: SystemTime) -> i64 {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    (seconds(time) - seconds(SystemTime::now())).round() as i64
}

/// What an order's `placed_at` and its id are ahead of this machine's clock.
fn ahead_of(order: &Order) -> (i64, i64) {
    let placed = order.placed_at.unwrap();
    let placed =
        Duration::new(placed.seconds.try_into().unwrap(), placed.nanos.try_into().unwrap());
    let id: OrderId = order.order_id.parse().unwrap();
    (ahead(UNIX_EPOCH + placed), ahead(id.minted_at()))
}

fn is_about(order: &Order, seconds: i64) {
    let (placed, id) = ahead_of(order);
    // What a busy machine adds between the order and this look.
    let about = seconds - 20..=seconds + 1;
    assert!(about.contains(&placed) && about.contains(&id), "{seconds}: {placed} {id}");
}

#[tokio::test]
#[ignore = "needs libfaketime; run by make test"]
async fn a_clock_that_jumped_is_followed_and_logged_once() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Clock::new());
    let service = clock.start(&database_in(dir.path())).await;
    let far = 73 * 365 * 24 * HOUR;
    let mut jumps = 0;
    for offset in [0, HOUR, 0, far, 0, -HOUR, 0] {
        clock.set(offset);
        let first = place(&service).await;
        is_about(&first, offset);
        let second = place(&service).await;
        is_about(&second, offset);
        assert!(second.order_id > first.order_id, "ids grow while the clock does");
        jumps += usize::from(offset != 0) * 2;
        let lines = service.log();
        let told = lines
            .iter()
            .filter(|line| line["message"].as_str().unwrap().starts_with("the clock jumped"));
        let told = told.count();
        assert_eq!(told, if offset == 0 { jumps } else { jumps - 1 }, "{offset}: {lines:?}");
    }
}

#[tokio::test]
#[ignore = "needs libfaketime; run by make test"]
async fn a_clock_that_goes_back_a_little_keeps_ids_growing() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Clock::new());
    let service = clock.start(&database_in(dir.path())).await;
    let mut last = String::new();
    for i in 0..20 {
        // Within a second of the latest.
        fs::write(clock.file(), format!("{:+.1}\n", 0.4 * f64::from(i % 3) - 0.4)).unwrap();
        let order = place(&service).await;
        assert!(order.order_id > last, "{i}");
        is_about(&order, 0);
        last = order.order_id;
    }
    assert_eq!(service.log().len(), 1, "{:?}", service.log());
}

async fn page(service: &Process, page_token: String) -> (Vec<String>, String) {
    let request = ListRequest { page_size: 7, page_token };
    let page = service.grpc().await.list(request).await.unwrap().into_inner();
    (page.orders.into_iter().map(|order| order.order_id).collect(), page.next_page_token)
}

/// Whatever was there when a listing began is in it once, in order, while replicas whose clocks are
/// an hour apart and jump go on placing.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs libfaketime and PostgreSQL's server programs; run by make test"]
async fn pages_are_whole_and_in_order_among_skewed_replicas() {
    let server = PostgresServer::start().await;
    let clocks = [Clock::new(), Clock::new(), Clock::new()];
    let mut services = Vec::new();
    for (clock, offset) in clocks.iter().zip([0, HOUR, -10 * MINUTE]) {
        clock.set(offset);
        services.push(clock.start(&server.url()).await);
    }
    let mut there = HashSet::new();
    for round in 0..5 {
        for service in &services {
            for _ in 0..10 {
                there.insert(place(service).await.order_id);
            }
        }
        let (before, mut listed, mut token) = (there.clone(), Vec::new(), String::new());
        loop {
            // Each page from another replica, and orders of all between two pages.
            let reader = &services[listed.len() % services.len()];
            let (ids, next) = page(reader, token).await;
            listed.extend(ids);
            token = next;
            if token.is_empty() {
                break;
            }
            for service in &services {
                there.insert(place(service).await.order_id);
            }
        }
        assert!(listed.is_sorted_by(|a, b| a > b), "newest first, none twice");
        let listed: HashSet<_> = listed.into_iter().collect();
        assert!(before.is_subset(&listed), "{:?}", before.difference(&listed).collect::<Vec<_>>());
        assert!(listed.is_subset(&there));
        clocks[1].set(HOUR * (round % 2));
        clocks[2].set(-10 * MINUTE * (round % 3));
    }
}
