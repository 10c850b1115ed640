//! Calls over HTTP/2 that are well-formed, and cost more than they should: bodies that never end,
//! heads as large as they may be, responses that nobody reads.

use std::{error::Error, future::poll_fn, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use h2::{SendStream, client::SendRequest};
use http::Request;
use prost::Message as _;
use tokio::{
    task::JoinSet,
    time::{interval, sleep},
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_request::MessageRequest,
};

use super::HostilePeer;

/// As many streams as a connection of the server takes.
const STREAMS: usize = 256;

/// What flow control and the frame size let through by one frame.
const CHUNK: usize = 16 * 1024;

/// Sent where the bytes do not matter.
static ZEROS: [u8; CHUNK] = [0; CHUNK];

type Ended = Result<(), Box<dyn Error + Send + Sync>>;

/// What is sent after a request's head.
#[derive(Debug, Clone)]
pub struct Body {
    begin: Bytes,
    rest: Rest,
}

#[derive(Debug, Clone, Copy)]
enum Rest {
    End,
    Nothing,
    Zeros(usize),
    Trickle,
    BeginAgain,
}

impl Body {
    /// Never comes.
    pub const NONE: Self = Self { begin: Bytes::new(), rest: Rest::Nothing };

    /// A gRPC message, and the end.
    pub fn message(message: &[u8]) -> Self {
        Self { begin: grpc_message(message), rest: Rest::End }
    }

    /// A gRPC message again and again, without an end.
    pub fn repeated(message: &[u8]) -> Self {
        Self { begin: grpc_message(message), rest: Rest::BeginAgain }
    }

    /// A gRPC message of this many bytes, whose last ones never come.
    pub fn lacking(length: usize, missing: usize) -> Self {
        Self { begin: prefix(length), rest: Rest::Zeros(length - missing) }
    }

    /// The same in JSON.
    pub fn lacking_json(length: usize, missing: usize) -> Self {
        Self { begin: Bytes::new(), rest: Rest::Zeros(length - missing) }
    }

    /// A gRPC message of this many bytes, one a second.
    pub fn trickling(length: usize) -> Self {
        Self { begin: prefix(length), rest: Rest::Trickle }
    }

    async fn send(&self, stream: &mut SendStream<Bytes>) -> Result<(), h2::Error> {
        send(stream, self.begin.clone()).await?;
        match self.rest {
            Rest::End | Rest::Nothing => {}
            Rest::Zeros(count) => {
                for begin in (0..count).step_by(CHUNK) {
                    let chunk = &ZEROS[..CHUNK.min(count - begin)];
                    send(stream, Bytes::from_static(chunk)).await?;
                }
            }
            Rest::Trickle => {
                let mut pace = interval(Duration::from_secs(1));
                loop {
                    pace.tick().await;
                    send(stream, Bytes::from_static(b"\n")).await?;
                }
            }
            Rest::BeginAgain => loop {
                send(stream, self.begin.clone()).await?;
            },
        }
        if matches!(self.rest, Rest::End) {
            stream.send_data(Bytes::new(), true)?;
        }
        Ok(())
    }
}

/// Sends bytes as flow control lets them through.
async fn send(stream: &mut SendStream<Bytes>, mut bytes: Bytes) -> Result<(), h2::Error> {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len().min(CHUNK));
        let capacity = poll_fn(|cx| stream.poll_capacity(cx)).await;
        let capacity = capacity.unwrap_or_else(|| Err(h2::Reason::STREAM_CLOSED.into()))?;
        stream.send_data(bytes.split_to(capacity.min(bytes.len())), false)?;
    }
    Ok(())
}

fn prefix(length: usize) -> Bytes {
    let mut prefix = BytesMut::new();
    prefix.put_u8(0);
    prefix.put_u32(length.try_into().unwrap());
    prefix.freeze()
}

pub fn grpc_message(message: &[u8]) -> Bytes {
    [&prefix(message.len()), message].concat().into()
}

