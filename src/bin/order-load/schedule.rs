//! When each order is to be sent: fixed before the first is, by the phases and the seed alone.
//!
//! A phase of rate r is cut into slots of 1/r seconds, and each slot holds one order, at a moment
//! that the seed chooses. So the number of orders is exact, and the orders do not fall into step with
//! anything that happens at regular times, in the server or here.

use std::{fmt, str::FromStr, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// Highest rate, in orders per second, and most orders of one run.
const MAX_RATE: f64 = 1_000_000.0;
const MAX_ORDERS: u64 = 1_000_000_000;

/// One phase: so many orders per second for so long.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// As the user wrote it.
    pub name: String,
    /// From 1 ms to 24 h.
    pub duration: Duration,
    /// Orders per second, from 0 to 1 000 000; may have a fraction.
    pub rate: f64,
}

impl Phase {
    /// How many orders it holds.
    pub fn orders(&self) -> u64 {
        // A thousandth of an order is no order, yet 0.29 s at 100 per second are 29, not 28.999….
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 8.64e10")]
        let orders = (self.duration.as_secs_f64() * self.rate + 1e-3) as u64;
        orders
    }
}

/// The phases of a run, one after the other; at least one.
#[derive(Debug, Clone, PartialEq)]
pub struct Phases(pub Vec<Phase>);

impl Phases {
    /// How long they take together.
    pub fn duration(&self) -> Duration {
        self.0.iter().map(|phase| phase.duration).sum()
    }
}

impl FromStr for Phases {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let phases: Result<Vec<_>, _> = text.split(',').map(phase).collect();
        let phases = phases?;
        let orders: u64 = phases.iter().map(Phase::orders).sum();
        if orders > MAX_ORDERS {
            return Err(format!("at most {MAX_ORDERS} orders, these are {orders}"));
        }
        Ok(Self(phases))
    }
}

fn phase(text: &str) -> Result<Phase, String> {
    let bad = |expected: &str| Err(format!("{expected} instead of {text:?}"));
    let Some((duration, rate)) = text.split_once('@') else {
        return bad("DURATION@RATE such as 30s@5");
    };
    let duration = match humantime::parse_duration(duration) {
        Ok(d) if (Duration::from_millis(1)..=Duration::from_secs(86_400)).contains(&d) => d,
        _ => {
            return bad(
                "a duration such as 250ms, 30s or 5m, at least 1ms and at most 24h, before @",
            );
        }
    };
    match rate.parse() {
        Ok(rate) if (0.0..=MAX_RATE).contains(&rate) => {
            Ok(Phase { name: text.to_owned(), duration, rate })
        }
        _ => bad("a number of orders per second from 0 to 1000000 after @"),
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, phase) in self.0.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{}", phase.name)?;
        }
        Ok(())
    }
}

/// One order to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Counts all orders of the run from 0.
    pub number: u64,
    /// The phase it belongs to.
    pub phase: usize,
    /// When to send it, since the start of the run.
    pub at: Duration,
}

/// The orders of all phases, in the order in which they are due.
#[derive(Debug)]
pub struct Schedule<'p> {
    phases: &'p [Phase],
    random: StdRng,
    phase: usize,
    phase_start: Duration,
    slot: u64,
    number: u64,
}

impl<'p> Schedule<'p> {
    /// The same phases and seed give the same schedule.
    pub fn new(phases: &'p Phases, seed: u64) -> Self {
        let random = StdRng::seed_from_u64(seed);
        let start = Duration::ZERO;
        Self { phases: &phases.0, random, phase: 0, phase_start: start, slot: 0, number: 0 }
    }
}

