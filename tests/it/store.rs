//! The store by itself: one suite of behaviours, run on every engine.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use order_service::{
    metrics::StoreErrorKind,
    order::Placed,
    store::{StoreError, StoreStatus},
};
use sqlx::{Connection as _, Executor as _};
use tokio::{task::JoinSet, time::Instant};

use crate::database::{Database, Opened, later, new, taken, until};

async fn a_key_is_placed_once_and_replayed(database: Database) {
    let opened = database.open().await;
    let (first, again) = (new("book", Some("k")), new("book", Some("k")));
    let placed = opened.store.place(first.clone(), later()).await.unwrap();
    assert_eq!(placed, Placed { order: first.order.clone(), replayed: false });
    let placed = opened.store.place(again, later()).await.unwrap();
    assert_eq!(placed, Placed { order: first.order.clone(), replayed: true });
    let other = opened.store.place(new("pen", Some("k")), later()).await;
    assert_eq!(other, Err(StoreError::KeyReused));
    // Keys differ in every letter, and orders without one have nothing in common.
    for key in [Some("K"), Some("kk"), None, None] {
        assert!(!opened.store.place(new("book", key), later()).await.unwrap().replayed);
    }
    assert_eq!(opened.placed(), 5);
    assert_eq!(opened.all().await.len(), 5);
    opened.close().await;
}

async fn of_many_calls_with_one_key_one_is_new(database: Database) {
    let opened = database.open().await;
    let mut calls = JoinSet::new();
    for _ in 0..200 {
        let store = opened.store.clone();
        calls.spawn(async move { store.place(new("book", Some("one")), later()).await.unwrap() });
    }
    let placed = calls.join_all().await;
    assert_eq!(placed.iter().filter(|placed| !placed.replayed).count(), 1);
    let ids: HashSet<_> = placed.iter().map(|placed| placed.order.id).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!((opened.placed(), opened.all().await.len()), (1, 1));
    opened.close().await;
}

/// Keys that meet in one batch, and keys that were there, among orders that have none.
async fn a_mixed_load_is_counted_exactly(database: Database) {
    let opened = database.open().await;
    let mut calls = JoinSet::new();
    for i in 0..3000 {
        let store = opened.store.clone();
        calls.spawn(async move {
            let (product, key) = match i % 3 {
                0 => ("book", None),
                1 => ("book", Some(format!("key-{}", i / 30))),
                _ => ("pen", Some(format!("key-{}", i / 30))),
            };
            (i, store.place(new(product, key.as_deref()), later()).await)
        });
    }
    let mut new_orders = 0;
    let mut by_key: HashMap<usize, HashSet<_>> = HashMap::new();
    for (i, result) in calls.join_all().await {
        match result {
            Ok(placed) => {
                new_orders += u64::from(!placed.replayed);
                if i % 3 != 0 {
                    by_key.entry(i / 30).or_default().insert(placed.order.id);
                }
            }
            Err(error) => assert_eq!(error, StoreError::KeyReused),
        }
    }
    assert!(by_key.values().all(|ids| ids.len() == 1));
    assert_eq!((by_key.len(), new_orders), (100, 1100));
    assert_eq!(opened.placed(), new_orders);
    assert_eq!(opened.all().await.len() as u64, new_orders);
    let batches = &opened.metrics.store.batch_orders;
    assert_eq!(batches.get_sample_sum(), 3000.0);
    assert_eq!(batches.get_sample_count(), opened.metrics.store.commit_seconds.get_sample_count());
    assert_eq!(opened.metrics.store.queue_orders.get(), 0);
    opened.close().await;
}

