//! How the runtimes are: read from them at each scrape.

use prometheus::{
    Gauge,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use tokio::runtime::{Handle, RuntimeMetrics};

use super::{MetricsError, gauge};

/// `tokio_*`, over all runtimes.
pub(super) struct RuntimesCollector {
    runtimes: Vec<Handle>,
    workers: Gauge,
    alive_tasks: Gauge,
    queue_depth: Gauge,
}

impl RuntimesCollector {
    pub(super) fn new(runtimes: Vec<Handle>) -> Result<Self, MetricsError> {
        let workers = gauge("tokio_workers", "Threads that serve connections.")?;
        workers.set(runtimes.len() as f64);
        let alive_tasks = gauge("tokio_alive_tasks", "Tasks of the runtimes that are alive.")?;
        let queue_depth = gauge(
            "tokio_global_queue_depth",
            "Tasks woken from another thread that wait in a runtime's queue.",
        )?;
        Ok(Self { runtimes, workers, alive_tasks, queue_depth })
    }
}

impl Collector for RuntimesCollector {
    fn desc(&self) -> Vec<&Desc> {
        [&self.workers, &self.alive_tasks, &self.queue_depth]
            .into_iter()
            .flat_map(Collector::desc)
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let all: Vec<RuntimeMetrics> = self.runtimes.iter().map(Handle::metrics).collect();
        let sum = |of: fn(&RuntimeMetrics) -> usize| all.iter().map(of).sum::<usize>() as f64;
        self.alive_tasks.set(sum(RuntimeMetrics::num_alive_tasks));
        self.queue_depth.set(sum(RuntimeMetrics::global_queue_depth));
        [&self.workers, &self.alive_tasks, &self.queue_depth]
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}
