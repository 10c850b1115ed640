//! What one connection holds of the budgets that all connections share.

use std::sync::atomic::{AtomicU32, AtomicUsize};

/// Counters of one connection. The middleware counts its requests here; the listener only keeps them
/// for the life of the connection and hands them to each request. They begin at 0.
#[derive(Debug, Default)]
pub struct ConnectionLoad {
    /// Requests in flight.
    pub in_flight: AtomicUsize,
    /// Requests that have not arrived whole.
    pub arriving: AtomicUsize,
    /// Bytes that those hold.
    pub arriving_bytes: AtomicUsize,
    /// Probes: health checks, and streams of reflection.
    pub probes: AtomicUsize,
    /// Streams of health's `Watch`.
    pub watches: AtomicUsize,
    /// The second in which a request came last, counted by whoever shares the budgets; 0 before the
    /// first.
    pub last_asked: AtomicU32,
}
