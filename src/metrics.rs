//! The registry and every metric family, with their help, labels and buckets; the handles that the
//! rest of the service records with. The layer that records requests is in [`layer`].
//!
//! Knows `prometheus` only.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, Registry};

/// Every metric of the process, and the registry they are scraped from.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// What `/metrics` serves.
    pub registry: Registry,
    /// The store's own.
    pub store: StoreMetrics,
}

impl Metrics {
    /// Creates and registers every family.
    ///
    /// # Errors
    /// If a name is registered twice.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let store = StoreMetrics::new(&registry)?;
        Ok(Self { registry, store })
    }
}

/// Why the store failed an order, as `order_store_errors_total` counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// The server cannot be reached, is starting or stopping, or has no connection left.
    Unavailable,
    /// The server did not answer in time.
    Timeout,
    /// A serialisation failure or deadlock.
    Conflict,
    /// A constraint refused the row.
    Constraint,
    /// The disk is full.
    Full,
    /// Anything else.
    Other,
}

/// The handles of the store's families.
#[derive(Debug, Clone)]
pub struct StoreMetrics {
    /// `product_order_total`: orders committed, each once.
    pub placed: IntCounter,
    /// `order_store_commit_duration_seconds`: one batch, from the first statement to the commit.
    pub commit_seconds: Histogram,
    /// `order_store_batch_orders`: orders in one committed batch.
    pub batch_orders: Histogram,
    /// `order_store_queue_orders`: orders waiting for a writer.
    pub queue_orders: IntGauge,
    errors: [IntCounter; 6],
}

impl StoreMetrics {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        // skeleton: families are completed with the layer
        let placed = IntCounter::new("product_order_total", "Orders placed.")?;
        registry.register(Box::new(placed.clone()))?;
        let counter = || IntCounter::new("x", "x");
        Ok(Self {
            placed,
            commit_seconds: Histogram::with_opts(HistogramOpts::new("c", "c"))?,
            batch_orders: Histogram::with_opts(HistogramOpts::new("b", "b"))?,
            queue_orders: IntGauge::new("q", "q")?,
            errors: [counter()?, counter()?, counter()?, counter()?, counter()?, counter()?],
        })
    }

    /// The counter of `order_store_errors_total` for one kind.
    pub fn errors(&self, kind: StoreErrorKind) -> &IntCounter {
        &self.errors[kind as usize]
    }
}

/// The handles of the API listener's families.
#[derive(Debug, Clone)]
pub struct ConnectionMetrics {
    /// `connections_open`.
    pub open: IntGauge,
    /// `connections_accepted_total`.
    pub accepted: IntCounter,
    /// `connections_refused_total{reason="limit"}`.
    pub refused_limit: IntCounter,
    /// `connections_refused_total{reason="read_timeout"}`.
    pub refused_read_timeout: IntCounter,
    /// `connections_refused_total{reason="tls"}`.
    pub refused_tls: IntCounter,
}

/// The handles with which the request layers record; the array index is [`Protocol`]'s.
#[derive(Debug, Clone)]
pub struct RequestMetrics {
    /// `requests_in_flight_limit`.
    pub in_flight_limit: IntGauge,
    shed: [[IntCounter; 2]; 2],
    panics: [IntCounter; 2],
}

/// The two protocols of the API, as labels spell them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `grpc`
    Grpc,
    /// `http`
    Http,
}

/// Why a request was shed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShedReason {
    /// `in_flight`: as many requests as allowed are in flight.
    InFlight,
    /// `queue_full`: the store's queue is full.
    QueueFull,
}

impl RequestMetrics {
    /// The counter of `requests_shed_total` for one protocol and reason.
    pub fn shed(&self, protocol: Protocol, reason: ShedReason) -> &IntCounter {
        &self.shed[protocol as usize][reason as usize]
    }

    /// The counter of `request_panics_total` for one protocol.
    pub fn panics(&self, protocol: Protocol) -> &IntCounter {
        &self.panics[protocol as usize]
    }
}
