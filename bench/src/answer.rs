//! What each Rust server that stores nothing does for an order: the same checks, and an answer of the
//! same size and headers.

use std::sync::LazyLock;

use axum::{
    extract::RawQuery,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use order_service::{
    order::{Expected, Order, OrderIds, Quantity},
    proto::{self, PlaceRequest, PlaceResponse},
};
use tonic::Status;

static IDS: LazyLock<OrderIds> = LazyLock::new(OrderIds::new);

/// `Place`.
pub fn place(request: &PlaceRequest) -> Result<PlaceResponse, Status> {
    let invalid = |Expected(what)| Status::invalid_argument(format!("expected {what}"));
    let product_id = request.product_id.parse().map_err(invalid)?;
    let quantity = u64::from(request.quantity.unwrap_or(1));
    let quantity = Quantity::try_from(quantity).map_err(invalid)?;
    let order = proto::Order::from(Order::new(product_id, quantity, &IDS));
    Ok(PlaceResponse { order: Some(order), replayed: false })
}

/// `GET /product`.
pub async fn place_by_query(RawQuery(query): RawQuery) -> Result<Response, StatusCode> {
    let query = query.unwrap_or_default();
    let product_id = query.strip_prefix("product_id=").unwrap_or("book");
    let product_id = product_id.parse().map_err(|_: Expected| StatusCode::UNPROCESSABLE_ENTITY)?;
    let order = Order::new(product_id, Quantity::ONE, &IDS);
    let location = HeaderValue::try_from(format!("/orders/{}", order.id));
    let location = location.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    let mut response = "Order placed!".into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response.headers_mut().insert(header::LOCATION, location);
    Ok(response)
}
