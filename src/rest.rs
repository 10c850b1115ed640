//! The REST shim on the same port: HTTP and JSON to the use cases and back. No rules, no SQL.

use std::borrow::Cow;

use axum::{
    Json, Router,
    extract::{Path, RawQuery, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get},
};
use serde::Serialize;

use crate::{
    error::{BadField, Error},
    layers::deadline_of,
    metrics::layer::Route,
    order::{Order, Placed},
    orders::{ListOrders, Orders, Page, PlaceOrder, RawNumber},
};

mod body;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The templates of the routes, for the router and for the metrics layer alike.
const PRODUCT: &str = "/product";
const ORDERS: &str = "/orders";
const ORDER: &str = "/orders/{order_id}";

/// What `GET /product` orders when the query does not say.
const DEFAULT_PRODUCT: &str = "book";

/// The routes of the shim.
pub fn routes(orders: Orders) -> Router {
    // axum would answer HEAD by the handler of GET, and a HEAD would place an order.
    let product = get(place_by_query).head(product_methods).post(place_by_body);
    Router::new()
        .route(PRODUCT, product.fallback(product_methods))
        .route(ORDERS, reads(get(list)))
        .route(ORDER, reads(get(read)))
        .with_state(orders)
}

/// Which codes these routes answer with, by path and method, as the metrics layer wants to know: the
/// rows of the error table that each can give.
pub fn metered_routes() -> Vec<Route> {
    const PLACING: &[u16] = &[200, 201, 400, 408, 413, 415, 422, 500, 503, 504];
    const PLACING_BY_QUERY: &[u16] = &[200, 422, 500, 503, 504];
    const READING: &[u16] = &[200, 404, 500, 503, 504];
    const LISTING: &[u16] = &[200, 422, 500, 503, 504];
    vec![
        Route::new(PRODUCT, &[(Method::GET, PLACING_BY_QUERY), (Method::POST, PLACING)]),
        Route::new(ORDERS, &[(Method::GET, LISTING), (Method::HEAD, LISTING)]),
        Route::new(ORDER, &[(Method::GET, READING), (Method::HEAD, READING)]),
    ]
}

fn reads(routes: MethodRouter<Orders>) -> MethodRouter<Orders> {
    routes.fallback(async || Error::WrongMethod("GET, HEAD"))
}

async fn product_methods() -> Error {
    Error::WrongMethod("GET, POST")
}

/// `GET /product`: the tutorial's way to place an order.
async fn place_by_query(
    State(orders): State<Orders>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, Error> {
    let query = query.unwrap_or_default();
    let [product_id, quantity] = parameters(&query, ["product_id", "quantity"])?;
    let product_id = product_id.unwrap_or(DEFAULT_PRODUCT.into());
    let order = PlaceOrder {
        product_id: &product_id,
        quantity: quantity.map(|text| text.parse().map_err(|_| text.into_owned())),
        idempotency_key: &idempotency_key(request.headers()),
    };
    let placed = orders.place(order, deadline_of(request.extensions())).await?;

    let mut response = "Order placed!".into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    describe(&placed, response.headers_mut());
    Ok(response)
}

/// `POST /product`: an order as JSON.
async fn place_by_body(State(orders): State<Orders>, request: Request) -> Result<Response, Error> {
    let (parts, body) = request.into_parts();
    let asked = body::read_order(&parts.headers, body).await?;
    let order = PlaceOrder {
        product_id: &asked.product_id,
        quantity: asked.quantity,
        idempotency_key: &idempotency_key(&parts.headers),
    };
    let placed = orders.place(order, deadline_of(&parts.extensions)).await?;

    let mut headers = HeaderMap::new();
    describe(&placed, &mut headers);
    let status = if placed.replayed { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, headers, Json(OrderJson::from(placed.order))).into_response())
}

/// `GET /orders/{order_id}`
async fn read(
    State(orders): State<Orders>,
    order_id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Json<OrderJson>, Error> {
    // axum refuses what is no UTF-8 once it is decoded; that, too, is no id.
    let Path(order_id) = order_id.map_err(|_| Error::NoSuchOrder)?;
    let order = orders.get(&order_id, deadline_of(request.extensions())).await?;
    Ok(Json(order.into()))
}

/// `GET /orders?page_size=&page_token=`
async fn list(
    State(orders): State<Orders>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Json<PageJson>, Error> {
    let query = query.unwrap_or_default();
    let [page_size, page_token] = parameters(&query, ["page_size", "page_token"])?;
    let list = ListOrders {
        // An empty one is none, as an empty token is the first page's.
        page_size: page_size.filter(|text| !text.is_empty()).map_or(Ok(0), number),
        page_token: &page_token.unwrap_or_default(),
    };
    let page = orders.list(list, deadline_of(request.extensions())).await?;
    Ok(Json(page.into()))
}

/// The values of query parameters; others are ignored. To guess which of two was meant could place an
/// order that nobody wanted.
fn parameters<'q, const N: usize>(
    query: &'q str,
    names: [&'static str; N],
) -> Result<[Option<Cow<'q, str>>; N], Error> {
    let mut values = [const { None }; N];
    let mut twice = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        let Some(at) = names.iter().position(|name| *name == key) else { continue };
        if values[at].replace(value).is_some() && twice.iter().all(|field| *field != names[at]) {
            twice.push(names[at]);
        }
    }
    if twice.is_empty() {
        return Ok(values);
    }
    let bad = |field| BadField { field, detail: "given more than once, expected once".to_owned() };
    Err(Error::Invalid(twice.into_iter().map(bad).collect()))
}

fn number(text: Cow<'_, str>) -> RawNumber<i64> {
    text.parse().map_err(|_| text.into_owned())
}

/// The key as the caller sent it. Several are one value with commas, as headers are (RFC 9110, 5.3):
/// the rule for keys refuses the space in it. Bytes that are no ASCII are kept apart from any key.
fn idempotency_key(headers: &HeaderMap) -> Cow<'_, str> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    match (values.next(), values.next()) {
        (None, _) => "".into(),
        (Some(one), None) => String::from_utf8_lossy(one.as_bytes()),
        (Some(first), Some(second)) => {
            let all: Vec<_> = [first, second].into_iter().chain(values).collect();
            let all: Vec<_> = all.iter().map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
            all.join(", ").into()
        }
    }
}

fn describe(placed: &Placed, headers: &mut HeaderMap) {
    let location = format!("/orders/{}", placed.order.id);
    let location = location.try_into().expect("a UUID makes a header value");
    headers.insert(header::LOCATION, location);
    if placed.replayed {
        headers.insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
}

/// An order with the proto's field names.
#[derive(Serialize)]
struct OrderJson {
    order_id: String,
    product_id: String,
    quantity: u16,
    /// RFC 3339, UTC, milliseconds.
    placed_at: String,
}

impl From<Order> for OrderJson {
    fn from(order: Order) -> Self {
        Self {
            order_id: order.id.to_string(),
            product_id: order.product_id.into_string(),
            quantity: order.quantity.get(),
            placed_at: humantime::format_rfc3339_millis(order.placed_at).to_string(),
        }
    }
}

#[derive(Serialize)]
struct PageJson {
    orders: Vec<OrderJson>,
    next_page_token: String,
}

impl From<Page> for PageJson {
    fn from(page: Page) -> Self {
        Self {
            orders: page.orders.into_iter().map(Into::into).collect(),
            next_page_token: page.next_page_token,
        }
    }
}
