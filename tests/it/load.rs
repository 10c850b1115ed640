//! `order-load` against real servers: what it sends, reports and refuses.

use std::{fs, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::{
    support::{PATIENCE, Page, Process, scrape_until},
    tls::Pki,
    traffic::Balancer,
};

pub const PROTOCOLS: [&str; 2] = ["grpc", "http"];

/// What a run of `order-load --json` came to.
#[derive(Debug)]
pub struct Loaded {
    pub code: Option<i32>,
    pub document: Value,
    pub stderr: String,
}

impl Loaded {
    pub fn phase(&self, phase: usize) -> &Value {
        &self.document["phases"][phase]
    }

    /// Checks that every order was sent and acknowledged; how many there were.
    pub fn all_well(&self) -> u64 {
        assert_eq!(self.code, Some(0), "{self:#?}");
        let phases = self.document["phases"].as_array().unwrap();
        for phase in phases {
            assert_eq!(phase["failed"], json!({}), "{self:#?}");
            assert_eq!((&phase["ok"], &phase["unsent"]), (&phase["sent"], &json!(0)), "{self:#?}");
        }
        phases.iter().map(|phase| phase["ok"].as_u64().unwrap()).sum()
    }

    /// The same of a run with `--audit`, of which nothing is wrong.
    pub fn audited_well(&self) -> u64 {
        let audit = &self.document["audit"];
        for count in ["lost", "doubled", "altered", "unread", "unacknowledged_stored"] {
            assert_eq!(audit[count], 0, "{self:#?}");
        }
        let acknowledged = audit["acknowledged"].as_u64().unwrap();
        assert_eq!(self.all_well(), acknowledged);
        acknowledged
    }
}

/// A run under way.
pub struct Loading(Child);

impl Loading {
    pub fn start(args: &[&str]) -> Self {
        Self::start_command(Command::new(env!("CARGO_BIN_EXE_order-load")), args)
    }

    pub fn start_command(mut command: Command, args: &[&str]) -> Self {
        command.arg("--json").args(args).stdin(Stdio::null()).kill_on_drop(true);
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.0.id().expect("running").try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub async fn ended(self) -> Loaded {
        let output = tokio::time::timeout(2 * PATIENCE, self.0.wait_with_output()).await;
        let output = output.expect("order-load ends").unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        assert!(stdout.lines().count() <= 1, "{stdout}");
        let document = serde_json::from_str(&stdout).unwrap_or_default();
        Loaded { code: output.status.code(), document, stderr }
    }
}

pub async fn load(args: &[&str]) -> Loaded {
    Loading::start(args).ended().await
}

fn placed(page: &Page) -> f64 {
    page.value("product_order_total", &[])
}

#[tokio::test]
async fn every_phase_sends_its_orders_over_either_protocol_and_tells_what_came_of_them() {
    for protocol in PROTOCOLS {
        let server = Process::start("sqlite::memory:", &[]).await;
        let target = server.url("");
        let phases = "500ms@100,200ms@0,500ms@40";
        let loaded = load(&["--target", &target, "--protocol", protocol, "--phases", phases]).await;
        assert_eq!(loaded.all_well(), 70);
        for (phase, name, sent) in [(0, "500ms@100", 50), (1, "200ms@0", 0), (2, "500ms@40", 20)] {
            let phase = loaded.phase(phase);
            assert_eq!((&phase["phase"], &phase["sent"]), (&json!(name), &json!(sent)));
            let latency = &phase["latency_seconds"];
            let quantiles = ["p50", "p90", "p99", "p99.9", "max"];
            let quantiles = quantiles.map(|quantile| latency[quantile].as_f64().unwrap());
            assert!(quantiles.is_sorted() && (quantiles[0] > 0.0) == (sent > 0), "{latency}");
            let processes = phase["served_by"].as_object().unwrap();
            assert_eq!(processes.len(), usize::from(sent > 0));
            for (process, orders) in processes {
                assert!(process.ends_with(&format!(":{}", server.id())), "{process}");
                assert_eq!(orders, sent);
            }
        }
        assert!(loaded.document.get("audit").is_none());
        // The table for the eye, beside the document.
        let row = loaded.stderr.lines().find(|line| line.starts_with("500ms@40 ")).unwrap();
        assert!(row.split_whitespace().nth(1) == Some("20") && row.contains("ms"), "{row}");

        let page = server.scrape().await;
        assert_eq!(placed(&page), 70.0);
        let calls = match protocol {
            "grpc" => page
                .value("grpc_server_handled_total", &["grpc_method=\"Place\"", "grpc_code=\"OK\""]),
            _ => page.value(
                "http_requests_total_with_path",
                &["url=\"/product\"", "method=\"POST\"", "code=\"201\""],
            ),
        };
        assert_eq!(calls, 70.0);
    }
}

#[tokio::test]
async fn without_json_the_table_is_on_stdout_and_progress_on_stderr() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_order-load"));
    command.args(["--target", &server.url(""), "--phases", "200ms@50"]);
    let output = command.output().await.unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let head = "phase     sent  ok  retried  unsent  failed ";
    assert!(stdout.starts_with(head), "{stdout}");
    assert!(stdout.lines().any(|line| line.starts_with("served by (1)")), "{stdout}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let last = stderr.lines().last().unwrap();
    assert!(last.starts_with("200ms@50: ") && last.contains("ok 10, failed 0, p99 "), "{stderr}");
}

#[tokio::test]
async fn a_phase_lasts_as_long_as_was_asked_for_though_nothing_is_sent() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let target = server.url("");
    let begun = std::time::Instant::now();
    let loaded = load(&["--target", &target, "--phases", "100ms@20,1s@0"]).await;
    assert!(begun.elapsed().as_millis() >= 1100, "{loaded:#?}");
    assert_eq!(loaded.all_well(), 2);
}

#[tokio::test]
async fn on_a_terminal_a_bar_shows_each_phase_and_the_table_begins_on_a_line_of_its_own() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let program = env!("CARGO_BIN_EXE_order-load");
    let line = format!("{program} --target {} --phases 300ms@20,300ms@0", server.url(""));
    // From util-linux: runs it on a terminal of its own.
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).stdin(Stdio::null());
    let output = command.output().await.unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{shown}");
    for phase in ["300ms@20 █", "300ms@0 █", "20.0/s, ok 6, failed 0, p99 ", "p99 -"] {
        assert!(shown.contains(phase), "{phase}: {shown}");
    }
    assert!(shown.lines().any(|line| line.starts_with("phase ")), "{shown}");
}

