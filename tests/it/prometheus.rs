//! The metrics in a real Prometheus: its own check of the page, and the number that KEDA scales on.

use std::{fs, path::Path, process::Stdio, time::Duration};

use rustix::process::Signal;
use serde_json::json;
use sqlx::{Connection as _, Row as _, SqliteConnection};
use tokio::{
    io::AsyncWriteExt as _,
    process::Command,
    task::JoinSet,
    time::{Instant, interval_at, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    prometheus_server::{Prometheus, free_port, now},
    support::{PATIENCE, Process, database_in},
};

/// `promtool check metrics` with a page; returns what it complains of.
async fn promtool(page: &str) -> String {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = command.spawn().expect("promtool is installed");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).await.unwrap();
    let output = promtool.wait_with_output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    text(output.stdout) + &text(output.stderr)
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn promtool_accepts_the_page() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let page = server.scrape().await;
    let complaints = promtool(&page.0).await;
    // The first name is the tutorial's, and its users' queries rest on it.
    let others: Vec<_> = complaints
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("http_requests_total_with_path "))
        .collect();
    assert_eq!(others, Vec::<&str>::new());
    // It would have told.
    assert!(promtool("orders_total 1\norders_total 2\n").await.contains("orders_total"));
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn the_queries_of_the_readme_are_queries() {
    let readme = fs::read_to_string("README.md").unwrap();
    let block = readme.split("```promql\n").nth(1).unwrap().split("```").next().unwrap();
    let squeezed = |text: &str| text.split_whitespace().collect::<String>();
    let exact = EXACT.replace("1m", "5m").replace("75", "315");
    assert_eq!(squeezed(block), squeezed(&exact), "the tested query is the README's");

    let rows = crate::readme::metric_rows();
    let queries = rows.iter().map(|row| row.example.as_str()).chain([block]);
    let rules: Vec<_> = queries
        .enumerate()
        .map(|(i, query)| json!({"record": format!("query:{i}"), "expr": query}))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules.yml");
    fs::write(&file, json!({"groups": [{"name": "readme", "rules": rules}]}).to_string()).unwrap();
    let checked = Command::new("promtool").args(["check", "rules"]).arg(&file).output().await;
    let output = checked.expect("promtool is installed");
    assert!(output.status.success(), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("FAILED"), "{output:?}");
}

/// Debian's promtool, which runs the same file, has the engine of Prometheus 2.
#[tokio::test]
#[ignore = "needs promql3; run by make test"]
async fn prometheus_3_counts_exactly_too() {
    let mut command = Command::new("promql3");
    command.arg("prometheus/tests/exact-count.yml");
    let output = command.output().await.expect("promql3 is installed");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains(" 0 failed"), "{output:?}");
}

/// A server whose admin port is known before it starts.
async fn server(dir: &Path, admin: u16) -> Process {
    let admin = format!("127.0.0.1:{admin}");
    Process::start_in(dir, &["--final-scrape-timeout", "10s", "--admin-listen", &admin]).await
}

/// Orders at a steady rate until told to stop.
async fn load(url: String, per_second: f64, stop: CancellationToken) {
    let client = reqwest::Client::new();
    let mut ticks = interval_at(Instant::now(), Duration::from_secs_f64(1.0 / per_second));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {
                assert_eq!(client.get(&url).send().await.unwrap().status(), 200);
            }
        }
    }
}

/// Orders that were placed in a window, as their rows tell.
async fn stored(dir: &Path, from: f64, to: f64) -> f64 {
    let mut connection = SqliteConnection::connect(&database_in(dir)).await.unwrap();
    let count = "SELECT COUNT(*) FROM orders WHERE placed_at >= ? AND placed_at <= ?";
    let query = sqlx::query(count).bind((from * 1e3) as i64).bind((to * 1e3) as i64);
    query.fetch_one(&mut connection).await.unwrap().get::<i64, _>(0) as f64
}

