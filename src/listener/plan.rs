//! When what is to be done with a connection, whatever its peer does.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::RngExt as _;
use tokio::time::Instant;

use super::{ConnectionControl, Ending, Limits, Phase, requests::InFlight};

/// When all is to stop: how long a connection without a request in flight may take to notice, or to
/// send what is on its way. An HTTP/1 client that asks more often than this learns by a response
/// that its connection ends, instead of sending into one that is being closed.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// Fraction of the age to wait for a moment with nothing in flight before the GOAWAY of an HTTP/2
/// connection. h2 0.4.20 ends a connection with PROTOCOL_ERROR on a WINDOW_UPDATE for a
/// stream that its GOAWAY refused, where RFC 9113 (section 6.8) says to ignore it; with nothing in
/// flight that harms no other call.
const QUIET_SEARCH: f64 = 0.1;

/// Cancelled requests after which a connection is not read for the rest of the time below. A
/// cancelled request costs its caller nothing and the server some microseconds, which is what makes
/// floods of them worth while.
const MAX_CANCELS: u32 = 1000;
const CANCELS_WINDOW: Duration = Duration::from_millis(100);

/// Bytes that are read from a connection before others have their turn: hundreds of the smallest
/// frames, which is a flood's way to keep its thread busy.
const READ_TURN: usize = 4 * 1024;

/// How often a connection of which nothing is due is looked at.
const RARELY: Duration = Duration::from_secs(3600);

/// With what an HTTP/2 connection begins (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the parts of one connection tell each other.
#[derive(Debug)]
pub(super) struct State {
    /// Whether responses of HTTP/1 are to say `connection: close`.
    closing: AtomicBool,
    write_blocked: AtomicBool,
    /// Whether `Now::paused_until` is set.
    paused: AtomicBool,
    /// Bytes that may yet be read in this turn.
    readable: AtomicUsize,
    /// What the requests share; see [`Ending`].
    pub(super) connection: Arc<ConnectionControl>,
    now: Mutex<Now>,
}

/// What is going on.
#[derive(Debug)]
struct Now {
    /// What of [`PREFACE`] has yet to come; `None` once something else came.
    preface: Option<&'static [u8]>,
    /// `None` before the whole preface or the first request.
    http1: Option<bool>,
    /// Whether a request has come.
    asked: bool,
    in_flight: usize,
    /// Since when nothing is in flight.
    idle_since: Since,
    /// When the first bytes of a head came that has not yet arrived whole: HTTP/1 only.
    head_since: Since,
    /// Of the last request.
    ending: Option<Ending>,
    /// Requests that were cancelled since `cancels_since`.
    cancels: u32,
    cancels_since: Option<Instant>,
    /// Until when the connection is not read.
    paused_until: Option<Instant>,
}

/// Since when something lasts. The clock is read where a turn of the connection ends, and only for
/// what still lasts then and is to end some time: of most requests the whole head comes by one
/// read.
#[derive(Debug, Clone, Copy)]
enum Since {
    Not,
    Undated,
    At(Instant),
}

impl Since {
    fn begins(&mut self) {
        if matches!(self, Self::Not) {
            *self = Self::Undated;
        }
    }

    fn date(&mut self) {
        if matches!(self, Self::Undated) {
            *self = Self::At(Instant::now());
        }
    }

    fn at(self) -> Option<Instant> {
        match self {
            Self::At(at) => Some(at),
            Self::Not | Self::Undated => None,
        }
    }
}

