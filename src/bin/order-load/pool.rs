//! The connections: which one takes the next call, and keeping as many as were asked for.
//!
//! tonic's balanced channel would do neither as a test needs it: it hides calls that were lost, and
//! keeps addresses that refuse.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use tokio::{
    net::lookup_host,
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep_until},
};

use crate::{
    connection::{Connection, Driver, Sender, open},
    spread::{Peer, Plan, plan},
    target::Target,
};

/// How often the target's name is looked up: a headless Service's addresses change.
const LOOKUP: Duration = Duration::from_secs(5);

/// How often while it has no address yet.
const FIRST_LOOKUP: Duration = Duration::from_millis(500);

/// A connection that ends so soon without an answer counts as one that was refused.
const SHORT: Duration = Duration::from_secs(1);

/// Connections to every address of the target.
#[derive(Debug, Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Connections that can take a call, the longest unused first: so all get their share.
    ring: Mutex<VecDeque<Entry>>,
    freed: Notify,
    /// How many connections are open, and whether an attempt at one failed.
    state: watch::Sender<(usize, bool)>,
    /// Why there is no connection.
    trouble: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Entry {
    connection: Arc<Connection>,
    sender: Sender,
}

impl Pool {
    /// Begins to connect, and keeps so many connections open to the end of the process.
    pub fn start(target: Target, connections: usize) -> Self {
        let shared = Arc::new(Shared {
            ring: Mutex::default(),
            freed: Notify::new(),
            state: watch::Sender::default(),
            trouble: Mutex::default(),
        });
        let (events, received) = mpsc::unbounded_channel();
        let keeper = Keeper {
            target: Arc::new(target),
            wanted: connections,
            shared: shared.clone(),
            events,
            addresses: Vec::new(),
            peers: HashMap::new(),
            live: HashMap::new(),
            opened: 0,
        };
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
            freed.await;
            waited = true;
        }
    }

    /// A connection for one call, if one is free.
    pub fn try_lease(&self) -> Option<Lease> {
        let mut ring = self.ring();
        while let Some(entry) = ring.pop_front() {
            if entry.connection.is_leaving() {
                continue;
            }
            if entry.sender.is_closed() {
                entry.connection.leave();
                continue;
            }
            let in_flight = entry.connection.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
            let connection = entry.connection.clone();
            let another =
                if in_flight < entry.sender.capacity() { entry.sender.another() } else { None };
            let sender = match another {
                Some(another) => {
                    ring.push_back(entry);
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
        self.shared.state.borrow().0 > 0
    }

    /// Waits until so many connections are open or an attempt failed: what is due then does not pay
    /// for the handshakes.
    pub async fn opened(&self, connections: usize) {
        let mut state = self.shared.state.subscribe();
        let opened = state.wait_for(|(open, failed)| *open >= connections || *failed).await;
        drop(opened.expect("the pool holds the sender"));
    }

    /// Why the last attempt to connect failed.
    pub fn trouble(&self) -> String {
        let trouble = self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        trouble.unwrap_or_else(|| "no connection".to_owned())
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.shared.ring()
    }
}

impl Shared {
    fn ring(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offer(&self, connection: Arc<Connection>, sender: Sender) {
        if !connection.is_leaving() && !connection.in_ring.swap(true, Ordering::Relaxed) {
            self.ring().push_back(Entry { connection, sender });
            self.freed.notify_one();
        }
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
        self.connection.in_flight.fetch_sub(1, Ordering::Relaxed);
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

/// What happens to connections.
pub enum Event {
    Opened(Arc<Connection>, Sender, Driver),
    Refused(SocketAddr, String),
    /// Takes no more calls.
    Gone(u64),
}

/// Looks up the name, and opens and replaces connections.
struct Keeper {
    target: Arc<Target>,
    wanted: usize,
    shared: Arc<Shared>,
    events: mpsc::UnboundedSender<Event>,
    addresses: Vec<SocketAddr>,
    peers: HashMap<SocketAddr, Peer>,
    live: HashMap<u64, Live>,
    opened: u64,
}

struct Live {
    connection: Arc<Connection>,
    since: Instant,
}

impl Keeper {
    async fn keep(mut self, mut events: mpsc::UnboundedReceiver<Event>) {
        let mut lookup = Instant::now();
        loop {
            if lookup <= Instant::now() {
                self.look_up().await;
                let wait = if self.addresses.is_empty() { FIRST_LOOKUP } else { LOOKUP };
                lookup = Instant::now() + wait;
            }
            self.spread();
            let due = self.peers.values().filter_map(Peer::retry_at).min();
            let wake = due.map_or(lookup, |due| due.min(lookup));
            tokio::select! {
                Some(event) = events.recv() => self.handle(event),
                () = sleep_until(wake) => {}
            }
            let open = self.live.len();
            self.shared
                .state
                .send_if_modified(|state| std::mem::replace(&mut state.0, open) != open);
        }
    }

    async fn look_up(&mut self) {
        match lookup_host((self.target.host.as_str(), self.target.port)).await {
            Ok(found) => {
                let mut found: Vec<_> = found.collect();
                found.sort();
                found.dedup();
                self.addresses = found;
                self.peers.retain(|address, peer| {
                    peer.connections > 0 || self.addresses.contains(address)
                });
            }
            // The addresses known so far stay.
            Err(error) => self.trouble(format!("{}: {error}", self.target.host)),
        }
    }

    fn spread(&mut self) {
        let Plan { open, retire } =
            plan(&self.addresses, &mut self.peers, self.wanted, Instant::now());
        for address in open {
            self.open(address);
        }
        for (address, excess) in retire {
            let there = self.live.values().filter(|live| live.connection.address == address);
            let there: Vec<_> = there.map(|live| live.connection.number).take(excess).collect();
            for number in there {
                if let Some(live) = self.remove(number) {
                    live.connection.leave();
                }
            }
        }
    }

    fn open(&mut self, address: SocketAddr) {
        let number = self.opened;
        self.opened += 1;
        let (target, events) = (self.target.clone(), self.events.clone());
        tokio::spawn(async move {
            let connection = Connection::new(number, address, events.clone());
            let event = match open(&target, address).await {
                Ok((sender, driver)) => Event::Opened(Arc::new(connection), sender, driver),
                Err(cause) => Event::Refused(address, cause),
            };
            // Without a keeper the run is over.
            let _ = events.send(event);
        });
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Opened(connection, sender, driver) => {
                self.peer(connection.address).live += 1;
                let live = Live { connection: connection.clone(), since: Instant::now() };
                self.live.insert(connection.number, live);
                let ending = connection.clone();
                tokio::spawn(async move {
                    driver.await;
                    ending.leave();
                });
                self.shared.offer(connection, sender);
            }
            Event::Refused(address, cause) => {
                let peer = self.peer(address);
                peer.connections -= 1;
                peer.refused(Instant::now());
                self.trouble(cause);
            }
            Event::Gone(number) => {
                // Those that were let go on purpose are removed already.
                let Some(Live { connection, since }) = self.remove(number) else { return };
                let useless = connection.answers() == 0 && since.elapsed() < SHORT;
                let address = connection.address;
                let peer = self.peer(address);
                if useless {
                    peer.refused(Instant::now());
                    self.trouble(format!("{address}: the connection was closed at once"));
                } else {
                    peer.accepted();
                }
            }
        }
    }

    fn remove(&mut self, number: u64) -> Option<Live> {
        let live = self.live.remove(&number)?;
        let peer = self.peer(live.connection.address);
        peer.connections -= 1;
        peer.live -= 1;
        Some(live)
    }

    fn peer(&mut self, address: SocketAddr) -> &mut Peer {
        self.peers.entry(address).or_default()
    }

    fn trouble(&self, cause: String) {
        *self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
        self.shared.state.send_modify(|state| state.1 = true);
    }
}
