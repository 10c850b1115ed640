//! A server in this process, with routes of the tests' own: streams, panics and bodies of every
//! kind.

use std::{convert::Infallible, net::SocketAddr};

use axum::{Router, body::Body, routing::get};
use futures_util::StreamExt as _;
use http::{Method, Request, StatusCode};
use order_service::{
    api::Extra,
    app::{self, Ended, Inputs, Signals},
    config::Settings,
    layers::ServedBy,
    metrics::{LogMetrics, layer::Route},
    proto::{PlaceRequest, PlaceResponse, order_service_client::OrderServiceClient},
};
use prost::Message as _;
use prost_types::{
    FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto, ServiceDescriptorProto,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{Status, Streaming, transport::Channel};
use tonic_prost::ProstCodec;

use crate::support::{Page, channel, scrape_until};

/// A server in this process, with routes of the test's own beside the program's.
pub struct InProcess {
    pub api: SocketAddr,
    pub admin: SocketAddr,
    signals: Signals,
    task: JoinHandle<anyhow::Result<Ended>>,
}

impl InProcess {
    pub async fn start(args: &[&str]) -> Self {
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (api, admin) = (bind().await, bind().await);
        let addresses = (api.local_addr().unwrap(), admin.local_addr().unwrap());
        let args = [&["order-service", "--database-url", "sqlite::memory:"], args].concat();
        let settings = Settings::read(args.iter().map(Into::into)).unwrap();
        let signals = Signals::default();
        let inputs = Inputs {
            api,
            admin,
            tls: None,
            served_by: ServedBy::new("test", 1),
            revision: "test",
            open_files: u64::MAX,
            signals: signals.clone(),
            log: LogMetrics::new(),
        };
        let task = tokio::spawn(async move { app::run(&settings, inputs, extra()).await });
        let server = Self { api: addresses.0, admin: addresses.1, signals, task };
        let ready = format!("http://{}/readyz", server.admin);
        while reqwest::get(&ready).await.unwrap().status() != 200 {}
        server
    }

    pub async fn grpc(&self) -> OrderServiceClient<Channel> {
        OrderServiceClient::new(channel(self.api).await)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.api)
    }

    pub async fn scrape(&self) -> Page {
        Page::scrape(self.admin).await
    }

    pub async fn stop(self) {
        self.signals.drain.cancel();
        assert_eq!(self.task.await.unwrap().unwrap(), Ended::Drained);
    }

    /// Runs an action that is one request, and checks that it is recorded once, under these labels,
    /// in the right family, and nothing else is.
    pub async fn records(&self, name: &str, labels: &[&str], action: impl Future) {
        let before = self.scrape().await;
        action.await;
        let ended = |page: &Page| handled(page) == handled(&before) + 1.0 && is_at_rest(page);
        let after = scrape_until(self.admin, ended).await;
        let (was, is) = (before.value(name, labels), after.value(name, labels));
        assert_eq!(is, was + 1.0, "{name} {labels:?}");
        assert_eq!(after.count(), before.count());
    }

    pub async fn records_grpc(&self, method: &str, code: &str, action: impl Future) {
        let labels = [format!("grpc_method=\"{method}\""), format!("grpc_code=\"{code}\"")];
        let labels: Vec<_> = labels.iter().map(String::as_str).collect();
        self.records("grpc_server_handled_total", &labels, action).await;
    }

    pub async fn records_http(&self, url: &str, method: &str, code: &str, action: impl Future) {
        let labels =
            [format!("url=\"{url}\""), format!("method=\"{method}\""), format!("code=\"{code}\"")];
        let labels: Vec<_> = labels.iter().map(String::as_str).collect();
        self.records("http_requests_total_with_path", &labels, action).await;
    }
}

pub fn handled(page: &Page) -> f64 {
    page.sum("grpc_server_handled_total", &[]) + page.sum("http_requests_total_with_path", &[])
}

pub fn in_flight(page: &Page) -> f64 {
    page.sum("requests_in_flight", &[])
}

/// Whether nothing is in flight, and what was started was handled, and timed, once. To be waited
/// for: the families are read one after the other, and of a request that ends meanwhile a page
/// shows a part.
pub fn is_at_rest(page: &Page) -> bool {
    let calls = page.sum("grpc_server_handled_total", &[]);
    let requests = page.sum("http_requests_total_with_path", &[]);
    in_flight(page) == 0.0
        && page.sum("grpc_server_started_total", &[]) == calls
        && page.sum("grpc_server_handling_seconds_count", &[]) == calls
        && page.sum("http_request_duration_seconds_count", &[]) == requests
}

