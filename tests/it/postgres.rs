//! A PostgreSQL server of a test's own: Debian's programs, a private data directory and port, ended
//! with the test.

use std::{
    fs::{self, Permissions},
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use order_service::order::OrderId;
use rustix::process::Pid;
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;

pub const PASSWORD: &str = "s3cret";

/// A running server.
pub struct PostgresServer {
    dir: TempDir,
    pub port: u16,
    settings: Vec<String>,
}

impl PostgresServer {
    /// Makes a server and starts it.
    pub async fn start() -> Self {
        let server = Self::make();
        server.run();
        server
    }

    /// Makes a server that does not run yet.
    pub fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let password = dir.path().join("password");
        fs::write(&password, PASSWORD).unwrap();
        let server = Self { dir, port, settings: vec!["max_connections=30".to_owned()] };
        server.give(server.dir.path());
        let password = password.to_str().unwrap();
        let data = server.data();
        server.program(
            "initdb",
            &[
                "-D",
                &data,
                "-U",
                "postgres",
                "-A",
                "scram-sha-256",
                "--pwfile",
                password,
                "--no-sync",
                "-E",
                "UTF8",
                "--no-locale",
            ],
        );
        server
    }

    /// A synchronous standby of this server, attached. From now on each commit waits for it.
    pub async fn attach_standby(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let standby = Self { dir, port, settings: self.settings.clone() };
        standby.give(standby.dir.path());
        let (data, primary) = (standby.data(), self.url() + "?application_name=standby");
        standby.program("pg_basebackup", &["-D", &data, "-d", &primary, "-R", "-c", "fast"]);
        standby.run();
        let mut connection = self.connect().await;
        for statement in
            ["ALTER SYSTEM SET synchronous_standby_names = 'standby'", "SELECT pg_reload_conf()"]
        {
            sqlx::query(statement).execute(&mut connection).await.unwrap();
        }
        self.until_replicated().await;
        standby
    }

    /// Waits until the synchronous standby is attached.
    pub async fn until_replicated(&self) {
        let attached = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'";
        let mut connection = self.connect().await;
        let waiting = async {
            while sqlx::query(attached).fetch_optional(&mut connection).await.unwrap().is_none() {}
        };
        tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("it is attached");
    }

    /// Makes a standby a primary that waits for nobody.
    pub fn promote(&self) {
        let data = self.data();
        self.program("pg_ctl", &["-D", &data, "-w", "promote"]);
    }

    fn data(&self) -> String {
        self.dir.path().join("data").to_str().unwrap().to_owned()
    }

    /// Settings for the next run, each `name=value`.
    pub fn set(&mut self, settings: &[&str]) {
        self.settings.extend(settings.iter().map(ToString::to_string));
    }

    /// A file that the server may read, and nobody else.
    pub fn private_file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        self.give(&path);
        path
    }

    /// Makes a file or directory the server's.
    pub fn give(&self, path: &Path) {
        if is_root() {
            let given = Command::new("chown").args(["-R", "postgres"]).arg(path).status();
            assert!(given.unwrap().success());
        }
    }

    pub fn run(&self) {
        let mut options =
            format!("-p {} -c listen_addresses=127.0.0.1 -c unix_socket_directories=", self.port);
        for setting in &self.settings {
            options += " -c ";
            options += setting;
        }
        let log = self.dir.path().join("log");
        let data = self.data();
        self.program(
            "pg_ctl",
            &["-D", &data, "-w", "-l", log.to_str().unwrap(), "-o", &options, "start"],
        );
    }

    /// The processes that serve the service's connections.
    pub async fn backends(&self) -> Vec<Pid> {
        let query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'order-service'";
        let rows: Vec<(i32,)> =
            sqlx::query_as(query).fetch_all(&mut self.connect().await).await.unwrap();
        rows.into_iter().map(|(pid,)| Pid::from_raw(pid).unwrap()).collect()
    }

    /// The process that receives the WAL of the primary.
    pub async fn wal_receiver(&self) -> Pid {
        let query = "SELECT pid FROM pg_stat_wal_receiver";
        let (pid,): (i32,) =
            sqlx::query_as(query).fetch_one(&mut self.connect().await).await.unwrap();
        Pid::from_raw(pid).unwrap()
    }

    /// The process that accepts its connections.
    pub fn postmaster(&self) -> Pid {
        let file = fs::read_to_string(self.dir.path().join("data/postmaster.pid")).unwrap();
        Pid::from_raw(file.lines().next().unwrap().parse().unwrap()).unwrap()
    }

    /// All the connections that the server has left.
    pub async fn hog(&self) -> Vec<PgConnection> {
        let mut hogged = Vec::new();
        while let Ok(connection) = PgConnection::connect(&self.url()).await {
            hogged.push(connection);
        }
        hogged
    }

    /// Ends the server as a crash would, without a word to its clients.
    pub fn stop_immediately(&self) {
        let data = self.data();
        self.program("pg_ctl", &["-D", &data, "-w", "-m", "immediate", "stop"]);
    }

    /// A connection beside the service's.
    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url()).await.unwrap()
    }

    /// Waits until the order of this id is committed.
    pub async fn until_stored(&self, id: OrderId) {
        let mut connection = self.connect().await;
        let id = id.to_string();
        let waiting = async {
            loop {
                let query = "SELECT 1 FROM orders WHERE id = CAST($1 AS UUID)";
                let row = sqlx::query(query).bind(&id).fetch_optional(&mut connection).await;
                if row.unwrap().is_some() {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("it is stored");
    }

    pub fn url(&self) -> String {
        self.url_at(self.port)
    }

    pub fn url_at(&self, port: u16) -> String {
        format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/postgres")
    }

    /// Runs one of the server's programs, as a user who is not root.
    fn program(&self, name: &str, args: &[&str]) -> Output {
        let program = server_programs().join(name);
        let mut command = if is_root() {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        let output = command.args(args).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{name} {args:?}: {output:?}");
        output
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        if fs::exists(self.dir.path().join("data/postmaster.pid")).unwrap_or(false) {
            self.stop_immediately();
        }
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Debian's newest.
fn server_programs() -> PathBuf {
    let mut versions: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .expect("Debian's package postgresql is installed")
        .map(|entry| entry.unwrap().path())
        .collect();
    versions.sort();
    versions.pop().expect("a version of PostgreSQL").join("bin")
}