async fn orders_are_read_newest_first(database: Database) {
    let opened = database.open().await;
    let mut placed = Vec::new();
    for i in 0..30 {
        let order = new(&format!("p{i}"), None);
        placed.push(opened.store.place(order, later()).await.unwrap().order);
    }
    placed.reverse();
    assert_eq!(opened.all().await, placed);
    assert_eq!(opened.store.list(None, 7, later()).await.unwrap().orders, placed[..7]);
    let next = opened.store.list(Some(placed[6].id), 7, later()).await.unwrap();
    assert_eq!((&next.orders[..], next.next), (&placed[7..14], Some(placed[13].id)));
    let end = opened.store.list(Some(placed[29].id), 7, later()).await.unwrap();
    assert_eq!((&end.orders[..], end.next), (&[][..], None));
    for order in &placed {
        assert_eq!(opened.store.get(order.id, later()).await.unwrap().as_ref(), Some(order));
    }
    let stranger = new("book", None).order.id;
    assert_eq!(opened.store.get(stranger, later()).await.unwrap(), None);
    opened.close().await;
}

async fn what_is_queued_at_the_end_is_stored(database: Database) {
    let opened = database.open().await;
    let mut calls = JoinSet::new();
    for _ in 0..500 {
        let store = opened.store.clone();
        calls.spawn(async move { store.place(new("book", None), later()).await });
    }
    let placed = opened.metrics.store.placed.clone();
    let Opened { store, writers, .. } = opened;
    drop(store);
    writers.finished().await.unwrap();
    assert!(calls.join_all().await.iter().all(Result::is_ok));
    assert_eq!(placed.get(), 500);
}

/// Runs each behaviour on each engine.
macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        mod sqlite_file {
            $(#[tokio::test] async fn $name() { super::$name(super::Database::file()).await; })*
        }
        mod sqlite_memory {
            $(#[tokio::test] async fn $name() { super::$name(super::Database::memory()).await; })*
        }
        mod postgres {
            $(
                #[tokio::test]
                #[ignore = "needs PostgreSQL's server programs; run by make test"]
                async fn $name() { super::$name(super::Database::postgres().await).await; }
            )*
        }
    };
}

suite!(
    a_key_is_placed_once_and_replayed,
    of_many_calls_with_one_key_one_is_new,
    a_mixed_load_is_counted_exactly,
    orders_are_read_newest_first,
    what_is_queued_at_the_end_is_stored,
);

async fn orders_are_there_after_reopening(database: Database) {
    let opened = database.open().await;
    let placed = opened.store.place(new("book", Some("k")), later()).await.unwrap().order;
    opened.close().await;
    let opened = database.open().await;
    assert_eq!(opened.all().await, std::slice::from_ref(&placed));
    let again = opened.store.place(new("book", Some("k")), later()).await.unwrap();
    assert_eq!(again, Placed { order: placed, replayed: true });
    assert_eq!(opened.placed(), 0);
    opened.close().await;
}

