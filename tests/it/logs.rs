//! The log lines of requests: one for each failure, with the names by which the request is known.

use std::{
    io,
    panic::{set_hook, take_hook},
    sync::{Arc, Mutex},
};

use order_service::{config::LogFormat, logs, panics};
use rustix::process::Signal;
use serde_json::Value;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_prost::ProstCodec;
use tracing::{Dispatch, dispatcher::DefaultGuard, subscriber::NoSubscriber};
use tracing_subscriber::fmt::MakeWriter;

use crate::{
    in_process::{InProcess, STREAM, place},
    peers::{call, grpc, with_window},
    support::{Process, channel},
};

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

const ONE_THREAD: [&str; 2] = ["--worker-threads", "1"];

/// Keeps what is logged on this thread, on which all of a test's server runs, too, if it has but one.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Logs as the program does, with this `RUST_LOG`, for as long as what it returns lives.
    fn capture(&self, filter: &str) -> (Dispatch, DefaultGuard) {
        // Of a subscriber that is the only one tracing asks whether anybody wants a line on the thread that
        // comes to it first, once for all threads. On another test's thread nobody does.
        let silent = Dispatch::new(NoSubscriber::default());
        let subscriber = logs::subscriber(LogFormat::Json, Some(filter), self.clone()).unwrap();
        (silent, tracing::subscriber::set_default(subscriber))
    }

    /// The lines of one request.
    fn of_request(&self, id: &str) -> Vec<Value> {
        let log = self.0.lock().unwrap();
        let lines = std::str::from_utf8(&log).unwrap().lines();
        let lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["request_id"] == id || line["span"]["request_id"] == id).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// The hook is the process's: other tests that fail must still say why.
fn log_panics_and_print_them() {
    let print = take_hook();
    panics::log_panics();
    let log = take_hook();
    set_hook(Box::new(move |panic| {
        log(panic);
        print(panic);
    }));
}

#[tokio::test]
async fn a_panic_is_logged_once_with_its_place_and_its_request() {
    log_panics_and_print_them();
    let log = Log::default();
    let _capturing = log.capture("info");
    let server = InProcess::start(&ONE_THREAD).await;
    let http = reqwest::Client::new();

    for (id, path) in [("rest-head", "/test/panic"), ("rest-body", "/test/panic-body")] {
        let request = http.get(server.url(path)).header("x-request-id", id);
        let answer = request.header("traceparent", TRACE).send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await);
        assert_eq!((status == 500, text.is_err()), (id == "rest-head", id == "rest-body"));
        assert!(!text.unwrap_or_default().contains("panic"));
    }
    for (id, end) in [("grpc-head", "panic"), ("grpc-body", "panics-third")] {
        let mut grpc = tonic::client::Grpc::new(channel(server.api).await);
        grpc.ready().await.unwrap();
        let codec = ProstCodec::<_, order_service::proto::PlaceResponse>::default();
        let mut request = tonic::Request::new(place(end));
        request.metadata_mut().insert("x-request-id", id.parse().unwrap());
        request.metadata_mut().insert("traceparent", TRACE.parse().unwrap());
        let path = http::uri::PathAndQuery::from_static(STREAM);
        let status = match grpc.server_streaming(request, path, codec).await {
            Err(status) => status,
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(message) => assert!(message.is_some()),
                        Err(status) => break status,
                    }
                }
            }
        };
        assert_eq!(status.code(), Code::Internal);
        assert!(!format!("{status:?}").contains("panic"), "{status:?}");
    }
    server.stop().await;
    for id in ["rest-head", "rest-body", "grpc-head", "grpc-body"] {
        let lines = log.of_request(id);
        assert_eq!(lines.len(), 1, "{id}: {lines:?}");
        let cause = lines[0]["cause"].as_str().unwrap();
        let what = if id.ends_with("head") { "the handler panics" } else { "the body panics" };
        assert!(cause.contains(what) && cause.contains("tests/it/in_process.rs:"), "{cause}");
        assert_eq!(
            (&lines[0]["level"], &lines[0]["traceparent"]),
            (&"ERROR".into(), &TRACE.into())
        );
    }
}