impl State {
    pub(super) fn new() -> Self {
        let now = Now {
            preface: Some(PREFACE),
            http1: None,
            asked: false,
            in_flight: 0,
            idle_since: Since::Undated,
            head_since: Since::Not,
            ending: None,
            cancels: 0,
            cancels_since: None,
            paused_until: None,
        };
        Self {
            closing: AtomicBool::new(false),
            write_blocked: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            readable: AtomicUsize::new(READ_TURN),
            connection: Arc::default(),
            now: Mutex::new(now),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // No code can panic while it holds the lock.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn bytes_came(&self, bytes: &[u8]) {
        // Only the connection's own task reads it.
        let readable = self.readable.load(Ordering::Relaxed).saturating_sub(bytes.len());
        self.readable.store(readable, Ordering::Relaxed);
        let mut now = self.now();
        if now.http1.is_none()
            && let Some(rest) = now.preface
        {
            let both = rest.len().min(bytes.len());
            now.preface = (rest[..both] == bytes[..both]).then(|| &rest[both..]);
            if now.preface.is_some_and(<[u8]>::is_empty) {
                now.http1 = Some(false);
            }
        }
        if now.http1 == Some(true) && now.in_flight == 0 {
            now.head_since.begins();
        }
    }

    pub(super) fn set_write_blocked(&self, blocked: bool) {
        self.write_blocked.store(blocked, Ordering::Relaxed);
    }

    pub(super) fn is_write_blocked(&self) -> bool {
        self.write_blocked.load(Ordering::Relaxed)
    }

    pub(super) fn request_came(self: &Arc<Self>, http1: bool, ending: Ending) -> InFlight {
        let mut now = self.now();
        now.http1 = Some(http1);
        now.asked = true;
        now.in_flight += 1;
        (now.idle_since, now.head_since) = (Since::Not, Since::Not);
        now.ending = Some(ending);
        InFlight { state: self.clone(), answered: false }
    }

    pub(super) fn request_ended(&self, cancelled: bool) {
        let mut now = self.now();
        if cancelled && now.http1 == Some(false) {
            self.count_cancel(&mut now);
        }
        now.in_flight -= 1;
        if now.in_flight == 0 {
            now.idle_since.begins();
        }
    }

    fn count_cancel(&self, now: &mut Now) {
        let at = Instant::now();
        let since = now.cancels_since.filter(|since| at < *since + CANCELS_WINDOW);
        if since.is_none() {
            (now.cancels, now.cancels_since) = (0, Some(at));
        }
        now.cancels += 1;
        if now.cancels >= MAX_CANCELS {
            now.paused_until = now.cancels_since.map(|since| since + CANCELS_WINDOW);
            self.paused.store(true, Ordering::Relaxed);
        }
    }

    /// A turn of the connection begins.
    pub(super) fn begin_turn(&self) {
        self.readable.store(READ_TURN, Ordering::Relaxed);
    }

    /// Whether the connection may be read on in this turn.
    pub(super) fn is_readable(&self) -> bool {
        self.readable.load(Ordering::Relaxed) > 0
    }

    /// Until when the connection is not to be read.
    pub(super) fn paused_until(&self) -> Option<Instant> {
        if self.paused.load(Ordering::Relaxed) { self.now().paused_until } else { None }
    }

    /// The connection is read again.
    pub(super) fn resume(&self) {
        self.paused.store(false, Ordering::Relaxed);
        self.now().paused_until = None;
    }

    /// How many requests are in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.now().in_flight
    }

    pub(super) fn take_ending(&self) -> Option<Ending> {
        self.now().ending.take()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }
}

/// What is to be done now.
#[derive(Debug)]
pub(super) enum Act {
    Nothing,
    /// hyper's graceful shutdown: GOAWAY, or the end after the response under way.
    GoAway,
    /// Close, the first request or a head having taken too long.
    Refuse,
    /// The same on HTTP/2, where a first request that is on its way can be served yet: GOAWAY.
    RefuseByGoAway,
    Close,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Plan {
    state: Arc<State>,
    read_timeout: Duration,
    max_idle: Option<Duration>,
    overtime: Duration,
    begun: Instant,
    /// When to ask the connection to go; an HTTP/2 connection with requests in flight, at
    /// `leave_busy`.
    leave: Option<Instant>,
    leave_busy: Option<Instant>,
    /// When to close it once nothing is in flight.
    close: Option<Instant>,
    pub(super) stopping: bool,
    stopping_since: Instant,
    /// Whether the connection was asked to go, as its requests know by [`State::leaving`].
    asked_to_go: bool,
    /// Whether hyper was told.
    told: bool,
}

impl Plan {
    pub(super) fn new(limits: Limits, state: Arc<State>) -> Self {
        let begun = Instant::now();
        let age = limits.max_age.map(|age| age.mul_f64(rand::rng().random_range(0.9..1.1)));
        Self {
            state,
            read_timeout: limits.read_timeout,
            max_idle: limits.max_idle,
            overtime: limits.overtime,
            begun,
            leave: age.map(|age| begun + age),
            leave_busy: age.map(|age| begun + age.mul_f64(1.0 + QUIET_SEARCH)),
            close: age.map(|age| begun + age.mul_f64(1.0 + QUIET_SEARCH) + limits.overtime),
            stopping: false,
            stopping_since: begun,
            asked_to_go: false,
            told: false,
        }
    }

    pub(super) fn follow(&mut self, phase: Phase) {
        let now = Instant::now();
        match phase {
            Phase::Serving => {}
            Phase::Leaving { until } => {
                self.state.closing.store(true, Ordering::Relaxed);
                let spread = until.saturating_duration_since(now);
                let at = now + spread.mul_f64(rand::rng().random_range(0.0..1.0));
                self.leave = sooner(self.leave, Some(at));
                self.leave_busy = sooner(self.leave_busy, Some(at));
            }
            Phase::Stopping => {
                self.state.closing.store(true, Ordering::Relaxed);
                (self.leave, self.leave_busy) = (Some(now), Some(now));
                self.stopping = true;
                self.stopping_since = now;
            }
        }
    }

