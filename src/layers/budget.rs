//! Budgets that all connections share: requests in flight, requests that have not arrived whole,
//! probes. Implements the fair-share rule.
//!
//! Knows numbers, nothing of requests.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use tokio::time::Instant;

/// Budgets of at least this size keep their last quarter for connections that hold at most this part.
const LARGE: usize = 256;
const SMALL_PART: usize = 100;

/// A number of places.
#[derive(Debug)]
pub(super) struct Budget {
    size: usize,
    taken: AtomicUsize,
}

impl Budget {
    pub(super) fn new(size: usize) -> Self {
        Self { size, taken: AtomicUsize::new(0) }
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Takes places for a connection that holds `own` of them, while `asking` connections ask;
    /// returns how many were taken before. Two rules keep room for connections that hold little:
    /// - while others ask, a connection gets no more than a quarter of the places;
    /// - the last quarter is for connections that hold less than an equal part. Of a large budget it
    ///   is for those that hold next to nothing, however many others come at once.
    pub(super) fn take(
        &self,
        places: usize,
        own: Option<&AtomicUsize>,
        asking: usize,
    ) -> Option<usize> {
        let holds = own.map_or(0, |own| own.load(Ordering::Relaxed));
        // A connection that holds nothing may always take what it asks for.
        let within = |share: usize| holds == 0 || holds + places <= share;
        let quarter = self.size / 4;
        if asking > 1 && !within(quarter) {
            return None;
        }
        // Rounded up, so that connections which ask for the same may take all of it together.
        let equal_part = self.size.div_ceil(asking.max(1));
        let little = if self.size >= LARGE { self.size / SMALL_PART } else { equal_part };
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            let after = taken.checked_add(places).filter(|after| *after <= self.size)?;
            (self.size - after >= quarter || within(little.min(equal_part))).then_some(after)
        });
        if let (Ok(_), Some(own)) = (taken, own) {
            own.fetch_add(places, Ordering::Relaxed);
        }
        taken.ok()
    }

    /// Gives places back.
    pub(super) fn release(&self, places: usize, own: Option<&AtomicUsize>) {
        self.taken.fetch_sub(places, Ordering::Relaxed);
        if let Some(own) = own {
            own.fetch_sub(places, Ordering::Relaxed);
        }
    }
}

/// Counts the connections on which requests come.
#[derive(Debug)]
pub(super) struct Asking {
    started: Instant,
    /// A second since `started`, and how many connections asked in the one before and in that one:
    /// 32, 16 and 16 bits.
    window: AtomicU64,
}

impl Asking {
    pub(super) fn new() -> Self {
        Self { started: Instant::now(), window: AtomicU64::new(0) }
    }

    /// Notes a request of the connection that asked last at `last_asked`; returns how many
    /// connections asked in this second or in the one before, whichever is more, at least 1. Costs
    /// one write for each connection and second.
    pub(super) fn note(&self, last_asked: &AtomicU32, now: Instant) -> usize {
        // From 1, since 0 is the second of a connection that has not asked.
        let second = now.saturating_duration_since(self.started).as_secs() + 1;
        let second = u32::try_from(second).unwrap_or(u32::MAX);
        // The body of an older request may arrive after a newer request.
        let window = if last_asked.load(Ordering::Relaxed) >= second {
            self.window.load(Ordering::Relaxed)
        } else {
            last_asked.store(second, Ordering::Relaxed);
            let add = |window| Some(Window::unpack(window).with_one_more(second).pack());
            let (Ok(before) | Err(before)) =
                self.window.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
            Window::unpack(before).with_one_more(second).pack()
        };
        let Window { before, current, .. } = Window::unpack(window);
        before.max(current).max(1).into()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    second: u32,
    before: u16,
    current: u16,
}

impl Window {
    fn with_one_more(self, second: u32) -> Self {
        let current = self.current;
        if second <= self.second {
            // Another thread's clock was read later.
            return Self { current: current.saturating_add(1), ..self };
        }
        let before = if second == self.second + 1 { current } else { 0 };
        Self { second, before, current: 1 }
    }

