//! Inputs that nobody means: no body, query, header, message or frame may panic the server, hang it or
//! make it grow.

use std::time::Duration;

use bytes::Bytes;
use order_service::proto::{ListRequest, PlaceRequest};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::Handle,
    time::timeout,
};
use tonic::Code;

use crate::{
    peers::{PREFACE, SETTINGS, connect, get, grpc, with_window},
    support::{PATIENCE, Page, Process, scrape_until},
};

/// Runs an async property on a few hundred inputs.
async fn for_all<S>(strategy: S, cases: u32, property: impl AsyncFn(S::Value) + Send + 'static)
where
    S: Strategy + Send + 'static,
{
    let handle = Handle::current();
    let run = move || {
        let config = Config { cases, failure_persistence: None, ..Config::default() };
        let tested = TestRunner::new(config).run(&strategy, |input| {
            let answered = timeout(PATIENCE, property(input));
            handle.block_on(answered).map_err(|_| TestCaseError::fail("it hangs"))
        });
        tested.unwrap_or_else(|error| panic!("{error}"));
    };
    tokio::task::spawn_blocking(run).await.unwrap();
}

/// A server, and the check that all that came at it has left nothing behind.
struct Target {
    server: Process,
    memory: f64,
}

fn memory(page: &Page) -> f64 {
    page.value("process_resident_memory_bytes", &[])
}

impl Target {
    async fn start() -> Self {
        let server = Process::start("sqlite::memory:", &["--read-timeout", "1s"]).await;
        // The first requests make room that the others use again.
        for _ in 0..100 {
            get(&mut connect(server.api).await).await;
        }
        let memory = memory(&server.scrape().await);
        Self { server, memory }
    }

    async fn assert_unharmed(self) {
        let page = scrape_until(self.server.admin, |page| {
            page.sum("requests_in_flight", &[]) == 0.0 && page.value("connections_open", &[]) == 0.0
        })
        .await;
        assert_eq!(page.sum("request_panics_total", &[]), 0.0);
        let started = page.sum("grpc_server_started_total", &[]);
        assert_eq!(page.sum("grpc_server_handled_total", &[]), started);
        let more = memory(&page) - self.memory;
        assert!(more < 32e6, "{more} bytes more");
        let head = get(&mut connect(self.server.api).await).await;
        assert!(head.starts_with("http/1.1 200"), "{head} {:?}", self.server.log().last());
    }
}

/// The status of the response to a request of these bytes, after which the connection is closed.
async fn status(api: std::net::SocketAddr, request: Vec<u8>) -> u16 {
    let mut stream = connect(api).await;
    stream.write_all(&request).await.unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).await.unwrap();
    let text = String::from_utf8_lossy(&response);
    let status = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    status.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
}

/// Bytes, JSON, and JSON with a few bytes changed.
fn bodies() -> impl Strategy<Value = Vec<u8>> {
    let json = || {
        let value = prop_oneof![
            any::<f64>().prop_map(|number| number.to_string()),
            any::<i128>().prop_map(|number| number.to_string()),
            any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
            "[\\[{\":,]{0,40}",
            Just("null".to_owned()),
        ];
        (value.clone(), value, any::<bool>()).prop_map(|(product, quantity, book)| {
            let product = if book { "\"book\"".to_owned() } else { product };
            format!(r#"{{"product_id":{product},"quantity":{quantity},"x":{quantity}}}"#)
                .into_bytes()
        })
    };
    let changed =
        (json(), prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4));
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..2000),
        json(),
        changed.prop_map(|(mut body, changes)| {
            for (at, byte) in changes {
                let at = at.index(body.len());
                body[at] = byte;
            }
            body
        }),
        (1_usize..70_000).prop_map(|depth| "[".repeat(depth).into_bytes()),
    ]
}

