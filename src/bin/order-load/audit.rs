//! Reads back what was acknowledged: no order lost, none doubled, none altered.
//!
//! Each order of an audited run has a product of its own (see [`crate::sender::Names`]), so the list
//! tells which orders are this run's, which one each is, and which is there twice.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::bail;
use futures_util::StreamExt as _;
use order_service::order::OrderId;
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    call::{Answer, Code, Failure, SeenOrder},
    pool::Lease,
    sender::{Sender, pause_after},
};

/// Orders on a page of the list: the most that the service gives.
const PAGE: u16 = 1000;

/// Orders that are read at a time.
const READERS: usize = 64;

/// How far the clocks of the service's processes may be apart.
const SKEW: Duration = Duration::from_secs(300);

/// Problems that are listed; the rest are counted.
pub const LISTED: usize = 20;

/// The acknowledged orders.
#[derive(Debug, Default)]
pub struct Journal(Mutex<Vec<(u64, OrderId)>>);

impl Journal {
    pub fn acknowledged(&self, number: u64, id: OrderId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((number, id));
    }

    fn orders(&self) -> Vec<(u64, OrderId)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What is wrong with an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It was acknowledged and is not there.
    Lost,
    /// It is there more than once.
    Doubled,
    /// It is not what was ordered.
    Altered,
    /// It could not be read, so nobody knows.
    Unread,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Lost, Self::Doubled, Self::Altered, Self::Unread];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "lost",
            Self::Doubled => "doubled",
            Self::Altered => "altered",
            Self::Unread => "unread",
        })
    }
}

/// Something wrong with one order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub kind: Kind,
    /// Which order, and what is wrong.
    pub what: String,
}

impl Problem {
    pub fn line(&self) -> String {
        format!("{}: {}", self.kind, self.what)
    }
}

/// What the audit found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit {
    pub acknowledged: u64,
    /// Orders of this run that are stored although no acknowledgement came.
    pub unacknowledged_stored: u64,
    pub problems: Vec<Problem>,
}

impl Audit {
    pub fn count(&self, kind: Kind) -> usize {
        self.problems.iter().filter(|problem| problem.kind == kind).count()
    }

    pub fn passed(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Reads orders.
#[derive(Debug)]
pub struct Reader<'s> {
    sender: &'s Sender,
    /// When the service last told what was asked.
    told: Cell<Instant>,
}

impl<'s> Reader<'s> {
    pub fn new(sender: &'s Sender) -> Self {
        Self { sender, told: Cell::new(Instant::now()) }
    }

    /// When the newest order was placed, by the service's clock; of an empty list, the beginning of
    /// time.
    ///
    /// # Errors
    /// If the list cannot be read.
    pub async fn newest(&self) -> anyhow::Result<SystemTime> {
        let page = self.ask(async |lease| self.sender.api.list(lease, 1, "").await).await;
        match page {
            Ok(page) => {
                Ok(page.orders.first().and_then(minted_at).unwrap_or(SystemTime::UNIX_EPOCH))
            }
            Err((code, cause)) => bail!("{code}: {cause}"),
        }
    }

    /// Reads every acknowledged order by its id, and the list back to the first order of this run.
    /// `before` is from [`Self::newest`], `due` how many orders there were to send.
    pub async fn audit(&self, journal: &Journal, before: SystemTime, due: u64) -> Audit {
        let acknowledged = journal.orders();
        let read: Vec<_> = futures_util::stream::iter(&acknowledged)
            .map(async |(number, id)| (*number, self.read_back(*number, *id).await))
            .buffer_unordered(READERS)
            .filter_map(async |(number, problem)| Some((number, problem?)))
            .collect()
            .await;
        let told: HashSet<_> = read.iter().map(|(number, _)| *number).collect();
        let mut problems: Vec<_> = read.into_iter().map(|(_, problem)| problem).collect();

        let numbers = acknowledged.iter().map(|(number, id)| (id.to_string(), *number)).collect();
        let mut listed = Listed { due, numbers, told, ..Listed::default() };
        match self.list(before, &mut listed).await {
            Ok(()) => listed.compare(&acknowledged),
            Err((code, cause)) => {
                let what = format!("the list cannot be read to its end: {code}: {cause}");
                problems.push(Problem { kind: Kind::Unread, what });
            }
        }
        problems.append(&mut listed.problems);
        Audit {
            acknowledged: acknowledged.len() as u64,
            unacknowledged_stored: listed.unacknowledged(&acknowledged),
            problems,
        }
    }

    async fn read_back(&self, number: u64, id: OrderId) -> Option<Problem> {
        let named = format!("order {number} ({id})");
        match self.ask(async |lease| self.sender.api.get(lease, id).await).await {
            Ok(seen) => {
                let what = difference(self.sender, number, &seen).or_else(|| {
                    (seen.id != id.to_string()).then(|| format!("is answered as {}", seen.id))
                })?;
                Some(Problem { kind: Kind::Altered, what: format!("{named} {what}") })
            }
            Err((code, _)) if code.is_not_found() => Some(Problem {
                kind: Kind::Lost,
                what: format!("{named} was acknowledged and is not found"),
            }),
            Err((code, cause)) => {
                let what = format!("{named} cannot be read: {code}: {cause}");
                Some(Problem { kind: Kind::Unread, what })
            }
        }
    }

