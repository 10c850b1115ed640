//! Which requests are let in: the budgets, and what a request holds of them.
//!
//! A request counts as in flight once it is whole, so that bytes which never come hold no permit.
//! Until then it counts among those that are arriving, which have budgets of their own.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use http::{Request, Version};
use tokio::time::Instant;

use super::{
    budget::{Asking, Budget},
    failure_log::Limit,
};
use crate::{
    error::Error,
    listener::{ConnectionLoad, Ending, RequestLoad, Unread},
    metrics::ShedReason,
};

/// Requests that have not arrived whole.
const ARRIVING: usize = 4096;

/// Bytes that those hold.
const ARRIVING_BYTES: usize = 48 * 1024 * 1024;

/// Fixed cost of an arriving request in bytes, without its body: its stream, its task, the
/// decoder's buffer; and the cost of each header field.
const REQUEST_BYTES: usize = 12 * 1024;
const FIELD_BYTES: usize = 160;

/// Bytes of responses that their peers have not read. Such a response is not in flight any more: a
/// peer that reads nothing would hold every permit.
const UNREAD_BYTES: usize = 48 * 1024 * 1024;

/// What an unread response is counted with, if its size is not known: its stream, its task, the
/// encoder's buffer.
const RESPONSE_BYTES: usize = 16 * 1024;

/// Health checks, until they are answered, and streams of reflection.
const CHECKS: usize = 256;
const REFLECTIONS: usize = 256;

/// Health's `Watch` streams: one for each of the default `--max-connections`.
const WATCHES: usize = 10_000;

/// The budgets of requests, of which the one of requests in flight is set by a flag.
#[derive(Debug, Clone)]
pub struct InFlight(Arc<Budgets>);

#[derive(Debug)]
struct Budgets {
    in_flight: Budget,
    arriving: Budget,
    arriving_bytes: Budget,
    unread_bytes: Budget,
    /// Responses that gave their permit back before they were read.
    unread: AtomicUsize,
    checks: Budget,
    reflections: Budget,
    watches: Budget,
    asking: Asking,
    /// The same of health checks and reflection: they take no place from requests.
    probing: Asking,
    /// Requests whose body has not come whole.
    incomplete: AtomicUsize,
    /// Whether the last request was shed: the begin and the end of such a time are logged, not each
    /// request in it.
    shedding: AtomicBool,
    /// The start of shedding was logged, so its end must be logged, too.
    begin_logged: AtomicBool,
    /// A stranger can make shedding begin and end many times a second.
    lines: Limit,
}

impl InFlight {
    /// None in flight, and at most `max_in_flight`, 1 to a million.
    pub fn new(max_in_flight: usize) -> Self {
        Self(Arc::new(Budgets {
            in_flight: Budget::new(max_in_flight),
            arriving: Budget::new(ARRIVING),
            arriving_bytes: Budget::new(ARRIVING_BYTES),
            unread_bytes: Budget::new(UNREAD_BYTES),
            unread: AtomicUsize::new(0),
            checks: Budget::new(CHECKS),
            reflections: Budget::new(REFLECTIONS),
            watches: Budget::new(WATCHES),
            asking: Asking::new(),
            probing: Asking::new(),
            incomplete: AtomicUsize::new(0),
            shedding: AtomicBool::new(false),
            begin_logged: AtomicBool::new(false),
            lines: Limit::default(),
        }))
    }

    /// How many requests have not ended, whether they are whole, in flight, or waiting to be read.
    pub fn count(&self) -> usize {
        let [unread, incomplete] =
            [&self.0.unread, &self.0.incomplete].map(|count| count.load(Ordering::Relaxed));
        self.0.in_flight.taken() + unread + incomplete
    }

    /// Lets a whole request in; `connection` is the one that it came on, if there is one.
    pub(super) fn enter(
        &self,
        class: Class,
        connection: Option<&Ending>,
        now: Instant,
    ) -> Result<Permit, Error> {
        let budgets = &*self.0;
        let load = connection.map(Ending::load);
        let asking = load.map_or(1, |load| budgets.asking(load, class, now));
        let budget = budgets.of(class);
        let Some(before) = budget.take(1, load.map(|load| own(load, class)), asking) else {
            // A connection that has its share is shed while there is room for others.
            let full = budget.taken() >= budget.size() - budget.size() / 16;
            if class == Class::Counted
                && full
                && !budgets.shedding.swap(true, Ordering::Relaxed)
                && budgets.lines.admits()
            {
                budgets.begin_logged.store(true, Ordering::Relaxed);
                let max_in_flight = budget.size();
                tracing::warn!(max_in_flight, "too many requests in flight: shedding begins");
            }
            return Err(Error::Shed(ShedReason::InFlight));
        };
        // It is over only once half of the permits are free: at the limit every second one would be
        // shed and logged.
        if class == Class::Counted
            && budgets.shedding.load(Ordering::Relaxed)
            && before < budget.size() / 2
            && budgets.shedding.swap(false, Ordering::Relaxed)
            && budgets.begin_logged.swap(false, Ordering::Relaxed)
        {
            tracing::info!("requests are no longer shed");
        }
        if let Some(connection) = connection {
            if matches!(class, Class::Watch | Class::Reflection) {
                connection.request_load().state.store(EXEMPT, Ordering::Relaxed);
            }
            connection.set_on_unread(|| {
                let of = self.clone();
                Arc::new(move |request| of.leave_unread(request))
            });
        }
        Ok(Permit { of: self.clone(), class, connection: connection.cloned() })
    }

