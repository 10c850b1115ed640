//! The admin listener: what is on its page from the start, probes, stuck scrapers, the final
//! scrape.

use bytes::Bytes;
use reqwest::Client;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    in_process::place,
    peers::{closed, connect, response},
    support::{PATIENCE, Page, Process, scrape_until},
};

#[tokio::test]
async fn every_series_exists_at_0_after_the_start() {
    let server = Process::start("sqlite::memory:", &["--max-in-flight", "77"]).await;
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 0.0);
    assert_eq!(page.value("requests_in_flight_limit", &[]), 77.0);
    let build = ["version=\"0.1.0\"", "revision="];
    assert_eq!(page.value("order_service_build_info", &build), 1.0);
    for method in ["Place", "Get", "List", "other"] {
        let label = format!("grpc_method=\"{method}\"");
        let codes = page.series("grpc_server_handled_total", &[&label]).count();
        assert_eq!(codes, 17, "{method}");
        for name in
            ["started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count"]
        {
            assert_eq!(page.value(&format!("grpc_server_{name}"), &[&label]), 0.0);
        }
    }
    for (url, method, codes) in [
        ("/product", "GET", &["200", "422", "499", "500", "503", "504"][..]),
        (
            "/product",
            "POST",
            &["200", "201", "400", "408", "413", "415", "422", "499", "500", "503", "504"],
        ),
        ("/product", "HEAD", &["405"]),
        ("/orders", "GET", &["200", "422", "499", "500", "503", "504"]),
        ("/orders/{order_id}", "GET", &["200", "404", "499", "500", "503", "504"]),
        ("unmatched", "GET", &["400", "404", "499"]),
        ("unmatched", "OTHER", &["404"]),
    ] {
        let (url, method) = (format!("url=\"{url}\""), format!("method=\"{method}\""));
        for code in codes {
            let code = format!("code=\"{code}\"");
            assert_eq!(page.value("http_requests_total_with_path", &[&url, &method, &code]), 0.0);
        }
    }
    assert_eq!(page.value("log_lines_dropped_total", &[]), 0.0);
    for reason in [
        "bad_request",
        "head_too_large",
        "enhance_your_calm",
        "compression_error",
        "flow_control_error",
        "frame_size_error",
        "protocol_error",
        "other",
    ] {
        let reason = format!("reason=\"{reason}\"");
        assert_eq!(page.value("connections_aborted_total", &[&reason]), 0.0);
    }
    for protocol in ["protocol=\"grpc\"", "protocol=\"http\""] {
        assert_eq!(page.value("requests_in_flight", &[protocol]), 0.0);
        assert_eq!(page.value("request_panics_total", &[protocol]), 0.0);
        assert_eq!(page.value("requests_malformed_total", &[protocol]), 0.0);
        for reason in ["in_flight", "queue_full", "readers_busy"] {
            let reason = format!("reason=\"{reason}\"");
            assert_eq!(page.value("requests_shed_total", &[protocol, &reason]), 0.0);
        }
    }
    for reason in ["limit", "read_timeout", "tls"] {
        let reason = format!("reason=\"{reason}\"");
        assert_eq!(page.value("connections_refused_total", &[&reason]), 0.0);
    }
    for kind in ["unavailable", "timeout", "conflict", "constraint", "full", "other"] {
        assert_eq!(page.value("order_store_errors_total", &[&format!("kind=\"{kind}\"")]), 0.0);
    }
    assert_eq!(page.value("order_store_up", &[]), 1.0, "it has answered");
    for name in [
        "connections_open",
        "connections_accepted_total",
        "order_store_queue_orders",
        "order_store_commit_duration_seconds_count",
        "order_store_batch_orders_count",
    ] {
        assert_eq!(page.value(name, &[]), 0.0, "{name}");
    }
}

#[tokio::test]
async fn the_process_tells_what_it_takes() {
    let server = Process::start("sqlite::memory:", &["--worker-threads", "3"]).await;
    let page = server.scrape().await;
    assert_eq!(page.value("tokio_workers", &[]), 3.0);
    assert!(page.value("process_threads", &[]) >= 4.0);
    let megabytes = page.value("process_resident_memory_bytes", &[]) / 1e6;
    assert!((1.0..500.0).contains(&megabytes), "{megabytes}");
    let fds = page.value("process_open_fds", &[]);
    assert!(fds >= 5.0 && fds < page.value("process_max_fds", &[]));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - page.value("process_start_time_seconds", &[]);
    // The kernel tells the boot time in whole seconds.
    assert!((-1.5..60.0).contains(&age), "{age}");

    // Work for less than a second shows, since fractions are counted.
    let cpu = page.value("process_cpu_seconds_total", &[]);
    let more =
        scrape_until(server.admin, |page| page.value("process_cpu_seconds_total", &[]) > cpu).await;
    let took = more.value("process_cpu_seconds_total", &[]) - cpu;
    assert!(took < 1.0, "{took}");
}

