//! The one stack of layers around both protocols' routes, and what its layers share.
//!
//! [`stack`] is read top-down: a request enters by the first line and leaves by it.

use std::{sync::Arc, time::Duration};

use axum::body::Body;
use http::{HeaderMap, HeaderName, Response};
use tower::ServiceBuilder;

use crate::{
    error::Error,
    metrics::{Protocol, RequestMetrics},
    wire,
};

mod admission;
mod budget;
mod context;
mod deadline;
mod drain_body;
mod failure_log;
mod recover;
mod request_body;
mod shed;
mod speaks;
mod until_leaving;

pub use self::{
    admission::InFlight,
    context::ServedBy,
    deadline::{READING, deadline_of},
    failure_log::FailureLog,
    shed::ResponseSize,
    speaks::GrpcServices,
    until_leaving::{StreamLimits, UntilLeaving},
};
use self::{
    context::{ContextLayer, WithContext},
    deadline::{DeadlineLayer, KeepDeadline},
    drain_body::{DrainBody, DrainBodyLayer},
    recover::{Recover, RecoverLayer},
    shed::{Shed, ShedLayer},
    speaks::{Speaks, SpeaksLayer},
};

/// The name under which a request is found in the logs of every system that it passed.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Routes under the stack.
pub type Stack<S> = WithContext<Recover<Shed<KeepDeadline<DrainBody<Speaks<S>>>>>>;

/// The whole stack but for the metrics layer, which goes around it. It goes around the router as
/// that one does: `Router::layer` would clone the stack and box the request's future and body for
/// each request.
pub fn stack<S>(
    routes: S,
    services: GrpcServices,
    in_flight: InFlight,
    request_timeout: Duration,
    served_by: ServedBy,
    metrics: Arc<RequestMetrics>,
    failure_log: FailureLog,
) -> Stack<S> {
    ServiceBuilder::new()
        // Names the request, and logs every failure of what is inside under that name.
        .layer(ContextLayer::new(served_by, metrics, failure_log))
        // Turns panics and the errors of the layers below into answers in the caller's protocol.
        .layer(RecoverLayer)
        // Before any work: whoever is one too many learns it at once.
        .layer(ShedLayer(in_flight))
        .layer(DeadlineLayer::new(request_timeout))
        // Delivers answers that come before the request was read.
        .layer(DrainBodyLayer)
        // gRPC on REST's routes, and the other way round.
        .layer(SpeaksLayer(services))
        .service(routes)
}

/// Which protocol a request speaks.
pub fn protocol(headers: &HeaderMap) -> Protocol {
    if wire::is_grpc(headers) { Protocol::Grpc } else { Protocol::Http }
}

/// The answer to a path that nothing is served on.
pub async fn no_such_route(headers: HeaderMap) -> Response<Body> {
    Error::NoSuchRoute.into_answer(protocol(&headers))
}
