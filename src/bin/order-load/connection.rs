//! One connection to one address.

use std::{
    error::Error,
    io,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::mpsc::UnboundedSender,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{args::Protocol, keeper::Event, target::Target};

/// Time limit of TCP's and TLS's handshakes together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Most calls of one HTTP/2 connection at a time, if the server allows so many.
const MAX_STREAMS: usize = 256;

/// What the server may send unread: pages of 1000 orders.
const WINDOW: u32 = 4 * 1024 * 1024;

/// The end of a connection that takes requests.
#[derive(Debug)]
pub enum Sender {
    /// For one request at a time.
    Http1(http1::SendRequest<Full<Bytes>>),
    /// For many; clones share the connection.
    Http2(h2::client::SendRequest<Bytes>),
}

/// The work of a connection; it ends with it, and tells why if not in order.
pub type Driver = BoxFuture<'static, Option<String>>;

/// Connects.
///
/// # Errors
/// Why not, in words.
pub async fn open(target: &Target, address: SocketAddr) -> Result<(Sender, Driver), String> {
    let connecting = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        match &target.tls {
            None => handshake(stream, target.protocol).await,
            Some(tls) => {
                let connector = TlsConnector::from(tls.config.clone());
                let stream = connector.connect(tls.name.clone(), stream).await?;
                handshake(stream, target.protocol).await
            }
        }
    };
    match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(error)) => Err(format!("{address}: {error}")),
        Err(_) => {
            let limit = humantime::format_duration(CONNECT_TIMEOUT);
            Err(format!("{address}: no connection within {limit}"))
        }
    }
}

async fn handshake<I>(stream: I, protocol: Protocol) -> io::Result<(Sender, Driver)>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    match protocol {
        Protocol::Grpc => {
            let mut builder = h2::client::Builder::new();
            builder.initial_window_size(WINDOW).initial_connection_window_size(WINDOW);
            builder.enable_push(false);
            let (sender, connection) = builder.handshake(stream).await.map_err(io::Error::other)?;
            Ok((Sender::Http2(sender), Box::pin(async { connection.await.err().map(in_words) })))
        }
        Protocol::Http => {
            let handshake = http1::Builder::new().handshake(TokioIo::new(stream)).await;
            let (sender, connection) = handshake.map_err(io::Error::other)?;
            Ok((Sender::Http1(sender), Box::pin(async { connection.await.err().map(in_words) })))
        }
    }
}

/// An error and what it came of.
pub fn in_words(error: impl Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

impl Sender {
    /// How many calls the connection carries at a time.
    pub fn capacity(&self) -> usize {
        match self {
            Self::Http1(_) => 1,
            Self::Http2(sender) => sender.current_max_send_streams().clamp(1, MAX_STREAMS),
        }
    }

    /// Another end of the same connection, where there can be one.
    pub fn another(&self) -> Option<Self> {
        match self {
            Self::Http1(_) => None,
            Self::Http2(sender) => Some(Self::Http2(sender.clone())),
        }
    }

    pub fn is_closed(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_closed(),
            // Tells by the call itself.
            Self::Http2(_) => false,
        }
    }
}

/// What is known of a connection by all who use it.
#[derive(Debug)]
pub struct Connection {
    pub number: u64,
    pub address: SocketAddr,
    /// Calls in flight.
    pub in_flight: AtomicUsize,
    /// The same of all connections to this address.
    pub address_in_flight: Arc<AtomicUsize>,
    /// Whether it stands among those that can take a call.
    pub in_ring: AtomicBool,
    leaving: AtomicBool,
    answers: AtomicU64,
    events: UnboundedSender<Event>,
    /// Why it ended.
    pub cause: OnceLock<String>,
}

impl Connection {
    pub fn new(
        number: u64,
        address: SocketAddr,
        address_in_flight: Arc<AtomicUsize>,
        events: UnboundedSender<Event>,
    ) -> Self {
        Self {
            number,
            address,
            in_flight: AtomicUsize::new(0),
            address_in_flight,
            in_ring: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            events,
            cause: OnceLock::new(),
        }
    }

    /// Counts a call. Returns how many are in flight with it.
    pub fn begin_call(&self) -> usize {
        self.address_in_flight.fetch_add(1, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub fn end_call(&self) {
        self.address_in_flight.fetch_sub(1, Ordering::Relaxed);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many calls it has answered.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    pub fn answered(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Begins no further call on it, and has it replaced; those in flight go on.
    pub fn leave(&self) {
        if !self.leaving.swap(true, Ordering::Relaxed) {
            // The keeper, which listens, lives as long as the process.
            let _ = self.events.send(Event::Gone(self.number));
        }
    }
}
