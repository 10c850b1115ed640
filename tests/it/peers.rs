//! Peers that speak HTTP byte by byte and frame by frame, to misbehave on purpose.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use order_service::proto::PlaceRequest;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
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
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS_FRAME: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// Flags of frames.
pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;

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

/// One HTTP/2 frame.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The last stream and the error code of a GOAWAY.
    pub fn goaway(&self) -> (u32, u32) {
        let number = |at| u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap());
        (number(0), number(4))
    }
}

/// Reads the next frame; `None` at the end.
pub async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> Option<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    let id = u32::from_be_bytes(head[5..].try_into().unwrap());
    Some(Frame { kind: head[3], flags: head[4], stream: id, payload })
}

/// The type of the next frame; `None` at the end.
pub async fn frame(stream: &mut TcpStream) -> Option<u8> {
    let read = timeout(PATIENCE, read_frame(stream)).await;
    read.expect("the server sends a frame or closes the connection").map(|frame| frame.kind)
}

/// A frame as it is sent.
pub fn raw_frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()];
    [&head.concat(), payload].concat()
}

/// A header field of a header block, which neither indexes nor compresses it (RFC 7541, section
/// 6.2.2).
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        // A length of 127 or more goes on in groups of seven bits (section 5.1).
        match text.len().checked_sub(127) {
            None => field.push(u8::try_from(text.len()).unwrap()),
            Some(mut rest) => {
                field.push(127);
                while rest >= 128 {
                    field.push(u8::try_from(rest % 128).unwrap() | 128);
                    rest /= 128;
                }
                field.push(u8::try_from(rest).unwrap());
            }
        }
        field.extend(text.bytes());
    }
    field
}

/// The header block of a gRPC request.
pub fn grpc_head(path: &str) -> Vec<u8> {
    [
        // `:method: POST` and `:scheme: http` of the static table.
        b"\x83\x86".to_vec(),
        field(":path", path),
        field(":authority", "x"),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
    ]
    .concat()
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
    request: (http::Request<()>, Bytes),
) -> h2::client::ResponseFuture {
    try_call(client, request).await.unwrap()
}

/// The same on a connection that may end.
pub async fn try_call(
    client: &mut h2::client::SendRequest<Bytes>,
    (request, body): (http::Request<()>, Bytes),
) -> Result<h2::client::ResponseFuture, h2::Error> {
    *client = client.clone().ready().await?;
    let (answer, mut stream) = client.send_request(request, false)?;
    stream.send_data(body, true)?;
    Ok(answer)
}
