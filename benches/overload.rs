//! Goodput under overload: a server of known capacity is offered once, twice and three times of it,
//! over each protocol, in one run. Latency counts from the moment at which a call was to be sent.
//!
//! `cargo bench --bench overload`

#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark that cannot go on has failed")]

use std::time::Duration;

use order_service::proto::{PlaceRequest, order_service_client::OrderServiceClient};
use tokio::{
    task::JoinSet,
    time::{Instant, interval},
};
use tonic::transport::Channel;

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../tests/it/support.rs"]
mod support;

use support::{Process, channel};

/// The server's work per order, and how many orders it works on at once.
const DELAY: Duration = Duration::from_millis(50);
const IN_FLIGHT: u32 = 64;

/// Calls per second that the server can answer.
const CAPACITY: f64 = IN_FLIGHT as f64 / 0.050;

/// How long each load lasts, and how much of its beginning does not count.
const LOAD: Duration = Duration::from_secs(6);
const WARM_UP: Duration = Duration::from_secs(1);

/// How often calls are sent: as many as are due.
const TICK: Duration = Duration::from_millis(2);

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Placed,
    Shed,
    Failed,
}

/// What came of one load.
struct Outcome {
    placed_per_second: f64,
    shed: usize,
    failed: usize,
    p99: Duration,
}

/// Sends calls at a rate, whatever becomes of them.
async fn offer<F>(rate: f64, call: impl Fn() -> F) -> Outcome
where
    F: Future<Output = End> + Send + 'static,
{
    let begun = Instant::now();
    let mut ticks = interval(TICK);
    let mut calls = JoinSet::new();
    let mut sent = 0_u32;
    loop {
        let due = ticks.tick().await;
        let elapsed = due - begun;
        if elapsed >= LOAD {
            break;
        }
        while f64::from(sent) < elapsed.as_secs_f64() * rate {
            sent += 1;
            let end = call();
            calls.spawn(async move {
                let end = end.await;
                (elapsed, end, due.elapsed())
            });
        }
    }
    let mut ends = calls.join_all().await;
    ends.retain(|(sent, ..)| *sent >= WARM_UP);
    let count = |wanted| ends.iter().filter(|(_, end, _)| *end == wanted).count();
    let (placed, shed, failed) = (count(End::Placed), count(End::Shed), count(End::Failed));
    let mut latencies: Vec<_> =
        ends.iter().filter(|(_, end, _)| *end == End::Placed).map(|(.., took)| *took).collect();
    latencies.sort_unstable();
    let p99 = latencies[latencies.len() * 99 / 100];
    let placed_per_second = placed as f64 / (LOAD - WARM_UP).as_secs_f64();
    Outcome { placed_per_second, shed, failed, p99 }
}

fn grpc(channels: &[Channel], next: usize) -> impl Future<Output = End> + Send + 'static {
    let mut client = OrderServiceClient::new(channels[next % channels.len()].clone());
    async move {
        let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
        match client.place(order).await {
            Ok(_) => End::Placed,
            Err(status) if status.code() == tonic::Code::ResourceExhausted => End::Shed,
            Err(_) => End::Failed,
        }
    }
}

fn http(client: &reqwest::Client, url: &str) -> impl Future<Output = End> + Send + 'static {
    let request = client.post(url).json(&serde_json::json!({ "product_id": "book" }));
    async move {
        match request.send().await {
            Ok(response) if response.status() == 201 => End::Placed,
            Ok(response) if response.status() == 503 => End::Shed,
            _ => End::Failed,
        }
    }
}

fn main() {
    tokio::runtime::Runtime::new().unwrap().block_on(compare());
}

async fn compare() {
    println!(
        "capacity {CAPACITY:.0} orders/s: {IN_FLIGHT} in flight, {DELAY:?} each; {LOAD:?} per load\n"
    );
    println!("| protocol | offered | placed per second | shed | failed | p99 of placed |");
    println!("|---|---|---|---|---|---|");
    for protocol in ["grpc", "http"] {
        let dir = tempfile::tempdir().unwrap();
        let (delay, in_flight) = (format!("{}ms", DELAY.as_millis()), IN_FLIGHT.to_string());
        let args = ["--processing-delay", &delay, "--max-in-flight", &in_flight];
        let server = Process::start_in(dir.path(), &args).await;
        let mut channels = Vec::new();
        for _ in 0..8 {
            channels.push(channel(server.api).await);
        }
        let (client, url) = (reqwest::Client::new(), server.url("/product"));
        let mut outcomes = Vec::new();
        for times in [1.0, 2.0, 3.0] {
            let rate = CAPACITY * times;
            let outcome = if protocol == "grpc" {
                let next = std::cell::Cell::new(0);
                offer(rate, || grpc(&channels, next.replace(next.get() + 1))).await
            } else {
                offer(rate, || http(&client, &url)).await
            };
            println!(
                "| {protocol} | {times}× | {:.0} | {} | {} | {:.0?} |",
                outcome.placed_per_second, outcome.shed, outcome.failed, outcome.p99
            );
            outcomes.push(outcome);
        }
        let peak = outcomes.iter().map(|o| o.placed_per_second).fold(0.0, f64::max);
        let last = &outcomes[2];
        println!(
            "\n{protocol}: at three times the capacity {:.0} % of the peak goodput (goal 90 %), p99 {:.2} \
             times the delay (goal 2)\n",
            100.0 * last.placed_per_second / peak,
            last.p99.as_secs_f64() / DELAY.as_secs_f64()
        );
        assert_eq!(server.terminate().await, Some(0));
    }
}