    /// A response that its peer does not read gives its permit back, and its bytes are counted;
    /// `None` if there is no room for them and it has no permit.
    fn leave_unread(&self, request: &Ending) -> Option<Unread> {
        let load = request.request_load();
        let state = load.state.load(Ordering::Relaxed);
        if matches!(state, EXEMPT | PRODUCING) {
            return Some(Box::new(()));
        }
        let (budgets, connection) = (&*self.0, request.load());
        let asking = budgets.asking.note(&connection.last_asked, Instant::now());
        let bytes = load.response_bytes.load(Ordering::Relaxed).max(RESPONSE_BYTES);
        if budgets.unread_bytes.take(bytes, Some(&connection.unread_bytes), asking).is_none() {
            if budgets.lines.admits() {
                tracing::info!("a response was cut off: its connection has too many unread ones");
            }
            return None;
        }
        if state == ANSWERED {
            load.state.store(RELEASED, Ordering::Relaxed);
            budgets.unread.fetch_add(1, Ordering::Relaxed);
            budgets.in_flight.release(1, Some(&connection.in_flight));
        }
        Some(Box::new(UnreadResponse { of: self.clone(), bytes, request: request.clone() }))
    }

    /// Counts a request whose body has yet to come, if it counts for the drain.
    pub(super) fn expect(&self, class: Class) -> Option<Incomplete> {
        (class == Class::Counted).then(|| {
            self.0.incomplete.fetch_add(1, Ordering::Relaxed);
            Incomplete(self.clone())
        })
    }

    /// Counts a request of which only a part has come.
    pub(super) fn arrive(
        &self,
        class: Class,
        fields: usize,
        connection: Option<&Ending>,
        now: Instant,
    ) -> Result<Arrival, Error> {
        let budgets = &*self.0;
        let load = connection.map(Ending::load);
        let asking = load.map_or(1, |load| budgets.asking(load, class, now));
        let own = load.map(|load| &load.arriving);
        budgets.arriving.take(1, own, asking).ok_or(Error::Shed(ShedReason::InFlight))?;
        let mut arrival =
            Arrival { of: self.clone(), asking, bytes: 0, connection: connection.cloned() };
        arrival.add(REQUEST_BYTES + fields * FIELD_BYTES)?;
        Ok(arrival)
    }
}

impl Budgets {
    fn asking(&self, load: &ConnectionLoad, class: Class, now: Instant) -> usize {
        match class {
            Class::Counted => self.asking.note(&load.last_asked, now),
            _ => self.probing.note(&load.last_probed, now),
        }
    }

    fn of(&self, class: Class) -> &Budget {
        match class {
            Class::Counted => &self.in_flight,
            Class::Check => &self.checks,
            Class::Reflection => &self.reflections,
            Class::Watch => &self.watches,
        }
    }
}

fn own(load: &ConnectionLoad, class: Class) -> &AtomicUsize {
    match class {
        Class::Counted => &load.in_flight,
        Class::Check => &load.checks,
        Class::Reflection => &load.reflections,
        Class::Watch => &load.watches,
    }
}

/// Selects the budget of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// An order request; limited by `--max-in-flight`.
    Counted,
    /// `Check` of health: an orchestrator must learn that an overloaded server lives.
    Check,
    /// `Watch` of health: a stream for as long as its connection.
    Watch,
    /// A stream of reflection.
    Reflection,
}

impl Class {
    /// Over HTTP/1, where no gRPC is served, every path is like any other.
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        if request.version() != Version::HTTP_2 {
            return Self::Counted;
        }
        match request.uri().path() {
            "/grpc.health.v1.Health/Watch" => Self::Watch,
            path if path.starts_with("/grpc.health.v1.") => Self::Check,
            path if path.starts_with("/grpc.reflection.") => Self::Reflection,
            _ => Self::Counted,
        }
    }

    /// Whether its request is never whole: messages come for as long as it lasts.
    pub(super) fn is_stream(self) -> bool {
        self == Self::Reflection
    }

    /// Whether its response must begin by the deadline.
    pub(super) fn has_deadline(self) -> bool {
        self != Self::Reflection
    }

    /// Whether its response ends by itself, and must end some time after the deadline.
    pub(super) fn ends(self) -> bool {
        matches!(self, Self::Counted | Self::Check)
    }
}

