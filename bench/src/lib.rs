//! One service, bare and under each metrics layer, and calls of it without sockets: a real generated
//! gRPC service and a REST route in one axum router, under a layer of its own as services have. (The
//! first `Router::layer` costs four allocations and some 2 000 instructions a call, whatever it does;
//! `unlayered` shows it.)

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    task::{Context, Poll},
};

use axum::{Router, body::Body, routing::get};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, Version, header::HOST};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use order_service::{
    metrics::layer::{Metered, MetricsLayer, Recording, Route},
    proto::{
        DESCRIPTORS, GetRequest, GetResponse, ListRequest, ListResponse, Order, PlaceRequest,
        PlaceResponse,
        order_service_server::{OrderService, OrderServiceServer},
    },
};
use prometheus::Registry;
use prost::Message as _;
use tonic::{Status, service::Routes};
use tower::{
    Layer, Service,
    util::{MapResponse, MapResponseLayer},
};

pub mod answer;
mod whole;

pub use self::whole::Whole;

/// The sides, in the order of the table.
pub const SIDES: [&str; 5] =
    ["unlayered", "bare", "order-service", "tonic_prometheus_layer", "axum-prometheus"];

/// The two calls.
pub const PROTOCOLS: [&str; 2] = ["grpc", "rest"];

struct Answers;

#[tonic::async_trait]
impl OrderService for Answers {
    async fn place(
        &self,
        request: tonic::Request<PlaceRequest>,
    ) -> Result<tonic::Response<PlaceResponse>, Status> {
        let PlaceRequest { product_id, .. } = request.into_inner();
        let order = Order { product_id, quantity: 1, ..Default::default() };
        Ok(tonic::Response::new(PlaceResponse { order: Some(order), replayed: false }))
    }

    async fn get(
        &self,
        _: tonic::Request<GetRequest>,
    ) -> Result<tonic::Response<GetResponse>, Status> {
        Err(Status::not_found("none"))
    }

    async fn list(
        &self,
        _: tonic::Request<ListRequest>,
    ) -> Result<tonic::Response<ListResponse>, Status> {
        Ok(tonic::Response::new(ListResponse::default()))
    }
}

fn routes() -> Router {
    Routes::new(OrderServiceServer::new(Answers))
        .into_axum_router()
        .route("/product", get(async || "Order placed!"))
}

/// Stands for a service's own layers: passes responses on in a body of another type.
fn own<S>()
-> impl Layer<S, Service = MapResponse<S, fn(Response<Body>) -> Response<Passed>>> + Clone {
    MapResponseLayer::new((|response: Response<Body>| response.map(Passed)) as fn(_) -> _)
}

/// A body, passed on.
#[derive(Debug)]
pub struct Passed(Body);

impl http_body::Body for Passed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

/// One side: the service under one layer.
pub enum Side {
    Plain(Router),
    Ours(Metered<Router>, Registry),
}

impl Side {
    /// The side of this name.
    pub fn new(name: &str) -> Self {
        match name {
            "unlayered" => Self::Plain(routes()),
            "bare" => Self::Plain(routes().layer(own())),
            "order-service" => {
                let registry = Registry::new();
                let recording = Recording {
                    descriptors: &[DESCRIPTORS],
                    unrecorded: &[],
                    routes: vec![Route::new("/product", &[(Method::GET, &[200])])],
                };
                let layer = MetricsLayer::new(&registry, recording).expect("a new registry");
                Self::Ours(layer.layer(routes().layer(own())), registry)
            }
            #[cfg(feature = "layers")]
            "tonic_prometheus_layer" => {
                Self::Plain(routes().layer((tonic_prometheus_layer::MetricsLayer::new(), own())))
            }
            #[cfg(feature = "layers")]
            "axum-prometheus" => {
                let layer = axum_prometheus::PrometheusMetricLayer::pair().0;
                Self::Plain(routes().layer((layer, own())))
            }
            other => panic!("no side {other:?}"),
        }
    }

    /// One call, read to its end.
    pub async fn call(&mut self, request: Request<Full<Bytes>>) {
        match self {
            Self::Plain(router) => read(router.call(request).await).await,
            Self::Ours(router, _) => read(router.call(request).await).await,
        }
    }
}

/// Reads a response as hyper does, which stops at the trailers.
async fn read<B>(response: Result<Response<B>, Infallible>)
where
    B: http_body::Body<Data = Bytes, Error = axum::Error>,
{
    let response = response.expect("routers do not fail");
    assert!(response.status().is_success());
    let mut body = pin!(response.into_body());
    while let Some(frame) = body.frame().await {
        if frame.expect("bodies do not fail").is_trailers() {
            break;
        }
    }
}

/// A request as it comes from hyper.
pub fn request(protocol: &str) -> Request<Full<Bytes>> {
    if protocol == "rest" {
        let request = Request::get("/product").header(HOST, HeaderValue::from_static("localhost"));
        return request.body(Full::default()).expect("valid");
    }
    let message = PlaceRequest { product_id: "book".into(), ..Default::default() };
    let mut bytes = vec![0; 5];
    bytes[4] = u8::try_from(message.encoded_len()).expect("short");
    message.encode(&mut bytes).expect("a vector grows");
    Request::post("/orders.v1.OrderService/Place")
        .version(Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "tonic/0.14")
        .header("grpc-timeout", "5S")
        .body(Full::new(bytes.into()))
        .expect("valid")
}

/// Runs on one thread; one of the peers starts a task with a timer.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().build().expect("a runtime").block_on(work)
}
