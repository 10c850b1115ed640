//! Limits log lines to a number a second, and counts the lines that it does not admit.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The period of the limit, and of the reports.
pub(super) const PERIOD: Duration = Duration::from_secs(1);

/// Most lines in any period.
const MAX_LINES: usize = 10;

#[derive(Debug, Default)]
pub(in crate::layers) struct Limit(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The times of the last lines, as a ring.
    admitted: [Option<Instant>; MAX_LINES],
    /// Index of the oldest.
    oldest: usize,
    omitted: u64,
}

impl Limit {
    /// Whether one more line is admitted now. Counts it if not.
    pub(in crate::layers) fn admits(&self) -> bool {
        self.lock().admits(Instant::now())
    }

    /// Takes the number of lines that were not admitted since the last call.
    pub(super) fn take(&self) -> u64 {
        std::mem::take(&mut self.lock().omitted)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn admits(&mut self, now: Instant) -> bool {
        let Self { admitted, oldest, omitted } = self;
        if admitted[*oldest].is_some_and(|at| now.saturating_duration_since(at) < PERIOD) {
            *omitted += 1;
            return false;
        }
        admitted[*oldest] = Some(now);
        *oldest = (*oldest + 1) % MAX_LINES;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_second_has_more_lines_than_allowed_and_the_others_are_counted() {
        let start = Instant::now();
        let mut state = State::default();
        // A line every 7 ms; the first ones of each second are admitted.
        let admitted: Vec<_> = (0..1000)
            .map(|n| start + Duration::from_millis(7 * n))
            .filter(|at| state.admits(*at))
            .collect();
        assert_eq!(admitted.len() as u64 + state.omitted, 1000);
        assert_eq!(admitted.len(), 10 * 7);
        assert!(admitted.windows(11).all(|lines| lines[10] - lines[0] >= PERIOD));
    }

    #[test]
    fn what_is_within_the_limit_is_never_omitted() {
        let start = Instant::now();
        let mut state = State::default();
        for n in 0..100 {
            assert!(state.admits(start + PERIOD * n / 10));
        }
        let limit = Limit(Mutex::new(state));
        assert_eq!(limit.take(), 0);
    }
}
