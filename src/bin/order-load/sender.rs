//! Sends each order when it is due, and again if its call may have been lost.
//!
//! Orders in flight are bounded by the connections. When none is free, the sender falls behind its
//! schedule, which is all the queue there is: what cannot be sent within `--timeout` of its moment goes
//! unsent, and the latency of what is sent late counts from its moment all the same.

use std::{sync::Arc, time::Duration};

use order_service::order::OrderId;
use rand::RngExt as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::yield_now,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    audit::Journal,
    call::{Api, Code, Failure, NewOrder},
    pacer::Pacer,
    pool::{Lease, Pool},
    recorder::Recorder,
    schedule::{Due, Schedule},
};

/// Most orders that are neither acknowledged nor given up: those in flight, and those that an audit
/// is to retry.
const MAX_UNFINISHED: u32 = 65_536;

/// Calls of one order that may be lost, where no audit insists.
const MAX_LOST: u32 = 3;

/// Orders sent in a row before connections get their turn.
const BURST: u64 = 16;

/// What the orders of this run are called.
#[derive(Debug, Clone)]
pub struct Names {
    /// Unlike that of any other run: keys must not meet.
    pub run: String,
    pub product: String,
    pub seed: u64,
    /// Whether each order has a product of its own and a quantity that varies, so that the list
    /// shows whether it was doubled or altered.
    pub own_products: bool,
}

impl Names {
    /// The order of this number; always the same.
    pub fn order(&self, number: u64) -> NewOrder {
        let run = &self.run;
        NewOrder {
            product: match self.own_products {
                true => format!("{}{number}", self.prefix()),
                false => self.product.clone(),
            },
            quantity: if self.own_products { self.quantity(number) } else { 1 },
            key: format!("{run}-{number}"),
        }
    }

    /// The beginning of the products that are one order's own.
    pub fn prefix(&self) -> String {
        format!("{}.{}.", self.product, self.run)
    }

    /// 1 to 10, by the seed (the mixing function is SplitMix64's).
    fn quantity(&self, number: u64) -> u32 {
        let mut bits = self.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((bits ^ (bits >> 31)) % 10 + 1).expect("at most 10")
    }
}

/// Sends orders.
#[derive(Debug)]
pub struct Sender {
    pub api: Api,
    pub pool: Pool,
    pub names: Names,
    pub recorder: Recorder,
    /// Keeps what was acknowledged, if it is to be audited.
    pub journal: Option<Journal>,
    /// How long an order may wait for its turn, or for a connection.
    pub timeout: Duration,
    /// How long to go on asking for the same order while the service is away.
    pub patience: Duration,
    /// Cancelled when the run is to end early.
    pub stop: CancellationToken,
}

