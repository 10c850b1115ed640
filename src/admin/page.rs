//! The metrics page: rendered off the runtime's threads, once for all scrapes that wait for it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use prometheus::{Registry, TextEncoder};
use tokio::sync::Mutex;

/// Renders pages, one at a time; a clone is of the same.
#[derive(Debug, Clone)]
pub(super) struct Pages(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registry: Registry,
    /// How many renderings have begun.
    begun: AtomicU64,
    last: Mutex<Rendered>,
}

/// The last page, and which rendering it is of; 0 before the first.
#[derive(Debug, Default)]
struct Rendered {
    number: u64,
    page: Bytes,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoPage {
    #[error(transparent)]
    Encoding(#[from] prometheus::Error),
    #[error(transparent)]
    Panicked(#[from] tokio::task::JoinError),
}

impl Pages {
    pub(super) fn new(registry: Registry) -> Self {
        let (begun, last) = Default::default();
        Self(Arc::new(Shared { registry, begun, last }))
    }

    /// A page in the text format 0.0.4 whose rendering begins after this call: it holds all that was
    /// recorded before. Scrapes that wait while another page is rendered share the next one.
    pub(super) async fn render(&self) -> Result<Bytes, NoPage> {
        let Shared { registry, begun, last } = &*self.0;
        let arrived = begun.load(Ordering::Acquire);
        let mut last = last.lock().await;
        if last.number <= arrived {
            let number = begun.fetch_add(1, Ordering::AcqRel) + 1;
            let registry = registry.clone();
            let rendering = tokio::task::spawn_blocking(move || {
                TextEncoder::new().encode_to_string(&registry.gather())
            });
            *last = Rendered { number, page: rendering.await??.into() };
        }
        Ok(last.page.clone())
    }
}