pub const STREAM: &str = "/test.v1.Streams/Count";
const UNARY: &str = "/test.v1.Streams/Panic";

/// A service of streams, and HTTP routes, that end in every way there is.
fn extra() -> Extra {
    let stream = tower::service_fn(async |request: Request<Body>| {
        let codec = ProstCodec::<PlaceResponse, PlaceRequest>::default();
        let count = tower::service_fn(async |request: tonic::Request<PlaceRequest>| {
            let end = request.into_inner().product_id;
            match end.as_str() {
                "panic" => panic!("the handler panics"),
                "hang" => std::future::pending().await,
                _ => {}
            }
            let message = || Ok(PlaceResponse::default());
            let rest = futures_util::stream::once(async move {
                // So that what came before is sent by then.
                tokio::task::yield_now().await;
                match end.as_str() {
                    "fails-third" => Err(Status::data_loss("the third message")),
                    "panics-third" => panic!("the body panics"),
                    "hangs-third" => std::future::pending().await,
                    _ => message(),
                }
            });
            let messages = tokio_stream::iter([message(), message()]).chain(rest);
            Ok(tonic::Response::new(messages))
        });
        let panics = tower::service_fn(async |_: tonic::Request<PlaceRequest>| {
            panic!("the handler panics") as Result<tonic::Response<PlaceResponse>, Status>
        });
        let mut grpc = tonic::server::Grpc::new(codec);
        let response = match request.uri().path() {
            UNARY => grpc.unary(panics, request).await,
            _ => grpc.server_streaming(count, request).await,
        };
        Ok::<_, Infallible>(response.map(Body::new))
    });
    let method = |name: &str, server_streaming| MethodDescriptorProto {
        name: Some(name.to_owned()),
        server_streaming: Some(server_streaming),
        ..Default::default()
    };
    let service = ServiceDescriptorProto {
        name: Some("Streams".to_owned()),
        method: vec![method("Count", true), method("Panic", false)],
        options: None,
    };
    let file = FileDescriptorProto {
        package: Some("test.v1".to_owned()),
        service: vec![service],
        ..Default::default()
    };
    let chunks = || tokio_stream::iter([Ok::<_, Infallible>("one"), Ok("two")]);
    let routes = Router::new()
        .route_service("/test.v1.Streams/{*rest}", stream)
        .route("/test/panic", get(async || panic!("the handler panics") as &str))
        .route("/test/chunked", get(async move || Body::from_stream(chunks())))
        .route(
            "/test/length",
            get(async move || ([("content-length", "6")], Body::from_stream(chunks()))),
        )
        .route(
            "/test/panic-body",
            get(async || {
                let rest = futures_util::stream::once(async {
                    tokio::task::yield_now().await;
                    panic!("the body panics")
                });
                Body::from_stream(tokio_stream::iter([Ok::<_, Infallible>("one")]).chain(rest))
            }),
        )
        .route("/test/empty", get(async || StatusCode::NO_CONTENT))
        .route("/test/logs", get(async || tracing::debug!("a line of the handler")));
    let ok: &'static [u16] = &[200, 204];
    let paths = ["/test/panic", "/test/chunked", "/test/length", "/test/panic-body", "/test/empty"];
    Extra {
        routes,
        descriptors: FileDescriptorSet { file: vec![file] }.encode_to_vec(),
        http: paths.map(|path| Route::new(path, &[(Method::GET, ok)])).to_vec(),
    }
}

pub fn place(product: &str) -> PlaceRequest {
    PlaceRequest { product_id: product.into(), ..Default::default() }
}

/// Opens the stream that ends as its product says.
pub async fn count(server: &InProcess, end: &str) -> Result<Streaming<PlaceResponse>, Status> {
    count_on(channel(server.api).await, end).await
}

/// The same on a connection.
pub async fn count_on(channel: Channel, end: &str) -> Result<Streaming<PlaceResponse>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let codec = ProstCodec::<PlaceRequest, PlaceResponse>::default();
    let path = http::uri::PathAndQuery::from_static(STREAM);
    let stream = grpc.server_streaming(tonic::Request::new(place(end)), path, codec).await?;
    Ok(stream.into_inner())
}

/// Calls the unary method whose handler panics.
pub async fn call_panicking(channel: Channel) -> Result<tonic::Response<PlaceResponse>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let codec = ProstCodec::<PlaceRequest, PlaceResponse>::default();
    let path = http::uri::PathAndQuery::from_static(UNARY);
    grpc.unary(tonic::Request::new(place("book")), path, codec).await
}
