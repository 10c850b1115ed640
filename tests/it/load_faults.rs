//! `order-load` against a service that does wrong: what an audit must find, and which calls are
//! sent again.

use std::{
    collections::{BTreeSet, HashSet},
    net::SocketAddr,
    process::Stdio,
    sync::{Arc, Mutex},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use order_service::{
    order::OrderIds,
    proto::{
        GetRequest, GetResponse, ListRequest, ListResponse, Order, PlaceRequest, PlaceResponse,
        order_service_server::{OrderService, OrderServiceServer},
    },
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    process::Command,
    task::JoinSet,
    time::timeout,
};
use tonic::{Request, Response, Status, service::Routes};

use crate::{
    load::{Loaded, load},
    log_stream::{broken_pipe, full_disk},
    support::{PATIENCE, Process},
};

/// What the service does to every tenth order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Acknowledges it without storing it.
    Loses,
    /// Stores it, and does not list it.
    HidesFromList,
    /// Stores it twice.
    Doubles,
    /// Stores another quantity.
    AltersQuantity,
    /// Stores another product.
    AltersProduct,
    /// Says that it failed, having stored it, and stores it again when it is sent again.
    ForgetsKeys,
}

/// A service in memory. Its orders, each with whether it is listed.
#[derive(Debug)]
struct Double {
    fault: Fault,
    orders: Mutex<Vec<(Order, bool)>>,
    calls: Mutex<Vec<PlaceRequest>>,
}

