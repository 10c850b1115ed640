//! A disk without room: callers are told UNAVAILABLE, and it is over as soon as there is room again.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use order_service::proto::PlaceRequest;
use sqlx::{AssertSqlSafe, Executor as _};
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::Code;

use crate::{
    postgres::PostgresServer,
    support::{PATIENCE, Process, database_in},
};

/// A file system of a few megabytes.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        as_root(&["mount", "-t", "tmpfs", "-o", "size=4m,mode=0777", "tmpfs", &path]);
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Takes all the room that is left; removing the file gives it back.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("ballast");
        let mut file = File::create(&path).unwrap();
        // A page at a time, down to the last.
        while file.write_all(&[0; 4096]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the server's files may still be open.
        as_root(&["umount", "-l", self.path().to_str().unwrap()]);
    }
}

fn as_root(command: &[&str]) {
    let root = rustix::process::geteuid().is_root();
    let command = if root { command.to_vec() } else { [&["sudo", "-n"], command].concat() };
    let done = Command::new(command[0]).args(&command[1..]).status().unwrap();
    assert!(done.success(), "{command:?}");
}

/// Places orders until the disk is full, makes room, and goes on; `rows` counts what is stored.
async fn recovers(service: &Process, disk: &SmallDisk) -> Vec<String> {
    let mut grpc = service.grpc().await;
    let mut place = async |key: String| {
        let product_id = "p".repeat(64);
        grpc.place(PlaceRequest { product_id, quantity: None, idempotency_key: key }).await
    };
    let mut keys = Vec::new();
    for i in 0..10 {
        place(format!("key-{i}")).await.unwrap();
        keys.push(format!("key-{i}"));
    }
    let ballast = disk.fill();
    // There may be room in files that are there already.
    let filling = async {
        for i in 10.. {
            let key = format!("{i}-{}", "k".repeat(200));
            keys.push(key.clone());
            if let Err(status) = place(key).await {
                return status;
            }
        }
        unreachable!("the disk has an end")
    };
    let status = timeout(PATIENCE, filling).await.expect("the disk is full");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let page = service.scrape().await;
    assert!(page.value("order_store_errors_total", &["kind=\"full\""]) >= 1.0);
    let ready = reqwest::get(format!("http://{}/readyz", service.admin)).await.unwrap();
    assert_eq!(ready.status(), 200);
    assert!(ready.text().await.unwrap().starts_with("ok, but the store fails: "));
    assert_eq!(service.scrape().await.value("product_order_total", &[]), keys.len() as f64 - 1.0);

    fs::remove_file(ballast).unwrap();
    let refused = keys.last().unwrap().clone();
    assert!(!place(refused).await.unwrap().into_inner().replayed, "nothing was stored of it");
    assert_eq!(service.scrape().await.value("product_order_total", &[]), keys.len() as f64);
    keys
}

#[tokio::test]
#[ignore = "mounts a file system, which needs root or sudo; run by make test"]
async fn sqlite_on_a_full_disk_fails_and_recovers() {
    let disk = SmallDisk::mount();
    let service = Process::start(&database_in(disk.path()), &[]).await;
    let keys = recovers(&service, &disk).await;
    assert_eq!(service.terminate().await, Some(0));
    let service = Process::start(&database_in(disk.path()), &[]).await;
    let page = reqwest::get(service.url("/orders?page_size=1000")).await.unwrap();
    let page: serde_json::Value = page.json().await.unwrap();
    assert_eq!(page["orders"].as_array().unwrap().len(), keys.len().min(1000));
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs, and root or sudo to mount; run by make test"]
async fn postgres_on_a_full_disk_fails_and_recovers() {
    let disk = SmallDisk::mount();
    let server = PostgresServer::start().await;
    let service = Process::start(&server.url(), &[]).await;
    // The table alone is on the small disk: without room for its log, the server would end.
    let space = disk.path().join("space");
    fs::create_dir(&space).unwrap();
    server.give(&space);
    let mut connection = server.connect().await;
    for statement in [
        format!("CREATE TABLESPACE small LOCATION '{}'", space.display()),
        "ALTER TABLE orders SET TABLESPACE small".to_owned(),
        "ALTER INDEX orders_pkey SET TABLESPACE small".to_owned(),
        "ALTER INDEX orders_idempotency_key_key SET TABLESPACE small".to_owned(),
    ] {
        connection.execute(AssertSqlSafe(statement)).await.unwrap();
    }
    let keys = recovers(&service, &disk).await;
    let rows: (i64,) =
        sqlx::query_as("SELECT COUNT(*) FROM orders").fetch_one(&mut connection).await.unwrap();
    assert_eq!(rows.0, keys.len() as i64);
}
