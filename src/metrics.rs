//! The registry and every metric family, with their help, labels and buckets; the handles that the
//! rest of the service records with. The layer that records requests is in [`layer`].
//!
//! Knows `prometheus` and what it measures of the process; nothing of orders.

use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
    core::{Collector, Metric},
};
use tokio::runtime::Handle;

pub mod layer;
mod process;
mod runtimes;

/// Why the metrics could not be made; a mistake of the program, found when it starts.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// A family that prometheus refuses: a bad name, or one that is there already.
    #[error(transparent)]
    Family(#[from] prometheus::Error),
    /// prometheus keys the children of a family by a hash of their label values without separators:
    /// two sets of labels met on one child.
    #[error("the labels {wanted:?} of {family} share a series with others")]
    Shared {
        /// The family.
        family: String,
        /// The label values that were asked for.
        wanted: Vec<String>,
    },
    /// A template of an HTTP route that cannot be matched.
    #[error(
        "the route {0:?}: expected a path whose parameters are whole segments, as in \
         /orders/{{order_id}}"
    )]
    Template(String),
    /// Descriptors of gRPC services that cannot be read.
    #[error("the gRPC descriptors: {0}")]
    Descriptors(#[from] prost::DecodeError),
}

/// Every metric of the process but the request layer's, and the registry they are scraped from.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// What `/metrics` serves.
    pub registry: Registry,
    /// The store's.
    pub store: StoreMetrics,
    /// The API listener's.
    pub connections: ConnectionMetrics,
    /// The request layers'.
    pub requests: RequestMetrics,
}

impl Metrics {
    /// Creates and registers every family, all children at 0: a series that is born with a value
    /// loses it to `rate` and `increase`.
    ///
    /// # Errors
    /// See [`MetricsError`].
    pub fn new(version: &str, revision: &str) -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let store = StoreMetrics::new(&registry)?;
        let connections = ConnectionMetrics::new()?;
        connections.register(&registry)?;
        let requests = RequestMetrics::new(&registry)?;

        let help = "1, with the version and the source revision of the program.";
        let build = IntGaugeVec::new(
            Opts::new("order_service_build_info", help),
            &["version", "revision"],
        )?;
        build.with_label_values(&[version, revision]).set(1);
        registry.register(Box::new(build))?;
        registry.register(Box::new(process::ProcessCollector::new()?))?;
        Ok(Self { registry, store, connections, requests })
    }

    /// Adds the log's families.
    ///
    /// # Errors
    /// If it was called before.
    pub fn watch_log(&self, log: LogMetrics) -> Result<(), MetricsError> {
        registered(&self.registry, log.lines_dropped).map(|_| ())
    }

    /// Adds `tokio_*`, of the runtimes that serve connections.
    ///
    /// # Errors
    /// If it was called before.
    pub fn watch_runtimes(
        &self,
        runtimes: impl IntoIterator<Item = Handle>,
    ) -> Result<(), MetricsError> {
        let runtimes = runtimes::RuntimesCollector::new(runtimes.into_iter().collect())?;
        Ok(self.registry.register(Box::new(runtimes))?)
    }
}

/// The handles of the log's families. The log starts before there is a registry;
/// [`Metrics::watch_log`] registers them.
#[derive(Debug, Clone)]
pub struct LogMetrics {
    /// `log_lines_dropped_total`.
    pub lines_dropped: IntCounter,
}

impl LogMetrics {
    /// Handles of families that are in no registry yet.
    pub fn new() -> Self {
        let help = "Log lines lost to a full queue or a failed write.";
        let lines_dropped = IntCounter::new("log_lines_dropped_total", help);
        Self { lines_dropped: lines_dropped.expect("the name is valid") }
    }
}

impl Default for LogMetrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Why the store failed an attempt, as `order_store_errors_total` counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// The database cannot be reached, is starting or stopping, or has no connection left.
    Unavailable,
    /// It did not answer in time.
    Timeout,
    /// A serialisation failure or deadlock.
    Conflict,
    /// A constraint refused a row.
    Constraint,
    /// The disk is full.
    Full,
    /// Anything else.
    Other,
}

/// In the order of [`StoreErrorKind`].
const STORE_ERROR_KINDS: [&str; 6] =
    ["unavailable", "timeout", "conflict", "constraint", "full", "other"];

/// The handles of the store's families.
#[derive(Debug, Clone)]
pub struct StoreMetrics {
    /// `product_order_total`: orders committed, each once.
    pub placed: IntCounter,
    /// `order_store_commit_duration_seconds`: one batch, from its first statement to its commit.
    pub commit_seconds: Histogram,
    /// `order_store_batch_orders`: orders in one committed batch.
    pub batch_orders: Histogram,
    /// `order_store_queue_orders`: orders waiting for a writer.
    pub queue_orders: IntGauge,
    /// `order_store_up`: 1 while the store answers, 0 before it has answered and while it fails.
    pub up: IntGauge,
    errors: [IntCounter; 6],
}

