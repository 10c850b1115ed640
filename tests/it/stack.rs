//! `make stack`: its script, on ports of its own.

use std::{collections::BTreeSet, fs, path::Path, process::Stdio};

use regex::Regex;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::{prometheus_server::now, support::PATIENCE};

struct Stack {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    api: String,
    prometheus: String,
    /// Where its data and the logs are.
    folder: String,
}

impl Stack {
    /// Starts it and waits until it is ready.
    async fn start(settings: &[(&str, &str)]) -> Self {
        let mut command = Command::new("python3");
        command
            .args(["-B", "stack/stack.py"])
            .env("STACK_SERVICE", env!("CARGO_BIN_EXE_order-service"));
        for port in ["STACK_API_PORT", "STACK_ADMIN_PORT", "STACK_PROMETHEUS_PORT"] {
            command.env(port, "0");
        }
        command.envs(settings.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("python3 is installed");
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut stack = Self {
            process,
            lines,
            api: String::new(),
            prometheus: String::new(),
            folder: String::new(),
        };
        let url = Regex::new("http://[0-9.:]+").unwrap();
        let folder = Regex::new("/[^ ]+/order-service-stack-[^/]+").unwrap();
        loop {
            let line = stack.line().await.expect("it becomes ready");
            let url = url.find(&line).map(|url| url.as_str().to_owned());
            match line.split_whitespace().next() {
                Some("PostgreSQL") => {
                    stack.folder = folder.find(&line).unwrap().as_str().to_owned();
                }
                Some("API") => stack.api = url.unwrap(),
                Some("Prometheus") => stack.prometheus = url.unwrap(),
                Some("Ready.") => return stack,
                _ => {}
            }
        }
    }

    async fn line(&mut self) -> Option<String> {
        timeout(PATIENCE, self.lines.next_line()).await.expect("it goes on").unwrap()
    }

    fn id(&self) -> Pid {
        Pid::from_raw(self.process.id().expect("running").try_into().unwrap()).unwrap()
    }

    /// The processes that it started, PostgreSQL's own children among them.
    fn children(&self) -> BTreeSet<i32> {
        let mut known = BTreeSet::from([self.id().as_raw_nonzero().get()]);
        loop {
            let before = known.len();
            for (process, parent) in processes() {
                if known.contains(&parent) {
                    known.insert(process);
                }
            }
            if known.len() == before {
                known.remove(&self.id().as_raw_nonzero().get());
                return known;
            }
        }
    }

    /// Waits for its end; the exit code and what it wrote to stderr.
    async fn ended(self) -> (Option<i32>, String) {
        let output =
            timeout(PATIENCE, self.process.wait_with_output()).await.expect("it ends").unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    /// Waits until Prometheus has seen so many processes, each with at least so many orders.
    async fn scraped_orders(&self, processes: usize, least: f64) -> Vec<Value> {
        let query = format!("product_order_total >= {least}");
        let waiting = async {
            loop {
                let orders = self.query(&query).await;
                if orders.len() == processes {
                    return orders;
                }
            }
        };
        timeout(PATIENCE, waiting).await.expect("Prometheus scrapes them")
    }

    /// The elements of a query.
    async fn query(&self, query: &str) -> Vec<Value> {
        let form = [("query", query.to_owned()), ("time", now().to_string())];
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let answer =
            reqwest::get(format!("{}/api/v1/query?{query}", self.prometheus)).await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        answer["data"]["result"].as_array().unwrap().clone()
    }
}

/// All processes and their parents.
fn processes() -> Vec<(i32, i32)> {
    let of = |process: i32| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The name, in parentheses, may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let running = fields.next()? != "Z";
        let parent = fields.next()?.parse().ok()?;
        running.then_some((process, parent))
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| of(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// Places an order on a connection of its own; the process that answered.
async fn place(api: &str) -> String {
    let answer = reqwest::get(format!("{api}/product")).await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.headers()["x-served-by"].to_str().unwrap().to_owned()
}

#[tokio::test]
#[ignore = "needs PostgreSQL, prometheus and python3; run by make test"]
async fn it_serves_many_processes_at_one_address_and_leaves_nothing_behind() {
    let mut stack = Stack::start(&[("ORDER_PROCESSING_DELAY", "0ms")]).await;
    let mut served = BTreeSet::new();
    for _ in 0..10 {
        served.insert(place(&stack.api).await.split(':').next().unwrap().to_owned());
    }
    assert_eq!(served, BTreeSet::from(["replica-1".to_owned(), "replica-2".to_owned()]));
    // They share one database: each lists the orders of both.
    for _ in 0..2 {
        let orders = reqwest::get(format!("{}/orders", stack.api)).await.unwrap();
        assert_eq!(orders.text().await.unwrap().matches("order_id").count(), 10);
    }

    // Prometheus scrapes both, by the names that they answer with.
    let orders = stack.scraped_orders(2, 5.0).await;
    let pods: BTreeSet<_> =
        orders.iter().map(|series| series["metric"]["pod"].as_str().unwrap().to_owned()).collect();
    assert_eq!(pods, served);
    assert!(orders.iter().all(|series| series["metric"]["job"] == "order-service"));

    let children = stack.children();
    assert!(children.len() >= 4, "{children:?}");
    kill_process(stack.id(), Signal::INT).unwrap();
    while let Some(line) = stack.line().await {
        if line == "Stopped." {
            break;
        }
    }
    let folder = stack.folder.clone();
    assert!(folder.contains("order-service-stack-"), "{folder}");
    assert_eq!(stack.ended().await, (Some(0), String::new()));
    assert!(!Path::new(&folder).exists(), "{folder}");
    let left: Vec<_> =
        processes().into_iter().filter(|(process, _)| children.contains(process)).collect();
    assert_eq!(left, []);
}

#[tokio::test]
#[ignore = "needs PostgreSQL, prometheus and python3; run by make test"]
async fn it_grows_with_the_orders_and_ends_if_a_part_of_it_does() {
    let settings = [("STACK_REPLICAS", "1"), ("STACK_MAX_REPLICAS", "2")];
    let mut stack =
        Stack::start(&[&settings[..], &[("ORDER_PROCESSING_DELAY", "0ms")]].concat()).await;
    // More than a threshold's worth after the first scrape: `rate` does not count what it begins with.
    for placed in [60.0, 120.0] {
        for _ in 0..60 {
            place(&stack.api).await;
        }
        stack.scraped_orders(1, placed).await;
    }
    let second = loop {
        let line = stack.line().await.expect("it grows");
        if line.starts_with("replica 2") {
            break line;
        }
    };
    assert!(second.contains("http://127.0.0.1:"), "{second}");

    // The processes answer by name and process id.
    let served = place(&stack.api).await;
    let process: i32 = served.rsplit_once(':').unwrap().1.parse().unwrap();
    let children = stack.children();
    assert!(children.contains(&process));
    kill_process(Pid::from_raw(process).unwrap(), Signal::KILL).unwrap();
    let folder = stack.folder.clone();
    let (code, said) = stack.ended().await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("ended by itself with -9"), "{said}");
    assert!(Path::new(&folder).join("prometheus.log").exists(), "{said}");
    fs::remove_dir_all(folder).unwrap();
    assert!(!processes().into_iter().any(|(process, _)| children.contains(&process)));
}

#[tokio::test]
#[ignore = "needs PostgreSQL, prometheus and python3; run by make test"]
async fn killed_it_takes_its_parts_along() {
    // Nothing asks for the last scrape any more.
    let settings = [("STACK_REPLICAS", "1"), ("ORDER_FINAL_SCRAPE_TIMEOUT", "0s")];
    let stack = Stack::start(&settings).await;
    let (children, folder) = (stack.children(), stack.folder.clone());
    kill_process(stack.id(), Signal::KILL).unwrap();
    let left = || processes().into_iter().any(|(process, _)| children.contains(&process));
    let waiting = async {
        while left() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, waiting).await.expect("all of them end");
    drop(stack);
    fs::remove_dir_all(folder).unwrap();
}

/// What check-jsonschema says of a Compose file.
async fn schema(arguments: &[&str], compose: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("compose.yaml");
    fs::write(&file, compose).unwrap();
    let mut check = Command::new("check-jsonschema");
    check.args(arguments).arg(file).stdin(Stdio::null());
    let output = check.output().await.expect("check-jsonschema is installed");
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8(output.stdout).unwrap())
}

#[tokio::test]
#[ignore = "needs check-jsonschema; run by make test"]
async fn the_compose_file_follows_its_schema_and_ours() {
    let compose = fs::read_to_string("compose.yaml").unwrap();
    let compose_spec = ["--builtin-schema", "vendor.compose-spec"];
    schema(&compose_spec, &compose).await.unwrap();
    schema(&compose_spec, &compose.replace("depends_on:", "dependson:")).await.unwrap_err();

    // Pinned images, health checks, loopback, no secrets.
    let ours = ["--schemafile", "tests/compose.schema.json"];
    schema(&ours, &compose).await.unwrap();
    for (right, wrong) in [
        ("grafana:13.2.3", "grafana:latest"),
        ("127.0.0.1:3000:3000", "3000:3000"),
        ("POSTGRES_PASSWORD: ${POSTGRES_PASSWORD:?set it in .env}", "POSTGRES_PASSWORD: orders"),
        ("orders:${POSTGRES_PASSWORD:?set it in .env}@", "orders:orders@"),
        ("healthcheck:\n      test: [CMD, wget", "x-healthcheck:\n      test: [CMD, wget"),
    ] {
        assert!(compose.contains(right), "{right}");
        schema(&ours, &compose.replace(right, wrong)).await.unwrap_err();
    }

    // What it mounts is there, and the variables that it asks for are in the example, without values.
    for line in compose.lines().filter_map(|line| line.trim().strip_prefix("- ./")) {
        let path = line.split(':').next().unwrap();
        assert!(Path::new(path).exists(), "{path}");
    }
    let asked = Regex::new(r"\$\{([A-Z_]+)").unwrap();
    let asked: BTreeSet<_> =
        asked.captures_iter(&compose).map(|name| format!("{}=", &name[1])).collect();
    let example = fs::read_to_string(".env.example").unwrap();
    let given = example.lines().filter(|line| !line.starts_with('#')).map(str::to_owned);
    assert_eq!(given.collect::<BTreeSet<_>>(), asked);
}