impl Sender {
    /// Sends what the schedule holds, to its end, and waits for what came of it. How many orders were
    /// due.
    pub async fn run(
        self: &Arc<Self>,
        schedule: Schedule<'_>,
        start: Instant,
        end: Instant,
        pacer: &Pacer,
    ) -> u64 {
        let unfinished = Arc::new(Semaphore::new(MAX_UNFINISHED as usize));
        let mut due_orders = 0;
        for due in schedule {
            let at = start + due.at;
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                () = pacer.wait_until(at) => {}
            }
            if due.number % BURST == 0 {
                yield_now().await;
            }
            due_orders += 1;
            if let Some((lease, permit)) = self.turn(at, &unfinished).await {
                self.recorder.phase(due.phase).sent += 1;
                tokio::spawn(self.clone().place(due, at, lease, permit));
            } else if self.stop.is_cancelled() {
                due_orders -= 1;
            } else if self.pool.is_connected() {
                self.recorder.phase(due.phase).unsent += 1;
            } else {
                let mut record = self.recorder.phase(due.phase);
                record.sent += 1;
                record.failed(Code::unreachable(self.api.protocol()), self.pool.trouble());
            }
        }
        // A phase lasts as long as was asked for, also after its last order.
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = pacer.wait_until(end) => {}
        }
        let all = unfinished.acquire_many(MAX_UNFINISHED).await;
        drop(all.expect("the semaphore is never closed"));
        due_orders
    }

    /// A free connection, if there is one in time; after it, the run may be stopping.
    async fn turn(
        &self,
        at: Instant,
        unfinished: &Arc<Semaphore>,
    ) -> Option<(Lease, OwnedSemaphorePermit)> {
        if let Ok(permit) = unfinished.clone().try_acquire_owned()
            && let Some(lease) = self.pool.try_lease()
        {
            return Some((lease, permit));
        }
        // In an overload most orders end here: without a timer.
        let mut limit = self.turn_limit(at);
        if limit <= Instant::now() {
            return None;
        }
        let turn = async {
            let permit = unfinished.clone().acquire_owned().await;
            (self.pool.lease().await, permit.expect("the semaphore is never closed"))
        };
        let mut turn = std::pin::pin!(turn);
        loop {
            tokio::select! {
                biased;
                turn = &mut turn => return Some(turn),
                () = self.stop.cancelled() => return None,
                () = sleep_until(limit) => {}
            }
            limit = self.turn_limit(at);
            if limit <= Instant::now() {
                return None;
            }
        }
    }

    /// Until when an order waits for its turn. An audit waits for a service that is away, but not for
    /// one that is slow: what fell due meanwhile has its time once the service is back.
    fn turn_limit(&self, at: Instant) -> Instant {
        match (&self.journal, self.pool.connected_since()) {
            (None, _) => at + self.timeout,
            (Some(_), Some(since)) => at.max(since) + self.timeout,
            (Some(_), None) => at + self.timeout.max(self.patience),
        }
    }

    /// A connection for a further call, if there is one by then; once the run is to end, it is not
    /// waited for longer than a call may take.
    async fn another(&self, limit: Instant) -> Option<Lease> {
        if limit <= Instant::now() {
            return None;
        }
        let stopped = async {
            self.stop.cancelled().await;
            sleep(self.timeout).await;
        };
        tokio::select! {
            biased;
            lease = timeout_at(limit, self.pool.lease()) => lease.ok(),
            () = stopped => None,
        }
    }

    async fn place(self: Arc<Self>, due: Due, at: Instant, lease: Lease, _: OwnedSemaphorePermit) {
        let order = self.names.order(due.number);
        let mut calls = 0;
        let placed = self.place_persistently(&order, at, lease, &mut calls).await;
        let mut record = self.recorder.phase(due.phase);
        if calls > 1 {
            record.retried += 1;
        }
        match placed {
            Ok((id, served_by, latency)) => {
                record.acknowledged(latency, served_by);
                if let Some(journal) = &self.journal {
                    journal.acknowledged(due.number, id);
                }
            }
            Err((code, cause)) => record.failed(code, cause),
        }
    }

    async fn place_persistently(
        &self,
        order: &NewOrder,
        at: Instant,
        lease: Lease,
        calls: &mut u32,
    ) -> Result<(OrderId, Option<http::HeaderValue>, Duration), (Code, String)> {
        let audited = self.journal.is_some();
        let unreachable = Code::unreachable(self.api.protocol());
        let end = at + self.timeout.max(self.patience);
        let mut lease = Some(lease);
        loop {
            let mut at_hand = match lease.take() {
                Some(lease) => lease,
                None => {
                    let limit = if audited { end } else { end.min(Instant::now() + self.timeout) };
                    // Boxed, since it is rare and would swell every order's task.
                    let another = Box::pin(self.another(limit)).await;
                    another.ok_or_else(|| (unreachable, self.pool.trouble()))?
                }
            };
            *calls += 1;
            let (code, cause, again) = match self.api.place(&mut at_hand, order).await {
                Ok(answer) => {
                    let latency = at.elapsed();
                    at_hand.give_back().await;
                    return Ok((answer.value, answer.served_by, latency));
                }
                Err(Failure::NotBegun) => {
                    *calls -= 1;
                    continue;
                }
                Err(Failure::Lost(cause)) => {
                    if *calls == 1 {
                        continue;
                    }
                    (unreachable, cause, audited || *calls < MAX_LOST)
                }
                Err(Failure::Refused(code, cause)) => {
                    at_hand.give_back().await;
                    (code, cause, audited && code.may_pass())
                }
            };
            let pause = pause_after(*calls);
            if !again || self.stop.is_cancelled() || Instant::now() + pause > end {
                return Err((code, cause));
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.stop.cancelled() => return Err((code, cause)),
            }
        }
    }
}

/// 10 ms, doubled with each call, to about a second; half of it at random.
pub fn pause_after(calls: u32) -> Duration {
    let most = Duration::from_millis(10) * 2_u32.pow(calls.min(7));
    most.mul_f64(rand::rng().random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(seed: u64, own_products: bool) -> Names {
        Names { run: "0123456789ab".into(), product: "book".into(), seed, own_products }
    }

    #[test]
    fn audited_orders_tell_themselves_apart_and_others_are_as_asked_for() {
        let order = names(1, true).order(17);
        assert_eq!((&*order.product, &*order.key), ("book.0123456789ab.17", "0123456789ab-17"));
        assert_eq!(names(1, true).order(17), order);
        let quantities: std::collections::BTreeSet<_> =
            (0..1000).map(|number| names(1, true).order(number).quantity).collect();
        assert_eq!(quantities, (1..=10).collect());
        let plain = names(1, false).order(17);
        assert_eq!((&*plain.product, plain.quantity), ("book", 1));
        assert_eq!(plain.key, order.key);
    }

    #[test]
    fn the_longest_names_are_within_the_rules() {
        let product = "p".repeat(crate::args::MAX_AUDITED_PRODUCT);
        let names = Names { product, ..names(1, true) };
        let order = names.order(999_999_999);
        assert!(order.product.parse::<order_service::order::ProductId>().is_ok());
        assert!(order.key.parse::<order_service::order::IdempotencyKey>().is_ok());
    }

    #[test]
    fn pauses_grow_to_about_a_second() {
        assert!(pause_after(1) <= Duration::from_millis(20));
        for calls in [7, 100, u32::MAX] {
            assert!((640..=1280).contains(&pause_after(calls).as_millis()));
        }
    }
}
