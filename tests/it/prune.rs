//! Pruning idempotency keys by the very SQL of docs/database.md, while orders arrive.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use sqlx::{AssertSqlSafe, Executor as _};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::database::{Database, later, new, until};

/// The one block of SQL of docs/database.md that has all of this in it.
pub fn documented(words: &[&str]) -> String {
    let text =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/database.md")).unwrap();
    let blocks: Vec<_> = text
        .split("```sql\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .filter(|block| words.iter().all(|word| block.contains(word)))
        .collect();
    assert_eq!(blocks.len(), 1, "{words:?}");
    blocks.into_iter().next().unwrap()
}

/// So many orders of 31 days ago with keys, and as many of 29 days ago.
const OLD: usize = 2500;

async fn keys_older_than_30_days_are_forgotten(database: Database, prune: &str) {
    let opened = database.open().await;
    let mut connection = database.connect().await;
    let insert = match database {
        Database::Postgres(_) => {
            "INSERT INTO orders \
             SELECT CAST(lpad(to_hex(at), 12, '0') || '7000b' || lpad(to_hex(i), 15, '0') AS UUID), \
             'book', 1, days || '-' || i, at FROM (SELECT i, days, \
             CAST((extract(epoch FROM now()) - days * 86400) * 1000 AS INT8) + i AS at \
             FROM generate_series(1, 2500) AS i, unnest(ARRAY[29, 31]) AS days) AS old"
        }
        _ => {
            "INSERT INTO orders \
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500) \
             SELECT unhex(printf('%012x7000b%015x', at, i)), 'book', 1, days || '-' || i, at FROM \
             (SELECT i, days, (unixepoch() - days * 86400) * 1000 + i AS at FROM n, \
             (SELECT 29 AS days UNION SELECT 31)) WHERE true"
        }
    };
    connection.execute(insert).await.unwrap();

    let (stop, placed) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
    let mut load = JoinSet::new();
    for caller in 0..16 {
        let (store, stop, placed) = (opened.store.clone(), stop.clone(), placed.clone());
        load.spawn(async move {
            for i in 0.. {
                if stop.is_cancelled() {
                    return;
                }
                let order = new("book", Some(&format!("now-{caller}-{i}")));
                store.place(order, later()).await.expect("orders arrive meanwhile");
                placed.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    until(|| placed.load(Ordering::Relaxed) > 100).await;
    loop {
        let changed = connection.execute(AssertSqlSafe(prune)).await.unwrap().rows_affected();
        // A block of PL/pgSQL does it all at once, and tells no number.
        if changed == 0 {
            break;
        }
    }
    let so_far = placed.load(Ordering::Relaxed);
    until(|| placed.load(Ordering::Relaxed) > so_far).await;
    stop.cancel();
    load.join_all().await;

    // Nothing but the old ones' keys is gone.
    let mut count = async |condition: &str| {
        let query = format!("SELECT COUNT(*) FROM orders WHERE {condition}");
        let query = sqlx::query_as::<_, (i64,)>(AssertSqlSafe(query));
        query.fetch_one(&mut connection).await.unwrap().0 as usize
    };
    assert_eq!(count("idempotency_key IS NULL").await, OLD);
    assert_eq!(count("idempotency_key LIKE '29-%'").await, OLD);
    let now = placed.load(Ordering::Relaxed) as usize;
    assert_eq!(count("idempotency_key LIKE 'now-%'").await, now);
    let again = |days: usize| new("book", Some(&format!("{days}-7")));
    assert!(!opened.store.place(again(31), later()).await.unwrap().replayed);
    assert!(opened.store.place(again(29), later()).await.unwrap().replayed);
    opened.close().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn on_postgres_the_documented_sql_prunes_under_load() {
    let database = Database::postgres().await;
    keys_older_than_30_days_are_forgotten(
        database,
        &documented(&["SET idempotency_key = NULL", "DO $$"]),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_the_documented_sql_prunes_under_load() {
    keys_older_than_30_days_are_forgotten(Database::file(), &documented(&["unixepoch"])).await;
}