#[tokio::test]
async fn any_body_is_answered() {
    let target = Target::start().await;
    let api = target.server.api;
    for_all(bodies(), 300, async move |body| {
        let head = format!(
            "POST /product HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: \
             application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let status = status(api, [head.into_bytes(), body].concat()).await;
        assert!([201, 400, 413, 422].contains(&status), "{status}");
    })
    .await;
    target.assert_unharmed().await;
}

#[tokio::test]
async fn any_query_and_any_page_token_is_answered() {
    let target = Target::start().await;
    let api = target.server.api;
    let names = "(product_id|quantity|page_size|page_token|[a-z]{0,3}|%[0-9a-f]{2})";
    let values = "[A-Za-z0-9_.~!$&'()*+,;=:@/?-]{0,60}|(%[0-9A-Fa-f]{0,2}){0,30}|-?[0-9]{1,30}";
    let pairs = prop::collection::vec((names, values), 0..5);
    let paths = prop_oneof![Just("/product"), Just("/orders")];
    for_all((paths, pairs), 300, async move |(path, pairs)| {
        let pairs: Vec<_> = pairs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let query = pairs.join("&");
        let request =
            format!("GET {path}?{query} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let status = status(api, request.into_bytes()).await;
        assert!([200, 422].contains(&status), "{status} for {query}");
    })
    .await;
    target.assert_unharmed().await;
}

#[tokio::test]
async fn any_idempotency_key_is_a_key_or_refused() {
    let target = Target::start().await;
    let api = target.server.api;
    let bytes =
        prop_oneof![4 => 0x21_u8..0x7f, 1 => 0x80_u8..=0xff, 1 => Just(b' '), 1 => Just(b'\t')];
    let keys = prop_oneof![
        prop::collection::vec(bytes, 0..300),
        prop::collection::vec(0x21_u8..0x7f, 0..300)
    ];
    for_all(keys, 300, async move |key| {
        let head = b"GET /product HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key:";
        let status = status(api, [head, &key[..], b"\r\n\r\n"].concat()).await;
        // White space around a value is none of it.
        let value = key.trim_ascii();
        let good = value.len() <= 255 && value.iter().all(u8::is_ascii_graphic);
        assert_eq!(status, if good { 200 } else { 422 }, "{value:?}");
    })
    .await;
    target.assert_unharmed().await;
}

#[tokio::test]
async fn any_message_is_answered() {
    let target = Target::start().await;
    let client = target.server.grpc().await;
    let messages = (any::<String>(), any::<Option<u32>>(), any::<String>(), any::<i32>());
    let calling = client.clone();
    for_all(messages, 300, async move |(text, quantity, key, page_size)| {
        let mut client = calling.clone();
        let order = PlaceRequest { product_id: text.clone(), quantity, idempotency_key: key };
        let code = client.place(order).await.map_or_else(|status| status.code(), |_| Code::Ok);
        assert!([Code::Ok, Code::InvalidArgument, Code::AlreadyExists].contains(&code), "{code:?}");
        let list = ListRequest { page_size, page_token: text };
        let code = client.list(list).await.map_or_else(|status| status.code(), |_| Code::Ok);
        assert!([Code::Ok, Code::InvalidArgument].contains(&code), "{code:?}");
    })
    .await;
    drop(client);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn any_grpc_timeout_and_any_bytes_for_messages_are_answered() {
    let target = Target::start().await;
    let client = with_window(target.server.api, 65_535).await;
    let calling = client.clone();
    let timeouts = prop_oneof!["[0-9]{0,10}[HMSmunx]?", "[ -~]{0,20}"];
    let (whole, _) = (grpc("/orders.v1.OrderService/List", &ListRequest::default()).1, ());
    let frames = prop_oneof![
        Just(vec![whole]),
        prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..600).prop_map(Bytes::from),
            0..6
        ),
    ];
    for_all((timeouts, frames), 300, async move |(timeout, frames)| {
        let mut client = calling.clone().ready().await.unwrap();
        let (mut request, _) = grpc("/orders.v1.OrderService/List", &ListRequest::default());
        request.headers_mut().insert("grpc-timeout", timeout.trim().try_into().unwrap());
        let (answer, mut stream) = client.send_request(request, false).unwrap();
        for frame in frames {
            // The answer may come, and the stream end, before all is sent.
            let _ = stream.send_data(frame, false);
        }
        let _ = stream.send_data(Bytes::new(), true);
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), 200);
        let head = answer.headers().get("grpc-status").cloned();
        let mut body = answer.into_body();
        while let Some(Ok(data)) = body.data().await {
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        let trailers = body.trailers().await.ok().flatten();
        let status = head.or_else(|| trailers.and_then(|t| t.get("grpc-status").cloned()));
        assert!(status.is_some());
    })
    .await;
    drop(client);
    target.assert_unharmed().await;
}

