//! Health and reflection: how clients and orchestrators find out what is there.

use std::collections::HashSet;

use tokio_stream::StreamExt as _;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1, v1alpha};

use crate::support::{Process, channel};

#[tokio::test]
async fn health_answers_for_the_process_and_the_service() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut health = HealthClient::new(channel(server.api).await);
    for service in ["", "orders.v1.OrderService"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let response = health.check(request).await.unwrap().into_inner();
        assert_eq!(response.status(), ServingStatus::Serving);
    }
    let stranger = HealthCheckRequest { service: "stranger".to_owned() };
    assert_eq!(health.check(stranger).await.unwrap_err().code(), Code::NotFound);

    let watched = health.watch(HealthCheckRequest::default()).await.unwrap();
    let first = watched.into_inner().message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
}

const SERVICES: [&str; 4] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "orders.v1.OrderService",
];

/// Lists the services by one version of reflection, whose types differ in their package alone.
macro_rules! services {
    ($version:ident, $channel:expr) => {{
        use $version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let channel: Channel = $channel;
        let mut client = ServerReflectionClient::new(channel);
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap();
        let answer = answers.into_inner().next().await.unwrap().unwrap();
        match answer.message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                list.service.into_iter().map(|service| service.name).collect::<HashSet<_>>()
            }
            other => panic!("{other:?}"),
        }
    }};
}

#[tokio::test]
async fn both_versions_of_reflection_list_the_services() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let v1 = services!(v1, channel(server.api).await);
    let v1alpha = services!(v1alpha, channel(server.api).await);
    assert_eq!(v1, HashSet::from(SERVICES.map(str::to_owned)));
    assert_eq!(v1alpha, v1);
}
