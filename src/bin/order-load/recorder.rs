//! What came of the orders, phase by phase.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hdrhistogram::Histogram;
use http::HeaderValue;

use crate::call::Code;

/// Quantiles of latency that are reported, and their names in JSON.
pub const QUANTILES: [(&str, f64); 4] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// The records of all phases.
#[derive(Debug)]
pub struct Recorder {
    phases: Vec<Mutex<Record>>,
}

/// What came of the orders of one phase.
#[derive(Debug, Clone)]
pub struct Record {
    /// Orders that were sent, however often.
    pub sent: u64,
    /// Of these the acknowledged ones.
    pub ok: u64,
    /// Orders that took more than one call.
    pub retried: u64,
    /// Orders that found no free connection in time.
    pub unsent: u64,
    /// Orders that failed for good.
    pub failed: BTreeMap<Code, Failed>,
    /// Acknowledged orders by the process that acknowledged them.
    pub served_by: Vec<(HeaderValue, u64)>,
    /// From the moment an order was due to its acknowledgement, in microseconds.
    latency: Histogram<u64>,
}

/// The orders that failed with one code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub count: u64,
    /// What was said of the first.
    pub first: String,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            sent: 0,
            ok: 0,
            retried: 0,
            unsent: 0,
            failed: BTreeMap::new(),
            served_by: Vec::new(),
            // Three digits are exact to one in a thousand at any length.
            latency: Histogram::new(3).expect("three digits can be had"),
        }
    }
}

impl Record {
    /// An acknowledged order.
    pub fn acknowledged(&mut self, latency: Duration, served_by: Option<HeaderValue>) {
        self.ok += 1;
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.latency.record(micros).expect("the histogram grows");
        let Some(process) = served_by else { return };
        match self.served_by.iter_mut().find(|(name, _)| *name == process) {
            Some((_, count)) => *count += 1,
            None => self.served_by.push((process, 1)),
        }
    }

    /// An order that failed for good.
    pub fn failed(&mut self, code: Code, cause: String) {
        let failed = self.failed.entry(code).or_insert(Failed { count: 0, first: cause });
        failed.count += 1;
    }

    /// How many orders failed.
    pub fn failures(&self) -> u64 {
        self.failed.values().map(|failed| failed.count).sum()
    }

    /// The latency that this part of the acknowledged orders kept within; zero if there are none.
    pub fn latency(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.latency.value_at_quantile(quantile).min(self.latency.max()))
    }

    /// The longest latency of an acknowledged order; zero if there are none.
    pub fn longest(&self) -> Duration {
        Duration::from_micros(self.latency.max())
    }
}

impl Recorder {
    pub fn new(phases: usize) -> Self {
        Self { phases: (0..phases).map(|_| Mutex::default()).collect() }
    }

    /// The record of a phase, for a moment.
    pub fn phase(&self, phase: usize) -> MutexGuard<'_, Record> {
        self.phases[phase].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of all records.
    pub fn records(&self) -> Vec<Record> {
        (0..self.phases.len()).map(|phase| self.phase(phase).clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_exact_to_one_in_a_thousand() {
        let mut record = Record::default();
        assert_eq!((record.latency(0.5), record.longest()), (Duration::ZERO, Duration::ZERO));
        for millis in 1..=1000 {
            record.acknowledged(Duration::from_millis(millis), None);
        }
        for (quantile, millis) in [(0.5, 500.0), (0.9, 900.0), (0.99, 990.0), (0.999, 999.0)] {
            let off = record.latency(quantile).as_secs_f64() * 1e3 / millis - 1.0;
            assert!(off.abs() <= 1e-3, "{quantile}: {:?}", record.latency(quantile));
        }
        assert!(record.longest() >= Duration::from_secs(1));
        record.acknowledged(Duration::from_secs(3600), None);
        assert!(record.longest() >= Duration::from_secs(3600));
    }

    #[test]
    fn processes_and_codes_are_counted_apart() {
        let mut record = Record::default();
        let name = |name| Some(HeaderValue::from_static(name));
        for process in ["a:1", "b:1", "a:1"] {
            record.acknowledged(Duration::from_millis(1), name(process));
        }
        assert_eq!(record.served_by.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [2, 1]);
        record.failed(Code::UNAVAILABLE, "first".into());
        record.failed(Code::UNAVAILABLE, "second".into());
        record.failed(Code::Http(503), "third".into());
        let first = Failed { count: 2, first: "first".into() };
        assert_eq!(record.failed[&Code::UNAVAILABLE], first);
        assert_eq!(record.failures(), 3);
    }
}