impl StoreMetrics {
    fn new(registry: &Registry) -> Result<Self, MetricsError> {
        let placed = registered(
            registry,
            IntCounter::new(
                "product_order_total",
                "New orders that are durably stored, each once.",
            )?,
        )?;
        let commit_seconds = registered(
            registry,
            Histogram::with_opts(
                HistogramOpts::new(
                    "order_store_commit_duration_seconds",
                    "Time to commit one batch of orders durably, as the service sees it.",
                )
                // From a flush to a fast disk (0.1 ms) to the time limit of an attempt (1 s).
                .buckets(vec![
                    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
                    2.5,
                ]),
            )?,
        )?;
        let batch_orders = registered(
            registry,
            Histogram::with_opts(
                HistogramOpts::new(
                    "order_store_batch_orders",
                    "Orders in one committed batch, replays included.",
                )
                // Powers of two to the size of the largest batch.
                .buckets((0..=10).map(|power| f64::from(1 << power)).collect()),
            )?,
        )?;
        let queue_orders = registered(
            registry,
            IntGauge::new(
                "order_store_queue_orders",
                "Orders that wait for a writer of the store.",
            )?,
        )?;
        let up = registered(
            registry,
            IntGauge::new("order_store_up", "1 while the store answers, else 0.")?,
        )?;
        let errors = IntCounterVec::new(
            Opts::new(
                "order_store_errors_total",
                "Failed attempts to commit a batch, stale statements and unreadable rows, by kind.",
            ),
            &["kind"],
        )?;
        let [unavailable, timeout, conflict, constraint, full, other] =
            STORE_ERROR_KINDS.map(|kind| child(&errors, &[kind]));
        registry.register(Box::new(errors))?;
        let errors = [unavailable?, timeout?, conflict?, constraint?, full?, other?];
        Ok(Self { placed, commit_seconds, batch_orders, queue_orders, up, errors })
    }

    /// The counter of `order_store_errors_total` for one kind.
    pub fn errors(&self, kind: StoreErrorKind) -> &IntCounter {
        &self.errors[kind as usize]
    }
}

/// Why the HTTP layer ended a connection by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortReason {
    /// `bad_request`: an HTTP/1 head that cannot be parsed, answered with 400.
    BadRequest,
    /// `head_too_large`: an HTTP/1 head over the limit, answered with 431 or 414.
    HeadTooLarge,
    /// `enhance_your_calm`: too many HTTP/2 resets or CONTINUATION frames, or a header block that
    /// is far over the limit.
    EnhanceYourCalm,
    /// `compression_error`: the rest of an HTTP/2 header block that is over the limit does not end.
    CompressionError,
    /// `flow_control_error`, HTTP/2.
    FlowControlError,
    /// `frame_size_error`, HTTP/2.
    FrameSizeError,
    /// `protocol_error`, HTTP/2.
    ProtocolError,
    /// `other`.
    Other,
}

impl AbortReason {
    /// As the label spells it.
    pub fn as_str(self) -> &'static str {
        ABORT_REASONS[self as usize]
    }
}

/// In the order of [`AbortReason`].
const ABORT_REASONS: [&str; 8] = [
    "bad_request",
    "head_too_large",
    "enhance_your_calm",
    "compression_error",
    "flow_control_error",
    "frame_size_error",
    "protocol_error",
    "other",
];

/// The handles of a listener's families.
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
    refused: IntCounterVec,
    /// In the order of [`AbortReason`].
    aborted_by_reason: Vec<IntCounter>,
    aborted: IntCounterVec,
}

impl ConnectionMetrics {
    /// Handles of families that are in no registry yet: the admin listener's never are, since
    /// `connections_*` tell of the API.
    ///
    /// # Errors
    /// See [`MetricsError`].
    pub fn new() -> Result<Self, MetricsError> {
        let refused = IntCounterVec::new(
            Opts::new("connections_refused_total", "API connections closed unserved, by reason."),
            &["reason"],
        )?;
        let aborted = IntCounterVec::new(
            Opts::new(
                "connections_aborted_total",
                "API connections that the HTTP layer ended by itself, by reason.",
            ),
            &["reason"],
        )?;
        let by_reason = ABORT_REASONS.iter().map(|reason| child(&aborted, &[reason]));
        Ok(Self {
            aborted_by_reason: by_reason.collect::<Result<_, _>>()?,
            aborted,
            open: IntGauge::new("connections_open", "API connections that are open.")?,
            accepted: IntCounter::new("connections_accepted_total", "API connections accepted.")?,
            refused_limit: child(&refused, &["limit"])?,
            refused_read_timeout: child(&refused, &["read_timeout"])?,
            refused_tls: child(&refused, &["tls"])?,
            refused,
        })
    }

