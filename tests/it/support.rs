//! Starts real servers and talks to them.

use std::{
    net::SocketAddr,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use order_service::proto::order_service_client::OrderServiceClient;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    sync::watch,
    time::timeout,
};
use tonic::transport::{Channel, Endpoint};

/// Far longer than anything here takes: a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A command of the server, with none of this environment's settings.
pub fn server_command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_order-service"));
    for (name, _) in std::env::vars() {
        if name.starts_with("ORDER_") || name == "DATABASE_URL" || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Replaces a command's program by other words; arguments and environment stay.
pub fn run_as(command: &mut Command, words: &[&str]) {
    let mut other = Command::new(words[0]);
    other.args(&words[1..]).args(command.as_std().get_args());
    for (name, value) in command.as_std().get_envs() {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    }
    other.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    *command = other;
}

/// A running server process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: Arc<Mutex<Vec<Value>>>,
    lines: watch::Receiver<usize>,
    pub api: SocketAddr,
    pub admin: SocketAddr,
}

impl Process {
    /// Starts a server on ports of its own and on a database, and waits until it serves.
    pub async fn start(database: &str, args: &[&str]) -> Self {
        Self::start_command(database, args, |_| {}).await
    }

    /// The same on the file `orders.db` of a directory.
    pub async fn start_in(dir: &Path, args: &[&str]) -> Self {
        Self::start(&database_in(dir), args).await
    }

    pub async fn start_command(
        database: &str,
        args: &[&str],
        adapt: impl FnOnce(&mut Command),
    ) -> Self {
        let mut process = Self::spawn(database, args, adapt);
        process.serving().await;
        process
    }

    /// Starts a server and waits for nothing.
    pub fn spawn(database: &str, args: &[&str], adapt: impl FnOnce(&mut Command)) -> Self {
        // By the environment, so that a test's flags win.
        let mut command = server_command(&[]);
        command.env("ORDER_LISTEN", "127.0.0.1:0").env("ORDER_ADMIN_LISTEN", "127.0.0.1:0");
        command.args(["--database-url", database, "--log-format", "json"]).args(args);
        command.stderr(Stdio::piped());
        adapt(&mut command);
        let mut child = command.spawn().unwrap();

        let stderr = child.stderr.take().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (sender, lines) = watch::channel(0);
        let kept = log.clone();
        tokio::spawn(async move {
            let mut stderr = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = stderr.next_line().await {
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                kept.lock().unwrap().push(line);
                sender.send_modify(|lines| *lines += 1);
            }
        });
        let nowhere = ([127, 0, 0, 1], 0).into();
        Self { child, log, lines, api: nowhere, admin: nowhere }
    }

    /// Waits until it serves; from then on its addresses are known.
    pub async fn serving(&mut self) {
        let line = self.logged("serving").await;
        self.api = line["api"].as_str().unwrap().parse().unwrap();
        self.admin = line["admin"].as_str().unwrap().parse().unwrap();
    }

    /// Waits for a log line with this message.
    pub async fn logged(&mut self, message: &str) -> Value {
        let waiting = async {
            loop {
                let seen = self.log().into_iter().find(|line| line["message"] == message);
                match seen {
                    Some(line) => return line,
                    None if self.lines.changed().await.is_err() => {
                        panic!("the server ended without {message:?}: {:?}", self.log())
                    }
                    None => {}
                }
            }
        };
        let waited = timeout(PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| panic!("no line {message:?}: {:?}", self.log()))
    }

    /// The log lines so far: JSON objects, or strings where a line is none.
    pub fn log(&self) -> Vec<Value> {
        self.log.lock().unwrap().clone()
    }

    pub fn id(&self) -> u32 {
        self.child.id().expect("running")
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.id().try_into().unwrap()).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the end of the server and of its log.
    pub async fn exited(&mut self) -> ExitStatus {
        let ending = async {
            let status = self.child.wait().await.unwrap();
            while self.lines.changed().await.is_ok() {}
            status
        };
        timeout(PATIENCE, ending).await.expect("the server ends")
    }

    /// The exit code of a server that is ending.
    pub async fn ended(mut self) -> Option<i32> {
        self.exited().await.code()
    }

    pub async fn kill_9(mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGTERM, and the exit code.
    pub async fn terminate(self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.ended().await
    }

    pub async fn grpc(&self) -> OrderServiceClient<Channel> {
        OrderServiceClient::new(channel(self.api).await)
    }

    /// A URL on the API.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.api)
    }

    pub async fn scrape(&self) -> Page {
        Page::scrape(self.admin).await
    }
}

/// The database URL of the file `orders.db` in a directory.
pub fn database_in(dir: &Path) -> String {
    format!("sqlite://{}", dir.join("orders.db").display())
}

/// An HTTP/2 connection of its own.
pub async fn channel(address: SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint.connect().await.unwrap()
}

/// A message as gRPC frames it: a prefix of five bytes and what was encoded, less than 256 bytes.
pub fn framed(message: &impl prost::Message) -> Vec<u8> {
    let mut framed = vec![0; 5];
    framed[4] = message.encoded_len().try_into().unwrap();
    message.encode(&mut framed).unwrap();
    framed
}

/// Sends these bytes on a connection of their own and reads until the server closes it.
pub async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it closes").unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// A scraped metrics page.
#[derive(Debug, Clone)]
pub struct Page(pub String);

impl Page {
    pub async fn scrape(admin: SocketAddr) -> Self {
        let response = reqwest::get(format!("http://{admin}/metrics")).await.unwrap();
        assert_eq!(response.status(), 200);
        Self(response.text().await.unwrap())
    }

    /// The value of the one series of this name that has all of these labels (`name="value"`, in
    /// any order).
    pub fn value(&self, name: &str, labels: &[&str]) -> f64 {
        let values: Vec<_> = self.series(name, labels).map(|(_, value)| value).collect();
        assert_eq!(values.len(), 1, "{name} {labels:?} in\n{}", self.0);
        values[0]
    }

    /// The sum of all series of this name that have these labels.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.series(name, labels).map(|(_, value)| value).sum()
    }

    /// The series of this name that have these labels.
    pub fn series<'p>(
        &'p self,
        name: &'p str,
        labels: &'p [&str],
    ) -> impl Iterator<Item = (&'p str, f64)> {
        self.0.lines().filter(|line| !line.starts_with('#')).filter_map(move |line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, braces) = series.split_once('{').unwrap_or((series, ""));
            let has = labels.iter().all(|label| braces.contains(label));
            (found == name && has).then(|| (series, value.parse().unwrap()))
        })
    }

    /// How many series the page has.
    pub fn count(&self) -> usize {
        self.0.lines().filter(|line| !line.starts_with('#')).count()
    }
}

/// Scrapes until a condition holds.
pub async fn scrape_until(admin: SocketAddr, condition: impl Fn(&Page) -> bool) -> Page {
    let mut last = None;
    let waiting = async {
        loop {
            let page = Page::scrape(admin).await;
            if condition(&page) {
                return page;
            }
            last = Some(page);
        }
    };
    let waited = timeout(PATIENCE, waiting).await;
    waited.unwrap_or_else(|_| panic!("the metrics do not come to it: {last:#?}"))
}
