//! When an old HTTP/2 connection is asked to go, and what becomes of the calls that cross the
//! GOAWAY.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use order_service::proto::PlaceRequest;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};

use crate::{
    peers::{
        ACK, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, PREFACE, SETTINGS,
        WINDOW_UPDATE, connect, grpc_head, raw_frame, read_frame,
    },
    support::{PATIENCE, Process, framed},
};

/// PROTOCOL_ERROR (RFC 9113, section 7).
const PROTOCOL_ERROR: u32 = 1;

/// A whole call of `Place`.
fn place(stream: u32) -> Vec<u8> {
    let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
    let head = grpc_head("/orders.v1.OrderService/Place");
    let head = raw_frame(HEADERS, END_HEADERS, stream, &head);
    [head, raw_frame(DATA, END_STREAM, stream, &framed(&order))].concat()
}

/// Reads the next frame, and acknowledges it if it is a PING: the last GOAWAY waits for that.
async fn next(peer: &mut TcpStream) -> Option<Frame> {
    let frame = timeout(PATIENCE, read_frame(peer)).await;
    let frame = frame.expect("the server sends a frame or closes the connection")?;
    if frame.kind == PING && frame.flags & ACK == 0 {
        peer.write_all(&raw_frame(PING, ACK, 0, &frame.payload)).await.ok()?;
    }
    Some(frame)
}

/// RFC 9113, section 6.8: the sender of a GOAWAY ignores frames on streams above its last one. h2
/// does so but for WINDOW_UPDATE, and ends the connection, which cuts the calls that are in flight
/// on it. grpcio sends such frames. Once this fails, h2 has it mended, and a GOAWAY need not avoid
/// calls in flight.
#[tokio::test]
async fn h2_ends_a_connection_for_a_window_update_of_a_stream_above_the_last_goaway() {
    let args = ["--max-connection-age", "300ms", "--processing-delay", "3s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let mut peer = connect(server.api).await;
    peer.write_all(&[PREFACE, SETTINGS, &place(1)].concat()).await.unwrap();
    // The first GOAWAY names no stream.
    loop {
        let frame = next(&mut peer).await.unwrap();
        if frame.kind == GOAWAY && frame.goaway() == (1, 0) {
            break;
        }
    }
    // They crossed the GOAWAY, as far as the server can tell.
    let update = raw_frame(WINDOW_UPDATE, 0, 3, &5_u32.to_be_bytes());
    peer.write_all(&[place(3), update].concat()).await.unwrap();
    let mut answered = false;
    let mut error = None;
    while let Some(frame) = next(&mut peer).await {
        answered |= frame.stream == 1 && frame.flags & END_STREAM != 0;
        if frame.kind == GOAWAY {
            error = Some(frame.goaway().1);
        }
    }
    assert_eq!((answered, error), (false, Some(PROTOCOL_ERROR)));
}

/// An HTTP/2 connection with so many calls in flight, each begun after a pause; whether there was
/// one as it was asked to go, and when that was.
async fn call_until_goaway(server: &Process, at_a_time: u32, pause: Duration) -> (bool, Duration) {
    let begun = Instant::now();
    let mut peer = connect(server.api).await;
    peer.write_all(&[PREFACE, SETTINGS].concat()).await.unwrap();
    let (mut stream, mut in_flight) = (1, 0);
    loop {
        if in_flight < at_a_time && timeout(pause, peer.peek(&mut [0])).await.is_err() {
            peer.write_all(&place(stream)).await.unwrap();
            (stream, in_flight) = (stream + 2, in_flight + 1);
            continue;
        }
        let frame = next(&mut peer).await.expect("GOAWAY comes before the end");
        if frame.kind == GOAWAY {
            return (in_flight > 0, begun.elapsed());
        }
        if frame.stream > 0 && frame.flags & END_STREAM != 0 {
            in_flight -= 1;
        }
    }
}

const AGE: Duration = Duration::from_secs(2);

async fn call_on_twenty(at_a_time: u32, pause: Duration) -> Vec<(bool, Duration)> {
    let args = ["--max-connection-age", "2s", "--processing-delay", "50ms"];
    let server = Process::start("sqlite::memory:", &args).await;
    join_all((0..20).map(|_| call_until_goaway(&server, at_a_time, pause))).await
}

#[tokio::test]
async fn an_old_connection_is_asked_to_go_while_nothing_is_in_flight() {
    let asked = call_on_twenty(1, Duration::from_millis(30)).await;
    let busy = asked.iter().filter(|(in_flight, _)| *in_flight).count();
    // The next call may be on its way as the GOAWAY comes. At random moments it would be 12 of 20.
    assert!(busy <= 3, "{busy}: {asked:?}");
}

#[tokio::test]
async fn a_connection_that_is_never_idle_is_asked_to_go_within_a_tenth_of_its_age_after_it() {
    let asked = call_on_twenty(4, Duration::from_millis(10)).await;
    let (early, late) = (AGE.mul_f64(0.9), AGE.mul_f64(1.1 * 1.1) + Duration::from_millis(500));
    for (in_flight, at) in asked {
        assert!(in_flight && at >= early && at <= late, "{in_flight} {at:?}");
    }
}
