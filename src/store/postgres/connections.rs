//! The connections to the server: at most so many, each used by one attempt at a time.
//!
//! Not sqlx's pool. That one pings each connection that comes back, without a time limit, so that a
//! server that vanishes in that moment takes the connection's place for as long as TCP waits; and
//! it says only that there was no connection, where an operator needs the reason.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::Connection as _;
use tokio::{
    sync::{Semaphore, SemaphorePermit, oneshot},
    task::AbortHandle,
    time::{Instant, timeout, timeout_at},
};

use super::{
    failure,
    servers::Servers,
    session::{Backend, LeftBehind, Session},
};
use crate::{
    metrics::StoreErrorKind,
    store::{
        engine::{Failure, Purpose},
        readers::{self, Readers},
    },
};

/// How long to wait for a place among the connections, and then for the connection.
const ACQUIRE: Duration = Duration::from_secs(1);

/// How long a login may take. It goes on without the one who began it, so that a server whose
/// logins take longer than anybody waits is reached all the same.
const LOGIN: Duration = Duration::from_secs(5);

/// A login that is under way for so long may hang; the next who wants a connection begins another
/// beside it. Shorter than [`ACQUIRE`], so that whoever has waited in vain does so at once.
const NEXT_LOGIN: Duration = Duration::from_millis(900);

/// At least so many logins may be under way, however few connections are wanted. Each has nearly a
/// second for itself before the next, so that the oldest, which makes room, had more than three.
const LOGINS: usize = 4;

/// A connection that is older is replaced before its next use, so that a name that points elsewhere
/// by now, and a balancer's new node, are noticed.
const MAX_AGE: Duration = Duration::from_secs(30 * 60);

/// How long the farewells may take.
const CLOSE: Duration = Duration::from_secs(1);

/// How long a connection that was closed under a write is remembered. What a network delivers later
/// than that is not waited for.
const LEFT_BEHIND: Duration = Duration::from_secs(10 * 60);

#[derive(Debug)]
pub(super) struct Connections {
    shared: Arc<Shared>,
    /// Those that may have a place.
    readers: Readers,
}

/// What the logins hold, too.
#[derive(Debug)]
struct Shared {
    servers: Servers,
    most: usize,
    places: Semaphore,
    state: Mutex<State>,
}

/// Whoever waits holds a place, and none is idle while somebody waits.
#[derive(Debug, Default)]
struct State {
    idle: Vec<Session>,
    waiting: VecDeque<oneshot::Sender<Result<Session, Failure>>>,
    /// Those under way, the oldest first.
    logins: VecDeque<Login>,
    /// Counts the calls of [`Connections::replace`]. A connection of an earlier generation is never
    /// used again.
    generation: u64,
    /// Closed under a write, the oldest first.
    left_behind: Vec<LeftBehind>,
}

#[derive(Debug)]
struct Login {
    begun: Instant,
    task: AbortHandle,
}

impl Connections {
    /// At most `most` connections, none of them opened yet; `writers` of them are not for reading,
    /// as long as that leaves one.
    pub(super) fn new(servers: Servers, most: usize, writers: usize) -> Self {
        let shared =
            Shared { servers, most, places: Semaphore::new(most), state: Mutex::default() };
        let readers = Readers::new(most.saturating_sub(writers).max(1));
        Self { shared: Arc::new(shared), readers }
    }

    /// A connection that nobody else uses, and that is closed when it is dropped.
    ///
    /// # Errors
    /// If all are in use for too long, or the server gives none within a second; nothing was sent
    /// then.
    pub(super) async fn take(&self, purpose: Purpose) -> Result<Taken<'_>, Failure> {
        let places = &self.shared.places;
        let (turn, place) = match purpose {
            Purpose::Read => {
                let until = Instant::now() + readers::WAIT;
                let turn = self.readers.turn(until).await?;
                (Some(turn), place_in(places, until, Failure::no_turn).await?)
            }
            Purpose::Write => {
                let busy = || none("every connection was busy for 1 s (--database-pool)");
                (None, place_in(places, Instant::now() + ACQUIRE, busy).await?)
            }
        };
        // Its own time: what a wait in line left of it would say nothing of the server.
        let until = Instant::now() + ACQUIRE;
        let held = match self.shared.idle_or_next() {
            Found::Idle(idle) => idle,
            Found::Next(next) => match timeout_at(until, next).await {
                Ok(Ok(login)) => login?,
                Ok(Err(_)) => return Err(Failure::closed()),
                Err(_) => return Err(none("no connection to the server within 1 s")),
            },
        };
        let session = Some(held);
        Ok(Taken { session, purpose, of: &self.shared, _place: place, _turn: turn })
    }

    /// The connections that were closed under a write, until that moment.
    pub(super) fn left_behind(&self, until: Instant) -> Vec<LeftBehind> {
        let mut left = self.shared.state().left_behind.clone();
        left.retain(|left| left.at <= until);
        left
    }

    /// Nothing is left of these.
    pub(super) fn forget(&self, over: &[Backend]) {
        self.shared.state().left_behind.retain(|left| !over.contains(&left.backend));
    }

    /// Closes those that are idle: one that broke is seldom the only one.
    pub(super) fn distrust(&self) {
        self.shared.state().idle.clear();
    }

    /// Closes every connection, those in use when they are returned, because the server of this one
    /// takes no writes. The next login begins with the next server.
    pub(super) fn leave(&self, taken: &Taken<'_>) {
        if let Some(session) = &taken.session {
            self.shared.servers.leave(session.server);
            self.replace(taken);
        }
    }

    /// Closes every connection, those in use when they are returned, because all may have what this
    /// one has: a server that takes no writes, or an outdated prepared statement.
    pub(super) fn replace(&self, taken: &Taken<'_>) {
        let Some(session) = &taken.session else { return };
        let mut state = self.shared.state();
        // Connections of one generation fail one after the other; only the first failure counts.
        if session.generation == state.generation {
            state.generation += 1;
            state.idle.clear();
        }
    }

    /// Says farewell to the server on each connection, and opens none any more.
    pub(super) async fn close(&self) {
        self.readers.close();
        self.shared.places.close();
        let State { idle, logins, .. } = std::mem::take(&mut *self.shared.state());
        for login in logins {
            login.task.abort();
        }
        let until = Instant::now() + CLOSE;
        for Session { connection, .. } in idle {
            // One that hangs must not hold the end of the process.
            let _ = timeout_at(until, connection.close()).await;
        }
    }
}