#[tokio::test]
async fn each_process_behind_one_address_has_its_share() {
    let servers = [
        Process::start("sqlite::memory:", &[]).await,
        Process::start("sqlite::memory:", &[]).await,
    ];
    let balancer = Balancer::start().await;
    servers.iter().for_each(|server| balancer.add(server.api));
    let target = format!("http://{}", balancer.address);
    for protocol in PROTOCOLS {
        let args = ["--target", &target, "--protocol", protocol, "--phases", "1s@100"];
        let loaded = load(&args).await;
        loaded.all_well();
        let served_by = &loaded.phase(0)["served_by"];
        for server in &servers {
            let name = format!(":{}", server.id());
            let mut processes = served_by.as_object().unwrap().iter();
            let (_, orders) = processes.find(|(process, _)| process.ends_with(&name)).unwrap();
            assert!((30..=70).contains(&orders.as_u64().unwrap()), "{served_by}");
        }
    }
}

#[tokio::test]
#[ignore = "needs mount namespaces (unshare); run by make test"]
async fn a_new_address_of_the_name_gets_its_share_and_one_that_refuses_harms_nobody() {
    let old = Process::start("sqlite::memory:", &[]).await;
    let port = old.api.port();
    let hosts = tempfile::NamedTempFile::new().unwrap();
    // Nobody listens at the second address.
    fs::write(hosts.path(), "127.0.0.1 orders.test\n127.0.0.3 orders.test\n").unwrap();
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
    command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(hosts.path());
    command.arg(env!("CARGO_BIN_EXE_order-load"));
    let target = format!("http://orders.test:{port}");
    let loading =
        Loading::start_command(command, &["--target", &target, "--phases", "60s@50,60s@50"]);
    scrape_until(old.admin, |page| placed(page) >= 20.0).await;

    let listen = format!("127.0.0.2:{port}");
    let new = Process::start("sqlite::memory:", &["--listen", &listen]).await;
    fs::write(hosts.path(), "127.0.0.1 orders.test\n127.0.0.2 orders.test\n").unwrap();
    let first = scrape_until(new.admin, |page| placed(page) >= 20.0).await;
    // From then on in equal shares: half of the connections are there.
    let before = placed(&old.scrape().await);
    let later = scrape_until(new.admin, |page| placed(page) >= placed(&first) + 100.0).await;
    let (there, here) = (placed(&later) - placed(&first), placed(&old.scrape().await) - before);
    assert!(here > there / 2.0 && here < there * 2.0, "{here} and {there}");
    loading.signal(Signal::INT);
    let loaded = loading.ended().await;
    loaded.all_well();
    assert_eq!(loaded.phase(0)["served_by"].as_object().unwrap().len(), 2);
}

