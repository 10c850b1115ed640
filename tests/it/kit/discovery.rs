//! The chart's scrape jobs on a static stand-in for the cluster's pods: which become targets, under
//! which labels. (Debian's Prometheus is built without Kubernetes' service discovery.)

use std::fs;

use serde_json::{Map, Value, json};

use super::{content, yaml};

/// A container's port as `kubernetes_sd_configs` with the role `pod` tells of it.
fn port(pod: &str, app: &str, phase: &str, name: &str, number: u16) -> Value {
    json!({
        "targets": [format!("10.1.2.3:{number}")],
        "labels": {
            "__meta_kubernetes_namespace": "orders",
            "__meta_kubernetes_pod_name": pod,
            "__meta_kubernetes_pod_phase": phase,
            "__meta_kubernetes_pod_label_app_kubernetes_io_name": app,
            "__meta_kubernetes_pod_label_app": app,
            "__meta_kubernetes_pod_container_port_name": name,
            "__meta_kubernetes_pod_container_port_number": number.to_string(),
        },
    })
}

/// The labels of the targets that a job of the chart's values makes of these ports.
async fn targets(job: &str, ports: &[Value]) -> Vec<Map<String, Value>> {
    let mut config = yaml("prometheus/values.yaml")["scrapeConfigs"][job].clone();
    let found = config.as_object_mut().unwrap().remove("kubernetes_sd_configs").unwrap();
    assert_eq!(found[0]["role"], "pod");
    config["job_name"] = json!(job);
    config["static_configs"] = json!(ports);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prometheus.yml");
    // JSON is YAML.
    fs::write(&file, json!({"scrape_configs": [config]}).to_string()).unwrap();
    let file = file.to_str().unwrap();
    content("promtool", &["check", "config", file]).await;
    let args = ["check", "service-discovery", "--timeout=2s", file, job];
    let report = content("promtool", &args).await;
    let report: Vec<Value> = serde_json::from_str(&report).expect("a list of targets");
    assert_eq!(report.len(), ports.len(), "{report:?}");
    report
        .iter()
        .filter_map(|target| target["labels"].as_object())
        .filter(|l| !l.is_empty())
        .cloned()
        .collect()
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn every_serving_pod_is_a_target_and_nothing_else_is() {
    let ours = "order-service";
    let ports = [
        port("order-service-a", ours, "Running", "metrics", 9464),
        port("order-service-a", ours, "Running", "api", 8181),
        port("order-service-ended", ours, "Succeeded", "metrics", 9464),
        port("order-service-evicted", ours, "Failed", "metrics", 9464),
        port("order-service-waits", ours, "Pending", "metrics", 9464),
        port("postgres-0", "postgres", "Running", "postgres", 5432),
        port("other", "other", "Running", "metrics", 9464),
    ];
    let targets = targets("order-service", &ports).await;
    assert_eq!(targets.len(), 1, "{targets:?}");
    let shown: Map<_, _> =
        targets[0].clone().into_iter().filter(|(name, _)| !name.starts_with("__")).collect();
    let expected = json!({
        "instance": "10.1.2.3:9464",
        "job": "order-service",
        "namespace": "orders",
        "pod": "order-service-a",
    });
    assert_eq!(Value::Object(shown), expected);
    assert_eq!(targets[0]["__address__"], "10.1.2.3:9464");
    assert_eq!(targets[0]["__metrics_path__"], "/metrics");
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn kedas_operator_is_a_target() {
    let ports = [
        port("keda-operator-a", "keda-operator", "Running", "http", 8080),
        port("keda-operator-a", "keda-operator", "Running", "metricsservice", 9666),
        port("keda-admission-webhooks-a", "keda-admission-webhooks", "Running", "http", 8080),
    ];
    let targets = targets("keda-operator", &ports).await;
    assert_eq!(targets.len(), 1, "{targets:?}");
    assert_eq!(targets[0]["__address__"], "10.1.2.3:8080");
    assert_eq!(targets[0].get("namespace"), None, "its series have their own");
}
