//! Stored rows that cannot be read as orders, because another program wrote them. A page comes
//! without them; each is reported once, by a line in the log and by `order_store_errors_total`.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use super::rows::Stored;
use crate::{
    metrics::{StoreErrorKind, StoreMetrics},
    order::{Order, OrderId},
};

/// Rows that are remembered as reported. Further ones are left out without a line, so that a table
/// full of them fills neither the log nor the memory.
const REPORTED: usize = 1000;

#[derive(Debug)]
pub(super) struct Unreadable {
    metrics: StoreMetrics,
    reported: Mutex<HashSet<OrderId>>,
}

impl Unreadable {
    pub(super) fn new(metrics: StoreMetrics) -> Self {
        Self { metrics, reported: Mutex::default() }
    }

    /// The orders among the rows; reports the others.
    pub(super) fn leave_out(&self, rows: Vec<Stored>) -> Vec<Order> {
        let readable = |row: Stored| {
            let id = row.id();
            row.into_result().map_err(|cause| self.report(id, &cause)).ok()
        };
        rows.into_iter().filter_map(readable).collect()
    }

    fn report(&self, id: OrderId, cause: &str) {
        // No code can panic while it holds the lock.
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() < REPORTED && reported.insert(id) {
            self.metrics.errors(StoreErrorKind::Other).inc();
            tracing::error!(cause, "a stored row is left out of the pages: it is no order");
        }
    }
}
