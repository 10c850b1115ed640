//! `grpc.health.v1.Health`: whether the process and its service take calls.
//!
//! Not tonic-health's own service, which ends the watch of an unknown name with NOT_FOUND where
//! health.proto wants SERVICE_UNKNOWN on a stream that stays open. Depends on nothing of ours.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};

/// The names under which health answers: the process, and the service.
const NAMES: [&str; 2] = ["", "orders.v1.OrderService"];

/// Longest request, in bytes: a name.
const MAX_MESSAGE: usize = 4 * 1024;

/// Sets what health answers; both names have the same status. It begins with SERVING.
#[derive(Debug)]
pub struct HealthReporter(watch::Sender<ServingStatus>);

impl HealthReporter {
    /// From now on the status is NOT_SERVING, which watchers learn at once.
    pub fn set_not_serving(&self) {
        self.0.send_replace(ServingStatus::NotServing);
    }
}

/// The service, ready to be routed, and what sets its status.
pub fn service() -> (HealthReporter, HealthServer<impl Health>) {
    let (sender, status) = watch::channel(ServingStatus::Serving);
    let server = HealthServer::new(Service { status }).max_decoding_message_size(MAX_MESSAGE);
    (HealthReporter(sender), server)
}

struct Service {
    status: watch::Receiver<ServingStatus>,
}

#[tonic::async_trait]
impl Health for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if is_known(&request) {
            Ok(Response::new(response(*self.status.borrow())))
        } else {
            Err(Status::not_found("no service of this name is known to health"))
        }
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let stream: Self::WatchStream = if is_known(&request) {
            let mut status = self.status.clone();
            status.mark_changed();
            Box::pin(stream::unfold(status, async |mut status| {
                // The sender lives as long as the server.
                status.changed().await.ok()?;
                let current = *status.borrow_and_update();
                Some((Ok(response(current)), status))
            }))
        } else {
            let unknown = stream::iter([Ok(response(ServingStatus::ServiceUnknown))]);
            Box::pin(stream::StreamExt::chain(unknown, stream::pending()))
        };
        Ok(Response::new(stream))
    }
}

fn is_known(request: &Request<HealthCheckRequest>) -> bool {
    NAMES.contains(&request.get_ref().service.as_str())
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}