    /// When to look again at the latest.
    pub(super) fn next_look(&self) -> Instant {
        self.turn_ended().unwrap_or_else(|| Instant::now() + RARELY)
    }

    /// Dates what has begun and still lasts, without which nothing of it is ever due; gives when to
    /// look again, if anything is due at all.
    pub(super) fn turn_ended(&self) -> Option<Instant> {
        let mut now = self.state.now();
        // Of a connection that may be idle as long as it likes, only once it is to end.
        if self.stopping || self.max_idle.is_some() {
            now.idle_since.date();
        }
        now.head_since.date();
        let due = [
            self.too_late(&now),
            self.unread(&now),
            self.overdue(&now),
            self.last_words(&now),
            self.leave(&now),
            self.idle(&now),
        ];
        due.into_iter().fold(None, sooner)
    }

    /// When to ask the connection to go for its age or for the drain.
    fn leave(&self, now: &Now) -> Option<Instant> {
        let busy = now.http1 == Some(false) && now.in_flight > 0;
        if busy { self.leave_busy } else { self.leave }
    }

    /// When to close a connection that was asked to go. A request in flight and a response on its
    /// way keep their own limit, and the response says that the connection ends.
    fn overdue(&self, now: &Now) -> Option<Instant> {
        // HTTP/2's streams are in flight until they are read, or nearly so.
        let http2 = now.http1 == Some(false);
        let pending = now.in_flight > 0 || !http2 && self.state.is_write_blocked();
        let has_limit = http2 || now.ending.as_ref().is_some_and(|ending| ending.limit().is_some());
        self.close.filter(|_| !(pending && has_limit))
    }

    /// By when the first request, or a head that has begun, must have arrived.
    fn too_late(&self, now: &Now) -> Option<Instant> {
        let since = if now.asked { now.head_since.at() } else { Some(self.begun) };
        // Once all is to stop, the time for last words is shorter.
        since.map(|since| since + self.read_timeout).filter(|_| !self.stopping)
    }

    /// By when an HTTP/1 response must have been read; HTTP/2's streams have timers of their own.
    fn unread(&self, now: &Now) -> Option<Instant> {
        let pending = now.in_flight > 0 || self.state.is_write_blocked();
        let ending = if pending && now.http1 == Some(true) { now.ending.as_ref() } else { None };
        ending.and_then(Ending::limit)
    }

    /// When to ask an idle connection to go.
    fn idle(&self, now: &Now) -> Option<Instant> {
        let is_idle = now.asked && !self.asked_to_go && matches!(now.head_since, Since::Not);
        self.max_idle.filter(|_| is_idle).and_then(|max_idle| Some(now.idle_since.at()? + max_idle))
    }

    /// When everything stops: by when a connection with nothing in flight must have ended.
    fn last_words(&self, now: &Now) -> Option<Instant> {
        let blocked = self.state.is_write_blocked();
        if !self.stopping || blocked {
            return None;
        }
        now.idle_since.at().map(|idle_since| self.stopping_since.max(idle_since) + LAST_WORDS)
    }

    /// Whether an HTTP/2 connection that is asked to go has yet to be told.
    pub(super) fn goaway_is_due(&self) -> bool {
        self.asked_to_go && !self.told && self.state.now().http1 == Some(false)
    }

    fn ask_to_go(&mut self) {
        self.asked_to_go = true;
        self.state.closing.store(true, Ordering::Relaxed);
        self.state.connection.leaving.cancel();
        (self.leave, self.leave_busy) = (None, None);
    }

    /// What is to be done now.
    pub(super) fn act(&mut self) -> Act {
        let at = Instant::now();
        let past = |instant: Option<Instant>| instant.is_some_and(|instant| instant <= at);
        let state = self.state.clone();
        let now = state.now();
        if past(self.too_late(&now)) {
            if now.http1 != Some(false) || self.told {
                return Act::Refuse;
            }
            self.ask_to_go();
            (self.told, self.stopping, self.stopping_since) = (true, true, at);
            return Act::RefuseByGoAway;
        }
        if past(self.idle(&now)) {
            self.ask_to_go();
            self.close = sooner(self.close, Some(at + self.overtime));
        } else if past(self.leave(&now)) {
            self.ask_to_go();
        }
        let ends = [self.unread(&now), self.overdue(&now), self.last_words(&now)];
        if ends.into_iter().any(past) {
            return Act::Close;
        }
        // An HTTP/1 connection leaves by its next response, and one that has sent nothing yet may
        // be sending its first request.
        if self.asked_to_go && !self.told && now.http1 == Some(false) {
            self.told = true;
            return Act::GoAway;
        }
        Act::Nothing
    }
}

fn sooner(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests;