    fn pack(self) -> u64 {
        u64::from(self.second) << 32 | u64::from(self.before) << 16 | u64::from(self.current)
    }

    fn unpack(window: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = window.to_be_bytes();
        Self {
            second: u32::from_be_bytes([a, b, c, d]),
            before: u16::from_be_bytes([e, f]),
            current: u16::from_be_bytes([g, h]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_connection_alone_may_take_all() {
        let (budget, own) = (Budget::new(8), AtomicUsize::new(0));
        for taken in 0..8 {
            assert_eq!(budget.take(1, Some(&own), 1), Some(taken));
        }
        assert_eq!(budget.take(1, Some(&own), 1), None);
        budget.release(1, Some(&own));
        assert_eq!((budget.taken(), own.into_inner()), (7, 7));
    }

    #[test]
    fn while_others_ask_a_connection_gets_a_quarter() {
        let (budget, greedy) = (Budget::new(40), AtomicUsize::new(0));
        let got = (0..100).filter(|_| budget.take(1, Some(&greedy), 2).is_some()).count();
        assert_eq!(got, 10);
    }

    #[test]
    fn whatever_connections_take_at_once_others_find_room() {
        // As if each were the first to ask, and as if all had asked before.
        for asking in [1, 2, 5, 21, 1001] {
            let budget = Budget::new(1024);
            for _ in 0..1000 {
                let greedy = AtomicUsize::new(0);
                for _ in 0..300 {
                    budget.take(1, Some(&greedy), asking);
                }
                if budget.size - budget.taken() <= 96 {
                    break;
                }
            }
            let left = budget.size - budget.taken();
            assert!(left >= 24, "{asking}: {left}");
            for _ in 0..left {
                assert!(budget.take(1, Some(&AtomicUsize::new(0)), asking).is_some(), "{asking}");
            }
        }
    }

    #[test]
    fn connections_that_ask_for_the_same_share_all_of_it() {
        for (size, connections) in [(200, 4), (64, 10), (40, 7), (3, 3), (1000, 999)] {
            let budget = Budget::new(size);
            let each: Vec<_> = (0..connections).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..size {
                for own in &each {
                    budget.take(1, Some(own), connections);
                }
            }
            assert_eq!(budget.taken(), size, "{connections}");
        }
    }

    #[test]
    fn a_place_larger_than_the_share_is_for_one_that_holds_nothing() {
        let (budget, own) = (Budget::new(100), AtomicUsize::new(0));
        assert!(budget.take(60, Some(&own), 9).is_some());
        assert!(budget.take(1, Some(&own), 9).is_none());
        assert!(budget.take(60, None, 1).is_none());
    }

    #[test]
    fn connections_count_in_their_second_and_the_next() {
        let asking = Asking::new();
        let connections: [AtomicU32; 5] = Default::default();
        let at = |millis| asking.started + Duration::from_millis(millis);
        let counts: Vec<_> = connections.iter().map(|it| asking.note(it, at(100))).collect();
        assert_eq!(counts, [1, 2, 3, 4, 5]);
        assert_eq!(asking.note(&connections[0], at(999)), 5);
        assert_eq!(asking.note(&connections[0], at(1500)), 5);
        // A request of the second before makes nothing of it.
        assert_eq!(asking.note(&connections[0], at(990)), 5);
        assert_eq!(asking.note(&connections[0], at(1550)), 5);
        assert_eq!(asking.note(&connections[1], at(1600)), 5);
        assert_eq!(asking.note(&connections[1], at(2100)), 2);
        assert_eq!(asking.note(&connections[1], at(9000)), 1);
    }

    #[test]
    fn a_window_survives_its_packing() {
        let window = Window { second: 0xdead_beef, before: 0x1234, current: u16::MAX };
        assert_eq!(Window::unpack(window.pack()), window);
        assert_eq!(window.with_one_more(window.second).current, u16::MAX);
    }
}