/// One request's place in the budget of its class, as long as it lives. Nobody waits for one, so
/// that counts are enough: a semaphore takes a lock that all threads share when a permit is given
/// back.
#[derive(Debug)]
pub(super) struct Permit {
    of: InFlight,
    class: Class,
    connection: Option<Ending>,
}

// States of a request's [`RequestLoad`]; 0 before there is a response.
/// A stream with a budget of its own.
const EXEMPT: u8 = 1;
/// The response head was sent; the permit is held.
const ANSWERED: u8 = 2;
/// The same, and the handler still produces the body.
const PRODUCING: u8 = 3;
/// The permit was given back.
const RELEASED: u8 = 4;

/// A request whose body has not come whole, as long as it lives.
#[derive(Debug)]
pub(super) struct Incomplete(InFlight);

impl Drop for Incomplete {
    fn drop(&mut self) {
        self.0.0.incomplete.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Permit {
    /// Whether it is given back with the head of the response, which is all there is to do.
    pub(super) fn ends_with_head(&self) -> bool {
        self.class == Class::Check
    }

    /// There is a response of so many bytes, if that is known.
    pub(super) fn answered(&self, bytes: Option<u64>) {
        if let Some(load) = self.request_load() {
            let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or_default();
            load.response_bytes.store(bytes, Ordering::Relaxed);
            load.state.store(ANSWERED, Ordering::Relaxed);
        }
    }

    /// Sets whether the handler is still producing the body.
    pub(super) fn set_producing(&self, producing: bool) {
        let (from, to) = if producing { (ANSWERED, PRODUCING) } else { (PRODUCING, ANSWERED) };
        if let Some(load) = self.request_load() {
            let _ = load.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    fn request_load(&self) -> Option<&RequestLoad> {
        let counted = self.class == Class::Counted;
        self.connection.as_ref().filter(|_| counted).map(Ending::request_load)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(load) = self.request_load()
            && load.state.swap(RELEASED, Ordering::Relaxed) == RELEASED
        {
            self.of.0.unread.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let own = self.connection.as_ref().map(|connection| own(connection.load(), self.class));
        self.of.0.of(self.class).release(1, own);
    }
}

/// The place of a request that has not arrived whole, as long as it lives.
#[derive(Debug)]
pub(super) struct Arrival {
    of: InFlight,
    asking: usize,
    bytes: usize,
    connection: Option<Ending>,
}

impl Arrival {
    /// Counts more bytes.
    pub(super) fn add(&mut self, bytes: usize) -> Result<(), Error> {
        let own = self.connection.as_ref().map(|connection| &connection.load().arriving_bytes);
        let taken = self.of.0.arriving_bytes.take(bytes, own, self.asking);
        taken.ok_or(Error::Shed(ShedReason::InFlight))?;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let load = self.connection.as_ref().map(Ending::load);
        self.of.0.arriving.release(1, load.map(|load| &load.arriving));
        self.of.0.arriving_bytes.release(self.bytes, load.map(|load| &load.arriving_bytes));
    }
}

/// A response that its peer has not read, as long as it lives.
struct UnreadResponse {
    of: InFlight,
    bytes: usize,
    request: Ending,
}

impl Drop for UnreadResponse {
    fn drop(&mut self) {
        self.of.0.unread_bytes.release(self.bytes, Some(&self.request.load().unread_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(in_flight: &InFlight) -> Result<Permit, Error> {
        in_flight.enter(Class::Counted, None, Instant::now())
    }

    #[test]
    fn permits_are_counted_and_one_too_many_is_shed() {
        let in_flight = InFlight::new(2);
        let first = enter(&in_flight).unwrap();
        let _second = enter(&in_flight).unwrap();
        assert!(matches!(enter(&in_flight), Err(Error::Shed(ShedReason::InFlight))));
        assert_eq!(in_flight.count(), 2);
        drop(first);
        assert_eq!(in_flight.count(), 1);
        enter(&in_flight).unwrap();
    }

    #[test]
    fn what_arrives_is_given_back_to_both_sides() {
        let (in_flight, connection) = (InFlight::new(1), Ending::default());
        let mut arrival =
            in_flight.arrive(Class::Counted, 10, Some(&connection), Instant::now()).unwrap();
        arrival.add(1000).unwrap();
        let held = REQUEST_BYTES + 10 * FIELD_BYTES + 1000;
        let load = connection.load();
        assert_eq!(load.arriving_bytes.load(Ordering::Relaxed), held);
        assert_eq!(in_flight.0.arriving_bytes.taken(), held);
        assert!(arrival.add(ARRIVING_BYTES).is_err());
        drop(arrival);
        assert_eq!(load.arriving_bytes.load(Ordering::Relaxed), 0);
        assert_eq!(load.arriving.load(Ordering::Relaxed), 0);
        assert_eq!((in_flight.0.arriving.taken(), in_flight.0.arriving_bytes.taken()), (0, 0));
    }
}
