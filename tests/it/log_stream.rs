//! A stderr that is broken, full or not read costs log lines and nothing else.

use std::{
    fs::File,
    io::{PipeReader, PipeWriter, Write as _, pipe},
    net::{SocketAddr, TcpListener},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use order_service::{config::LogFormat, logs::Log, panics};
use reqwest::Client;
use rustix::{
    pipe::fcntl_getpipe_size,
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr, Command},
    time::timeout,
};

use crate::{
    in_process::{InProcess, place},
    support::{PATIENCE, Page, Process, channel, scrape_until, server_command},
};

/// Limit of an answer and of the drain: far longer than either takes, the flush of the log
/// included.
const SOON: Duration = Duration::from_secs(20);

/// A server whose stderr the test chooses.
pub struct Server {
    child: Child,
    pub api: SocketAddr,
    pub admin: SocketAddr,
    client: Client,
}

impl Server {
    fn new(child: Child, api: SocketAddr, admin: SocketAddr) -> Self {
        let client = Client::builder().timeout(SOON).build().unwrap();
        Self { child, api, admin, client }
    }

    /// Starts it on free ports, since nobody may be able to read its addresses from stderr.
    pub async fn start(args: &[&str], stderr: impl Into<Stdio>) -> Self {
        // Both bound before either is dropped, so that they differ.
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [api, admin] = free.map(|socket| socket.local_addr().unwrap());
        let addresses = [api.to_string(), admin.to_string()];
        let mut command = server_command(&["--database-url", "sqlite::memory:"]);
        command.args(["--listen", &addresses[0], "--admin-listen", &addresses[1]]).args(args);
        let child = command.stderr(stderr).spawn().unwrap();
        // It holds the stream as well.
        drop(command);
        let mut server = Self::new(child, api, admin);
        let begun = Instant::now();
        let quick = Client::builder().timeout(Duration::from_secs(1)).build().unwrap();
        while !matches!(quick.get(server.admin_url("/readyz")).send().await, Ok(r) if r.status() == 200)
        {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none() && begun.elapsed() < PATIENCE, "not ready: {ended:?}");
        }
        server
    }

    /// Starts it and reads its stderr up to the line with the addresses, no further.
    async fn start_told(command: &mut Command) -> (Self, Lines<BufReader<ChildStderr>>) {
        command.args(["--database-url", "sqlite::memory:", "--log-format", "json"]);
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let line = loop {
            let line = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "serving" {
                break line;
            }
        };
        let address = |name: &str| line[name].as_str().unwrap().parse().unwrap();
        (Self::new(child, address("api"), address("admin")), lines)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.api)
    }

    fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    /// Sends requests that are refused.
    async fn refuses(&self, requests: usize) {
        let path = format!("/nowhere/{}", "x".repeat(2000));
        for _ in 0..requests {
            let response = self.client.get(self.url(&path)).send().await;
            assert_eq!(response.expect("an answer").status(), 404);
        }
    }

    /// Checks that orders, probes and scrapes are answered.
    async fn serves(&self) {
        let response = self.client.get(self.url("/product")).send().await.expect("an answer");
        assert_eq!(response.text().await.unwrap(), "Order placed!");
        let mut grpc = order_service::proto::order_service_client::OrderServiceClient::new(
            channel(self.api).await,
        );
        timeout(SOON, grpc.place(place("book"))).await.expect("an answer").unwrap();
        for path in ["/livez", "/readyz", "/metrics"] {
            let response = self.client.get(self.admin_url(path)).send().await;
            assert_eq!(response.expect("an answer").status(), 200, "{path}");
        }
    }

    async fn dropped_lines(&self, least: f64) -> Page {
        let dropped = |page: &Page| page.value("log_lines_dropped_total", &[]) >= least;
        scrape_until(self.admin, dropped).await
    }

    /// Checks that it drains after SIGTERM.
    pub async fn drains(mut self) {
        let pid = self.child.id().expect("running").try_into().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
        drop(self.client);
        assert_eq!(code(&mut self.child).await, Some(0));
    }
}

/// Waits for the end of a process.
async fn code(child: &mut Child) -> Option<i32> {
    let ended: ExitStatus = timeout(SOON, child.wait()).await.expect("it ends").unwrap();
    ended.code()
}

/// A full pipe, and the end that nobody reads.
fn full_pipe() -> (PipeWriter, PipeReader) {
    let (reader, mut writer) = pipe().unwrap();
    let room = fcntl_getpipe_size(&writer).unwrap();
    writer.write_all(&vec![b'x'; room]).unwrap();
    (writer, reader)
}

pub fn full_disk() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

/// A pipe whose reader is gone.
pub fn broken_pipe() -> PipeWriter {
    pipe().unwrap().1
}

#[tokio::test]
async fn a_reader_that_goes_away_costs_its_lines_alone() {
    let (server, lines) = Server::start_told(&mut server_command(&[])).await;
    drop(lines);
    server.refuses(3).await;
    server.serves().await;
    server.dropped_lines(3.0).await;
    server.drains().await;
}

#[tokio::test]
async fn a_full_disk_costs_every_line_and_nothing_else() {
    let server = Server::start(&[], full_disk()).await;
    server.refuses(3).await;
    server.serves().await;
    // "serving" is lost, too.
    server.dropped_lines(4.0).await;
    server.drains().await;
}

