//! Steady traffic from Go's clients, and a plain TCP balancer before several servers.

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::Value;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::JoinSet,
    time::timeout,
};

use crate::support::PATIENCE;

/// A running `steady`, see `tests/steady`.
pub struct Steady(Child);

impl Steady {
    pub fn start(args: &[&str]) -> Self {
        let mut command = Command::new("steady");
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        Self(command.spawn().expect("steady is installed by make tools"))
    }

    /// Ends it; checks that it placed orders over each of these protocols and none failed. Tells how
    /// many there were.
    pub async fn none_failed(mut self, protocols: &[&str]) -> u64 {
        drop(self.0.stdin.take());
        let output =
            timeout(PATIENCE, self.0.wait_with_output()).await.expect("steady ends").unwrap();
        assert!(output.status.success());
        let tallies: Value = serde_json::from_slice(&output.stdout).unwrap();
        println!("{tallies}");
        let sent = protocols.iter().map(|protocol| {
            let tally = &tallies[protocol];
            let sent = tally["sent"].as_u64().unwrap();
            assert!(sent > 0 && tally["failed"] == 0, "{tallies}");
            sent
        });
        sent.sum()
    }
}

/// Hands each new connection to the next server in turn, as a service of type ClusterIP does, and
/// knows nothing of what they speak.
pub struct Balancer {
    pub address: SocketAddr,
    servers: Arc<Mutex<Vec<SocketAddr>>>,
    _accepting: JoinSet<()>,
}

impl Balancer {
    pub async fn start() -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let servers = Arc::new(Mutex::new(Vec::<SocketAddr>::new()));
        let known = servers.clone();
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let next = AtomicUsize::new(0);
            let mut connections = JoinSet::new();
            loop {
                let (mut client, _) = socket.accept().await.unwrap();
                let server = {
                    let servers = known.lock().unwrap();
                    servers[next.fetch_add(1, Ordering::Relaxed) % servers.len()]
                };
                connections.spawn(async move {
                    // A server that refuses is the client's failure to tell.
                    if let Ok(mut server) = TcpStream::connect(server).await {
                        let _ = copy_bidirectional(&mut client, &mut server).await;
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, servers, _accepting: accepting }
    }

    pub fn add(&self, server: SocketAddr) {
        self.servers.lock().unwrap().push(server);
    }

    pub fn remove(&self, server: SocketAddr) {
        self.servers.lock().unwrap().retain(|known| *known != server);
    }
}
