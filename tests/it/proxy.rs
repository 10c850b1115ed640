//! A TCP proxy before a server, to lose or delay what the two say.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::sleep,
};

/// What becomes of the traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// All passes.
    Passes,
    /// All passes, but on a connection that begins now only after so long.
    BeginsAfter(Duration),
    /// What clients send passes, what the server answers is held back.
    AnswersAreHeld,
    /// What clients send on a connection that is open is held back, and passes later even if the
    /// client is gone by then; all passes on a connection that begins now.
    RequestsAreHeld,
    /// Every connection is closed, and each new one.
    IsCut,
}

pub struct Proxy {
    pub port: u16,
    traffic: watch::Sender<Traffic>,
    cuts: watch::Sender<()>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// A proxy before a port of this machine.
    pub async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (traffic, state) = watch::channel(Traffic::Passes);
        let (cuts, cut) = watch::channel(());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let mut cut = cut.clone();
                cut.mark_unchanged();
                let passing = pass(client, server, state.clone());
                connections.spawn(async move {
                    tokio::select! {
                        biased;
                        _ = cut.changed() => {}
                        () = passing => {}
                    }
                });
            }
        });
        Self { port, traffic, cuts, _tasks: tasks }
    }

    pub fn set(&self, traffic: Traffic) {
        self.traffic.send_replace(traffic);
        if traffic == Traffic::IsCut {
            self.cut();
        }
    }

    /// Closes every connection there is: nothing that was held back passes any more, whatever the
    /// traffic is set to next.
    pub fn cut(&self) {
        self.cuts.send_replace(());
    }
}

async fn pass(client: TcpStream, server: u16, mut traffic: watch::Receiver<Traffic>) {
    let now = *traffic.borrow();
    match now {
        Traffic::IsCut => return,
        // The fault's length.
        Traffic::BeginsAfter(delay) => sleep(delay).await,
        Traffic::Passes | Traffic::AnswersAreHeld | Traffic::RequestsAreHeld => {}
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
    let (mut asks, mut answers) = client.into_split();
    let (mut from, mut to) = server.into_split();
    let mut held = traffic.clone();
    let begins_held = now == Traffic::RequestsAreHeld;
    let asking = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(read @ 1..) = asks.read(&mut bytes).await {
            let passes = |traffic: &Traffic| begins_held || *traffic != Traffic::RequestsAreHeld;
            let passed = held.wait_for(passes).await.is_ok();
            if !passed || to.write_all(&bytes[..read]).await.is_err() {
                return;
            }
        }
        // The server reads all before it sees the end.
        let _ = to.shutdown().await;
        std::future::pending::<()>().await;
    };
    let answering = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut bytes).await {
            let passes = |traffic: &Traffic| {
                use Traffic as T;
                matches!(traffic, T::Passes | T::BeginsAfter(_) | T::RequestsAreHeld)
            };
            if traffic.wait_for(passes).await.is_err() {
                return;
            }
            // The client may be gone while the server still reads what it sent.
            let _ = answers.write_all(&bytes[..read]).await;
        }
    };
    tokio::select! { _ = asking => {}, () = answering => {} }
}
