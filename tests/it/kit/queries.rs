//! What KEDA asks, on a real Prometheus that scrapes real processes: one element each time, for it
//! takes any other number for an error.

use std::env;

use rustix::process::Signal;
use serde_json::json;
use tokio::time::timeout;

use super::triggers;
use crate::{
    prometheus_server::{Prometheus, now},
    support::{PATIENCE, Process},
};

/// The replicas, scraped each second under the labels that the chart's values give, with the kit's rules.
async fn scraping(replicas: &[Process]) -> Prometheus {
    let targets = |name: &str, replica: &Process| {
        let labels = json!({"namespace": "orders", "pod": name});
        json!({"targets": [replica.admin.to_string()], "labels": labels})
    };
    let targets: Vec<_> = ["a", "b", "c"]
        .iter()
        .zip(replicas)
        .map(|(name, replica)| targets(name, replica))
        .collect();
    let rules = env::current_dir().unwrap().join("prometheus/rules/*.yml");
    Prometheus::configured(json!({
        "rule_files": [rules],
        "scrape_configs": [{"job_name": "order-service", "static_configs": targets}],
    }))
    .await
}

/// Waits until a query has a value for which the condition holds.
async fn until(prometheus: &Prometheus, query: &str, condition: impl Fn(f64) -> bool) {
    let waiting = async {
        loop {
            let elements = prometheus.query(query, now()).await;
            if elements.iter().any(|(_, value)| condition(*value)) {
                return;
            }
        }
    };
    let waited = timeout(PATIENCE, waiting).await;
    waited.unwrap_or_else(|_| panic!("{query} does not come to it"));
}

/// Each query of both overlays, and its one value.
async fn values(prometheus: &Prometheus) -> Vec<(String, f64)> {
    let mut values = Vec::new();
    for overlay in ["demo", "production"] {
        for (name, query, _) in triggers(&format!("k8s/overlays/{overlay}")).await {
            values.push((format!("{overlay} {name}"), prometheus.value(&query, now()).await));
        }
    }
    values
}

#[tokio::test]
#[ignore = "needs prometheus and kustomize; run by make test"]
async fn what_keda_asks_has_one_answer_idle_busy_and_while_a_replica_ends() {
    let mut replicas = Vec::new();
    for _ in 0..2 {
        replicas.push(Process::start("sqlite::memory:", &[]).await);
    }
    let prometheus = scraping(&replicas).await;
    let twice = r#"min(count_over_time(product_order_total{job="order-service"}[1m]))"#;
    let both = r#"count(product_order_total{job="order-service"})"#;
    until(&prometheus, &format!("{twice} and on () ({both} == 2)"), |samples| samples >= 2.0).await;
    let idle = values(&prometheus).await;
    assert_eq!(idle.len(), 3);
    assert!(idle.iter().all(|(_, value)| *value == 0.0), "{idle:?}");

    for replica in &replicas {
        for _ in 0..15 {
            assert_eq!(reqwest::get(replica.url("/product")).await.unwrap().status(), 200);
        }
    }
    until(&prometheus, r#"sum(product_order_total{job="order-service"})"#, |sum| sum == 30.0).await;
    let busy = values(&prometheus).await;
    assert!((busy[1].1 - 30.0).abs() < 0.01, "the exact count: {busy:?}");
    assert!(busy[0].1 > 0.0, "{busy:?}");

    // One ends. Its orders are still those of the last minute.
    let mut first = replicas.remove(0);
    first.signal(Signal::TERM);
    assert_eq!(first.exited().await.code(), Some(0));
    until(&prometheus, &format!("{both} == 1"), |_| true).await;
    let after = values(&prometheus).await;
    assert!((after[1].1 - 30.0).abs() < 0.01, "the exact count: {after:?}");

    // The recording rules see the same service, and no alert is up but for the replica that has ended
    // and is still in this static list.
    let rate = r#"sum(namespace:orders:rate5m{namespace="orders"})"#;
    until(&prometheus, rate, |rate| rate > 0.0).await;
    for rule in [
        "requests:rate5m",
        "requests_failed:ratio_rate5m",
        "requests_shed:ratio_rate5m",
        "place_seconds:p99_5m",
        "requests_in_flight:saturation",
        "order_store_queue:saturation",
    ] {
        let query = format!(r#"namespace:{rule}{{namespace="orders"}}"#);
        until(&prometheus, &query, |value| !value.is_nan()).await;
    }
    let alerts = prometheus.query(r#"ALERTS{alertname!="OrderServiceTargetDown"}"#, now()).await;
    assert_eq!(alerts, []);
}
