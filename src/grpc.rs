//! `orders.v1.OrderService` over gRPC: proto messages to the use cases and back. No rules, no SQL.

use std::time::UNIX_EPOCH;

use prost_types::Timestamp;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::{
    layers::{ResponseSize, deadline_of},
    order,
    orders::{ListOrders, Orders, PlaceOrder},
    proto::{
        GetRequest, GetResponse, ListRequest, ListResponse, Order, PlaceRequest, PlaceResponse,
        order_service_server::{OrderService, OrderServiceServer},
    },
};

/// Longest request message, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// What an order of a list holds in memory at most, in bytes: the message, and its text.
const ORDER_BYTES: usize = 256;

/// The service, ready to be routed.
pub fn service(orders: Orders) -> OrderServiceServer<impl OrderService> {
    OrderServiceServer::new(Grpc { orders }).max_decoding_message_size(MAX_MESSAGE)
}

struct Grpc {
    orders: Orders,
}

#[tonic::async_trait]
impl OrderService for Grpc {
    async fn place(
        &self,
        request: Request<PlaceRequest>,
    ) -> Result<Response<PlaceResponse>, Status> {
        let deadline = deadline(&request);
        let PlaceRequest { product_id, quantity, idempotency_key } = request.get_ref();
        let order = PlaceOrder {
            product_id,
            quantity: quantity.map(|quantity| Ok(quantity.into())),
            idempotency_key,
        };
        let order::Placed { order, replayed } = self.orders.place(order, deadline).await?;
        Ok(Response::new(PlaceResponse { order: Some(order.into()), replayed }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let order = self.orders.get(&request.get_ref().order_id, deadline(&request)).await?;
        Ok(Response::new(GetResponse { order: Some(order.into()) }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let ListRequest { page_size, page_token } = request.get_ref();
        let list = ListOrders { page_size: Ok((*page_size).into()), page_token };
        let page = self.orders.list(list, deadline(&request)).await?;
        let response = ListResponse {
            orders: page.orders.into_iter().map(Into::into).collect(),
            next_page_token: page.next_page_token,
        };
        let size = response.orders.len() * ORDER_BYTES;
        let mut response = Response::new(response);
        response.extensions_mut().insert(ResponseSize(size as u64));
        Ok(response)
    }
}

fn deadline<T>(request: &Request<T>) -> Instant {
    deadline_of(request.extensions())
}

impl From<order::Order> for Order {
    fn from(order: order::Order) -> Self {
        let since_1970 =
            order.placed_at.duration_since(UNIX_EPOCH).expect("no order is from before 1970");
        Self {
            order_id: order.id.to_string(),
            product_id: order.product_id.into_string(),
            quantity: order.quantity.get().into(),
            placed_at: Some(Timestamp {
                seconds: since_1970.as_secs().try_into().expect("seconds since 1970 fit an i64"),
                nanos: since_1970.subsec_nanos().try_into().expect("below 10^9"),
            }),
        }
    }
}
