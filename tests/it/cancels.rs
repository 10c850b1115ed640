//! Callers that share a connection with others who cancel: an ordinary thing, since deadlines,
//! hedging and users who give up cancel calls, and a gRPC client has one connection for all of its
//! threads.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::try_join_all;
use h2::client::{Builder, SendRequest};
use tokio::time::{Instant, sleep};

use crate::{
    peers::{connect, place, try_call},
    support::Process,
};

/// How long they call.
const LOAD: Duration = Duration::from_secs(3);

/// Calls that one task cancels at a time.
const BURST: usize = 10;

#[tokio::test]
async fn callers_who_cancel_cut_no_call_beside_them() {
    let server = Process::start("sqlite::memory:", &["--processing-delay", "5ms"]).await;
    // h2's client counts the small DATA frames that come for calls it has cancelled, for as long as
    // its connection lasts, and ends that by itself after some hundred.
    let mut builder = Builder::new();
    builder.data_frame_budget(usize::MAX);
    let (client, connection) = builder.handshake(connect(server.api).await).await.unwrap();
    let connection = tokio::spawn(connection);
    let until = Instant::now() + LOAD;
    let placing = try_join_all((0..8).map(|_| place_until(until, client.clone())));
    let cancelling = try_join_all((0..4).map(|_| cancel_until(until, client.clone())));
    let Ok((placed, cancelled)) = tokio::try_join!(placing, cancelling) else {
        panic!("the connection was ended: {:?}", connection.await);
    };
    let (placed, cancelled): (usize, usize) = (placed.iter().sum(), cancelled.iter().sum());
    println!("{placed} placed, {cancelled} cancelled");
    assert!(placed > 100 && cancelled > 100, "{placed} {cancelled}");
}

/// Places orders one after the other; gives how many.
async fn place_until(until: Instant, mut client: SendRequest<Bytes>) -> Result<usize, h2::Error> {
    let mut placed = 0;
    while Instant::now() < until {
        let mut body = try_call(&mut client, place()).await?.await?.into_body();
        while let Some(data) = body.data().await {
            body.flow_control().release_capacity(data?.len())?;
        }
        let trailers = body.trailers().await?.expect("the call ends with its status");
        assert_eq!(trailers["grpc-status"], "0");
        placed += 1;
    }
    Ok(placed)
}

/// Begins calls and cancels them, some before they have left and some in the middle of their work.
async fn cancel_until(until: Instant, mut client: SendRequest<Bytes>) -> Result<usize, h2::Error> {
    let mut cancelled = 0;
    while Instant::now() < until {
        let mut burst = Vec::new();
        for _ in 0..BURST {
            burst.push(try_call(&mut client, place()).await?);
        }
        sleep(Duration::from_millis(cancelled as u64 / 10 % 3)).await;
        drop(burst);
        cancelled += BURST;
        sleep(Duration::from_millis(2)).await;
    }
    Ok(cancelled)
}
