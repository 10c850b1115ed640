//! Peers that speak HTTP byte by byte and frame by frame, to misbehave on purpose.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use order_service::proto::PlaceRequest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{PATIENCE, framed};

pub const GET: &[u8] = b"GET /product HTTP/1.1\r\nhost: x\r\n\r\n";

/// With what an HTTP/2 connection begins.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// An empty SETTINGS frame, and a request of `GET /product` on stream 1.
pub const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
pub const GET_FRAME: &[u8] = b"\0\0\x0f\x01\x05\0\0\0\x01\x82\x86\x04\x08/product\x01\x01x";

/// Types of frames.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;

pub async fn connect(api: SocketAddr) -> TcpStream {
    TcpStream::connect(api).await.unwrap()
}

/// Waits for the end of a connection.
pub async fn closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let ended = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    // A reset is an end, too.
    let _ = ended.expect("the server closes the connection");
}

/// Checks that nothing comes for a while, the end of the connection included.
pub async fn silent_for(stream: &mut TcpStream, time: Duration) {
    timeout(time, stream.read_u8()).await.unwrap_err();
}

/// Sends one HTTP/1 request and reads its response; returns the head.
pub async fn get(stream: &mut TcpStream) -> String {
    stream.write_all(GET).await.unwrap();
    response(stream).await
}

/// Reads one response with a body of a declared length; returns its head, in lower case.
pub async fn response(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    head
}

/// An HTTP/2 connection that sends one request and acknowledges nothing.
pub async fn unacknowledging(api: SocketAddr) -> TcpStream {
    let mut peer = connect(api).await;
    peer.write_all(&[PREFACE, SETTINGS, GET_FRAME].concat()).await.unwrap();
    peer
}

/// The type of the next frame; `None` at the end.
pub async fn frame(stream: &mut TcpStream) -> Option<u8> {
    let mut head = [0; 9];
    let read = timeout(PATIENCE, stream.read_exact(&mut head)).await;
    read.expect("the server sends a frame or closes the connection").ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some(head[3])
}

/// The types of all frames to the end of the connection.
pub async fn frames(stream: &mut TcpStream) -> Vec<u8> {
    let mut types = Vec::new();
    while let Some(kind) = frame(stream).await {
        types.push(kind);
    }
    types
}

/// An HTTP/2 connection whose peer may send this much of each response.
pub async fn with_window(api: SocketAddr, bytes: u32) -> h2::client::SendRequest<Bytes> {
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(bytes);
    let (client, connection) = builder.handshake(connect(api).await).await.unwrap();
    tokio::spawn(connection);
    client
}

/// A gRPC request, and its body.
pub fn grpc(path: &str, message: &impl prost::Message) -> (http::Request<()>, Bytes) {
    let request = http::Request::post(format!("http://x{path}"));
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    (request.body(()).unwrap(), framed(message).into())
}

pub fn place() -> (http::Request<()>, Bytes) {
    let message = PlaceRequest { product_id: "book".into(), ..Default::default() };
    grpc("/orders.v1.OrderService/Place", &message)
}

/// Begins a call; its response is not read before the future is polled.
pub async fn call(
    client: &mut h2::client::SendRequest<Bytes>,
    (request, body): (http::Request<()>, Bytes),
) -> h2::client::ResponseFuture {
    *client = client.clone().ready().await.unwrap();
    let (answer, mut stream) = client.send_request(request, false).unwrap();
    stream.send_data(body, true).unwrap();
    answer
}
