//! The layer's families, as collectors that read them in an order that keeps a scrape consistent.

use std::sync::atomic::{Ordering, fence};

use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::super::MetricsError;

const GRPC_LABELS: [&str; 3] = ["grpc_type", "grpc_service", "grpc_method"];

/// From half a millisecond, below which a durable order on a good disk is not, to the default time
/// limit of a request; dense around 1 ms and around 100 ms, where an idle and a busy replica have
/// their p99.
fn buckets() -> Vec<f64> {
    vec![
        0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1,
        0.125, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
    ]
}

/// The `grpc_server_*` families. They are one collector, read in this order: a call that ends while
/// it is read is not seen as handled without being seen as started.
#[derive(Debug, Clone)]
pub(super) struct GrpcFamilies {
    pub(super) handled: IntCounterVec,
    pub(super) seconds: HistogramVec,
    pub(super) sent: IntCounterVec,
    pub(super) received: IntCounterVec,
    pub(super) started: IntCounterVec,
}

impl GrpcFamilies {
    pub(super) fn new() -> Result<Self, MetricsError> {
        let counter = |name, help| IntCounterVec::new(Opts::new(name, help), &GRPC_LABELS);
        let [grpc_type, service, method] = GRPC_LABELS;
        Ok(Self {
            handled: IntCounterVec::new(
                Opts::new("grpc_server_handled_total", "gRPC calls that ended, by their code."),
                &[grpc_type, service, method, "grpc_code"],
            )?,
            seconds: HistogramVec::new(
                HistogramOpts::new(
                    "grpc_server_handling_seconds",
                    "Time of gRPC calls from their arrival to the end of their response.",
                )
                .buckets(buckets()),
                &GRPC_LABELS,
            )?,
            sent: counter("grpc_server_msg_sent_total", "gRPC messages sent.")?,
            received: counter("grpc_server_msg_received_total", "gRPC messages received.")?,
            started: counter("grpc_server_started_total", "gRPC calls that arrived.")?,
        })
    }

    fn all(&self) -> [&dyn Collector; 5] {
        [&self.handled, &self.seconds, &self.sent, &self.received, &self.started]
    }
}

impl Collector for GrpcFamilies {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = Vec::new();
        for family in self.all() {
            families.extend(family.collect());
            // With the guard's release fence: whoever sees an end sees its start afterwards.
            fence(Ordering::Acquire);
        }
        families
    }
}

/// The `http_*` families.
#[derive(Debug, Clone)]
pub(super) struct HttpFamilies {
    pub(super) requests: IntCounterVec,
    pub(super) seconds: HistogramVec,
}

impl HttpFamilies {
    pub(super) fn new() -> Result<Self, MetricsError> {
        Ok(Self {
            requests: IntCounterVec::new(
                Opts::new(
                    "http_requests_total_with_path",
                    "HTTP requests that ended, by route, method and code; gRPC calls are not among \
                     them.",
                ),
                &["url", "method", "code"],
            )?,
            seconds: HistogramVec::new(
                HistogramOpts::new(
                    "http_request_duration_seconds",
                    "Time of HTTP requests from their arrival to the end of their response.",
                )
                .buckets(buckets()),
                &["path", "method"],
            )?,
        })
    }
}
