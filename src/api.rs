//! The API's router: both protocols' routes, health and reflection, under the one stack of layers
//! and the one metrics layer.

use std::{sync::Arc, time::Duration};

use axum::Router;
use tonic::service::Routes;
use tower::Layer as _;

use crate::{
    config::Settings,
    grpc,
    health::{self, HealthReporter},
    layers::{
        self, FailureLog, GrpcServices, InFlight, ServedBy, Stack, StreamLimits, UntilLeaving,
    },
    metrics::{
        Metrics, MetricsError,
        layer::{Metered, MetricsLayer, Recording, Route, services},
    },
    orders::Orders,
    proto, rest,
    store::Store,
};

/// Probes and tools, not business.
const UNRECORDED: [&str; 3] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// Longest query of reflection, in bytes: the name of a symbol or a file.
const MAX_QUERY: usize = 4 * 1024;

/// How long a stream of reflection may last without a query, and in all. Tools ask all they want to
/// know at once.
const REFLECTION: StreamLimits =
    StreamLimits { idle: Duration::from_secs(10), total: Duration::from_secs(60) };

/// Further routes on the API's port and what the metrics layer must know of them. The program has
/// none; tests bring streams and panics.
#[derive(Debug, Clone, Default)]
pub struct Extra {
    /// The routes.
    pub routes: Router,
    /// An encoded `FileDescriptorSet` of the gRPC services among them; empty if there are none. A
    /// service that is not in it is not served.
    pub descriptors: Vec<u8>,
    /// The HTTP routes among them.
    pub http: Vec<Route>,
}

/// The API, ready to be served.
pub struct Api {
    /// All of it, under every layer.
    pub service: Metered<Stack<Router>>,
    /// Sets what health answers.
    pub health: HealthReporter,
    /// Logs the failed requests.
    pub failure_log: FailureLog,
}

/// Builds the API over a store; it holds the store's queue open for as long as it lives.
///
/// # Errors
/// If the metrics layer cannot be made.
pub fn build(
    settings: &Settings,
    store: Store,
    in_flight: InFlight,
    served_by: ServedBy,
    metrics: &Metrics,
    extra: Extra,
) -> Result<Api, MetricsError> {
    let orders = Orders::new(store, settings.processing_delay);
    let (health, health_service) = health::service();
    // Each version lists both.
    let descriptors = [
        proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        // The details of our errors, which grpcurl prints by their types.
        tonic_types::pb::FILE_DESCRIPTOR_SET,
    ];
    let reflection = || {
        let builder =
            tonic_reflection::server::Builder::configure().include_reflection_service(false);
        descriptors.iter().fold(builder, |b, set| b.register_encoded_file_descriptor_set(set))
    };
    const VALID: &str = "the build made the descriptors";
    let v1 = reflection().build_v1().expect(VALID).max_decoding_message_size(MAX_QUERY);
    let v1alpha = reflection().build_v1alpha().expect(VALID).max_decoding_message_size(MAX_QUERY);
    let health_routes = Routes::new(health_service).into_axum_router();
    let reflection_routes = Routes::new(v1).add_service(v1alpha).into_axum_router();
    let streams = health_routes
        .layer(UntilLeaving::new())
        .reset_fallback()
        .merge(reflection_routes.layer(UntilLeaving::with_limits(REFLECTION)).reset_fallback());

    let requests = Arc::new(metrics.requests.clone());
    let recording = Recording {
        descriptors: &[proto::DESCRIPTORS, &extra.descriptors],
        unrecorded: &UNRECORDED,
        routes: [rest::metered_routes(), extra.http].concat(),
    };
    let layer = MetricsLayer::new(&metrics.registry, recording)?;
    let mut methods = Vec::new();
    for descriptors in descriptors.into_iter().chain([&*extra.descriptors]) {
        for (service, descriptor) in services(descriptors)? {
            methods.extend(
                descriptor.method.iter().map(|method| format!("/{service}/{}", method.name())),
            );
        }
    }
    let services = GrpcServices::new(methods);
    let router = Routes::new(grpc::service(orders.clone()))
        .into_axum_router()
        .merge(rest::routes(orders))
        // tonic's routers answer every unknown path as gRPC; the one fallback set last is used.
        .reset_fallback()
        .merge(streams)
        .merge(extra.routes)
        .fallback(layers::no_such_route);
    let timeout = settings.request_timeout;
    let failure_log = FailureLog::new(requests.clone(), &UNRECORDED);
    let log = failure_log.clone();
    let stack = layers::stack(router, services, in_flight, timeout, served_by, requests, log);
    Ok(Api { service: layer.layer(stack), health, failure_log })
}
