//! Ids of new orders and the clock behind them. Ids of one process grow and never run more than a
//! second ahead of the clock: a clock that was wrong for a moment and was set back is followed at
//! once.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use uuid::Uuid;

use super::{LATEST, OrderId};

/// How far ids may run ahead of a clock that went back, and the smallest step of it that is logged.
const LEAD: Duration = Duration::from_secs(1);

/// Bits that grow within a millisecond (RFC 9562, "Fixed Bit-Length Dedicated Counter"); they begin
/// at random with the highest bit 0, so that there is room for 2^41 ids. As many as `rand_a` and 30
/// bits of `rand_b`.
const COUNTER_BITS: u32 = 42;

/// Makes the ids of one process.
#[derive(Debug)]
pub struct OrderIds(Mutex<Last>);

#[derive(Debug)]
struct Last {
    /// Time and counter of the last id.
    millis: u64,
    counter: u64,
    /// The clock when it was last read, and the moment by a clock that nobody sets.
    clock: u64,
    read: Instant,
}

impl OrderIds {
    /// Ids of this process from now on.
    pub fn new() -> Self {
        let clock = millis(SystemTime::now());
        Self(Mutex::new(Last { millis: 0, counter: 0, clock, read: Instant::now() }))
    }

    /// The next id, and the clock's time, to the millisecond.
    pub fn next(&self) -> (OrderId, SystemTime) {
        // No code can panic while it holds the lock.
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Read under the lock, so that no other thread's later time comes first.
        let (clock, read) = (millis(SystemTime::now()), Instant::now());
        let jump = last.jump(clock, read);
        let id = last.id(clock);
        drop(last);
        if let Some(seconds) = jump {
            tracing::warn!(seconds, "the clock jumped: the times and ids of orders follow it");
        }
        (id, UNIX_EPOCH + Duration::from_millis(clock))
    }
}

impl Default for OrderIds {
    fn default() -> Self {
        Self::new()
    }
}

impl Last {
    /// By how many seconds the clock was set since it was last read, if that is more than a slew.
    fn jump(&mut self, clock: u64, read: Instant) -> Option<i64> {
        let passed = read.saturating_duration_since(self.read);
        let expected = i128::from(self.clock) + i128::try_from(passed.as_millis()).ok()?;
        (self.clock, self.read) = (clock, read);
        let jump = i128::from(clock) - expected;
        let is_jump = jump.unsigned_abs() > LEAD.as_millis();
        is_jump.then(|| i64::try_from(jump / 1000).unwrap_or(i64::MAX))
    }

    fn id(&mut self, clock: u64) -> OrderId {
        let lead = u64::try_from(LEAD.as_millis()).unwrap_or(u64::MAX);
        let ahead = self.millis > clock && self.millis - clock <= lead;
        if self.millis == clock || ahead {
            self.counter += 1;
        } else {
            self.millis = clock;
            self.counter = rand::random::<u64>() >> (64 - COUNTER_BITS + 1);
        }
        let counter = self.counter & ((1 << COUNTER_BITS) - 1);
        let random = rand::random::<u32>();
        let (rand_a, rest) = (counter >> 30, counter & ((1 << 30) - 1));
        let id = u128::from(self.millis) << 80
            | 0x7 << 76
            | u128::from(rand_a) << 64
            | 0b10 << 62
            | u128::from(rest) << 32
            | u128::from(random);
        OrderId(Uuid::from_u128(id))
    }
}

/// Milliseconds since 1970, of a time that an order may have.
fn millis(time: SystemTime) -> u64 {
    let since_1970 = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(LATEST).min(LATEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: u64 = 1_800_000_000_000;

    fn last() -> Last {
        Last { millis: 0, counter: 0, clock: NOON, read: Instant::now() }
    }

    fn millis_of(id: OrderId) -> u64 {
        millis(id.minted_at())
    }

    #[test]
    fn ids_grow_and_follow_the_clock_within_a_second() {
        let mut last = last();
        let mut before = last.id(NOON);
        // Back and forth within a second: they grow, and are at most a second ahead.
        for clock in [NOON, NOON, NOON + 7, NOON + 500, NOON, NOON - 400, NOON + 499, NOON + 501] {
            let id = last.id(clock);
            assert!(id > before, "{clock}");
            assert!(millis_of(id) >= clock && millis_of(id) <= clock + 1000);
            before = id;
        }
        // An hour ahead and back, or 2099 and back.
        for wrong in [NOON + 3_600_000, 4_070_908_800_000] {
            assert_eq!(millis_of(last.id(wrong)), wrong);
            let back = last.id(NOON + 600);
            assert_eq!(millis_of(back), NOON + 600);
            assert!(last.id(NOON + 600) > back);
        }
    }

    #[test]
    fn an_id_is_a_uuid_of_version_7() {
        let id = Uuid::from_bytes(*last().id(NOON).as_bytes());
        assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
    }

    #[test]
    fn a_jump_is_told_once_and_a_slew_never() {
        let mut last = last();
        let (start, second) = (last.read, Duration::from_secs(1));
        assert_eq!(last.jump(NOON + 1900, start + second), None);
        assert_eq!(last.jump(NOON + 3_602_900, start + 2 * second), Some(3600));
        assert_eq!(last.jump(NOON + 3_603_900, start + 3 * second), None);
        assert_eq!(last.jump(NOON + 4000, start + 4 * second), Some(-3600));
        assert_eq!(last.jump(NOON + 5000, start + 5 * second), None);
    }

    #[test]
    fn many_threads_get_different_ids_each_in_order() {
        let ids = OrderIds::new();
        let mut all: Vec<OrderId> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let ids: Vec<_> = (0..10_000).map(|_| ids.next().0).collect();
                        assert!(ids.is_sorted_by(|a, b| a < b));
                        ids
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 40_000);
    }

    #[test]
    fn a_time_before_1970_or_after_9999_is_taken_for_the_nearest() {
        assert_eq!(millis(UNIX_EPOCH - Duration::from_secs(1)), 0);
        assert_eq!(millis(UNIX_EPOCH + Duration::from_secs(1 << 40)), LATEST);
    }
}
