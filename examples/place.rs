//! Places orders and loses none, although servers restart, connections grow old and load is shed.
//!
//! `cargo run --example place -- http://127.0.0.1:8181 1000`

use std::{env, error::Error, time::Duration};

use order_service::proto::{PlaceRequest, PlaceResponse, order_service_client::OrderServiceClient};
use rand::RngExt as _;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// Attempts at one order before its caller is told, and how long each may take.
const ATTEMPTS: u32 = 8;
const TIMEOUT: Duration = Duration::from_secs(5);

/// Between two attempts, where the server gives no advice: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

#[allow(dead_code, reason = "a test runs the rest")]
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let target = args.next().unwrap_or_else(|| "http://127.0.0.1:8181".to_owned());
    let orders: u32 = args.next().map_or(Ok(1), |count| count.parse())?;
    // Lazily: a server that is not up yet is one more failure that a retry mends.
    let mut client = OrderServiceClient::new(Endpoint::from_shared(target)?.connect_lazy());
    for _ in 0..orders {
        let order = PlaceRequest { product_id: "book".to_owned(), ..Default::default() };
        let (response, attempts) = place(&mut client, order).await?;
        let id = response.order.map(|order| order.order_id).unwrap_or_default();
        println!("{id} after {attempts} attempts");
    }
    Ok(())
}

/// Places one order, once, however many attempts that takes; tells how many it took. The order gets an
/// idempotency key unless it has one: that is what makes a retry safe.
pub async fn place(
    client: &mut OrderServiceClient<Channel>,
    mut order: PlaceRequest,
) -> Result<(PlaceResponse, u32), Status> {
    if order.idempotency_key.is_empty() {
        order.idempotency_key = Uuid::new_v4().to_string();
    }
    let mut back_off = BACK_OFF.0;
    let mut attempt = 1;
    loop {
        let mut request = Request::new(order.clone());
        request.set_timeout(TIMEOUT);
        let status = match client.place(request).await {
            Ok(response) => return Ok((response.into_inner(), attempt)),
            Err(status) => status,
        };
        if attempt == ATTEMPTS || !is_worth_a_retry(&status) {
            return Err(status);
        }
        let advised = status.get_details_retry_info().and_then(|info| info.retry_delay);
        // At random, so that callers that failed together do not come back together.
        let pause = advised.unwrap_or(back_off).mul_f64(rand::rng().random_range(1.0..1.5));
        tokio::time::sleep(pause).await;
        back_off = (back_off * 2).min(BACK_OFF.1);
        attempt += 1;
    }
}

/// Whether another attempt may succeed: the server says so, or the call was lost with its connection.
fn is_worth_a_retry(status: &Status) -> bool {
    let by_code = matches!(
        status.code(),
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded
    );
    by_code || was_lost_with_its_connection(status)
}

/// tonic reports a call that its connection took down, as at GOAWAY, as `Cancelled` ("operation was
/// canceled") or `Internal` ("h2 protocol error"), never as `Unavailable`. The code alone does not tell
/// it from what a server answers: the chain of sources does, for an answer has none.
fn was_lost_with_its_connection(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::transport::Error>()
            || error.is::<hyper::Error>()
            || error.is::<h2::Error>()
        {
            return true;
        }
        source = error.source();
    }
    false
}
