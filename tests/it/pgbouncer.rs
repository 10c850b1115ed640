//! PgBouncer before a PostgreSQL server: Debian's program, a private configuration and port, ended
//! with the test.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::{net::TcpStream, time::timeout};

use crate::{
    postgres::{PASSWORD, PostgresServer},
    support::PATIENCE,
};

const PROGRAM: &str = "/usr/sbin/pgbouncer";

/// A running PgBouncer.
pub struct PgBouncer {
    child: Child,
    pub port: u16,
}

impl PgBouncer {
    /// Starts one before a server; `settings` are lines of its section `[pgbouncer]`.
    pub async fn start(server: &PostgresServer, settings: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let users = server.private_file("users", &format!("\"postgres\" \"{PASSWORD}\"\n"));
        let config = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\n\
             auth_file = {}\n{}\n",
            server.port,
            users.display(),
            settings.join("\n")
        );
        let config = server.private_file("pgbouncer.ini", &config);
        let mut command = if rustix::process::geteuid().is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", PROGRAM]);
            command
        } else {
            Command::new(PROGRAM)
        };
        let command = command.arg("--quiet").arg(config).stdin(Stdio::null());
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let listening = async {
            while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, listening).await.expect("PgBouncer listens");
        Self { child, port }
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
