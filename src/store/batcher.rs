//! Group commit. Calls queue; each writer takes all that wait, commits them in one transaction, and
//! answers each. There is no timer: while one batch is flushed to the disk, the next one gathers.
//!
//! What holds, whatever fails:
//! - an order is counted once, when its commit is seen to succeed, whether or not its caller still
//!   waits;
//! - a caller that is told that nothing was done can rely on it: either it or a writer takes the
//!   order, by one atomic step;
//! - an order of which an attempt may have been committed is tried until that is known.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::RngExt as _;
use tokio::{
    runtime::Handle,
    sync::{Mutex, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

use self::resolver::{Resolver, Unresolved};
use super::{
    NewOrder, StoreError, StoreHealth,
    engine::{Engine, Outcome, Remedy},
    replies::{Replies, Reply},
};
use crate::{
    metrics::{StoreErrorKind, StoreMetrics},
    order::Placed,
};

mod resolver;

/// Orders that may wait.
const QUEUE: usize = 4096;

/// Orders in a batch at most.
const BATCH: usize = 1024;

/// Between two attempts: at first, and at most. Half of it is random, so that replicas do not come
/// back together.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// Who may decide about an order: the caller, who may still take it back, or a writer, who is
/// sending it to the database.
const WAITING: u8 = 0;
const SENT: u8 = 1;
const TAKEN_BACK: u8 = 2;

/// One order in the queue.
#[derive(Debug)]
struct Queued {
    new: NewOrder,
    deadline: Instant,
    state: Arc<AtomicU8>,
    reply: oneshot::Sender<Reply>,
    /// The runtime that the caller waits on.
    home: Handle,
    /// Whether an earlier attempt may have committed it.
    maybe_stored: bool,
}

impl Queued {
    /// The writer's step: whether the order is to be sent.
    fn send(&self) -> bool {
        if self.maybe_stored {
            return true;
        }
        let wanted = self.deadline > Instant::now() && !self.reply.is_closed();
        let (from, to) = (WAITING, if wanted { SENT } else { TAKEN_BACK });
        let step = self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        wanted && step.is_ok()
    }
}

/// The caller's half; dropping it takes the order back, if that is still possible.
struct Waiting {
    state: Arc<AtomicU8>,
    callers: Arc<AtomicUsize>,
}

impl Waiting {
    fn new(state: Arc<AtomicU8>, callers: Arc<AtomicUsize>) -> Self {
        callers.fetch_add(1, Ordering::Relaxed);
        Self { state, callers }
    }

    /// Whether nothing was done and nothing will be.
    fn take_back(&self) -> bool {
        let (from, to) = (WAITING, TAKEN_BACK);
        let step = self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        step.map_or_else(|state| state == TAKEN_BACK, |_| true)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.take_back();
        self.callers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The callers' end of the queue.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    sender: mpsc::Sender<Queued>,
    /// How many callers wait, be their orders in the queue or with a writer.
    callers: Arc<AtomicUsize>,
    metrics: StoreMetrics,
    health: StoreHealth,
}

impl Queue {
    pub(super) async fn place(
        &self,
        new: NewOrder,
        deadline: Instant,
    ) -> Result<Placed, StoreError> {
        let begun = Instant::now();
        let state = Arc::new(AtomicU8::new(WAITING));
        let waiting = Waiting::new(state.clone(), self.callers.clone());
        let (reply, answer) = oneshot::channel();
        let home = Handle::current();
        let queued = Queued { new, deadline, state, reply, home, maybe_stored: false };
        // Before the order is there to be taken, so that the gauge never shows less than none.
        self.metrics.queue_orders.inc();
        if self.sender.try_send(queued).is_err() {
            self.metrics.queue_orders.dec();
            // While the store fails, orders whose callers are long gone stay in the queue. One that
            // they fill, rather than callers who wait, tells of the outage and of no overload.
            let overload = self.callers.load(Ordering::Relaxed) > QUEUE;
            let outage = self.health.is_failing() && !overload;
            return Err(if outage { StoreError::Unavailable } else { StoreError::QueueFull });
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            // The order was dropped because its time was up, as ours is.
            Ok(Err(_)) | Err(_) => {
                if waiting.take_back() && !self.health.failed_since(begun) {
                    Err(StoreError::DeadlineExceeded)
                } else {
                    Err(StoreError::Unavailable)
                }
            }
        }
    }
}

/// Starts an engine's writers. They end once every clone of the queue is gone and it is empty.
pub(super) fn start(
    engine: &Arc<Engine>,
    metrics: StoreMetrics,
    health: &StoreHealth,
) -> (Queue, JoinSet<()>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let receiver = Arc::new(Mutex::new(receiver));
    let mut tasks = JoinSet::new();
    let (resolver, unresolved) = Resolver::new(engine.clone(), metrics.clone(), health.clone());
    tasks.spawn(resolver.run());
    for _ in 0..engine.writers() {
        let writer = Writer {
            engine: engine.clone(),
            receiver: receiver.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
            unresolved: unresolved.clone(),
        };
        tasks.spawn(writer.run());
    }
    let queue = Queue { sender, callers: Arc::default(), metrics, health: health.clone() };
    (queue, tasks)
}

struct Writer {
    engine: Arc<Engine>,
    receiver: Arc<Mutex<mpsc::Receiver<Queued>>>,
    metrics: StoreMetrics,
    health: StoreHealth,
    unresolved: mpsc::Sender<Unresolved>,
}

impl Writer {
    async fn run(self) {
        loop {
            let mut batch = Vec::new();
            let taken = self.receiver.lock().await.recv_many(&mut batch, BATCH).await;
            if taken == 0 {
                return;
            }
            self.metrics.queue_orders.sub(taken.try_into().expect("at most a batch"));
            if let Some(failed) = self.settle(batch).await {
                // One order spoils the batch: alone, it spoils nothing but itself.
                for order in failed {
                    self.settle(vec![order]).await;
                }
            }
        }
    }

    /// Tries until every order of the batch is answered; returns those that are to be tried one by
    /// one.
    async fn settle(&self, mut batch: Vec<Queued>) -> Option<Vec<Queued>> {
        let mut back_off = BACK_OFF.0;
        let _under_way = self.health.commit_begun();
        loop {
            batch.retain(Queued::send);
            if batch.is_empty() {
                return None;
            }
            let orders: Vec<NewOrder> = batch.iter().map(|queued| queued.new.clone()).collect();
            let begun = Instant::now();
            batch = match self.engine.commit(&orders).await {
                Ok(outcomes) => {
                    self.metrics.commit_seconds.observe(begun.elapsed().as_secs_f64());
                    self.metrics.batch_orders.observe(batch.len() as f64);
                    self.health.answered();
                    answer(&self.metrics, batch, outcomes)
                }
                Err(failure) => {
                    self.metrics.errors(failure.kind).inc();
                    for queued in &mut batch {
                        queued.maybe_stored |= failure.outcome_unknown;
                    }
                    match failure.remedy() {
                        Remedy::OneByOne if batch.len() > 1 => return Some(not_sent(batch)),
                        Remedy::OneByOne => {
                            self.refuse(batch, &failure.cause).await;
                            return None;
                        }
                        Remedy::Retry => {
                            self.health.failed(failure.cause);
                            batch
                        }
                        Remedy::GiveUp => {
                            self.health.full(failure.cause);
                            give_up(batch)
                        }
                    }
                }
            };
            if batch.is_empty() {
                return None;
            }
            batch = not_sent(batch);
            let random = rand::rng().random_range(0.5..1.0);
            sleep(back_off.mul_f64(random)).await;
            back_off = (back_off * 2).min(BACK_OFF.1);
        }
    }

    /// Answers an order that the database refuses, unless an earlier attempt may have stored it:
    /// then the resolver finds that out.
    async fn refuse(&self, batch: Vec<Queued>, cause: &str) {
        for queued in batch {
            if queued.maybe_stored {
                let unresolved = Unresolved::new(queued, cause);
                self.unresolved.send(unresolved).await.expect("the resolver outlives the writers");
            } else {
                let _ = queued.reply.send(Err(StoreError::Internal(cause.to_owned())));
            }
        }
    }
}

/// Counts and answers the orders of a committed batch; returns those that are to be sent again.
fn answer(metrics: &StoreMetrics, batch: Vec<Queued>, outcomes: Vec<Outcome>) -> Vec<Queued> {
    let new = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::New)).count();
    metrics.placed.inc_by(new as u64);
    let mut missing = Vec::new();
    let mut replies = Replies::default();
    for (queued, outcome) in batch.into_iter().zip(outcomes) {
        let asked = &queued.new.order;
        let result = match outcome {
            Outcome::New => Ok(Placed { order: asked.clone(), replayed: false }),
            Outcome::Earlier(earlier)
                if (&earlier.product_id, earlier.quantity)
                    == (&asked.product_id, asked.quantity) =>
            {
                Ok(Placed { order: earlier, replayed: true })
            }
            Outcome::Earlier(_) => Err(StoreError::KeyReused),
            Outcome::Unreadable(cause) => Err(StoreError::Internal(cause)),
            Outcome::Missing => {
                metrics.errors(StoreErrorKind::Conflict).inc();
                missing.push(queued);
                continue;
            }
        };
        replies.add(queued.home, queued.reply, result);
    }
    replies.send();
    missing
}

/// The attempt failed: its orders may be taken back, unless it may have stored them.
fn not_sent(batch: Vec<Queued>) -> Vec<Queued> {
    for queued in batch.iter().filter(|queued| !queued.maybe_stored) {
        queued.state.store(WAITING, Ordering::Release);
    }
    batch
}

/// Answers those of which nothing was stored; the others are kept.
fn give_up(batch: Vec<Queued>) -> Vec<Queued> {
    let (unknown, known): (Vec<_>, Vec<_>) =
        batch.into_iter().partition(|queued| queued.maybe_stored);
    for queued in known {
        let _ = queued.reply.send(Err(StoreError::Unavailable));
    }
    unknown
}