/// Ten connections cannot be divided by seven: three addresses have two.
#[tokio::test]
#[ignore = "needs mount namespaces (unshare); run by make test"]
async fn seven_addresses_have_equal_shares_of_the_calls_on_ten_connections() {
    let mut servers = vec![Process::start("sqlite::memory:", &[]).await];
    let port = servers[0].api.port();
    let mut names = "127.0.0.1 orders.test\n".to_owned();
    for host in 2..=7 {
        let listen = format!("127.0.0.{host}:{port}");
        servers.push(Process::start("sqlite::memory:", &["--listen", &listen]).await);
        names += &format!("127.0.0.{host} orders.test\n");
    }
    let hosts = tempfile::NamedTempFile::new().unwrap();
    fs::write(hosts.path(), names).unwrap();
    for protocol in PROTOCOLS {
        let mut command = Command::new("unshare");
        let script = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(hosts.path());
        command.arg(env!("CARGO_BIN_EXE_order-load"));
        let target = format!("http://orders.test:{port}");
        let args = ["--target", &target, "--protocol", protocol, "--connections", "10"];
        let args = [&args[..], &["--phases", "5s@200"]].concat();
        let loaded = Loading::start_command(command, &args).ended().await;
        loaded.all_well();
        let served_by = loaded.phase(0)["served_by"].as_object().unwrap();
        assert_eq!(served_by.len(), 7, "{served_by:?}");
        // 143 each. By connections it would be 100 and 200.
        for orders in served_by.values() {
            assert!((115..=171).contains(&orders.as_u64().unwrap()), "{served_by:?}");
        }
    }
}

#[tokio::test]
async fn connections_that_are_asked_to_go_cost_no_order() {
    let server = Process::start("sqlite::memory:", &["--max-connection-age", "200ms"]).await;
    for protocol in PROTOCOLS {
        let target = server.url("");
        let args = ["--target", &target, "--protocol", protocol, "--phases", "3s@200", "--audit"];
        assert_eq!(load(&args).await.audited_well(), 600);
    }
    let page = server.scrape().await;
    assert!(page.value("connections_accepted_total", &[]) >= 60.0);
    assert_eq!(placed(&page), 1200.0);
}

