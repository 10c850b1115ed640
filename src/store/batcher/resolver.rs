//! Orders that the database refuses although an earlier attempt may have stored them. "Not there" is
//! the last word on one only when no earlier attempt can arrive any more: one that was delayed on
//! its way would be stored after its caller was told that it failed, and counted by nobody.
//!
//! A task of its own, so that the writers go on with other orders meanwhile. It ends after the
//! writers, once it has answered all.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::{BATCH, Queued, answer};
use crate::{
    metrics::StoreMetrics,
    store::{
        NewOrder, StoreError, StoreHealth,
        engine::{Engine, Failure, Outcome, Remedy},
    },
};

/// Between two look-ups.
const PAUSE: Duration = Duration::from_millis(100);

/// An order to be looked up.
pub(super) struct Unresolved {
    queued: Queued,
    /// Why the database refuses it.
    cause: String,
    /// When it was sent for the last time, at the latest.
    sent: Instant,
}

impl Unresolved {
    pub(super) fn new(queued: Queued, cause: &str) -> Self {
        Self { queued, cause: cause.to_owned(), sent: Instant::now() }
    }
}

/// See the [module](self).
pub(super) struct Resolver {
    engine: Arc<Engine>,
    receiver: mpsc::Receiver<Unresolved>,
    metrics: StoreMetrics,
    health: StoreHealth,
}

impl Resolver {
    pub(super) fn new(
        engine: Arc<Engine>,
        metrics: StoreMetrics,
        health: StoreHealth,
    ) -> (Self, mpsc::Sender<Unresolved>) {
        let (sender, receiver) = mpsc::channel(BATCH);
        (Self { engine, receiver, metrics, health }, sender)
    }

    pub(super) async fn run(mut self) {
        let mut orders = Vec::new();
        loop {
            if orders.is_empty() && self.receiver.recv_many(&mut orders, BATCH).await == 0 {
                return;
            }
            match self.look_up(&orders).await {
                Ok((outcomes, is_final)) => orders = self.settle(orders, outcomes, is_final),
                Err(failure) => {
                    self.metrics.errors(failure.kind).inc();
                    if failure.remedy() != Remedy::OneByOne {
                        self.health.failed(failure.cause);
                    }
                }
            }
            if !orders.is_empty() {
                sleep(PAUSE).await;
            }
        }
    }

    /// What became of the orders, and whether what is missing will stay so. In this order: an
    /// attempt that arrives between the two questions must be seen by the second.
    async fn look_up(&self, orders: &[Unresolved]) -> Result<(Vec<Outcome>, bool), Failure> {
        let sent = orders.iter().map(|order| order.sent).max().unwrap_or_else(Instant::now);
        let is_final = self.engine.earlier_attempts_are_over(sent).await?;
        let batch: Vec<NewOrder> = orders.iter().map(|order| order.queued.new.clone()).collect();
        Ok((self.engine.look_up(&batch).await?, is_final))
    }

    /// Answers what is known; returns the others.
    fn settle(
        &self,
        orders: Vec<Unresolved>,
        outcomes: Vec<Outcome>,
        is_final: bool,
    ) -> Vec<Unresolved> {
        let mut open = Vec::new();
        let mut found = (Vec::new(), Vec::new());
        for (order, outcome) in orders.into_iter().zip(outcomes) {
            match outcome {
                Outcome::Missing if is_final => {
                    let _ = order.queued.reply.send(Err(StoreError::Internal(order.cause)));
                }
                Outcome::Missing => open.push(order),
                outcome => {
                    found.0.push(order.queued);
                    found.1.push(outcome);
                }
            }
        }
        // None of them is missing.
        answer(&self.metrics, found.0, found.1);
        open
    }
}
