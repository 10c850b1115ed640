//! The Grafana dashboard against real servers under load and a real Prometheus: on Kubernetes's
//! labels, beside a stand-in for kube-state-metrics and KEDA, and on a local run, which has
//! neither. And its file against Grafana's own types.

use std::{collections::BTreeSet, fs, path::Path, process::Stdio, time::Duration};

use order_service::proto::{GetRequest, ListRequest, PlaceRequest};
use regex::Regex;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    task::JoinSet,
    time::timeout,
};

use crate::{
    dashboard_rules::{Target, dashboard, targets, text, variables},
    prometheus_server::{Prometheus, now},
    support::{PATIENCE, Process},
};

/// What kube-state-metrics and KEDA say of four ready pods of five, one of them not this service's,
/// and of 42 orders.
const KUBERNETES: &str = r#"
kube_deployment_spec_replicas{namespace="orders",deployment="order-service"} 5
kube_deployment_status_replicas_ready{namespace="orders",deployment="order-service"} 4
kube_horizontalpodautoscaler_spec_max_replicas{namespace="orders",horizontalpodautoscaler="keda-hpa-order-service"} 7
kube_pod_status_ready{namespace="orders",pod="order-service-7d9f8c6b5d-aaaaa",condition="true"} 1
kube_pod_status_ready{namespace="orders",pod="order-service-7d9f8c6b5d-aaaaa",condition="false"} 0
kube_pod_status_ready{namespace="orders",pod="order-service-7d9f8c6b5d-bbbbb",condition="true"} 0
kube_pod_status_ready{namespace="orders",pod="order-service-7d9f8c6b5d-bbbbb",condition="false"} 1
kube_pod_status_ready{namespace="orders",pod="order-service-7d9f8c6b5d-ccccc",condition="true"} 1
kube_pod_status_ready{namespace="orders",pod="postgres-0",condition="true"} 1
kube_pod_container_status_restarts_total{namespace="orders",pod="order-service-7d9f8c6b5d-aaaaa",container="order-service"} 0
keda_scaler_metrics_value{namespace="orders",scaledObject="order-service",scaler="orders",metric="s0-prometheus"} 42
keda_scaler_metrics_value{namespace="orders",scaledObject="order-service",scaler="in-flight",metric="s1-prometheus"} 3
"#;
const PODS: [&str; 2] = ["order-service-7d9f8c6b5d-aaaaa", "order-service-7d9f8c6b5d-bbbbb"];

/// Two servers that have calls of every kind.
struct Loaded {
    servers: Vec<Process>,
    _dirs: Vec<TempDir>,
    _load: JoinSet<()>,
}

impl Loaded {
    async fn start() -> Self {
        let mut loaded = Self { servers: Vec::new(), _dirs: Vec::new(), _load: JoinSet::new() };
        for _ in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            // Connections that say nothing are soon refused.
            let server = Process::start_in(dir.path(), &["--read-timeout", "100ms"]).await;
            loaded._load.spawn(grpc_calls(server.grpc().await));
            loaded._load.spawn(http_calls(server.url("")));
            loaded._load.spawn(silent_connections(server.api));
            loaded._load.spawn(broken_connections(server.api));
            loaded.servers.push(server);
            loaded._dirs.push(dir);
        }
        loaded
    }

    fn targets(&self) -> Vec<String> {
        self.servers.iter().map(|server| server.admin.to_string()).collect()
    }
}

/// What a load waits between its calls: a rate, not a synchronisation.
const PAUSE: Duration = Duration::from_millis(20);

async fn grpc_calls(
    mut client: order_service::proto::order_service_client::OrderServiceClient<
        tonic::transport::Channel,
    >,
) {
    loop {
        let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
        let invalid = PlaceRequest::default();
        let _ = client.place(order).await;
        let _ = client.place(invalid).await;
        let _ = client.get(GetRequest::default()).await;
        let _ = client.list(ListRequest::default()).await;
        tokio::time::sleep(PAUSE).await;
    }
}