#[tokio::test]
async fn a_log_file_at_its_limit_costs_the_lines_beyond_it_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    // 1024 or 2048 bytes, depending on the shell.
    let limited = "ulimit -f 2 && exec \"$0\" \"$@\" 2>>\"$LOG\"";
    let mut command = server_command(&[]);
    let program = command.as_std().get_program().to_owned();
    let mut shell = Command::new("sh");
    shell.args(["-c", limited]).arg(program).env("LOG", &path).kill_on_drop(true);
    for (name, _) in command.as_std_mut().get_envs() {
        shell.env_remove(name);
    }
    shell.args(["--database-url", "sqlite::memory:", "--log-format", "json"]);
    shell.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
    let mut child = shell.spawn().unwrap();
    let begun = Instant::now();
    let line: Value = loop {
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        if let Some((line, _)) = log.split_once('\n') {
            break serde_json::from_str(line).unwrap();
        }
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none() && begun.elapsed() < PATIENCE, "{ended:?}: {log}");
    };
    let address = |name: &str| line[name].as_str().unwrap().parse().unwrap();
    let server = Server::new(child, address("api"), address("admin"));
    server.refuses(8).await;
    server.serves().await;
    server.dropped_lines(1.0).await;
    server.drains().await;
}

#[tokio::test]
async fn nothing_waits_for_a_pipe_that_nobody_reads() {
    let (server, unread) = Server::start_told(&mut server_command(&[])).await;
    server.refuses(400).await;
    server.serves().await;
    // The queue has room for so few lines.
    let page = Page::scrape(server.admin).await;
    assert_eq!(page.value("log_lines_dropped_total", &[]), 0.0);
    server.drains().await;
    drop(unread);
}

#[tokio::test]
async fn lines_beyond_what_the_queue_holds_are_dropped_and_counted() {
    let mut command = server_command(&[]);
    let (mut server, unread) = Server::start_told(command.env("RUST_LOG", "trace")).await;
    // HTTP/2 logs many lines a request, which fill the pipe and then the queue.
    server.client = Client::builder().http2_prior_knowledge().timeout(SOON).build().unwrap();
    while Page::scrape(server.admin).await.value("log_lines_dropped_total", &[]) == 0.0 {
        server.refuses(50).await;
    }
    server.serves().await;
    server.drains().await;
    drop(unread);
}

#[tokio::test]
async fn a_pipe_that_is_full_from_the_start_stops_nothing() {
    let (writer, unread) = full_pipe();
    let server = Server::start(&[], writer).await;
    server.refuses(50).await;
    server.serves().await;
    server.drains().await;
    drop(unread);
}

#[tokio::test]
async fn a_start_that_fails_ends_with_its_exit_code_whatever_stderr_is() {
    let running = Process::start("sqlite::memory:", &[]).await;
    let taken = running.api.to_string();
    let port_taken = ["--listen", &taken, "--admin-listen", "127.0.0.1:0"];
    let database_gone = ["--listen", "127.0.0.1:0", "--database-url", "sqlite://missing/orders.db"];
    let bad_usage = ["--max-in-flight", "many"];
    for (args, expected) in [(&port_taken[..], 1), (&database_gone, 1), (&bad_usage, 2)] {
        let (writer, unread) = full_pipe();
        let streams: [Stdio; 3] = [writer.into(), broken_pipe().into(), full_disk().into()];
        for (stderr, what) in streams.into_iter().zip(["unread", "broken", "full"]) {
            let mut command = server_command(args);
            command.env("ORDER_ADMIN_LISTEN", "127.0.0.1:0");
            if args != database_gone {
                command.env("DATABASE_URL", "sqlite::memory:");
            }
            let mut child = command.stderr(stderr).spawn().unwrap();
            drop(command);
            assert_eq!(code(&mut child).await, Some(expected), "{args:?}, {what}");
        }
        drop(unread);
    }
}

/// Set in the process that the test starts of itself.
const HAS_BROKEN_STDERR: &str = "TEST_HAS_BROKEN_STDERR";

#[tokio::test]
async fn panics_are_answered_and_harm_nobody_whatever_stderr_is() {
    const NAME: &str = "log_stream::panics_are_answered_and_harm_nobody_whatever_stderr_is";
    if std::env::var_os(HAS_BROKEN_STDERR).is_some() {
        return answer_panics().await;
    }
    let (writer, unread) = full_pipe();
    let streams: [Stdio; 3] = [writer.into(), broken_pipe().into(), full_disk().into()];
    for (stderr, what) in streams.into_iter().zip(["unread", "broken", "full"]) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        // Not captured, prints go to stderr as in the program.
        command.args([NAME, "--exact", "--nocapture"]).env(HAS_BROKEN_STDERR, "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).kill_on_drop(true);
        let output = timeout(PATIENCE, command.spawn().unwrap().wait_with_output()).await;
        let output = output.unwrap_or_else(|_| panic!("{what}: it hangs")).unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{what}: {output:?}");
    }
    drop(unread);
}

async fn answer_panics() {
    let _log = Log::start(LogFormat::Text, None).unwrap();
    panics::log_panics();
    let server = InProcess::start(&["--worker-threads", "1"]).await;
    for _ in 0..3 {
        let response = reqwest::get(server.url("/test/panic")).await.unwrap();
        assert_eq!(response.status(), 500);
        // The hook logs a panic that belongs to no request.
        assert!(tokio::spawn(async { panic!("a task panics") }).await.unwrap_err().is_panic());
        let response = reqwest::get(server.url("/product")).await.unwrap();
        assert_eq!(response.text().await.unwrap(), "Order placed!");
    }
    let panics = server.scrape().await.sum("request_panics_total", &[]);
    assert_eq!(panics, 3.0);
    server.stop().await;
}
