//! Starts a real Prometheus and asks it.

use std::{
    fs,
    process::Stdio,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    process::{Child, Command},
};

use crate::support::PATIENCE;

/// A running Prometheus that scrapes its targets each second.
pub struct Prometheus {
    _child: Child,
    _dir: TempDir,
    pub url: String,
}

impl Prometheus {
    /// One that scrapes these addresses as the job `order-service`.
    pub async fn scraping(targets: &[String]) -> Self {
        let job = json!({"job_name": "order-service", "static_configs": [{"targets": targets}]});
        Self::start(&json!([job])).await
    }

    /// One with these `scrape_configs`.
    pub async fn start(scrape_configs: &Value) -> Self {
        Self::configured(json!({"scrape_configs": scrape_configs})).await
    }

    /// One with this configuration; it need not say how often.
    pub async fn configured(mut config: Value) -> Self {
        let each = "1s";
        config["global"] =
            json!({"scrape_interval": each, "scrape_timeout": each, "evaluation_interval": each});
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("prometheus.yml");
        // JSON is YAML.
        fs::write(&file, config.to_string()).unwrap();
        let port = free_port().await;
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let child = command.spawn().expect("prometheus is installed");
        let prometheus = Self { _child: child, _dir: dir, url: format!("http://127.0.0.1:{port}") };
        let ready = format!("{}/-/ready", prometheus.url);
        let waiting = async {
            while !reqwest::get(&ready).await.is_ok_and(|ready| ready.status() == 200) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("Prometheus starts");
        prometheus
    }

    /// The elements of an instant query: labels and value.
    pub async fn query(&self, query: &str, at: f64) -> Vec<(Value, f64)> {
        let form = [("query", query.to_owned()), ("time", at.to_string())];
        let data = self.ask("query", &form).await;
        let elements = data["result"].as_array().unwrap().iter();
        let value = |element: &Value| element["value"][1].as_str().unwrap().parse().unwrap();
        elements.map(|element| (element["metric"].clone(), value(element))).collect()
    }

    /// What an endpoint of the API answers to a form; it must accept it.
    pub async fn ask(&self, endpoint: &str, form: &[(&str, String)]) -> Value {
        let url = format!("{}/api/v1/{endpoint}", self.url);
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let request = reqwest::Client::new().post(url).body(body);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let answer: Value = request.send().await.unwrap().json().await.unwrap();
        assert_eq!(answer["status"], "success", "{form:?}: {answer}");
        answer["data"].clone()
    }

    /// The one value of a query.
    pub async fn value(&self, query: &str, at: f64) -> f64 {
        let elements = self.query(query, at).await;
        assert_eq!(elements.len(), 1, "{query}: {elements:?}");
        elements[0].1
    }
}

pub async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}