    fn register(&self, registry: &Registry) -> Result<(), MetricsError> {
        registered(registry, self.open.clone())?;
        registered(registry, self.accepted.clone())?;
        registered(registry, self.refused.clone())?;
        registered(registry, self.aborted.clone())?;
        Ok(())
    }

    /// The counter of `connections_aborted_total` for one reason.
    pub fn aborted(&self, reason: AbortReason) -> &IntCounter {
        &self.aborted_by_reason[reason as usize]
    }
}

/// The two protocols of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `grpc`
    Grpc,
    /// `http`
    Http,
}

impl Protocol {
    /// As labels and logs spell it.
    pub fn as_str(self) -> &'static str {
        PROTOCOLS[self as usize]
    }
}

/// In the order of [`Protocol`].
const PROTOCOLS: [&str; 2] = ["grpc", "http"];

/// Why a request was shed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShedReason {
    /// `in_flight`: as many requests as allowed are in flight.
    InFlight,
    /// `queue_full`: the store's queue is full.
    QueueFull,
    /// `readers_busy`: more reads wait than the store can answer in time.
    ReadersBusy,
}

/// In the order of [`ShedReason`].
const SHED_REASONS: [&str; 3] = ["in_flight", "queue_full", "readers_busy"];

/// The handles with which the request layers record.
#[derive(Debug, Clone)]
pub struct RequestMetrics {
    /// `requests_in_flight_limit`.
    pub in_flight_limit: IntGauge,
    shed: [[IntCounter; 3]; 2],
    panics: [IntCounter; 2],
    malformed: [IntCounter; 2],
}

impl RequestMetrics {
    fn new(registry: &Registry) -> Result<Self, MetricsError> {
        let help = "Requests that may be in flight at once; beyond it they are shed.";
        let in_flight_limit =
            registered(registry, IntGauge::new("requests_in_flight_limit", help)?)?;
        let shed = registered(
            registry,
            IntCounterVec::new(
                Opts::new("requests_shed_total", "Requests refused for overload."),
                &["protocol", "reason"],
            )?,
        )?;
        let panics = registered(
            registry,
            IntCounterVec::new(
                Opts::new("request_panics_total", "Requests that panicked: bugs."),
                &["protocol"],
            )?,
        )?;
        let malformed = registered(
            registry,
            IntCounterVec::new(
                Opts::new(
                    "requests_malformed_total",
                    "Requests that could not be decoded or did not arrive whole: the caller's fault.",
                ),
                &["protocol"],
            )?,
        )?;
        let [grpc, http] = PROTOCOLS;
        let by_reason = |protocol| -> Result<_, MetricsError> {
            let [in_flight, queue_full, readers_busy] =
                SHED_REASONS.map(|reason| child(&shed, &[protocol, reason]));
            Ok([in_flight?, queue_full?, readers_busy?])
        };
        Ok(Self {
            in_flight_limit,
            shed: [by_reason(grpc)?, by_reason(http)?],
            panics: [child(&panics, &[grpc])?, child(&panics, &[http])?],
            malformed: [child(&malformed, &[grpc])?, child(&malformed, &[http])?],
        })
    }

    /// The counter of `requests_shed_total` for one protocol and reason.
    pub fn shed(&self, protocol: Protocol, reason: ShedReason) -> &IntCounter {
        &self.shed[protocol as usize][reason as usize]
    }

    /// The counter of `requests_malformed_total` for one protocol.
    pub fn malformed(&self, protocol: Protocol) -> &IntCounter {
        &self.malformed[protocol as usize]
    }

    /// The counter of `request_panics_total` for one protocol.
    pub fn panics(&self, protocol: Protocol) -> &IntCounter {
        &self.panics[protocol as usize]
    }
}

/// Registers a collector and hands it back.
fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> Result<C, MetricsError> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

/// The child of a family with these label values, which no other labels share.
fn child<B>(family: &prometheus::core::MetricVec<B>, values: &[&str]) -> Result<B::M, MetricsError>
where
    B: prometheus::core::MetricVecBuilder,
{
    let child = family.get_metric_with_label_values(values)?;
    let metric = child.metric();
    let carries = |value: &&str| metric.get_label().iter().any(|label| label.value() == *value);
    if metric.get_label().len() == values.len() && values.iter().all(carries) {
        return Ok(child);
    }
    let family = family.desc().first().map(|desc| desc.fq_name.clone()).unwrap_or_default();
    Err(MetricsError::Shared { family, wanted: values.iter().map(ToString::to_string).collect() })
}

/// A gauge whose value is set when it is scraped.
fn gauge(name: &str, help: &str) -> Result<Gauge, MetricsError> {
    Ok(Gauge::new(name, help)?)
}
