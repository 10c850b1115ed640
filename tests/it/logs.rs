//! The log lines of requests: one for each failure, with the names by which the request is known,
//! and no more than strangers may cause.

use std::{
    fs::File,
    io,
    panic::{set_hook, take_hook},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use order_service::{config::LogFormat, logs, panics};
use regex::Regex;
use reqwest::Client;
use rustix::process::Signal;
use serde_json::Value;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_prost::ProstCodec;
use tracing::{Dispatch, dispatcher::DefaultGuard, subscriber::NoSubscriber};
use tracing_subscriber::fmt::MakeWriter;

use crate::{
    in_process::{InProcess, STREAM, place},
    log_stream::Server,
    peers::{call, grpc, with_window},
    support::{PATIENCE, Process, channel, exchange},
};

pub const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

const ONE_THREAD: [&str; 2] = ["--worker-threads", "1"];

/// Keeps what is logged on this thread, on which all of a test's server runs, too, if it has but
/// one.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Logs as the program does, with this `RUST_LOG`, for as long as what it returns lives.
    fn capture(&self, filter: &str) -> (Dispatch, DefaultGuard) {
        // Of a subscriber that is the only one tracing asks whether anybody wants a line on the
        // thread that comes to it first, once for all threads. On another test's thread nobody
        // does.
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

/// How many requests lines of a level report, one by one or by their number.
fn reported(lines: &[Value], level: &str) -> u64 {
    let lines = lines.iter().filter(|line| line["level"] == level);
    lines
        .map(|line| match line["message"].as_str().unwrap_or_default() {
            "request failed" => 1,
            text if text.starts_with("a response was cut off") => 1,
            text if text.starts_with("further requests ") => line["requests"].as_u64().unwrap(),
            _ => 0,
        })
        .sum()
}

/// Waits until exactly that many requests are reported. Checks that no second has more than ten
/// lines about single requests, and more than one with a number.
async fn reported_within_the_limit(server: &Process, level: &str, requests: u64) {
    let begun = Instant::now();
    while reported(&server.log(), level) < requests {
        assert!(begun.elapsed() < PATIENCE, "{:?}", server.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let log = server.log();
    assert_eq!(reported(&log, level), requests, "{log:?}");
    let times = |further: bool| {
        let lines = log.iter().filter(|line| reported(&[(*line).clone()], level) > 0);
        times(lines.filter(|line| line["requests"].is_u64() == further))
    };
    let (single, further) = (times(false), times(true));
    assert!(single.len() >= 10 && !further.is_empty(), "{log:?}");
    assert!(are_apart(&single, 10) && are_apart(&further, 1), "{log:?}");
}

/// When lines were written.
pub fn times<'l>(lines: impl Iterator<Item = &'l Value>) -> Vec<SystemTime> {
    let times = lines.map(|line| line["timestamp"].as_str().unwrap());
    times.map(|time| humantime::parse_rfc3339(time).unwrap()).collect()
}

/// Whether no second has more lines than that. Half a second, since a line's timestamp is a moment
/// later than the check of the limit.
pub fn are_apart(times: &[SystemTime], lines: usize) -> bool {
    let gap = |window: &[SystemTime]| window[lines].duration_since(window[0]).unwrap();
    times.windows(lines + 1).all(|window| gap(window) > Duration::from_millis(500))
}

#[tokio::test]
async fn refused_requests_write_few_short_lines_and_their_number() {
    let mut server = Process::start("sqlite::memory:", &[]).await;
    let client = Client::new();
    let path = format!("/nowhere/{}", "x".repeat(2000));
    let trace = "1".repeat(2000);
    let refuse = async || {
        let begun = Instant::now();
        for _ in 0..200 {
            let request = client.get(server.url(&path)).header("traceparent", &trace);
            assert_eq!(request.send().await.unwrap().status(), 404);
        }
        begun.elapsed()
    };
    let took = refuse().await;
    reported_within_the_limit(&server, "INFO", 200).await;
    let log = server.log();
    for line in log.iter().filter(|line| line["message"] == "request failed") {
        let path = line["path"].as_str().unwrap();
        assert!(path.ends_with("x…") && path.len() == 256 + "…".len(), "{line}");
        assert_eq!(line["traceparent"], "", "{line}");
        assert!(line.to_string().len() < 700, "{line}");
    }
    let bytes: usize = log.iter().map(|line| line.to_string().len()).sum();
    let seconds = usize::try_from(took.as_secs()).unwrap() + 1;
    assert!(bytes < 10_000 * seconds, "{bytes} bytes in {took:?}");

    // The end of the process omits none either.
    refuse().await;
    server.signal(Signal::TERM);
    assert_eq!(server.exited().await.code(), Some(0));
    assert_eq!(reported(&server.log(), "INFO"), 400, "{:?}", server.log());
}

#[tokio::test]
async fn lines_about_deadlines_are_limited_whoever_set_them() {
    let args = ["--processing-delay", "60s", "--request-timeout", "300ms"];
    let server = Process::start("sqlite::memory:", &args).await;
    let client = Client::builder().http2_prior_knowledge().build().unwrap();
    for (timeout, level, other) in [("1m", "INFO", "WARN"), ("60S", "WARN", "INFO")] {
        let already = reported(&server.log(), other);
        let calls = (0..30).map(|_| {
            // A gRPC client would keep its timeout by itself; this one waits for the server's
            // answer.
            let (request, body) = grpc("/orders.v1.OrderService/Place", &place("book"));
            let request = client.post(server.url(request.uri().path())).body(body);
            let request = request.header("content-type", "application/grpc");
            request.header("te", "trailers").header("grpc-timeout", timeout).send()
        });
        for answer in futures_util::future::join_all(calls).await {
            assert_eq!(answer.unwrap().headers()["grpc-status"], "4");
        }
        reported_within_the_limit(&server, level, 30).await;
        assert_eq!(reported(&server.log(), other), already, "{:?}", server.log());
    }
}

#[tokio::test]
async fn lines_about_responses_that_nobody_reads_are_limited() {
    let server = Process::start("sqlite::memory:", &["--request-timeout", "100ms"]).await;
    let mut client = with_window(server.api, 0).await;
    let mut unread = Vec::new();
    for _ in 0..30 {
        let answer = call(&mut client, crate::peers::place()).await;
        unread.push(answer.await.unwrap());
    }
    reported_within_the_limit(&server, "INFO", 30).await;
}

#[tokio::test]
async fn failures_of_the_service_are_never_omitted() {
    log_panics_and_print_them();
    let log = Log::default();
    let _capturing = log.capture("info");
    let server = InProcess::start(&ONE_THREAD).await;
    for _ in 0..30 {
        let request = reqwest::Client::new().get(server.url("/test/panic"));
        request.header("x-request-id", "panics").send().await.unwrap();
    }
    server.stop().await;
    assert_eq!(log.of_request("panics").len(), 30);
}

#[tokio::test]
async fn in_text_format_a_stranger_forges_neither_fields_nor_lines() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let server = Server::start(&[], File::create(&path).unwrap()).await;
    // The cause quotes the encoding; id, path and method are the stranger's as well.
    let mut client = with_window(server.api, 65_535).await;
    let (mut request, body) = grpc("/orders.v1.OrderService/Place", &place("book"));
    request.headers_mut().insert("grpc-encoding", "zz level=error forged=1".parse().unwrap());
    request.headers_mut().insert("x-request-id", "id\"forged=2".parse().unwrap());
    let compressed = [&[1], &body[1..]].concat();
    call(&mut client, (request, Bytes::from(compressed))).await.await.unwrap();
    let odd = "GET /x\"\u{e4}forged=3 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    exchange(server.api, odd.as_bytes()).await;
    let odd = "GET'forged! /nowhere HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    exchange(server.api, odd.as_bytes()).await;
    let bad = "/product?product_id=%22%0Aforged=4&quantity=%22+forged%3D5";
    reqwest::get(format!("http://{}{bad}", server.api)).await.unwrap();
    let json = "{\"a forged=6\n";
    let request = Client::new().post(format!("http://{}/product", server.api)).body(json);
    request.header("content-type", "application/json; forged=7").send().await.unwrap();
    server.drains().await;

    let log = std::fs::read_to_string(path).unwrap();
    let quoted = Regex::new(r#""(\\.|[^"\\])*""#).unwrap();
    let field = Regex::new(r"(\w+)=").unwrap();
    let (mut failed, expected) =
        (0, ["request_id", "traceparent", "protocol", "method", "path", "code", "cause"]);
    for line in log.lines() {
        let unquoted = quoted.replace_all(line, "Q");
        assert!(!unquoted.contains("forged=") && unquoted.contains(" order_service"), "{line}");
        if line.contains("request failed") {
            failed += 1;
            let fields: Vec<_> =
                field.captures_iter(&unquoted).map(|found| found[1].to_owned()).collect();
            assert_eq!(fields, expected, "{line}");
        }
    }
    assert_eq!(failed, 5, "{log}");
    assert!(
        log.contains(r#"cause="Content is compressed with `zz level=error forged=1`"#),
        "{log}"
    );
}