async fn http_calls(api: String) {
    loop {
        for path in ["/product", "/orders", "/nowhere"] {
            let _ = reqwest::get(format!("{api}{path}")).await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn silent_connections(api: std::net::SocketAddr) {
    loop {
        if let Ok(mut silent) = TcpStream::connect(api).await {
            let _ = silent.read_to_end(&mut Vec::new()).await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Connections that the HTTP layer ends: DATA on stream 0 is an error of the whole connection
/// (RFC 9113, 6.1).
async fn broken_connections(api: std::net::SocketAddr) {
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let data = [0; 9];
    let sent = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &settings, &data].concat();
    loop {
        if let Ok(mut broken) = TcpStream::connect(api).await {
            let _ = broken.write_all(&sent).await;
            let _ = broken.read_to_end(&mut Vec::new()).await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Serves one page for ever; the address.
async fn exporter(page: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (mut scraper, _) = listener.accept().await.unwrap();
            let _ = scraper.read(&mut [0; 4096]).await;
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close";
            let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{page}", page.len());
            let _ = scraper.write_all(answer.as_bytes()).await;
        }
    });
    address
}

/// The query as Grafana sends it.
pub fn interpolated(query: &str, chosen: &[(&str, &str)]) -> String {
    let mut query = query.replace("$__rate_interval", "10s").replace("$threshold", "20");
    for (name, value) in chosen {
        query = query.replace(&format!("${name}"), value);
    }
    // What is left is of label_replace.
    assert!(!query.replace("\"$1\"", "").contains('$'), "{query}");
    query
}

/// What All of each selector matches.
pub const ALL: [(&str, &str); 4] =
    [("namespace", ".*"), ("job", ".+"), ("pod", ".*"), ("instance", ".+")];

/// Waits until so many targets have answered, and both servers twice, so that there are rates.
async fn scraped(prometheus: &Prometheus, targets: usize) {
    let count = async |query| prometheus.query(query, now()).await.len();
    let waiting = async {
        while count("up == 1").await < targets || count("rate(product_order_total[10s])").await < 2
        {
        }
    };
    timeout(PATIENCE, waiting).await.expect("Prometheus scrapes all targets");
}

/// The elements of every query, each of which has some before long.
async fn data(prometheus: &Prometheus, chosen: &[(&str, &str)], needless: &[&str]) -> Vec<Answer> {
    let mut answers = Vec::new();
    let placeholder = Regex::new(r"\{\{([a-z_]+)\}\}").unwrap();
    for Target { panel, legend, query } in targets(&dashboard()) {
        let query = interpolated(&query, chosen);
        let needless = needless.contains(&legend.as_str());
        let waiting = async {
            loop {
                let elements = prometheus.query(&query, now()).await;
                if !elements.is_empty() || needless {
                    return elements;
                }
            }
        };
        let waited = timeout(PATIENCE, waiting).await;
        let elements = waited.unwrap_or_else(|_| panic!("no data: {panel}, {legend}: {query}"));
        for label in placeholder.captures_iter(&legend) {
            assert!(elements.iter().all(|(labels, _)| labels.get(&label[1]).is_some()), "{query}");
        }
        answers.push(Answer { panel, legend, query, elements });
    }
    answers
}

struct Answer {
    panel: String,
    legend: String,
    query: String,
    elements: Vec<(Value, f64)>,
}

fn answer<'a>(answers: &'a [Answer], panel: &str, legend: &str) -> &'a Answer {
    let found = answers.iter().find(|answer| answer.panel == panel && answer.legend == legend);
    found.unwrap_or_else(|| panic!("{panel}, {legend}"))
}

fn value(answers: &[Answer], panel: &str, legend: &str) -> f64 {
    let elements = &answer(answers, panel, legend).elements;
    assert_eq!(elements.len(), 1, "{panel}, {legend}: {elements:?}");
    elements[0].1
}

fn replicas(answer: &Answer) -> BTreeSet<String> {
    answer.elements.iter().map(|(labels, _)| text(labels, "replica").to_owned()).collect()
}

#[tokio::test]
#[ignore = "needs prometheus; run by make test"]
async fn on_kubernetes_every_query_returns_data() {
    let loaded = Loaded::start().await;
    let targets = loaded.targets();
    let pods: Vec<_> = (targets.iter().zip(PODS))
        .map(|(target, pod)| {
            json!({"targets": [target], "labels": {"namespace": "orders", "pod": pod}})
        })
        .collect();
    let kubernetes = exporter(KUBERNETES).await;
    // As the chart scrapes kube-state-metrics; and KEDA as who does not honour its labels.
    let prometheus = Prometheus::start(&json!([
        {"job_name": "order-service", "static_configs": pods},
        {"job_name": "kube-state-metrics", "honor_labels": true,
         "static_configs": [{"targets": [kubernetes], "labels": {"namespace": "monitoring"}}],
         "metric_relabel_configs":
            [{"source_labels": ["__name__"], "regex": "keda_.*", "action": "drop"}]},
        {"job_name": "keda",
         "static_configs": [{"targets": [kubernetes], "labels": {"namespace": "keda"}}],
         "metric_relabel_configs":
            [{"source_labels": ["__name__"], "regex": "kube_.*", "action": "drop"}]},
    ]))
    .await;
    let begun = now();
    scraped(&prometheus, 4).await;

    let job = [ALL[0], ("job", "order-service"), ALL[2], ALL[3]];
    let orders = [("namespace", "orders"), ("job", "order-service"), ALL[2], ALL[3]];
    for chosen in [ALL, job, orders] {
        let answers = data(&prometheus, &chosen, &[]).await;
        assert_eq!(value(&answers, "Orders against capacity", "threshold × ready replicas"), 80.0);
        assert_eq!(value(&answers, "Replicas", "desired"), 5.0);
        assert_eq!(value(&answers, "Replicas", "ready"), 4.0);
        assert_eq!(value(&answers, "Replicas", "max"), 7.0);
        assert_eq!(value(&answers, "What KEDA sees", "KEDA sees"), 42.0);
        assert_eq!(value(&answers, "Number of Pods", "ready"), 2.0);
        assert_eq!(value(&answers, "Number of Pods", "not ready"), 1.0);
        for panel in ["Share of calls by replica", "CPU", "Memory", "File descriptors", "Threads"] {
            let names = replicas(answer(&answers, panel, "{{replica}}"));
            assert_eq!(names, ["aaaaa", "bbbbb"].map(str::to_owned).into(), "{panel}");
        }
    }
    let one = [("namespace", "orders"), ("job", "order-service"), ("pod", PODS[0]), ALL[3]];
    let answers = data(&prometheus, &one, &[]).await;
    assert_eq!(replicas(answer(&answers, "Memory", "{{replica}}")), ["aaaaa".to_owned()].into());
    let elsewhere = [("namespace", "other"), ALL[1], ALL[2], ALL[3]];
    for Target { panel, query, .. } in crate::dashboard_rules::targets(&dashboard()) {
        let elements = prometheus.query(&interpolated(&query, &elsewhere), now()).await;
        assert!(elements.is_empty(), "{panel}: {query}: {elements:?}");
    }

    // The selectors offer what there is.
    for variable in variables(&dashboard(), "query") {
        let query = interpolated(text(variable, "query"), &ALL);
        let name = text(variable, "name");
        let series = query.strip_prefix("label_values(").unwrap();
        let series = series.strip_suffix(&format!(", {name})")).unwrap();
        let found = prometheus.ask("series", &[("match[]", series.to_owned())]).await;
        let values: BTreeSet<_> =
            found.as_array().unwrap().iter().map(|labels| text(labels, name).to_owned()).collect();
        let expected = match name {
            "namespace" => BTreeSet::from(["orders".to_owned()]),
            "job" => BTreeSet::from(["order-service".to_owned()]),
            "pod" => PODS.map(str::to_owned).into(),
            _ => targets.iter().cloned().collect(),
        };
        assert_eq!(values, expected, "{name}");
    }

    // The build that began to run is marked.
    for annotation in dashboard()["annotations"]["list"].as_array().unwrap() {
        let query = interpolated(text(annotation, "expr"), &ALL);
        assert_eq!(text(annotation, "expr"), text(&annotation["target"], "expr"));
        let range = [
            ("query", query),
            ("start", begun.to_string()),
            ("end", now().to_string()),
            ("step", "1".to_owned()),
        ];
        let marks = prometheus.ask("query_range", &range).await;
        let marks = marks["result"].as_array().unwrap().clone();
        assert_eq!(marks.len(), 1, "{marks:?}");
        assert_eq!(marks[0]["metric"]["version"], env!("CARGO_PKG_VERSION"));
    }
}

#[tokio::test]
#[ignore = "needs prometheus; run by make test"]
async fn on_a_local_run_every_query_of_the_service_returns_data() {
    let mut loaded = Loaded::start().await;
    let targets = loaded.targets();
    // Prometheus itself is a target too, as it often is: it is no replica.
    let itself = exporter("process_resident_memory_bytes 1\nprocess_threads 1\n").await;
    let prometheus = Prometheus::start(&json!([
        {"job_name": "order-service", "static_configs": [{"targets": targets}]},
        {"job_name": "prometheus", "static_configs": [{"targets": [itself]}]},
    ]))
    .await;

    scraped(&prometheus, 3).await;

    // What only Kubernetes and KEDA know.
    let needless = ["max", "KEDA sees", "counted by Kubernetes"];
    let answers = data(&prometheus, &ALL, &needless).await;
    for legend in needless {
        let known = answers.iter().find(|answer| answer.legend == legend).unwrap();
        assert!(known.elements.is_empty(), "{legend}");
    }
    for (panel, legend, expected) in [
        ("Replicas", "desired", 2.0),
        ("Replicas", "ready", 2.0),
        ("Orders against capacity", "threshold × ready replicas", 40.0),
        ("Number of Pods", "ready", 2.0),
        ("Number of Pods", "not ready", 0.0),
    ] {
        assert_eq!(value(&answers, panel, legend), expected, "{panel}, {legend}");
    }
    let shares = answer(&answers, "Share of calls by replica", "{{replica}}");
    assert_eq!(replicas(shares), targets.iter().cloned().collect());
    let sum: f64 = shares.elements.iter().map(|(_, share)| share).sum();
    assert!((sum - 1.0).abs() < 1e-9, "{sum}");
    for panel in ["CPU", "Memory", "File descriptors", "Threads"] {
        let names = replicas(answer(&answers, panel, "{{replica}}"));
        assert_eq!(names, targets.iter().cloned().collect(), "{panel}");
    }

    // One that no longer answers is desired, and not ready.
    loaded.servers.remove(0).kill_9().await;
    let not_ready = &answer(&answers, "Number of Pods", "not ready").query;
    let waiting = async { while prometheus.value(not_ready, now()).await != 1.0 {} };
    timeout(PATIENCE, waiting).await.expect("Prometheus sees it gone");
    let desired = &answer(&answers, "Replicas", "desired").query;
    assert_eq!(prometheus.value(desired, now()).await, 2.0);
    let ready = &answer(&answers, "Replicas", "ready").query;
    assert_eq!(prometheus.value(ready, now()).await, 1.0);
}

/// What the TypeScript compiler says of the dashboard in the types of one Grafana.
async fn types(grafana: &Path, dashboard: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let modules = grafana.join("node_modules");
    assert!(modules.is_dir(), "{}", modules.display());
    std::os::unix::fs::symlink(modules, dir.path().join("node_modules")).unwrap();
    let types = fs::read_to_string("grafana/dashboard.types.ts").unwrap();
    let (head, _) = types.split_once("DASHBOARD;").unwrap();
    fs::write(dir.path().join("dashboard.ts"), format!("{head}{dashboard};\n")).unwrap();
    let mut tsc = Command::new("tsc");
    tsc.args(["--noEmit", "--strict", "--skipLibCheck", "--preserveSymlinks"]);
    tsc.args(["--module", "esnext", "--moduleResolution", "bundler", "--target", "es2022"]);
    tsc.arg("dashboard.ts").current_dir(dir.path()).stdin(Stdio::null());
    let output = tsc.output().await.expect("tsc is installed");
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test]
#[ignore = "needs tsc and @grafana/schema; run by make test"]
async fn the_file_has_the_types_of_grafana_10_and_13() {
    let file = fs::read_to_string("grafana/dashboard.json").unwrap();
    let which = Command::new("which").arg("tsc").output().await.unwrap();
    let tsc = String::from_utf8(which.stdout).unwrap();
    let tools = fs::canonicalize(Path::new(tsc.trim_end()).parent().unwrap()).unwrap();
    for version in ["10", "13"] {
        let grafana = tools.parent().unwrap().join("grafana").join(version);
        types(&grafana, &file).await.unwrap_or_else(|said| panic!("Grafana {version}: {said}"));
        // They would have told.
        for (right, wrong) in [("\"lineWidth\"", "\"lineWith\""), ("\"never\"", "\"nevr\"")] {
            assert!(file.contains(right));
            let said = types(&grafana, &file.replace(right, wrong)).await.unwrap_err();
            assert!(said.contains(wrong.trim_matches('"')), "{said}");
        }
    }
}
