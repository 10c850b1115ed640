//! The metrics page: rendered off the runtime's threads, once for all scrapes that wait for it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use prometheus::{Registry, TextEncoder};
use tokio::sync::Mutex;

/// Renders one page at a time; clones share state.
#[derive(Debug, Clone)]
pub(super) struct Pages(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registry: Registry,
    /// How many renderings have begun.
    begun: AtomicU64,
    last: Arc<Mutex<Rendered>>,
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

    /// A page in the text format 0.0.4 whose rendering begins after this call: it holds all that
    /// was recorded before. Scrapes that wait while another page is rendered share the next one.
    pub(super) async fn render(&self) -> Result<Bytes, NoPage> {
        let Shared { registry, begun, last } = &*self.0;
        let arrived = begun.load(Ordering::Acquire);
        let mut last = last.clone().lock_owned().await;
        if last.number > arrived {
            return Ok(last.page.clone());
        }
        let number = begun.fetch_add(1, Ordering::AcqRel) + 1;
        let registry = registry.clone();
        // The lock goes with it: a scrape that is given up must not let another rendering begin.
        let rendering = tokio::task::spawn_blocking(move || {
            let page = TextEncoder::new().encode_to_string(&registry.gather())?;
            *last = Rendered { number, page: page.into() };
            Ok(last.page.clone())
        });
        rendering.await?
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{
            Mutex as StdMutex,
            mpsc::{Receiver, Sender, channel},
        },
        task::Poll,
    };

    use prometheus::{
        IntCounter,
        core::{Collector, Desc},
        proto::MetricFamily,
    };

    use super::*;

    /// Reports each rendering, and lets it go on when it is told to.
    struct Slow {
        counter: IntCounter,
        begun: Sender<()>,
        go_on: StdMutex<Receiver<()>>,
    }

    impl Collector for Slow {
        fn desc(&self) -> Vec<&Desc> {
            self.counter.desc()
        }

        fn collect(&self) -> Vec<MetricFamily> {
            self.begun.send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap();
            self.counter.inc();
            self.counter.collect()
        }
    }

    #[tokio::test]
    async fn scrapes_that_wait_share_the_next_rendering() {
        let ((begun, begins), (go, go_on)) = (channel(), channel());
        let counter = IntCounter::new("renderings", "The number of this one.").unwrap();
        let registry = Registry::new();
        let slow = Slow { counter, begun, go_on: StdMutex::new(go_on) };
        registry.register(Box::new(slow)).unwrap();
        let pages = Pages::new(registry);

        let first = tokio::spawn({
            let pages = pages.clone();
            async move { pages.render().await.unwrap() }
        });
        // It has begun, so that it may lack what those after it have recorded.
        let begins = tokio::task::spawn_blocking(move || {
            begins.recv().unwrap();
            begins
        });
        let begins = begins.await.unwrap();
        let mut waiting = Vec::new();
        for _ in 0..100 {
            let pages = pages.clone();
            let mut scrape = Box::pin(async move { pages.render().await.unwrap() });
            // It is in line.
            let polled = poll_fn(|cx| Poll::Ready(scrape.as_mut().poll(cx))).await;
            assert!(polled.is_pending());
            waiting.push(scrape);
        }
        go.send(()).unwrap();
        go.send(()).unwrap();
        assert!(first.await.unwrap().ends_with(b"renderings 1\n"));
        for scrape in waiting {
            assert!(scrape.await.ends_with(b"renderings 2\n"));
        }
        assert_eq!(begins.try_iter().count(), 1);
    }
}
