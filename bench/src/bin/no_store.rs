//! The service's own program, and beside its routes two that do all that placing an order is but for
//! the store: `limit.v1.LimitService/Place` and `GET /limit`. They pass through the same listener,
//! layers and metrics. Takes the service's flags.

use std::{env, process};

use axum::{Router, http::Method, routing::get};
use mimalloc::MiMalloc;
use order_service::{
    api::Extra,
    app::{self, Inputs, Signals},
    config::Settings,
    layers::ServedBy,
    metrics::{LogMetrics, layer::Route},
    proto::{PlaceRequest, PlaceResponse},
    usage::NoArguments,
};
use peers::answer::{place, place_by_query};
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
            open_files: u64::MAX,
            signals,
            log: LogMetrics::new(),
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

#[tonic::async_trait]
impl LimitService for Limit {
    async fn place(
        &self,
        request: Request<PlaceRequest>,
    ) -> Result<tonic::Response<PlaceResponse>, Status> {
        Ok(tonic::Response::new(place(request.get_ref())?))
    }
}
