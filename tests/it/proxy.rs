//! A TCP proxy before a server, to lose what the server says.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// What becomes of the traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// All passes.
    Passes,
    /// What clients send passes, what the server answers is held back.
    AnswersAreHeld,
    /// Every connection is closed, and each new one.
    IsCut,
}

pub struct Proxy {
    pub port: u16,
    traffic: watch::Sender<Traffic>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// A proxy before a port of this machine.
    pub async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (traffic, state) = watch::channel(Traffic::Passes);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let mut cut = state.clone();
                let passing = pass(client, server, state.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = passing => {}
                        _ = cut.wait_for(|traffic| *traffic == Traffic::IsCut) => {}
                    }
                });
            }
        });
        Self { port, traffic, _tasks: tasks }
    }

    pub fn set(&self, traffic: Traffic) {
        self.traffic.send_replace(traffic);
    }
}

async fn pass(client: TcpStream, server: u16, mut traffic: watch::Receiver<Traffic>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
    let (mut asks, mut answers) = client.into_split();
    let (mut from, mut to) = server.into_split();
    let asking = copy(&mut asks, &mut to);
    let answering = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut bytes).await {
            let passes = traffic.wait_for(|traffic| *traffic == Traffic::Passes).await.is_ok();
            if !passes || answers.write_all(&bytes[..read]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! { _ = asking => {}, () = answering => {} }
}