    /// Reads the list from the newest order to those that are older than the run.
    async fn list(&self, before: SystemTime, listed: &mut Listed) -> Result<(), (Code, String)> {
        let oldest = before.checked_sub(SKEW).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut token = String::new();
        loop {
            let page =
                self.ask(async |lease| self.sender.api.list(lease, PAGE, &token).await).await?;
            let past = page.orders.last().and_then(minted_at).is_some_and(|at| at < oldest);
            for order in &page.orders {
                listed.see(self.sender, order);
            }
            token = page.next;
            if token.is_empty() || past {
                return Ok(());
            }
        }
    }

    /// Asks until there is an answer, or patience ends. A service that stays away is waited for
    /// once, not once for each order.
    async fn ask<T>(
        &self,
        question: impl AsyncFn(&mut Lease) -> Result<Answer<T>, Failure>,
    ) -> Result<T, (Code, String)> {
        let sender = self.sender;
        let begun = Instant::now();
        let mut failure = None;
        let mut calls = 0;
        loop {
            let end = begun.min(self.told.get()) + sender.patience;
            let away = || (Code::unreachable(sender.api.protocol()), sender.pool.trouble());
            let lease = timeout_at(end, sender.pool.lease()).await;
            let (Ok(mut lease), true) = (lease, Instant::now() < end) else {
                return Err(failure.unwrap_or_else(away));
            };
            match question(&mut lease).await {
                Ok(answer) => {
                    lease.give_back().await;
                    self.told.set(Instant::now());
                    return Ok(answer.value);
                }
                Err(Failure::NotBegun) => continue,
                Err(Failure::Lost(cause)) => failure = Some((away().0, cause)),
                Err(Failure::Refused(code, cause)) => {
                    lease.give_back().await;
                    if !code.may_pass() {
                        self.told.set(Instant::now());
                        return Err((code, cause));
                    }
                    failure = Some((code, cause));
                }
            }
            calls += 1;
            sleep(pause_after(calls)).await;
        }
    }
}

fn minted_at(order: &SeenOrder) -> Option<SystemTime> {
    Some(order.id.parse::<OrderId>().ok()?.minted_at())
}

/// How an order differs from what was ordered.
fn difference(sender: &Sender, number: u64, seen: &SeenOrder) -> Option<String> {
    let ordered = sender.names.order(number);
    if (&seen.product, seen.quantity) == (&ordered.product, ordered.quantity) {
        return None;
    }
    Some(format!(
        "is {} of {:?}, ordered were {} of {:?}",
        seen.quantity, seen.product, ordered.quantity, ordered.product
    ))
}

/// The orders of this run that the list holds.
#[derive(Debug, Default)]
struct Listed {
    due: u64,
    /// The acknowledged ones by their ids.
    numbers: HashMap<String, u64>,
    /// Those with which something is wrong by their ids already.
    told: HashSet<u64>,
    /// By the number of the order.
    ids: HashMap<u64, Vec<String>>,
    problems: Vec<Problem>,
}

impl Listed {
    fn see(&mut self, sender: &Sender, order: &SeenOrder) {
        let prefix = sender.names.prefix();
        let by_product = order.product.strip_prefix(&prefix).map(str::parse);
        // What was acknowledged is that order, whatever has become of its product.
        let altered = match (self.numbers.get(&order.id), by_product) {
            (Some(number), _) => {
                let number = *number;
                self.ids.entry(number).or_default().push(order.id.clone());
                difference(sender, number, order).filter(|_| !self.told.contains(&number))
            }
            (None, Some(Ok(number))) if number < self.due => {
                self.ids.entry(number).or_default().push(order.id.clone());
                difference(sender, number, order)
            }
            (None, Some(_)) => {
                Some(format!("is {} of {:?}, never ordered", order.quantity, order.product))
            }
            (None, None) => None,
        };
        if let Some(what) = altered {
            let what = format!("listed order {} {what}", order.id);
            self.problems.push(Problem { kind: Kind::Altered, what });
        }
    }

    fn compare(&mut self, acknowledged: &[(u64, OrderId)]) {
        for (number, id) in acknowledged {
            let listed = self.ids.get(number).is_some_and(|ids| ids.contains(&id.to_string()));
            if !listed && !self.told.contains(number) {
                let what = format!("order {number} ({id}) was acknowledged and is not in the list");
                self.problems.push(Problem { kind: Kind::Lost, what });
            }
        }
        let mut doubled: Vec<_> = self.ids.iter().filter(|(_, ids)| ids.len() > 1).collect();
        doubled.sort();
        for (number, ids) in doubled {
            let what = format!("order {number} is stored {} times: {}", ids.len(), ids.join(", "));
            self.problems.push(Problem { kind: Kind::Doubled, what });
        }
    }

    fn unacknowledged(&self, acknowledged: &[(u64, OrderId)]) -> u64 {
        let known = acknowledged.iter().filter(|(number, _)| self.ids.contains_key(number)).count();
        (self.ids.len() - known) as u64
    }
}
