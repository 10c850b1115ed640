//! What connections may do, and the values that suit most peers.

use std::time::Duration;

/// What connections may do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Beyond it a new connection is closed at once.
    pub max_connections: usize,
    /// Whether at that limit the connection that has had nothing in flight for longest is closed
    /// for a new one. Its client may lose a request that is on its way.
    pub evicts_idle: bool,
    /// For the first request of a connection to arrive, a later HTTP/1 head, and a TLS handshake.
    pub read_timeout: Duration,
    /// After it, 10 % more or less at random, a connection is asked to go.
    pub max_age: Option<Duration>,
    /// Grace after a connection was asked to go for its age or its idleness: then it is closed once
    /// nothing is in flight.
    pub overtime: Duration,
    /// A connection with nothing in flight for that long after its last response is asked to go.
    pub max_idle: Option<Duration>,
    /// Of HTTP/2 connections.
    pub keep_alive: KeepAlive,
    /// Streams of one HTTP/2 connection at a time.
    pub max_streams: u32,
}

/// When the peer of an HTTP/2 connection is taken for gone: a NAT or a load balancer forgot it.
#[derive(Debug, Clone, Copy)]
pub struct KeepAlive {
    /// After so long without a frame the peer is sent a PING.
    pub interval: Duration,
    /// Without an answer to it the connection is closed.
    pub timeout: Duration,
}

/// What suits peers on the internet, and the idle timeouts of the load balancers on the way.
pub const KEEP_ALIVE: KeepAlive =
    KeepAlive { interval: Duration::from_secs(30), timeout: Duration::from_secs(20) };

/// Enough for an idle HTTP/1 client to learn by its next response that its connection ends.
pub const OVERTIME: Duration = Duration::from_secs(30);

/// Streams of one HTTP/2 connection that suit clients which share one connection.
pub const MAX_STREAMS: u32 = 256;