async fn one_bad_order_harms_nobody_else(database: Database) {
    let opened = database.open().await;
    Database::refuse_product(&database.url(), "poison").await;
    let mut calls = JoinSet::new();
    for i in 0..100 {
        let store = opened.store.clone();
        let product = if i % 10 == 0 { "poison" } else { "book" };
        calls.spawn(async move { (product, store.place(new(product, None), later()).await) });
    }
    for (product, result) in calls.join_all().await {
        match (product, result) {
            ("book", Ok(_)) => {}
            ("poison", Err(StoreError::Internal(cause))) => assert!(cause.contains("the cause")),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((opened.placed(), opened.all().await.len()), (90, 90));
    assert_eq!(opened.health.status(), StoreStatus::Up);
    opened.close().await;
}

async fn who_gives_up_in_the_queue_is_not_placed(database: Database) {
    let opened = database.open().await;
    let locked = database.lock().await;
    // Each writer has an order that it cannot commit; all others wait behind them.
    let writers = if matches!(database, Database::Postgres(_)) { 2 } else { 1 };
    let mut sent = Vec::new();
    for _ in 0..writers {
        sent.push(taken(&opened, new("sent", None), later()).await);
    }
    let soon = Instant::now() + Duration::from_millis(50);
    let too_late = opened.store.place(new("too-late", None), soon).await;
    assert!(
        matches!(too_late, Err(StoreError::DeadlineExceeded | StoreError::Unavailable)),
        "{too_late:?}"
    );
    let mut hung_up = Box::pin(opened.store.place(new("hung-up", None), later()));
    assert!(futures_util::poll!(hung_up.as_mut()).is_pending());
    drop(hung_up);
    locked.close().await.unwrap();
    for call in sent {
        call.await.unwrap().unwrap();
    }
    // What comes later is placed: those before it in the queue were passed over.
    opened.store.place(new("later", None), later()).await.unwrap();
    let products: Vec<_> =
        opened.all().await.iter().map(|order| order.product_id.as_str().to_owned()).collect();
    assert_eq!(products.len(), writers + 1, "{products:?}");
    assert!(products.iter().all(|product| product == "sent" || product == "later"));
    assert_eq!(opened.placed(), writers as u64 + 1);
    opened.queue_is_empty().await;
    opened.close().await;
}

async fn an_outage_is_told_and_ends_by_itself(database: Database) {
    let opened = database.open().await;
    let locked = database.lock().await;
    let soon = Instant::now() + Duration::from_millis(1500);
    let result = opened.store.place(new("book", Some("k")), soon).await;
    assert_eq!(result, Err(StoreError::Unavailable));
    until(|| matches!(opened.health.status(), StoreStatus::Failing { .. })).await;
    let kind = match database {
        Database::Postgres(_) => StoreErrorKind::Timeout,
        _ => StoreErrorKind::Unavailable,
    };
    assert!(opened.metrics.store.errors(kind).get() > 0);
    locked.close().await.unwrap();
    let placed = opened.store.place(new("book", Some("k")), later()).await.unwrap();
    assert_eq!(opened.health.status(), StoreStatus::Up);
    assert_eq!(opened.all().await, [placed.order]);
    assert_eq!(opened.placed(), 1);
    opened.close().await;
}

async fn a_database_of_a_newer_version_is_refused(database: Database) {
    database.open().await.close().await;
    let newer = "INSERT INTO _sqlx_migrations \
        (version, description, installed_on, success, checksum, execution_time) \
        SELECT 9999, 'newer', installed_on, success, checksum, 0 FROM _sqlx_migrations";
    database.connect().await.execute(newer).await.unwrap();
    let refused = Opened::new(&database.url()).await.err().unwrap();
    assert!(refused.contains("9999"), "{refused}");
}

/// The same for behaviours that need a database which somebody else can reach, too.
macro_rules! shared_suite {
    ($($name:ident),* $(,)?) => {
        mod shared_sqlite_file {
            $(#[tokio::test] async fn $name() { super::$name(super::Database::file()).await; })*
        }
        mod shared_postgres {
            $(
                #[tokio::test]
                #[ignore = "needs PostgreSQL's server programs; run by make test"]
                async fn $name() { super::$name(super::Database::postgres().await).await; }
            )*
        }
    };
}

shared_suite!(
    orders_are_there_after_reopening,
    one_bad_order_harms_nobody_else,
    who_gives_up_in_the_queue_is_not_placed,
    an_outage_is_told_and_ends_by_itself,
    a_database_of_a_newer_version_is_refused,
);

#[tokio::test]
async fn a_queue_that_is_full_refuses() {
    let database = Database::file();
    let opened = database.open().await;
    let locked = database.lock().await;
    let _sent = taken(&opened, new("book", None), later()).await;
    let mut waiting = Vec::new();
    for _ in 0..4096 {
        let mut place = Box::pin(opened.store.place(new("book", None), later()));
        assert!(futures_util::poll!(place.as_mut()).is_pending());
        waiting.push(place);
    }
    assert_eq!(opened.metrics.store.queue_orders.get(), 4096);
    let refused = opened.store.place(new("book", None), later()).await;
    assert_eq!(refused, Err(StoreError::QueueFull));
    locked.close().await.unwrap();
    for place in waiting {
        place.await.unwrap();
    }
    assert_eq!(opened.placed(), 4097);
    // 4097 orders were at most six batches: they were committed in groups.
    assert!(opened.metrics.store.batch_orders.get_sample_count() <= 6);
    opened.close().await;
}