#[tokio::test]
async fn the_admin_routes_answer_as_scrapers_and_probes_expect() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let client = Client::new();
    let url = |path: &str| format!("http://{}{path}", server.admin);
    let page = client.get(url("/metrics")).send().await.unwrap();
    assert_eq!(page.headers()["content-type"], "text/plain; version=0.0.4");
    assert!(!page.headers().contains_key("content-encoding"));
    let plain = page.text().await.unwrap();
    let zipped =
        client.get(url("/metrics")).header("accept-encoding", "gzip").send().await.unwrap();
    assert_eq!(zipped.headers()["content-encoding"], "gzip");
    // Its length is told, so it was compressed before it was handed to the connection's thread.
    assert!(zipped.headers().contains_key("content-length"), "{zipped:?}");
    let zipped: Bytes = zipped.bytes().await.unwrap();
    assert!(zipped.starts_with(&[0x1f, 0x8b]) && zipped.len() * 4 < plain.len());

    for path in ["/livez", "/readyz"] {
        assert_eq!(client.get(url(path)).send().await.unwrap().text().await.unwrap(), "ok\n");
    }
    let root = client.get(url("/")).send().await.unwrap().text().await.unwrap();
    assert!(["/metrics", "/livez", "/readyz"].iter().all(|path| root.contains(path)));
    for path in ["/", "/metrics", "/livez", "/readyz"] {
        assert_eq!(client.head(url(path)).send().await.unwrap().status(), 200);
        let refused = client.post(url(path)).send().await.unwrap();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["allow"]),
            (405, &"GET, HEAD".parse().unwrap())
        );
    }
    assert_eq!(client.get(url("/nowhere")).send().await.unwrap().status(), 404);
}

#[tokio::test]
async fn a_stuck_scraper_holds_neither_the_api_nor_the_end() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut stuck = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(server.admin).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        stuck.push(stream);
    }
    let mut silent = TcpStream::connect(server.admin).await.unwrap();
    server.grpc().await.place(place("book")).await.unwrap();
    assert_eq!(server.terminate().await, Some(0));
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn dead_clients_do_not_take_the_port() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut dead = Vec::new();
    for _ in 0..60 {
        let mut stream = TcpStream::connect(server.admin).await.unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
        dead.push(stream);
    }
    server.scrape().await;
    for mut stream in dead {
        let closed = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await;
        closed.expect("an idle connection is closed").unwrap();
    }
    server.scrape().await;
}

/// One more takes the place of the one that has been idle longest: whoever reaches the port could
/// keep probes out otherwise, and the pod would be restarted.
#[tokio::test]
async fn the_port_takes_64_connections() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut peers = Vec::new();
    for _ in 0..80 {
        let mut peer = connect(server.admin).await;
        assert!(get_livez(&mut peer).await);
        peers.push(peer);
    }
    for peer in &mut peers[..16] {
        closed(peer).await;
    }
    for peer in &mut peers[16..] {
        assert!(get_livez(peer).await);
    }
    // Those that say nothing at all are the same.
    for _ in 0..64 {
        peers.push(connect(server.admin).await);
    }
    for _ in 0..64 {
        assert!(get_livez(&mut connect(server.admin).await).await);
    }
}

/// Whether the probe is answered.
async fn get_livez(peer: &mut TcpStream) -> bool {
    peer.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    timeout(PATIENCE, response(peer)).await.unwrap().starts_with("http/1.1 200")
}

#[tokio::test]
async fn a_scraper_that_does_not_read_is_cut_off() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let before = server.scrape().await.value("process_open_fds", &[]);
    let mut stuck = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(server.admin).await.unwrap();
        // More pages than the sockets' buffers hold.
        let requests = "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".repeat(300);
        stream.write_all(requests.as_bytes()).await.unwrap();
        stuck.push(stream);
    }
    let held = |page: &Page| page.value("process_open_fds", &[]) - before;
    scrape_until(server.admin, |page| held(page) >= 20.0).await;
    // A few are the scrapes' own.
    scrape_until(server.admin, |page| held(page) < 10.0).await;
}

#[tokio::test]
async fn the_last_orders_are_seen_by_a_final_scrape() {
    let mut server = Process::start("sqlite::memory:", &["--final-scrape-timeout", "60s"]).await;
    server.grpc().await.place(place("book")).await.unwrap();
    server.signal(rustix::process::Signal::TERM);
    server.logged("draining: waiting for the final scrape").await;
    // Probes and HEAD are no scrapes.
    let client = Client::new();
    let metrics = format!("http://{}/metrics", server.admin);
    let ready = client.get(format!("http://{}/readyz", server.admin)).send().await.unwrap();
    assert_eq!(
        (ready.status().as_u16(), ready.text().await.unwrap()),
        (503, "draining\n".to_owned())
    );
    let live = client.get(format!("http://{}/livez", server.admin)).send().await.unwrap();
    assert_eq!(live.status(), 200);
    client.head(&metrics).send().await.unwrap();
    let page = Page(client.get(&metrics).send().await.unwrap().text().await.unwrap());
    assert_eq!(page.value("product_order_total", &[]), 1.0);
    assert_eq!(server.exited().await.code(), Some(0));
}