/// The query of the README that counts every order, with a window of a minute.
const EXACT: &str = r#"
sum(
  (
    last_over_time(product_order_total{job="order-service"}[1m]) + max_over_time(product_order_total{job="order-service"}[75s]) * resets(product_order_total{job="order-service"}[75s])
    - (last_over_time(product_order_total{job="order-service"}[15s] offset 1m) or 0 * (min_over_time(process_start_time_seconds{job="order-service"}[1m]) > time() - 75))
    and resets(product_order_total{job="order-service"}[75s]) == (last_over_time(product_order_total{job="order-service"}[1m]) < bool max_over_time(product_order_total{job="order-service"}[75s]))
    unless resets(product_order_total{job="order-service"}[15s] offset 1m) > 0
  )
  or increase(product_order_total{job="order-service"}[1m])
)"#;
const TUTORIAL: &str = r#"sum(rate(product_order_total{job="order-service"}[1m])) * 60"#;

#[tokio::test]
#[ignore = "needs prometheus; run by make test"]
async fn the_number_that_keda_scales_on_is_the_number_of_stored_orders() {
    let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut admins = Vec::new();
    for _ in &dirs {
        admins.push(free_port().await);
    }
    let targets: Vec<_> = admins.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let prometheus = Prometheus::scraping(&targets).await;
    let mut servers = Vec::new();
    for i in 0..3 {
        servers.push(server(dirs[i].path(), admins[i]).await);
    }
    let (stop, stop_first) = (CancellationToken::new(), CancellationToken::new());
    let mut loads = JoinSet::new();
    for (i, server) in servers.iter().enumerate() {
        let stop = if i == 0 { stop_first.clone() } else { stop.clone() };
        loads.spawn(load(server.url("/product"), 10.0 + 5.0 * i as f64, stop));
    }

    let begun = Instant::now();
    let at = |seconds| sleep_until(begun + Duration::from_secs(seconds));
    // While orders come: what the query says, and when it was asked.
    let mut looks = Vec::new();
    let mut look = async || {
        let asked = now();
        looks.push((asked, prometheus.value(EXACT, asked).await));
    };
    at(8).await;
    // The balancer takes the first one out of rotation, and it ends.
    stop_first.cancel();
    let mut first = servers.remove(0);
    first.signal(Signal::TERM);
    look().await;
    at(10).await;
    let fourth = server(dirs[3].path(), admins[3]).await;
    loads.spawn(load(fourth.url("/product"), 20.0, stop.clone()));
    servers.push(fourth);
    for second in 11..22 {
        at(second).await;
        look().await;
    }
    at(22).await;
    stop.cancel();
    loads.join_all().await;
    assert_eq!(first.exited().await.code(), Some(0));

    // A scrape of each that is left has followed the last order.
    let ended = now();
    let waiting = async {
        loop {
            let query = r#"timestamp(product_order_total{job="order-service"})"#;
            let scraped = prometheus.query(query, now()).await;
            if scraped.len() == 3 && scraped.iter().all(|(_, time)| *time > ended) {
                return now();
            }
        }
    };
    let asked = tokio::time::timeout(PATIENCE, waiting).await.expect("scrapes follow");
    let all = async |from, to| {
        let mut all = 0.0;
        for dir in &dirs {
            all += stored(dir.path(), from, to).await;
        }
        all
    };
    let truth = all(asked - 60.0, asked).await;
    let exact = prometheus.value(EXACT, asked).await;
    let tutorial = prometheus.value(TUTORIAL, asked).await;
    println!(
        "orders stored {truth}; exact query {exact:.1} ({:.3}), tutorial's {tutorial:.1} ({:.3})",
        exact / truth,
        tutorial / truth
    );
    assert!(truth > 600.0, "{truth}");
    // The window holds all of it.
    assert_eq!(exact, truth);
    // A scrape each second, and its duration: what was placed before is counted, and nothing that was
    // not placed yet.
    const LAG: f64 = 3.0;
    assert_eq!(looks.len(), 12);
    for (asked, exact) in looks {
        let (least, most) = (all(asked - 60.0, asked - LAG).await, all(asked - 60.0, asked).await);
        assert!((least..=most).contains(&exact), "{exact} of {least} to {most}");
        assert_eq!(exact.fract(), 0.0, "{exact}");
    }
}
