//! The connections to the server: at most so many, each used by one attempt at a time.
//!
//! Not sqlx's pool. That one pings each connection that comes back, without a time limit, so that a
//! server that vanishes in that moment takes the connection's place for as long as TCP waits; and it
//! says only that there was no connection, where an operator needs the reason.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::{
    ConnectOptions as _, Connection as _,
    postgres::{PgConnectOptions, PgConnection},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

use super::failure;
use crate::{metrics::StoreErrorKind, store::engine::Failure};

/// How long to wait for a connection.
const ACQUIRE: Duration = Duration::from_secs(1);

/// A connection that is older is replaced before its next use, so that a name that points elsewhere by
/// now, and a balancer's new node, are noticed.
const MAX_AGE: Duration = Duration::from_secs(30 * 60);

/// How long the farewells may take.
const CLOSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Connections {
    options: Box<PgConnectOptions>,
    places: Semaphore,
    idle: Mutex<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    connection: PgConnection,
    born: Instant,
}

impl Connections {
    /// At most `most` connections, none of them opened yet.
    pub(super) fn new(options: PgConnectOptions, most: usize) -> Self {
        Self { options: Box::new(options), places: Semaphore::new(most), idle: Mutex::default() }
    }

    /// A connection that nobody else uses, and that is closed when it is dropped.
    ///
    /// # Errors
    /// If there is none within a second; nothing was sent then.
    pub(super) async fn take(&self) -> Result<Taken<'_>, Failure> {
        let until = Instant::now() + ACQUIRE;
        let none = |cause: &str| Failure::nothing_done(StoreErrorKind::Unavailable, cause);
        let place = match timeout_at(until, self.places.acquire()).await {
            Ok(Ok(place)) => place,
            Ok(Err(_)) => return Err(none("the store is closed")),
            Err(_) => return Err(none("every connection was busy for 1 s (--database-pool)")),
        };
        let kept = self.idle().pop().filter(|idle| idle.born.elapsed() < MAX_AGE);
        let held = match kept {
            Some(idle) => idle,
            None => match timeout_at(until, self.options.connect()).await {
                Ok(Ok(connection)) => Idle { connection, born: Instant::now() },
                Ok(Err(error)) => {
                    return Err(Failure { outcome_unknown: false, ..failure(&error) });
                }
                Err(_) => return Err(none("no connection to the server within 1 s")),
            },
        };
        Ok(Taken { held, of: self, _place: place })
    }

    /// Closes those that are idle: one that broke is seldom the only one.
    pub(super) fn distrust(&self) {
        self.idle().clear();
    }

    /// Says farewell to the server on each connection, and opens none any more.
    pub(super) async fn close(&self) {
        self.places.close();
        let idle = std::mem::take(&mut *self.idle());
        let until = Instant::now() + CLOSE;
        for Idle { connection, .. } in idle {
            // One that hangs must not hold the end of the process.
            let _ = timeout_at(until, connection.close()).await;
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        // No code can panic while it holds the lock.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection in use. Dropping it closes it, which is right for one with statements under way, also
/// when the caller hung up.
pub(super) struct Taken<'c> {
    held: Idle,
    of: &'c Connections,
    _place: SemaphorePermit<'c>,
}

impl Taken<'_> {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.held.connection
    }

    /// Its statements are over: it may serve others.
    pub(super) fn keep(self) {
        self.of.idle().push(self.held);
    }
}
