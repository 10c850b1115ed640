//! What connections and requests hold of the budgets that all connections share.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize};

/// Counters of one connection. The middleware counts its requests here; the listener only keeps
/// them for the life of the connection and hands them to each request. They begin at 0.
#[derive(Debug, Default)]
pub struct ConnectionLoad {
    /// Requests in flight.
    pub in_flight: AtomicUsize,
    /// Requests that have not arrived whole.
    pub arriving: AtomicUsize,
    /// Bytes that those hold.
    pub arriving_bytes: AtomicUsize,
    /// Bytes of responses that its peer has not read.
    pub unread_bytes: AtomicUsize,
    /// Health checks.
    pub checks: AtomicUsize,
    /// Streams of reflection.
    pub reflections: AtomicUsize,
    /// Streams of health's `Watch`.
    pub watches: AtomicUsize,
    /// The second in which a request came last, counted by whoever shares the budgets; 0 before the
    /// first.
    pub last_asked: AtomicU32,
    /// The same of health checks and reflection.
    pub last_probed: AtomicU32,
}

/// The same of one request.
#[derive(Debug, Default)]
pub struct RequestLoad {
    /// What it holds; 0 until there is a response.
    pub state: AtomicU8,
    /// Bytes that its response holds as long as it is not read.
    pub response_bytes: AtomicUsize,
}
