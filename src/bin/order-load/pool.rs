//! The connections: which one takes the next call, and keeping as many as were asked for.
//!
//! tonic's balanced channel would do neither as a test needs it: it hides calls that were lost, and
//! keeps addresses that refuse.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use crate::{
    connection::{Connection, Sender},
    keeper::{Event, Keeper},
    ring::{Entry, Ring},
    target::Target,
};

/// Connections to begin with; more are opened when calls wait for one.
const FIRST_CONNECTIONS: usize = 10;

/// Connections to every address of the target.
#[derive(Debug, Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

/// What the users of the pool share with its [`Keeper`].
#[derive(Debug)]
pub struct Shared {
    ring: Mutex<Ring>,
    freed: Notify,
    pub state: watch::Sender<State>,
    /// Whether connections closed for want of calls stay closed until there is one.
    quiet: AtomicBool,
    /// Calls that wait for a connection.
    waiting: AtomicUsize,
    pub events: mpsc::UnboundedSender<Event>,
    /// Why there is no connection.
    trouble: Mutex<Option<String>>,
}

/// How it stands with the connections.
#[derive(Debug, Default)]
pub struct State {
    /// How many are open.
    open: usize,
    /// Since when there is any.
    since: Option<Instant>,
    /// Whether an attempt at one failed.
    failed: bool,
}

impl Pool {
    /// Begins to connect, and keeps connections open, at most so many, or one for each address of the
    /// target, to the end of the process.
    pub fn start(target: Target, connections: usize) -> Self {
        let (events, received) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            ring: Mutex::default(),
            freed: Notify::new(),
            state: watch::Sender::default(),
            quiet: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            events,
            trouble: Mutex::default(),
        });
        let first = connections.min(FIRST_CONNECTIONS);
        let keeper = Keeper::new(target, first, connections, shared.clone());
        tokio::spawn(keeper.keep(received));
        Self { shared }
    }

    /// A connection for one call, at once or as soon as one is free.
    pub async fn lease(&self) -> Lease {
        let mut waited = false;
        loop {
            let freed = self.shared.freed.notified();
            if let Some(lease) = self.try_lease() {
                // What woke this one may have freed more than it took.
                if waited && !self.ring().is_empty() {
                    self.shared.freed.notify_one();
                }
                return lease;
            }
            if !waited {
                self.shared.tell(Event::Wanted);
            }
            let _waiting = Waiting::new(&self.shared.waiting);
            freed.await;
            waited = true;
        }
    }

    /// A connection for one call, if one is free.
    pub fn try_lease(&self) -> Option<Lease> {
        if self.shared.quiet.load(Ordering::Relaxed) {
            self.shared.tell(Event::Wanted);
        }
        let mut ring = self.ring();
        while let Some(entry) = ring.pop() {
            if entry.connection.is_leaving() {
                continue;
            }
            if entry.sender.is_closed() {
                entry.connection.leave();
                continue;
            }
            let in_flight = entry.connection.begin_call();
            let connection = entry.connection.clone();
            let another =
                if in_flight < entry.sender.capacity() { entry.sender.another() } else { None };
            let sender = match another {
                Some(another) => {
                    ring.push(entry);
                    another
                }
                None => {
                    connection.in_ring.store(false, Ordering::Relaxed);
                    entry.sender
                }
            };
            let pool = self.shared.clone();
            return Some(Lease { connection, sender: Some(sender), pool });
        }
        None
    }

    /// Whether there is any connection, be it busy.
    pub fn is_connected(&self) -> bool {
        self.connected_since().is_some()
    }

    /// Since when there has been any connection without a break, if there is one.
    pub fn connected_since(&self) -> Option<Instant> {
        self.shared.state.borrow().since
    }

    /// Waits until the first connections are open or an attempt failed: what is due then does not
    /// pay for the handshakes.
    pub async fn opened(&self, connections: usize) {
        let first = connections.min(FIRST_CONNECTIONS);
        let mut state = self.shared.state.subscribe();
        let opened = state.wait_for(|state| state.open >= first || state.failed).await;
        drop(opened.expect("the pool holds the sender"));
    }

    /// Why the last attempt to connect failed.
    pub fn trouble(&self) -> String {
        let trouble = self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        trouble.unwrap_or_else(|| "no connection".to_owned())
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.shared.ring()
    }
}

impl Shared {
    /// An attempt to connect failed, for this reason.
    pub fn trouble_is(&self, cause: String) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
        self.state.send_modify(|state| state.failed = true);
    }

    /// So many connections are open.
    pub fn open_are(&self, open: usize) {
        self.state.send_if_modified(|state| {
            state.since =
                if open > 0 { state.since.or_else(|| Some(Instant::now())) } else { None };
            std::mem::replace(&mut state.open, open) != open
        });
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that closed unused need not be opened again before there is a call.
    pub fn be_quiet(&self) {
        self.quiet.store(true, Ordering::Relaxed);
    }

    /// There is a call. Whether it was quiet.
    pub fn wake(&self) -> bool {
        self.quiet.swap(false, Ordering::Relaxed)
    }

    /// Whether no connection needs to be opened: never while a call waits for one.
    pub fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Relaxed) && self.waiting.load(Ordering::Relaxed) == 0
    }

    pub fn tell(&self, event: Event) {
        // The keeper, which listens, lives as long as the process.
        let _ = self.events.send(event);
    }

    /// Puts a connection among those that can take a call.
    pub fn offer(&self, connection: Arc<Connection>, sender: Sender) {
        if !connection.is_leaving() && !connection.in_ring.swap(true, Ordering::Relaxed) {
            self.ring().push(Entry { connection, sender });
            self.freed.notify_one();
        }
    }
}

/// A call that waits, also one that stops waiting.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The use of a connection for one call.
#[derive(Debug)]
pub struct Lease {
    connection: Arc<Connection>,
    /// Taken when it ends.
    sender: Option<Sender>,
    pool: Arc<Shared>,
}

impl Lease {
    pub fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }

    pub fn sender(&mut self) -> &mut Sender {
        self.sender.as_mut().expect("a lease has it to its end")
    }

    /// Gives the connection back after a call that had an answer.
    pub async fn give_back(mut self) {
        if let Some(Sender::Http1(sender)) = &mut self.sender
            && !self.connection.is_leaving()
        {
            // Not before the connection knows whether it goes on (`connection: close`).
            if sender.ready().await.is_err() {
                self.connection.leave();
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.connection.end_call();
        let Some(sender) = self.sender.take() else { return };
        if let Sender::Http1(sender) = &sender
            && !sender.is_ready()
        {
            // In the middle of a call: of no further use.
            self.connection.leave();
        }
        self.pool.offer(self.connection.clone(), sender);
    }
}