/// An HTTP/2 frame with a head that fits its payload, or not.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop::collection::vec(any::<u8>(), 0..64);
    (0_u8..12, any::<u8>(), 0_u8..6, payload, prop::option::weighted(0.1, any::<u16>())).prop_map(
        |(kind, flags, stream, payload, lie)| {
            let length = lie.map_or(payload.len(), usize::from);
            let length = u32::try_from(length).unwrap().to_be_bytes();
            [&length[1..], &[kind, flags, 0, 0, 0, stream], &payload].concat()
        },
    )
}

#[tokio::test]
async fn any_bytes_and_any_frames_end_a_connection_at_most() {
    let target = Target::start().await;
    let api = target.server.api;
    let frames = prop::collection::vec(frame(), 1..20)
        .prop_map(|frames| [PREFACE, SETTINGS, &frames.concat()].concat());
    let bytes = prop_oneof![prop::collection::vec(any::<u8>(), 1..600), frames];
    for_all(bytes, 300, async move |bytes| {
        let mut stream = connect(api).await;
        // The server may have closed it by then.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    target.assert_unharmed().await;
}

/// Writes a piece over and over until the server has enough; how many bytes it took.
async fn endless(api: std::net::SocketAddr, begin: &[u8], piece: &[u8]) -> usize {
    const MOST: usize = 256 * 1024 * 1024;
    let (mut reader, mut writer) = connect(api).await.into_split();
    let reading = tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await });
    let mut taken = 0;
    if writer.write_all(begin).await.is_ok() {
        while taken < MOST && writer.write_all(piece).await.is_ok() {
            taken += piece.len();
        }
    }
    drop(writer);
    let _ = timeout(PATIENCE, reading).await.expect("the connection ends").unwrap();
    taken
}

#[tokio::test]
async fn endless_heads_and_floods_of_frames_are_cut_short_or_cost_nothing() {
    let target = Target::start().await;
    let api = target.server.api;
    let line = [&b"x: "[..], &vec![b'y'; 4096], b"\r\n"].concat();
    let taken = endless(api, b"GET /product HTTP/1.1\r\nhost: x\r\n", &line).await;
    assert!(taken < 16 << 20, "{taken} bytes of an HTTP/1 head");
    // HEADERS that do not end the head, then CONTINUATION for ever.
    let begin = [PREFACE, SETTINGS, b"\0\0\x01\x01\0\0\0\0\x01\x82"].concat();
    let piece = [&b"\0\x40\0\x09\0\0\0\0\x01"[..], &vec![0; 16_384]].concat();
    let taken = endless(api, &begin, &piece).await;
    assert!(taken < 16 << 20, "{taken} bytes of CONTINUATION");
    // PING and SETTINGS that are to be answered, from peers that read and that do not.
    let begin = [PREFACE, SETTINGS].concat();
    for piece in [&b"\0\0\x08\x06\0\0\0\0\0pingpong"[..], SETTINGS] {
        let flood = piece.repeat(4096);
        let mut deaf = connect(api).await;
        deaf.write_all(&begin).await.unwrap();
        let flooding = async { while deaf.write_all(&flood).await.is_ok() {} };
        // The length of the flood: the server stops to read it, or closes.
        let _ = timeout(Duration::from_secs(2), flooding).await;
    }
    target.assert_unharmed().await;
}
