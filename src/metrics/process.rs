//! What the process takes: read from the kernel at each scrape.

use procfs::process::{LimitValue, Process};
use prometheus::{
    Counter, Gauge,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::{MetricsError, gauge};

/// `process_*`. prometheus's own collector counts whole CPU seconds, which makes the
/// rate of a process that takes 1 % of a core useless.
pub(super) struct ProcessCollector {
    cpu_seconds: Counter,
    resident_bytes: Gauge,
    virtual_bytes: Gauge,
    open_fds: Gauge,
    max_fds: Gauge,
    start_seconds: Gauge,
    threads: Gauge,
}

impl ProcessCollector {
    pub(super) fn new() -> Result<Self, MetricsError> {
        let collector = Self {
            cpu_seconds: Counter::new(
                "process_cpu_seconds_total",
                "CPU time of the process, user and system, in seconds.",
            )?,
            resident_bytes: gauge("process_resident_memory_bytes", "Memory in RAM, in bytes.")?,
            virtual_bytes: gauge("process_virtual_memory_bytes", "Virtual memory, in bytes.")?,
            open_fds: gauge("process_open_fds", "Open file descriptors.")?,
            max_fds: gauge("process_max_fds", "File descriptors that may be open.")?,
            start_seconds: gauge(
                "process_start_time_seconds",
                "When the process started, in seconds since 1970.",
            )?,
            threads: gauge("process_threads", "Threads of the process.")?,
        };
        collector.refresh();
        // Once: the kernel's boot time, to which it is relative, moves as the clock is adjusted, and
        // a start that moves looks like a restart.
        collector.start_seconds.set(start_seconds().unwrap_or_default());
        Ok(collector)
    }

    fn all(&self) -> [&dyn Collector; 7] {
        [
            &self.cpu_seconds,
            &self.resident_bytes,
            &self.virtual_bytes,
            &self.open_fds,
            &self.max_fds,
            &self.start_seconds,
            &self.threads,
        ]
    }

    fn refresh(&self) {
        // A value that the kernel does not tell stays what it was.
        let _ = self.refresh_process();
    }

    fn refresh_process(&self) -> procfs::ProcResult<()> {
        let process = Process::myself()?;
        let stat = process.stat()?;
        let ticks = procfs::ticks_per_second() as f64;
        let cpu_seconds = (stat.utime + stat.stime) as f64 / ticks;
        self.cpu_seconds.inc_by((cpu_seconds - self.cpu_seconds.get()).max(0.0));
        self.resident_bytes.set((stat.rss * procfs::page_size()) as f64);
        self.virtual_bytes.set(stat.vsize as f64);
        self.threads.set(stat.num_threads as f64);
        self.open_fds.set(process.fd_count()? as f64);
        self.max_fds.set(match process.limits()?.max_open_files.soft_limit {
            LimitValue::Value(limit) => limit as f64,
            LimitValue::Unlimited => f64::INFINITY,
        });
        Ok(())
    }
}

/// When this process started, in seconds since 1970.
fn start_seconds() -> procfs::ProcResult<f64> {
    let ticks = Process::myself()?.stat()?.starttime as f64;
    Ok(procfs::boot_time_secs()? as f64 + ticks / procfs::ticks_per_second() as f64)
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.refresh();
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}
