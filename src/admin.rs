//! The admin listener's routes: metrics for Prometheus, liveness and readiness for Kubernetes.
//!
//! Knows the registry and the store's health, nothing of orders.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    middleware::{Next, from_fn_with_state, map_request},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use prometheus::Registry;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
    time::Instant,
};
use tower_http::compression::CompressionLayer;

use self::{page::Pages, scraped::Scraped};
use crate::{
    listener::Ending,
    store::{StoreHealth, StoreStatus},
};

mod page;
mod scraped;

/// How long a client may take to read a response.
const READING: Duration = Duration::from_secs(15);

/// Scrapes in work at a time.
const SCRAPES: usize = 4;

/// How far the process is between its start and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The store has not answered yet, or the API does not listen.
    Starting,
    /// The API serves.
    Serving,
    /// The API serves for a while yet, but wants no new clients.
    Draining,
    /// Every request has been answered and every order is stored: the counters are final.
    Flushed,
}

/// What the routes tell of.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The metrics.
    pub registry: Registry,
    /// How far the process is.
    pub stage: watch::Receiver<Stage>,
    /// How the store is.
    pub store: StoreHealth,
    /// How many scrapes that were asked for after the flush were answered in full.
    pub final_scrapes: watch::Sender<usize>,
}

/// `/metrics`, `/livez`, `/readyz`, and `/` that lists them.
pub fn routes(admin: Admin) -> Router {
    let metrics = get(metrics)
        .layer(CompressionLayer::new().gzip(true))
        .layer(from_fn_with_state(Arc::new(Semaphore::new(SCRAPES)), off_runtime))
        .layer(from_fn_with_state(Pages::new(admin.registry.clone()), render));
    let scraped = from_fn_with_state(admin.clone(), note_final_scrape);
    Router::new()
        .route("/metrics", metrics.layer(scraped).fallback(only_reads))
        .route("/livez", get(async || "ok\n").fallback(only_reads))
        .route("/readyz", get(readyz).fallback(only_reads))
        .route("/", get(async || "/metrics\n/livez\n/readyz\n").fallback(only_reads))
        .fallback(async || (StatusCode::NOT_FOUND, "expected /metrics, /livez or /readyz\n"))
        .layer(map_request(limit_reading))
        .with_state(admin)
}

async fn limit_reading(request: Request) -> Request {
    if let Some(ending) = request.extensions().get::<Ending>() {
        ending.set_limit(Instant::now() + READING);
    }
    request
}

async fn only_reads() -> Response {
    let allow = [(header::ALLOW, HeaderValue::from_static("GET, HEAD"))];
    (StatusCode::METHOD_NOT_ALLOWED, allow, "expected GET or HEAD\n").into_response()
}

/// Renders the page before it waits for its turn, so that all scrapes that wait share one
/// rendering.
async fn render(State(pages): State<Pages>, mut request: Request, next: Next) -> Response {
    match pages.render().await {
        Ok(page) => {
            request.extensions_mut().insert(Page(page));
            next.run(request).await
        }
        Err(error) => cannot_write(&error),
    }
}

/// A rendered page, in the extensions of its request.
#[derive(Debug, Clone)]
struct Page(Bytes);

/// Compresses a page off the runtime's threads, which have requests to serve: it takes about a
/// millisecond. At most `SCRAPES` run at once; others
/// wait.
async fn off_runtime(
    State(turns): State<Arc<Semaphore>>,
    request: Request,
    next: Next,
) -> Response {
    let turn = turns.acquire_owned().await.expect("nobody closes it");
    let runtime = Handle::current();
    let page = async {
        let (head, body) = next.run(request).await.into_parts();
        let body = to_bytes(body, usize::MAX).await?;
        Ok::<_, axum::Error>(Response::from_parts(head, Body::from(body)))
    };
    // The turn goes with it: a scrape that is given up must not let a fifth begin.
    let compressing = tokio::task::spawn_blocking(move || {
        let page = runtime.block_on(page);
        drop(turn);
        page
    });
    match compressing.await {
        Ok(Ok(page)) => page,
        Ok(Err(error)) => cannot_write(&error),
        Err(panic) => cannot_write(&panic),
    }
}

async fn metrics(Extension(Page(page)): Extension<Page>) -> Response {
    let format = HeaderValue::from_static(prometheus::TEXT_FORMAT);
    ([(header::CONTENT_TYPE, format)], page).into_response()
}

fn cannot_write(error: &dyn std::error::Error) -> Response {
    tracing::error!(%error, "the metrics page could not be written");
    (StatusCode::INTERNAL_SERVER_ERROR, "the page could not be written; see the log\n")
        .into_response()
}

/// Counts a scrape of the final figures at the end of its body.
async fn note_final_scrape(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let is_final = *admin.stage.borrow() == Stage::Flushed && request.method() == Method::GET;
    let response = next.run(request).await;
    if is_final && response.status().is_success() {
        response.map(|page| Body::new(Scraped::new(page, admin.final_scrapes)))
    } else {
        response
    }
}

/// 200 as long as traffic is wanted. A store that fails later is told, but does not take the pod
/// out: with a shared database that would take out all of them at once.
async fn readyz(State(admin): State<Admin>) -> Response {
    let unready = |why: String| (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    let stage = *admin.stage.borrow();
    match (stage, admin.store.status()) {
        (Stage::Starting, StoreStatus::Opening { why: Some(why) }) => {
            unready(format!("starting: the store has not answered yet: {why}\n"))
        }
        (Stage::Starting, _) => unready("starting\n".to_owned()),
        (Stage::Draining | Stage::Flushed, _) => unready("draining\n".to_owned()),
        (Stage::Serving, StoreStatus::Failing { why }) => {
            format!("ok, but the store fails: {why}\n").into_response()
        }
        (Stage::Serving, _) => "ok\n".into_response(),
    }
}
