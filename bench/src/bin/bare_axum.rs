//! axum's own server with nothing around it: `GET /product` checked and answered as order-service does,
//! without a store, metrics, limits or request ids, on the same allocator. `bare_axum ADDRESS`

use axum::{
    Router,
    extract::RawQuery,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use mimalloc::MiMalloc;
use order_service::order::{Expected, Order, Quantity};
use tokio::net::TcpListener;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_default();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(address).await?;
        Ok(axum::serve(listener, Router::new().route("/product", get(place))).await?)
    })
}

async fn place(RawQuery(query): RawQuery) -> Result<Response, StatusCode> {
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