/// A request for reflection whose answer quotes it.
pub fn reflection_of_host(bytes: usize) -> Vec<u8> {
    let services = MessageRequest::ListServices(String::new());
    let host = "x".repeat(bytes);
    ServerReflectionRequest { host, message_request: Some(services) }.encode_to_vec()
}

pub fn reflection_of_symbol(name: &str) -> Vec<u8> {
    let symbol = MessageRequest::FileContainingSymbol(name.to_owned());
    ServerReflectionRequest { host: String::new(), message_request: Some(symbol) }.encode_to_vec()
}

/// The same call, many times at once, and again whenever one has ended.
pub struct Calls {
    request: Request<()>,
    body: Body,
    at_a_time: usize,
    window: u32,
    orders_before: usize,
}

impl Calls {
    pub fn grpc(path: &str) -> Self {
        let request = Request::post(format!("http://x{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        Self::new(request)
    }

    /// Without a body, unless it is given one.
    pub fn http(method: &str, path: &str) -> Self {
        let request = Request::builder().method(method).uri(format!("http://x{path}"));
        Self::new(request.header("content-type", "application/json"))
    }

    fn new(request: http::request::Builder) -> Self {
        let body = Body { begin: Bytes::new(), rest: Rest::End };
        let request = request.body(()).unwrap();
        Self { request, body, at_a_time: STREAMS, window: 65_535, orders_before: 0 }
    }

    pub fn body(mut self, body: Body) -> Self {
        self.body = body;
        self
    }

    pub fn at_a_time(mut self, at_a_time: usize) -> Self {
        self.at_a_time = at_a_time;
        self
    }

    /// How much of each response the server may send before it was read.
    pub fn window(mut self, bytes: u32) -> Self {
        self.window = bytes;
        self
    }

    pub fn unread(self) -> Self {
        self.window(0)
    }

    pub fn gzip(mut self) -> Self {
        self.request.headers_mut().insert("accept-encoding", "gzip".try_into().unwrap());
        self
    }

    /// Places this many orders first.
    pub fn after_orders(mut self, count: usize) -> Self {
        self.orders_before = count;
        self
    }

    /// Calls to the end of a connection.
    pub fn run(self, peer: HostilePeer) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            // However it ends, there is another.
            let _ = self.on_connection(&peer).await;
        })
    }

    async fn on_connection(self, peer: &HostilePeer) -> Ended {
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(self.window).initial_max_send_streams(STREAMS);
        // Its size is also how many small frames h2's client bears.
        builder.initial_connection_window_size(16 << 20);
        let (client, connection) = builder.handshake(peer.connect().await?).await?;
        let calls = Arc::new(self);
        let mut streams = JoinSet::new();
        for number in 0..calls.at_a_time {
            let (calls, client) = (calls.clone(), client.clone());
            streams.spawn(async move {
                if number < calls.orders_before {
                    place(client.clone()).await?;
                }
                calls.repeat(client).await
            });
        }
        drop(client);
        connection.await?;
        Ok(())
    }

    async fn repeat(&self, mut client: SendRequest<Bytes>) -> Ended {
        loop {
            client = client.ready().await?;
            let ends = matches!(self.body.rest, Rest::End) && self.body.begin.is_empty();
            let (answer, mut stream) = client.send_request(self.request.clone(), ends)?;
            let sending = async {
                if ends || self.body.send(&mut stream).await.is_ok() {
                    std::future::pending::<()>().await;
                }
            };
            let answered = async {
                let mut body = answer.await?.into_body();
                while let Some(data) = body.data().await {
                    body.flow_control().release_capacity(data?.len())?;
                }
                Ok::<_, h2::Error>(())
            };
            // A call that is refused is begun again at once, at the peer's rate.
            tokio::select! { () = sending => {}, _ = answered => {} }
            sleep(Duration::ZERO).await;
        }
    }
}

/// Places an order, whose response may not be readable.
async fn place(client: SendRequest<Bytes>) -> Ended {
    let request = Request::get("http://x/product").body(())?;
    let (answer, _) = client.ready().await?.send_request(request, true)?;
    answer.await?;
    Ok(())
}
