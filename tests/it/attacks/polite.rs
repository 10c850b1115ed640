//! Callers with manners, at a steady rate: what an attack must not take from them.

use std::{error::Error, net::SocketAddr, time::Duration};

use order_service::proto::{PlaceRequest, order_service_client::OrderServiceClient};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{interval, timeout},
};
use tonic::transport::{Channel, Endpoint};

/// How many calls there are, and how far they are apart.
#[derive(Debug, Clone, Copy)]
pub struct Polite {
    pub calls: usize,
    pub every: Duration,
}

/// What is called in turn.
#[derive(Debug, Clone, Copy)]
pub enum Call {
    /// Over gRPC, on a connection that ten calls share.
    Place,
    /// `GET /product` over HTTP/1, on a connection of its own.
    GetProduct,
    /// `/livez` on the admin listener, on a connection of its own.
    Livez,
}

/// What became of the calls.
#[derive(Debug, Default)]
pub struct Outcome {
    pub ok: usize,
    /// Why each of the others failed.
    pub lost: Vec<String>,
    /// Of those that succeeded, from the moment at which they were to begin.
    pub slowest: Duration,
}

/// A call that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many calls a gRPC connection has.
const CALLS_PER_CONNECTION: usize = 10;

type Ended = Result<(), Box<dyn Error + Send + Sync>>;

impl Polite {
    /// Calls, whatever becomes of the calls before.
    pub async fn call(self, api: SocketAddr, admin: SocketAddr, calls: &[Call]) -> Outcome {
        let endpoint = Endpoint::from_shared(format!("http://{api}")).unwrap();
        let mut places = 0;
        let mut channel = endpoint.connect_lazy();
        let mut ticks = interval(self.every);
        let mut pending = JoinSet::new();
        for number in 0..self.calls {
            let due = ticks.tick().await;
            let call = calls[number % calls.len()];
            if matches!(call, Call::Place) {
                places += 1;
                if places % CALLS_PER_CONNECTION == 0 {
                    channel = endpoint.connect_lazy();
                }
            }
            let channel = channel.clone();
            pending.spawn(async move {
                let calling = async {
                    match call {
                        Call::Place => place(channel).await,
                        Call::GetProduct => get(api, "/product", "Order placed!").await,
                        Call::Livez => get(admin, "/livez", "ok\n").await,
                    }
                };
                let ended = timeout(PATIENCE, calling).await;
                let ended = ended.unwrap_or_else(|_| Err("no answer in time".into()));
                ended.map(|()| due.elapsed()).map_err(|error| format!("{call:?}: {error}"))
            });
        }
        let mut outcome = Outcome::default();
        for ended in pending.join_all().await {
            match ended {
                Ok(took) => {
                    outcome.ok += 1;
                    outcome.slowest = outcome.slowest.max(took);
                }
                Err(lost) => outcome.lost.push(lost),
            }
        }
        outcome
    }
}

async fn place(channel: Channel) -> Ended {
    let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
    OrderServiceClient::new(channel).place(order).await?;
    Ok(())
}

async fn get(address: SocketAddr, path: &str, body: &str) -> Ended {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(body) {
        return Ok(());
    }
    Err(format!("{answer:?}").into())
}