#[tokio::test]
async fn a_target_that_is_not_there_fails_every_order_and_max_failures_allows_for_it() {
    for (protocol, code) in [("grpc", "UNAVAILABLE"), ("http", "unreachable")] {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let target = format!("http://{free}");
        let args = ["--target", &target, "--protocol", protocol, "--phases", "100ms@50"];
        for (most, exit) in [("4", 1), ("5", 0)] {
            let more = ["--timeout", "100ms", "--max-failures", most];
            let loaded = load(&[&args[..], &more].concat()).await;
            assert_eq!(loaded.code, Some(exit), "{loaded:#?}");
            assert_eq!(loaded.phase(0)["failed"], json!({code: 5}));
            assert!(loaded.stderr.contains("refused"), "{}", loaded.stderr);
        }
    }
}

#[tokio::test]
async fn what_the_service_refuses_is_told_by_its_code() {
    let server = Process::start("sqlite::memory:", &["--processing-delay", "1h"]).await;
    for (protocol, code) in [("grpc", "DEADLINE_EXCEEDED"), ("http", "timeout")] {
        let target = server.url("");
        let args = ["--target", &target, "--protocol", protocol, "--phases", "100ms@50"];
        let loaded = load(&[&args[..], &["--timeout", "200ms"]].concat()).await;
        assert_eq!(loaded.code, Some(1), "{loaded:#?}");
        assert_eq!(loaded.phase(0)["failed"], json!({code: 5}));
        assert_eq!(loaded.phase(0)["sent"], 5);
    }
}

#[tokio::test]
async fn what_finds_no_free_connection_in_time_goes_unsent_and_is_told() {
    let server = Process::start("sqlite::memory:", &["--processing-delay", "300ms"]).await;
    let target = server.url("");
    let narrow = ["--protocol", "http", "--connections", "1", "--timeout", "500ms"];
    let args = ["--target", &target, "--phases", "1s@50"];
    let loaded = load(&[&args[..], &narrow].concat()).await;
    let count = |name: &str| loaded.phase(0)[name].as_u64().unwrap();
    assert_eq!(loaded.code, Some(1));
    assert!(count("unsent") >= 40, "{loaded:#?}");
    assert_eq!(count("sent") + count("unsent"), 50);
    // Those that were sent waited, and their latency says so.
    assert!(loaded.phase(0)["latency_seconds"]["max"].as_f64().unwrap() > 0.5, "{loaded:#?}");
    assert_eq!(placed(&server.scrape().await), count("ok") as f64);
}

#[tokio::test]
async fn a_signal_ends_the_run_and_what_was_sent_is_audited_and_reported() {
    for signal in [Signal::INT, Signal::TERM] {
        let server = Process::start("sqlite::memory:", &[]).await;
        let target = server.url("");
        let phases = "1h@50,1h@50";
        let loading = Loading::start(&["--target", &target, "--phases", phases, "--audit"]);
        scrape_until(server.admin, |page| placed(page) >= 20.0).await;
        loading.signal(signal);
        let loaded = loading.ended().await;
        assert_eq!(loaded.document["interrupted"], true);
        assert_eq!(loaded.audited_well() as f64, placed(&server.scrape().await));
        assert_eq!(loaded.phase(1)["sent"], 0);
        assert!(loaded.stderr.contains("ended early"), "{}", loaded.stderr);
    }
}

#[tokio::test]
async fn tls_and_client_certificates_are_spoken_over_either_protocol() {
    let pki = Pki::new();
    pki.issue("server", "127.0.0.1");
    pki.issue("client", "client.test");
    let file = |name| pki.path(name).to_str().unwrap().to_owned();
    let (ca, cert, key) = (file("ca.pem"), file("client.pem"), file("client.key"));
    let plain = pki.serve(&[]).await;
    let mutual = pki.serve(&["--tls-client-ca".to_owned(), ca.clone()]).await;
    for protocol in PROTOCOLS {
        let run = async |server: &Process, more: &[&str]| {
            let target = format!("https://{}", server.api);
            let args = ["--target", &target, "--protocol", protocol, "--phases", "100ms@100"];
            load(&[&args[..], &["--timeout", "2s"], more].concat()).await
        };
        let trusting = ["--tls-ca", &ca];
        let known = ["--tls-ca", &ca, "--tls-cert", &cert, "--tls-key", &key];
        assert_eq!(run(&plain, &[&trusting[..], &["--audit"]].concat()).await.audited_well(), 10);
        assert_eq!(run(&mutual, &known).await.all_well(), 10);
        // Without a certificate the one refuses us, without its CA we the other.
        let refused = run(&mutual, &trusting).await;
        let refusing = run(&plain, &["--tls-ca", &cert]).await;
        for loaded in [&refused, &refusing] {
            assert_eq!((loaded.code, &loaded.phase(0)["ok"]), (Some(1), &json!(0)), "{loaded:#?}");
        }
        // The refusal of TLS 1.3 may come after our first bytes met a closed socket: it is not always
        // what is told.
        assert!(refusing.stderr.contains("certificate"), "{}", refusing.stderr);
    }
}

