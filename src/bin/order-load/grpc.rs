//! `orders.v1.OrderService` over HTTP/2.
//!
//! Below tonic and hyper, on h2 itself: its errors say which calls a GOAWAY left undone, and a call
//! costs neither a channel nor a task.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, client::SendRequest};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use order_service::{
    order::OrderId,
    proto::{
        GetRequest, GetResponse, ListRequest, ListResponse, Order, PlaceRequest, PlaceResponse,
    },
};
use percent_encoding::percent_decode;
use prost::Message;

use crate::{
    call::{Answer, Code, Failure, NewOrder, Page, SeenOrder, X_SERVED_BY},
    target::Base,
};

const USER_AGENT: &str = concat!("order-load/", env!("CARGO_PKG_VERSION"));

/// Length and compression flag before each message.
const PREFIX: usize = 5;

/// The heads of the requests.
#[derive(Debug)]
pub struct Api {
    place: Request<()>,
    get: Request<()>,
    list: Request<()>,
}

impl Api {
    pub fn new(base: &Base, timeout: Duration) -> Self {
        // At most eight digits, so no finer than a millisecond up to an hour.
        let timeout = format!("{}m", timeout.as_millis());
        let head = |method: &str| {
            Request::builder()
                .method(Method::POST)
                .uri(base.uri(&format!("/orders.v1.OrderService/{method}")))
                .header(header::CONTENT_TYPE, "application/grpc")
                .header(header::TE, "trailers")
                .header(header::USER_AGENT, USER_AGENT)
                .header("grpc-timeout", &timeout)
                .body(())
                .expect("constants and a number make a head")
        };
        Self { place: head("Place"), get: head("Get"), list: head("List") }
    }

    pub async fn place(
        &self,
        sender: &mut SendRequest<Bytes>,
        order: &NewOrder,
    ) -> Result<Answer<OrderId>, Failure> {
        let question = PlaceRequest {
            product_id: order.product.clone(),
            quantity: Some(order.quantity),
            idempotency_key: order.key.clone(),
        };
        let answer = unary::<PlaceResponse>(sender, &self.place, &question).await?;
        let order = order_of(answer.value.order)?;
        let id =
            order.id.parse().map_err(|error| malformed(&format!("{:?}: {error}", order.id)))?;
        Ok(Answer { value: id, served_by: answer.served_by })
    }

    pub async fn get(
        &self,
        sender: &mut SendRequest<Bytes>,
        id: OrderId,
    ) -> Result<Answer<SeenOrder>, Failure> {
        let question = GetRequest { order_id: id.to_string() };
        let answer = unary::<GetResponse>(sender, &self.get, &question).await?;
        Ok(Answer { value: order_of(answer.value.order)?, served_by: answer.served_by })
    }

    pub async fn list(
        &self,
        sender: &mut SendRequest<Bytes>,
        page_size: u16,
        token: &str,
    ) -> Result<Answer<Page>, Failure> {
        let question = ListRequest { page_size: page_size.into(), page_token: token.to_owned() };
        let answer = unary::<ListResponse>(sender, &self.list, &question).await?;
        let orders = answer.value.orders.into_iter().map(|order| order_of(Some(order)));
        let page =
            Page { orders: orders.collect::<Result<_, _>>()?, next: answer.value.next_page_token };
        Ok(Answer { value: page, served_by: answer.served_by })
    }
}

fn order_of(order: Option<Order>) -> Result<SeenOrder, Failure> {
    let order = order.ok_or_else(|| malformed("no order"))?;
    Ok(SeenOrder { id: order.order_id, product: order.product_id, quantity: order.quantity })
}

/// What gRPC's own clients make of an answer that they cannot read.
fn malformed(cause: &str) -> Failure {
    Failure::Refused(Code::INTERNAL, format!("the answer cannot be read: {cause}"))
}

async fn unary<A: Message + Default>(
    sender: &mut SendRequest<Bytes>,
    head: &Request<()>,
    question: &impl Message,
) -> Result<Answer<A>, Failure> {
    let length = question.encoded_len();
    let mut message = BytesMut::with_capacity(PREFIX + length);
    message.put_u8(0);
    message.put_u32(length.try_into().expect("questions are short"));
    question.encode(&mut message).expect("the buffer grows");

    let (response, mut stream) =
        sender.send_request(head.clone(), false).map_err(|_| Failure::NotBegun)?;
    stream.send_data(message.freeze(), true).map_err(|error| lost(&error))?;
    let response = response.await.map_err(|error| lost(&error))?;
    let served_by = response.headers().get(X_SERVED_BY).cloned();
    let body = read(response).await?;
    if body.len() < PREFIX || body[0] != 0 {
        return Err(malformed("no message"));
    }
    let value = A::decode(&body[PREFIX..]).map_err(|error| malformed(&error.to_string()))?;
    Ok(Answer { value, served_by })
}

/// The body of an answer whose status is OK.
async fn read(response: Response<RecvStream>) -> Result<Bytes, Failure> {
    if response.status() != StatusCode::OK {
        return Err(no_grpc(response.status()));
    }
    let (head, mut stream) = response.into_parts();
    let mut body = Bytes::new();
    while let Some(data) = stream.data().await {
        let data = data.map_err(|error| lost(&error))?;
        // Of a stream that is over, nobody needs to know.
        let _ = stream.flow_control().release_capacity(data.len());
        body = if body.is_empty() { data } else { [body, data].concat().into() };
    }
    let trailers = stream.trailers().await.map_err(|error| lost(&error))?;
    let status = trailers.as_ref().unwrap_or(&head.headers);
    match status.get("grpc-status").map(HeaderValue::as_bytes) {
        Some(b"0") => Ok(body),
        Some(code) => {
            let code = std::str::from_utf8(code).ok().and_then(|code| code.parse().ok());
            Err(Failure::Refused(code.map_or(Code::INTERNAL, Code::Grpc), message(status)))
        }
        None => Err(malformed("no grpc-status")),
    }
}

fn message(status: &HeaderMap) -> String {
    let message = status.get("grpc-message").map(HeaderValue::as_bytes).unwrap_or_default();
    percent_decode(message).decode_utf8_lossy().into_owned()
}

/// By gRPC's table for answers of something that is no gRPC server.
fn no_grpc(status: StatusCode) -> Failure {
    let code = match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    };
    Failure::Refused(Code::Grpc(code), format!("HTTP status {status}"))
}

fn lost(error: &h2::Error) -> Failure {
    // A reset is the service's word on this call alone, by gRPC's table; a refused stream was not
    // looked at, and is lost as one behind a GOAWAY is.
    match error.reason() {
        Some(reason)
            if error.is_reset() && error.is_remote() && reason != Reason::REFUSED_STREAM =>
        {
            let code = match reason {
                Reason::CANCEL => 1,
                Reason::ENHANCE_YOUR_CALM => 8,
                Reason::INADEQUATE_SECURITY => 7,
                _ => 13,
            };
            Failure::Refused(Code::Grpc(code), error.to_string())
        }
        _ => Failure::Lost(error.to_string()),
    }
}
