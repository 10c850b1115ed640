//! axum's own server with nothing around it: `GET /product` checked and answered as order-service does,
//! without a store, metrics, limits or request ids, on the same allocator. `bare_axum ADDRESS`

use axum::{Router, routing::get};
use mimalloc::MiMalloc;
use peers::answer::place_by_query;
use tokio::net::TcpListener;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_default();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(address).await?;
        Ok(axum::serve(listener, Router::new().route("/product", get(place_by_query))).await?)
    })
}
