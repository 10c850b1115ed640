//! The service's own program, and beside its routes two that do all that placing an order is but for
//! the store: `limit.v1.LimitService/Place` and `GET /limit`. They pass through the same listener,
//! layers and metrics. Takes the service's flags.

use std::{env, process};

use axum::{
    Router,
    extract::RawQuery,
    http::{HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use mimalloc::MiMalloc;
use order_service::{
    api::Extra,
    app::{self, Inputs, Signals},
    config::Settings,
    layers::ServedBy,
    metrics::layer::Route,
    order::{Expected, Order, Quantity},
    proto::{self, PlaceRequest, PlaceResponse},
    usage::NoArguments,
};
use tokio::{
    net::TcpListener,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
};
use tonic::{Request, Status, service::Routes};

mod limit {
    tonic::include_proto!("limit.v1");
    pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("limit");
}

use limit::limit_service_server::{LimitService, LimitServiceServer};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> anyhow::Result<()> {
    let settings = match Settings::read(env::args_os()) {
        Ok(settings) => settings,
        Err(NoArguments::Asked(text) | NoArguments::BadUsage(text)) => anyhow::bail!(text),
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let signals = Signals::default();
        let drain = signals.drain.clone();
        let mut term = signal(SignalKind::terminate())?;
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = ctrl_c() => {} }
            drain.cancel();
        });
        let inputs = Inputs {
            api: TcpListener::bind(settings.listen).await?,
            admin: TcpListener::bind(settings.admin_listen).await?,
            tls: None,
            served_by: ServedBy::new("limit", process::id()),
            revision: "bench",
            signals,
        };
        app::run(&settings, inputs, extra()).await.map(|_| ())
    })
}

fn extra() -> Extra {
    let routes = Routes::new(LimitServiceServer::new(Limit)).into_axum_router().reset_fallback();
    Extra {
        routes: routes.merge(Router::new().route("/limit", get(place_by_query))),
        descriptors: limit::DESCRIPTORS.to_vec(),
        http: vec![Route::new("/limit", &[(Method::GET, &[200, 422])])],
    }
}

struct Limit;

fn invalid(Expected(what): Expected) -> Status {
    Status::invalid_argument(format!("expected {what}"))
}

#[tonic::async_trait]
impl LimitService for Limit {
    async fn place(
        &self,
        request: Request<PlaceRequest>,
    ) -> Result<tonic::Response<PlaceResponse>, Status> {
        let PlaceRequest { product_id, quantity, .. } = request.get_ref();
        let product_id = product_id.parse().map_err(invalid)?;
        let quantity = Quantity::try_from(u64::from(quantity.unwrap_or(1))).map_err(invalid)?;
        let order = proto::Order::from(Order::new(product_id, quantity));
        Ok(tonic::Response::new(PlaceResponse { order: Some(order), replayed: false }))
    }
}

/// `GET /product` with the same checks and headers.
async fn place_by_query(RawQuery(query): RawQuery) -> Result<Response, StatusCode> {
    let query = query.unwrap_or_default();
    let product_id = query.strip_prefix("product_id=").unwrap_or("book");
    let product_id = product_id.parse().map_err(|_: Expected| StatusCode::UNPROCESSABLE_ENTITY)?;
    let order = Order::new(product_id, Quantity::ONE);
    let location = HeaderValue::try_from(format!("/orders/{}", order.id));
    let location = location.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    let mut response = "Order placed!".into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response.headers_mut().insert(header::LOCATION, location);
    Ok(response)
}