impl Double {
    fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Self { fault, orders: Mutex::default(), calls: Mutex::default() })
    }

    /// Accepts connections; the first so many are ended by a GOAWAY on their first call.
    async fn serve(self: &Arc<Self>, going: usize) -> (SocketAddr, JoinSet<()>) {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let routes = Routes::new(OrderServiceServer::from_arc(self.clone())).into_axum_router();
        let double = self.clone();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            for number in 0.. {
                let (stream, _) = socket.accept().await.unwrap();
                if number < going {
                    connections.spawn(double.clone().go_away(stream));
                    continue;
                }
                let service = TowerToHyperService::new(routes.clone());
                connections.spawn(async move {
                    let builder = Builder::new(TokioExecutor::new());
                    // Its end is the client's to tell.
                    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        (address, serving)
    }

    /// Takes one call and goes away without an answer.
    async fn go_away(self: Arc<Self>, stream: TcpStream) {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, _respond) = connection.accept().await.unwrap().unwrap();
        let mut body = request.into_body();
        let message = tokio::select! {
            message = body.data() => message.unwrap().unwrap(),
            _ = connection.accept() => unreachable!("a test's orders are far apart"),
        };
        self.calls.lock().unwrap().push(prost::Message::decode(&message[5..]).unwrap());
        connection.abrupt_shutdown(h2::Reason::NO_ERROR);
        while connection.accept().await.is_some() {}
    }

    fn store(&self, mut order: Order, listed: bool) -> Order {
        order.order_id = OrderIds::new().next().0.to_string();
        self.orders.lock().unwrap().push((order.clone(), listed));
        order
    }
}

#[tonic::async_trait]
impl OrderService for Double {
    async fn place(
        &self,
        request: Request<PlaceRequest>,
    ) -> Result<Response<PlaceResponse>, Status> {
        let request = request.into_inner();
        // Counts orders, not calls: one that is sent again fares better.
        let faulty = {
            let mut calls = self.calls.lock().unwrap();
            let keys: HashSet<_> = calls.iter().map(|call| &call.idempotency_key).collect();
            let faulty = keys.len() % 10 == 0 && !keys.contains(&request.idempotency_key);
            calls.push(request.clone());
            faulty
        };
        let PlaceRequest { product_id, quantity, .. } = request;
        let mut order = Order { product_id, quantity: quantity.unwrap(), ..Order::default() };
        let order = if faulty {
            match self.fault {
                Fault::None => self.store(order, true),
                Fault::Loses => Order { order_id: OrderIds::new().next().0.to_string(), ..order },
                Fault::HidesFromList => self.store(order, false),
                Fault::Doubles => {
                    self.store(order.clone(), true);
                    self.store(order, true)
                }
                Fault::AltersQuantity => {
                    order.quantity += 1;
                    self.store(order, true)
                }
                Fault::AltersProduct => {
                    order.product_id.push('0');
                    self.store(order, true)
                }
                Fault::ForgetsKeys => {
                    self.store(order, true);
                    return Err(Status::unavailable("try again"));
                }
            }
        } else {
            self.store(order, true)
        };
        Ok(Response::new(PlaceResponse { order: Some(order), replayed: false }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let id = request.into_inner().order_id;
        let orders = self.orders.lock().unwrap();
        let found = orders.iter().find(|(order, _)| order.order_id == id);
        let (order, _) = found.ok_or_else(|| Status::not_found("no such order"))?;
        Ok(Response::new(GetResponse { order: Some(order.clone()) }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let ListRequest { page_size, page_token } = request.into_inner();
        let mut orders = self.orders.lock().unwrap().clone();
        orders.retain(|(_, listed)| *listed);
        orders.sort_by(|(a, _), (b, _)| b.order_id.cmp(&a.order_id));
        // Pages shorter than asked for, as a service may give them: the scan must follow the
        // tokens.
        let from: usize = page_token.parse().unwrap_or_default();
        let to = orders.len().min(from + usize::try_from(page_size).unwrap().min(70));
        let next = if to < orders.len() { to.to_string() } else { String::new() };
        let page = orders[from..to].iter().map(|(order, _)| order.clone()).collect();
        Ok(Response::new(ListResponse { orders: page, next_page_token: next }))
    }
}

/// A run of 300 orders under audit.
async fn audited(fault: Fault) -> Loaded {
    let (address, _serving) = Double::new(fault).serve(0).await;
    let target = format!("http://{address}");
    load(&["--target", &target, "--phases", "1s@300", "--audit", "--product", "tea"]).await
}

#[tokio::test]
async fn an_audit_finds_nothing_where_nothing_is_wrong() {
    let loaded = audited(Fault::None).await;
    assert_eq!(loaded.audited_well(), 300);
    assert!(loaded.stderr.contains("300 acknowledged, 0 lost, 0 doubled, 0 altered, 0 unread"));
}

#[tokio::test]
async fn an_audit_finds_what_was_lost_doubled_or_altered() {
    for (fault, kind, told) in [
        (Fault::Loses, "lost", "was acknowledged and is not found"),
        (Fault::HidesFromList, "lost", "was acknowledged and is not in the list"),
        (Fault::Doubles, "doubled", "is stored 2 times"),
        (Fault::ForgetsKeys, "doubled", "is stored 2 times"),
        (Fault::AltersQuantity, "altered", ", ordered were "),
        (Fault::AltersProduct, "altered", ", ordered were "),
    ] {
        let loaded = audited(fault).await;
        assert_eq!(loaded.code, Some(1), "{fault:?}: {loaded:#?}");
        for other in ["lost", "doubled", "altered", "unread"] {
            let found = if other == kind { 30 } else { 0 };
            assert_eq!(loaded.document["audit"][other], found, "{fault:?}: {loaded:#?}");
        }
        // All orders are acknowledged all the same: the audit alone tells.
        assert_eq!((&loaded.phase(0)["ok"], &loaded.phase(0)["failed"]), (&json!(300), &json!({})));
        let listed = loaded.stderr.matches(told).count();
        assert_eq!(listed, 20, "{}", loaded.stderr);
        assert!(loaded.stderr.contains("and 10 more"), "{}", loaded.stderr);
        assert_eq!(loaded.document["audit"]["problems"].as_array().unwrap().len(), 20);
    }
}

#[tokio::test]
async fn a_call_lost_at_goaway_is_sent_again_with_its_key_and_reported_as_retried() {
    let double = Double::new(Fault::None);
    let (address, _serving) = double.serve(2).await;
    let target = format!("http://{address}");
    // Without an audit, too. One connection, and far apart: each call of the first two is lost.
    let args = ["--target", &target, "--phases", "1s@5", "--connections", "1", "--seed", "1"];
    let loaded = load(&args).await;
    assert_eq!(loaded.all_well(), 5);
    let calls = double.calls.lock().unwrap().clone();
    assert_eq!(calls.len(), 7, "{calls:?}");
    assert!(calls[..3].iter().all(|call| call == &calls[0]), "{calls:?}");
    assert!(!calls[0].idempotency_key.is_empty());
    let keys: BTreeSet<_> = calls.iter().map(|call| &call.idempotency_key).collect();
    assert_eq!(keys.len(), 5, "{calls:?}");
    assert_eq!(loaded.phase(0)["retried"], 1);
    assert!(calls.iter().all(|call| call.product_id == "book" && call.quantity == Some(1)));
}

#[tokio::test]
async fn a_run_whose_stderr_is_broken_goes_on_and_is_reported() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let target = server.url("");
    let broken: [Stdio; 2] = [broken_pipe().into(), full_disk().into()];
    for (stderr, json) in broken.into_iter().zip([true, false]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_order-load"));
        command.args(["--target", &target, "--phases", "300ms@40"]).args(json.then_some("--json"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).kill_on_drop(true);
        let output = timeout(PATIENCE, command.spawn().unwrap().wait_with_output()).await;
        let output = output.expect("order-load ends").unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let report = String::from_utf8(output.stdout).unwrap();
        assert!(report.contains(if json { "\"ok\":12," } else { "300ms@40" }), "{report}");
    }
    // Nor does one that has nothing to report end otherwise.
    let mut command = Command::new(env!("CARGO_BIN_EXE_order-load"));
    command.args(["--target", "http://127.0.0.1:1", "--phases", "1s@1", "--audit", "--json"]);
    command
        .args(["--timeout", "100ms", "--patience", "100ms"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let ended = timeout(PATIENCE, command.stderr(broken_pipe()).status()).await;
    assert_eq!(ended.expect("order-load ends").unwrap().code(), Some(1));
}