fn none(cause: &str) -> Failure {
    Failure::nothing_done(StoreErrorKind::Unavailable, cause)
}

async fn place_in(
    places: &Semaphore,
    until: Instant,
    too_late: impl FnOnce() -> Failure,
) -> Result<SemaphorePermit<'_>, Failure> {
    match timeout_at(until, places.acquire()).await {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(_)) => Err(Failure::closed()),
        Err(_) => Err(too_late()),
    }
}

enum Found {
    Idle(Session),
    /// The next that is free or logged in.
    Next(oneshot::Receiver<Result<Session, Failure>>),
}

impl Shared {
    fn idle_or_next(self: &Arc<Self>) -> Found {
        let mut state = self.state();
        while let Some(idle) = state.idle.pop() {
            if idle.born.elapsed() < MAX_AGE {
                return Found::Idle(idle);
            }
        }
        let (sender, next) = oneshot::channel();
        state.waiting.retain(|waiting| !waiting.is_closed());
        state.waiting.push_back(sender);
        let may_hang =
            state.logins.back().is_some_and(|newest| newest.begun.elapsed() >= NEXT_LOGIN);
        if state.logins.len() < state.waiting.len() || may_hang {
            if state.logins.len() >= self.most.max(LOGINS)
                && let Some(oldest) = state.logins.pop_front()
            {
                oldest.task.abort();
            }
            let task = tokio::spawn(self.clone().log_in()).abort_handle();
            state.logins.push_back(Login { begun: Instant::now(), task });
        }
        Found::Next(next)
    }

    async fn log_in(self: Arc<Self>) {
        let generation = self.state().generation;
        let login = timeout(LOGIN, self.connect(generation)).await;
        let mut state = self.state();
        let this = tokio::task::id();
        state.logins.retain(|login| login.task.id() != this);
        // Whoever waits for one that hung has begun another.
        let Ok(login) = login else { return };
        // Whatever the server says to a login, no order is to blame, and it may pass.
        let login =
            login.map_err(|cause| Failure::nothing_done(StoreErrorKind::Unavailable, cause));
        // A place that is free has one idle connection at most.
        if let Some(Ok(unwanted)) = state.tell(login)
            && unwanted.generation == state.generation
            && state.idle.len() < self.places.available_permits()
        {
            state.idle.push(unwanted);
        }
    }

    /// Logs in and prepares the session.
    async fn connect(&self, generation: u64) -> Result<Session, String> {
        let connected = self.servers.connect().await;
        let (connection, server) = connected.map_err(|none| none.to_string())?;
        let session = Session::set_up(connection, server, generation).await;
        session.map_err(|error| failure(&error).cause)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code can panic while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Gives a connection to the first who waits; else keeps it.
    fn offer(&mut self, idle: Session) {
        if idle.generation != self.generation {
            return;
        }
        if let Some(Ok(unwanted)) = self.tell(Ok(idle)) {
            self.idle.push(unwanted);
        }
    }

    /// Tells the first who still waits; returns what nobody waits for.
    fn tell(&mut self, mut login: Result<Session, Failure>) -> Option<Result<Session, Failure>> {
        while let Some(waiting) = self.waiting.pop_front() {
            match waiting.send(login) {
                Ok(()) => return None,
                Err(unsent) => login = unsent,
            }
        }
        Some(login)
    }
}

/// A connection in use. Dropping it closes it, which is right for one with statements under way,
/// also when the caller hung up.
pub(super) struct Taken<'c> {
    /// Until it is kept or dropped.
    session: Option<Session>,
    purpose: Purpose,
    of: &'c Shared,
    _place: SemaphorePermit<'c>,
    _turn: Option<SemaphorePermit<'c>>,
}

impl Taken<'_> {
    pub(super) fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("it is taken away only at the end")
    }

    /// Its statements are over: it may serve others.
    pub(super) fn keep(mut self) {
        if let Some(session) = self.session.take() {
            self.of.state().offer(session);
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(session) = self.session.take()
            && self.purpose == Purpose::Write
        {
            let left_behind = &mut self.of.state().left_behind;
            left_behind.retain(|left| left.at.elapsed() < LEFT_BEHIND);
            left_behind.push(LeftBehind::new(session.backend));
        }
    }
}