impl Iterator for Schedule<'_> {
    type Item = Due;

    fn next(&mut self) -> Option<Due> {
        let mut phase = self.phases.get(self.phase)?;
        while self.slot >= phase.orders() {
            self.phase_start += phase.duration;
            self.phase += 1;
            self.slot = 0;
            phase = self.phases.get(self.phase)?;
        }
        #[allow(clippy::cast_precision_loss, reason = "slots are at most 10^9")]
        let slots = self.slot as f64 + self.random.random::<f64>();
        let due = Due {
            number: self.number,
            phase: self.phase,
            // A rate too small for its phase has no slot, so it is not 0 here.
            at: self.phase_start + Duration::from_secs_f64(slots / phase.rate),
        };
        self.slot += 1;
        self.number += 1;
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases(text: &str) -> Phases {
        text.parse().unwrap()
    }

    fn schedule(text: &str, seed: u64) -> Vec<Due> {
        Schedule::new(&phases(text), seed).collect()
    }

    #[test]
    fn the_number_of_orders_is_duration_times_rate() {
        for (text, orders) in [
            ("30s@5", 150),
            ("60s@0", 0),
            ("1m@0.5", 30),
            ("290ms@100", 29),
            ("1s@0.9", 0),
            ("10s@1.25", 12),
            ("1s@1000000", 1_000_000),
            ("24h@0.00001", 0),
        ] {
            assert_eq!(phases(text).0[0].orders(), orders, "{text}");
        }
        assert_eq!(schedule("30s@5,60s@0,30s@2", 1).len(), 210);
    }

    #[test]
    fn each_slot_of_a_phase_holds_one_order() {
        let orders = schedule("2s@10,500ms@0,1s@4", 7);
        assert_eq!(orders.len(), 24);
        for (number, order) in orders.iter().enumerate() {
            let (phase, start, slot, width) =
                if number < 20 { (0, 0.0, number, 0.1) } else { (1 + 1, 2.5, number - 20, 0.25) };
            let begin = start + slot as f64 * width;
            let at = order.at.as_secs_f64();
            assert_eq!((order.number, order.phase), (number as u64, phase));
            assert!((begin - 1e-6..begin + width + 1e-6).contains(&at), "{order:?} from {begin}");
        }
        assert!(orders.is_sorted_by_key(|order| order.at));
    }

    #[test]
    fn the_seed_alone_fixes_the_moments() {
        let of = |seed| schedule("1s@100", seed);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        // Moments vary within their slots, or there would be nothing to fix.
        let gaps: Vec<_> = of(1).windows(2).map(|pair| pair[1].at - pair[0].at).collect();
        assert!(gaps.iter().max() > gaps.iter().min());
    }

    #[test]
    fn phases_are_read_and_shown_as_written() {
        let read = phases("30s@5,1m@0,250ms@0.5");
        assert_eq!(read.0.len(), 3);
        assert_eq!(read.0[1].duration, Duration::from_secs(60));
        assert_eq!(read.0[2].rate, 0.5);
        assert_eq!(read.to_string(), "30s@5,1m@0,250ms@0.5");
    }

    #[test]
    fn what_is_wrong_with_a_phase_is_said_of_that_phase() {
        for (text, named, expected) in [
            ("", "\"\"", "DURATION@RATE"),
            ("30s", "\"30s\"", "DURATION@RATE"),
            ("30s@5,", "\"\"", "DURATION@RATE"),
            ("30s@5,soon@2", "\"soon@2\"", "a duration such as"),
            ("0s@5", "\"0s@5\"", "at least 1ms"),
            ("25h@5", "\"25h@5\"", "at most 24h"),
            ("30s@fast", "\"30s@fast\"", "from 0 to 1000000"),
            ("30s@-1", "\"30s@-1\"", "from 0 to 1000000"),
            ("30s@NaN", "\"30s@NaN\"", "from 0 to 1000000"),
            ("30s@inf", "\"30s@inf\"", "from 0 to 1000000"),
            ("30s@5@6", "\"30s@5@6\"", "from 0 to 1000000"),
            ("24h@1000000", "86400000000", "at most 1000000000 orders"),
        ] {
            let error = text.parse::<Phases>().unwrap_err();
            assert!(error.contains(named) && error.contains(expected), "{text:?}: {error}");
        }
    }
}
