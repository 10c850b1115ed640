//! The dashboard's numbers where they are easily wrong: of series that begin, end and miss scrapes,
//! of several namespaces and of a chosen pod. promtool has the series from us, and the queries from
//! the dashboard's file.

use std::fs;

use serde_json::{Value, json};
use tokio::process::Command;

use crate::{
    dashboard::{ALL, interpolated},
    dashboard_rules::{dashboard, targets, text},
};

/// Seconds between the samples, as between the scrapes on Kubernetes.
const SCRAPES: &str = "5s";

fn query(panel: &str, legend: &str) -> String {
    let targets = targets(&dashboard());
    let found = targets.iter().find(|target| target.panel == panel && target.legend == legend);
    found.unwrap_or_else(|| panic!("{panel}, {legend}")).query.clone()
}

/// As Grafana sends it, while it looks at the last half hour.
fn chosen(query: &str, pod: &str) -> String {
    let query = query.replace("$__rate_interval", "20s");
    interpolated(&query, &[ALL[0], ALL[1], ("pod", pod), ALL[3]])
}

/// What promtool says of a query over these series: its value, which has no labels, or that it has
/// none.
async fn expect(series: &[(&str, &str)], query: &str, at: &str, value: Option<f64>) {
    let samples: Vec<_> =
        value.iter().map(|value| json!({"labels": "{}", "value": value})).collect();
    let input: Vec<Value> =
        series.iter().map(|(series, values)| json!({"series": series, "values": values})).collect();
    let test = json!({
        "evaluation_interval": SCRAPES,
        "tests": [{
            "interval": SCRAPES,
            "input_series": input,
            "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": samples}],
        }],
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("test.yml");
    // JSON is YAML.
    fs::write(&file, test.to_string()).unwrap();
    let output = Command::new("promtool").args(["test", "rules"]).arg(file).output().await;
    let output = output.expect("promtool is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn the_age_of_connections_is_theirs_from_the_first_minutes_on() {
    // Four, each of which lives two minutes: one is accepted every half minute.
    let accepted: Vec<_> = (0..40).map(|accepted| format!("{accepted}x5")).collect();
    let accepted = accepted.join(" ");
    let long = [
        (r#"connections_open{job="order-service",instance="a"}"#, "4x240"),
        (r#"connections_accepted_total{job="order-service",instance="a"}"#, accepted.as_str()),
    ];
    let age = chosen(&query("Connection age", "mean lifetime"), ".*");
    // Not quite two minutes: how many were accepted is known by whole connections alone.
    let near = format!("{age} > bool 100 and {age} < 140");
    expect(&long, &near, "19m", Some(1.0)).await;
    // A window longer than the process has lived makes none of it longer.
    expect(&long, &near, "4m", Some(1.0)).await;

    // A second process took over half of it and ended again.
    let half = "_x120 2x47 stale";
    let early: Vec<_> = (0..8).map(|accepted| format!("{accepted}x5")).collect();
    let early = format!("_x120 {} stale", early.join(" "));
    let ended = [
        long[0],
        long[1],
        (r#"connections_open{job="order-service",instance="b"}"#, half),
        (r#"connections_accepted_total{job="order-service",instance="b"}"#, early.as_str()),
    ];
    expect(&ended, &near, "16m", Some(1.0)).await;
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn restarts_are_seen_although_kubernetes_is_scraped_once_a_minute() {
    let minutes: Vec<_> =
        [0, 0, 0, 1, 1, 1].iter().map(|restarts| format!("{restarts} _x10")).collect();
    let minutes = minutes.join(" ");
    let pod = r#"pod="order-service-7d9f8c6b5d-aaaaa""#;
    let series = format!(r#"kube_pod_container_status_restarts_total{{namespace="orders",{pod}}}"#);
    let restarts = chosen(&query("Restarts", "counted by Kubernetes"), ".*");
    let series = [(series.as_str(), minutes.as_str())];
    for at in ["4m5s", "4m30s", "4m50s"] {
        expect(&series, &format!("round({restarts})"), at, Some(1.0)).await;
    }
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn a_missed_scrape_is_no_new_build() {
    let dashboard = dashboard();
    let query = text(&dashboard["annotations"]["list"][0], "expr");
    let marks = format!("count({})", chosen(query, ".*"));
    let build = |version: &str| {
        format!(
            r#"order_service_build_info{{job="order-service",instance="a",version="{version}",revision="r"}}"#
        )
    };
    let (old, new) = (build("1"), build("2"));
    // One failed scrape at 10 min of the only replica; a new build at 15 min.
    let series = [(old.as_str(), "1x119 stale 1x58 stale"), (new.as_str(), "_x180 1x60")];
    for (at, marked) in [("10m5s", None), ("11m", None), ("14m", None), ("15m30s", Some(1.0))] {
        expect(&series, &marks, at, marked).await;
    }
    expect(&series, &marks, "17m", None).await;
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn what_keda_sees_is_summed_as_the_orders_are() {
    let keda = |namespace: &str| {
        format!(
            r#"keda_scaler_metrics_value{{{namespace},scaledObject="order-service",metric="s0-prometheus"}}"#
        )
    };
    let honoured = keda(r#"namespace="staging""#);
    let renamed = keda(r#"namespace="keda",exported_namespace="orders""#);
    let limit = |namespace: &str| {
        format!(
            r#"kube_horizontalpodautoscaler_spec_max_replicas{{namespace="{namespace}",horizontalpodautoscaler="keda-hpa-order-service"}}"#
        )
    };
    let (staging, orders) = (limit("staging"), limit("orders"));
    let series = [
        (honoured.as_str(), "8x60"),
        (renamed.as_str(), "42x60"),
        (staging.as_str(), "2x60"),
        (orders.as_str(), "5x60"),
    ];
    let seen = query("What KEDA sees", "KEDA sees");
    expect(&series, &chosen(&seen, ".*"), "4m", Some(50.0)).await;
    let one = interpolated(&seen, &[("namespace", "orders"), ALL[1], ALL[2], ALL[3]]);
    expect(&series, &one, "4m", Some(42.0)).await;
    expect(&series, &chosen(&query("Replicas", "max"), ".*"), "4m", Some(7.0)).await;
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn a_chosen_pod_is_held_against_all_of_them() {
    let of = |metric: &str, pod: &str| {
        format!(
            r#"{metric}{{namespace="orders",job="order-service",pod="{pod}",instance="{pod}"}}"#
        )
    };
    let mut series = Vec::new();
    for (pod, calls) in [("a", "0+5x120"), ("b", "0+15x120")] {
        series.push((of("grpc_server_handled_total", pod), calls));
        series.push((of("http_requests_total_with_path", pod), "0x120"));
        series.push((of("product_order_total", pod), calls));
        series.push((of("process_start_time_seconds", pod), "0x120"));
        series.push((of("order_service_build_info", pod), "1x120"));
        series.push((of("up", pod), "1x120"));
    }
    let series: Vec<_> = series.iter().map(|(series, values)| (series.as_str(), *values)).collect();
    let all = [
        ("Orders against capacity", "orders in the last 5 minutes", 1200.0),
        ("Orders against capacity", "threshold × ready replicas", 40.0),
        ("Replicas", "ready", 2.0),
        ("Replicas", "desired", 2.0),
        ("What KEDA sees", "exact count", 1200.0),
        ("What KEDA sees", "rate × 300", 1200.0),
    ];
    for (panel, legend, value) in all {
        let query = chosen(&query(panel, legend), "a");
        expect(&series, &format!("round({query})"), "9m", Some(value)).await;
    }
    let share = chosen(&query("Share of calls by replica", "{{replica}}"), "a");
    expect(&series, &format!("sum({share})"), "9m", Some(0.25)).await;
    // All others tell of the pod alone.
    let pods = chosen(&query("Number of Pods", "ready"), "a");
    expect(&series, &pods, "9m", Some(1.0)).await;
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn a_malformed_request_is_the_callers_fault_and_hides_no_other() {
    let grpc = |code: &str| {
        format!(
            r#"grpc_server_handled_total{{namespace="orders",job="order-service",instance="a",grpc_code="{code}"}}"#
        )
    };
    let http = |code: &str| {
        format!(
            r#"http_requests_total_with_path{{namespace="orders",job="order-service",instance="a",code="{code}"}}"#
        )
    };
    let malformed = |namespace: &str, protocol: &str| {
        format!(
            r#"requests_malformed_total{{namespace="{namespace}",job="order-service",instance="a",protocol="{protocol}"}}"#
        )
    };
    // Of 100 calls each scrape 10 are malformed, 20 hit a bug, 5 meet no store and 15 are invalid.
    let calls = [
        (grpc("OK"), "0+40x60"),
        (grpc("Internal"), "0+25x60"),
        (grpc("Unavailable"), "0+5x60"),
        (grpc("InvalidArgument"), "0+15x60"),
        (http("200"), "0+10x60"),
        (http("400"), "0+5x60"),
        (http("503"), "0x60"),
    ];
    let malformed = [
        (malformed("orders", "grpc"), "0+5x60"),
        (malformed("orders", "http"), "0+5x60"),
        (malformed("staging", "grpc"), "0+50x60"),
    ];
    let service = chosen(&query("Error ratio", "the service's fault"), ".*");
    let callers = chosen(&query("Error ratio", "the caller's"), ".*");
    let counted = query("Error ratio", "malformed");
    let counted = interpolated(&counted, &[("namespace", "orders"), ALL[1], ALL[2], ALL[3]]);
    let all: Vec<_> =
        calls.iter().chain(&malformed).map(|(series, values)| (series.as_str(), *values)).collect();
    for (query, ratio) in [(&service, 0.25), (&callers, 0.25), (&counted, 0.1)] {
        expect(&all, &format!("round({query}, 0.001)"), "4m", Some(ratio)).await;
    }
    // A replica that does not count them: each INTERNAL is taken for a bug.
    let older = &all[..calls.len()];
    for (query, ratio) in [(&service, 0.3), (&callers, 0.2)] {
        expect(older, &format!("round({query}, 0.001)"), "4m", Some(ratio)).await;
    }
}