#[tokio::test]
async fn bad_usage_is_refused_in_one_line_that_names_flag_value_and_expectation() {
    let long = "p".repeat(41);
    for (args, value, expected) in [
        (&["--phases=30s"][..], "30s", "DURATION@RATE"),
        (&["--phases=30s@5,60s@many"], "60s@many", "orders per second"),
        (&["--target=localhost"], "localhost", "http://HOST:PORT"),
        (&["--target=ftp://localhost"], "ftp://localhost", "https://HOST:PORT"),
        (&["--target=http://localhost/product"], "http://localhost/product", "http://HOST:PORT"),
        (&["--target=http://localhost:0"], "http://localhost:0", "http://HOST:PORT"),
        (&["--target=http://localhost:99999"], "http://localhost:99999", "http://HOST:PORT"),
        (&["--target=http://localhost:0\n"], "http://localhost:0", "http://HOST:PORT"),
        (&["--target=http://local\nhost"], "http://local\nhost", "control character"),
        (&["--tls-ca=a\n.pem"], "a\n.pem", "control character"),
        (&["--tls-ca=a.pem\n", "--target=https://localhost\r\n"], "a.pem", "read"),
        (&["--protocol=smtp"], "smtp", "grpc or http"),
        (&["--connections=0"], "0", "1 to 10000"),
        (&["--timeout=10"], "10", "250ms"),
        (&["--timeout=2h"], "2h", "at most 1h"),
        (&["--product=a b"], "a b", "1 to 64"),
        (&["--product", &long, "--audit"], &long, "at most 40"),
        (&["--seed=x"], "x", "whole number"),
        (&["--max-failures=-1"], "-1", "whole number"),
        (&["--tls-ca=ca.pem"], "ca.pem", "https://"),
        (&["--tls-cert=cert.pem"], "cert.pem", "--tls-key"),
        (&["--tls-key=key.pem"], "key.pem", "--tls-cert"),
        (&["--tls-ca=missing.pem", "--target=https://localhost"], "missing.pem", "read"),
        (&["--json=yes"], "yes", "no value"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_order-load")).args(args).output();
        let output = output.await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty() && stderr.lines().count() == 1, "{args:?}: {stderr}");
        let flag = args[0].split('=').next().unwrap();
        let named = [flag, &format!("{value:?}"), expected];
        assert!(named.iter().all(|part| stderr.contains(part)), "{named:?}: {stderr}");
    }
    for args in [&["--rate", "3"][..], &["now"], &["--target"], &["--seed", "1", "--seed", "2"]] {
        let loaded = load(args).await;
        assert_eq!(loaded.code, Some(2), "{loaded:?}");
        assert!(
            loaded.stderr.lines().count() == 1 && loaded.stderr.contains(args[0]),
            "{loaded:?}"
        );
    }
    for target in ["http://user:s3cret@localhost", "http://user:s3cret@local\thost"] {
        let loaded = load(&["--target", target]).await;
        assert!(loaded.code == Some(2) && !loaded.stderr.contains("s3cret"), "{loaded:?}");
    }
}