#[tokio::test]
async fn every_line_of_a_request_names_it_and_success_is_silent() {
    let log = Log::default();
    let capturing = log.capture("info");
    let server = InProcess::start(&ONE_THREAD).await;
    let http = reqwest::Client::new();
    let get = async |id: &str, path: &str| {
        let request = http.get(server.url(path)).header("x-request-id", id);
        request.header("traceparent", TRACE).send().await.unwrap().bytes().await.unwrap();
    };
    get("well", "/product").await;
    get("bad", "/product?quantity=0").await;
    assert_eq!(log.of_request("well"), Vec::<Value>::new());
    let lines = log.of_request("bad");
    assert_eq!(lines.len(), 1, "{lines:?}");
    for (member, value) in [
        ("level", "INFO"),
        ("message", "request failed"),
        ("traceparent", TRACE),
        ("protocol", "http"),
        ("method", "GET"),
        ("path", "/product"),
        ("code", "422"),
    ] {
        assert_eq!(lines[0][member], value, "{lines:?}");
    }
    assert!(lines[0]["cause"].as_str().unwrap().contains("quantity"), "{lines:?}");
    server.stop().await;
    drop(capturing);

    // What the parts log for those who debug is inside of the request's span.
    let _capturing = log.capture("debug");
    let server = InProcess::start(&ONE_THREAD).await;
    let request = http.get(server.url("/test/logs")).header("x-request-id", "debugged");
    request.header("traceparent", TRACE).send().await.unwrap();
    server.stop().await;
    let lines = log.of_request("debugged");
    let inner = lines.iter().find(|line| line["message"] == "a line of the handler");
    let span = &inner.unwrap_or_else(|| panic!("{lines:?}"))["span"];
    assert_eq!((&span["request_id"], &span["traceparent"]), (&"debugged".into(), &TRACE.into()));
}

#[tokio::test]
async fn a_response_that_is_cut_off_is_told_with_its_request() {
    let mut server = Process::start("sqlite::memory:", &["--request-timeout", "100ms"]).await;
    let mut unread = Vec::new();
    // Health has no time limit before its connection is asked to go.
    for (id, path) in
        [("timed", "/orders.v1.OrderService/Place"), ("exempt", "/grpc.health.v1.Health/Watch")]
    {
        let mut client = with_window(server.api, 0).await;
        let (mut request, message) = match id {
            "timed" => grpc(path, &place("book")),
            _ => grpc(path, &HealthCheckRequest::default()),
        };
        request.headers_mut().insert("x-request-id", id.parse().unwrap());
        request.headers_mut().insert("traceparent", TRACE.parse().unwrap());
        let answer = call(&mut client, (request, message)).await.await.unwrap();
        unread.push((client, answer));
    }
    server.signal(Signal::TERM);
    assert_eq!(server.exited().await.code(), Some(0));
    server.logged("drained").await;
    let log = server.log().into_iter();
    let cut = log.filter(|line| line["message"].as_str().unwrap().contains("cut off"));
    let mut named: Vec<_> =
        cut.map(|line| [line["request_id"].clone(), line["traceparent"].clone()]).collect();
    named.sort_by_key(|names| names[0].to_string());
    assert_eq!(named, [["exempt", TRACE], ["timed", TRACE]]);
}

#[tokio::test]
async fn a_line_is_one_json_object_or_one_line_of_text() {
    let mut server = Process::start("sqlite::memory:", &[]).await;
    let line = server.logged("serving").await;
    for member in ["timestamp", "level", "target", "version", "api", "admin", "database"] {
        assert!(line[member].is_string(), "{member} in {line}");
    }
    server.signal(Signal::TERM);
    assert_eq!(server.exited().await.code(), Some(0));
    assert!(server.log().iter().all(Value::is_object), "{:?}", server.log());

    let log = Log::default();
    let lines = logs::subscriber(LogFormat::Text, None, log.clone()).unwrap();
    tracing::subscriber::with_default(lines, || tracing::info!(order = 7, "it is placed"));
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text:?}");
    assert!(text.contains("INFO") && text.contains("order=7"), "{text:?}");
}
