//! The REST shim over HTTP/1.1.

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1::SendRequest};
use order_service::order::OrderId;
use serde::{Deserialize, Serialize};

use crate::{
    call::{Answer, Code, Failure, NewOrder, Page, SeenOrder, X_SERVED_BY},
    connection::in_words,
    target::Base,
};

const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("order-load/", env!("CARGO_PKG_VERSION")));

/// What the requests' heads share.
#[derive(Debug)]
pub struct Api {
    host: HeaderValue,
    product: Uri,
}

#[derive(Serialize)]
struct PlaceJson<'o> {
    product_id: &'o str,
    quantity: u32,
}

#[derive(Deserialize)]
struct OrderJson {
    order_id: String,
    product_id: String,
    quantity: u32,
}

#[derive(Deserialize)]
struct PageJson {
    orders: Vec<OrderJson>,
    next_page_token: String,
}

#[derive(Deserialize)]
struct ProblemJson {
    detail: Option<String>,
    title: Option<String>,
}

impl Api {
    pub fn new(base: &Base) -> Self {
        let host = HeaderValue::from_str(base.authority.as_str());
        Self {
            host: host.expect("an authority makes a header value"),
            product: Uri::from_static("/product"),
        }
    }

    pub async fn place(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        order: &NewOrder,
    ) -> Result<Answer<OrderId>, Failure> {
        let body = PlaceJson { product_id: &order.product, quantity: order.quantity };
        let body = serde_json::to_vec(&body).expect("an order makes JSON");
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.product.clone();
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.host.clone());
        headers.insert(header::USER_AGENT, USER_AGENT);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let key = HeaderValue::from_str(&order.key).expect("keys are visible ASCII");
        headers.insert("idempotency-key", key);
        let response = answered(sender, request).await?;
        let location = response.headers().get(header::LOCATION).map(HeaderValue::as_bytes);
        let id = location.and_then(|path| path.strip_prefix(b"/orders/"));
        let id = id.and_then(|id| std::str::from_utf8(id).ok()?.parse().ok());
        let served_by = response.headers().get(X_SERVED_BY).cloned();
        // Read to its end, or the connection would be of no further use.
        body_of(response).await?;
        let value = id.ok_or_else(|| malformed("no Location of an order"))?;
        Ok(Answer { value, served_by })
    }

    pub async fn get(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        id: OrderId,
    ) -> Result<Answer<SeenOrder>, Failure> {
        let answer = self.read::<OrderJson>(sender, &format!("/orders/{id}")).await?;
        Ok(Answer { value: answer.value.into(), served_by: answer.served_by })
    }

    pub async fn list(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        page_size: u16,
        token: &str,
    ) -> Result<Answer<Page>, Failure> {
        let token: String = form_urlencoded::byte_serialize(token.as_bytes()).collect();
        let path = format!("/orders?page_size={page_size}&page_token={token}");
        let answer = self.read::<PageJson>(sender, &path).await?;
        let page = Page {
            orders: answer.value.orders.into_iter().map(Into::into).collect(),
            next: answer.value.next_page_token,
        };
        Ok(Answer { value: page, served_by: answer.served_by })
    }

    async fn read<T: for<'j> Deserialize<'j>>(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        path: &str,
    ) -> Result<Answer<T>, Failure> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = path.parse().expect("ids and encoded tokens make a path");
        request.headers_mut().insert(header::HOST, self.host.clone());
        request.headers_mut().insert(header::USER_AGENT, USER_AGENT);
        let response = answered(sender, request).await?;
        let served_by = response.headers().get(X_SERVED_BY).cloned();
        let body = body_of(response).await?;
        let value = serde_json::from_slice(&body).map_err(|error| malformed(&error.to_string()))?;
        Ok(Answer { value, served_by })
    }
}

impl From<OrderJson> for SeenOrder {
    fn from(order: OrderJson) -> Self {
        Self { id: order.order_id, product: order.product_id, quantity: order.quantity }
    }
}

fn malformed(cause: &str) -> Failure {
    Failure::Refused(Code::Malformed, format!("the answer cannot be read: {cause}"))
}

/// The response, if it is a success.
async fn answered(
    sender: &mut SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, Failure> {
    // hyper gives back a request of which it has not written a byte.
    let response =
        sender.try_send_request(request).await.map_err(|mut error| match error.take_message() {
            Some(_) => Failure::NotBegun,
            None => lost(error.error()),
        })?;
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::CREATED) {
        return Ok(response);
    }
    let body = body_of(response).await?;
    let problem = serde_json::from_slice::<ProblemJson>(&body).ok();
    let detail = problem.and_then(|problem| problem.detail.or(problem.title));
    let detail = detail.unwrap_or_else(|| format!("HTTP status {status}"));
    Err(Failure::Refused(Code::Http(status.as_u16()), detail))
}

async fn body_of(response: Response<Incoming>) -> Result<Bytes, Failure> {
    let body = response.into_body().collect().await.map_err(|error| lost(&error))?;
    Ok(body.to_bytes())
}

fn lost(error: &hyper::Error) -> Failure {
    Failure::Lost(in_words(error))
}
