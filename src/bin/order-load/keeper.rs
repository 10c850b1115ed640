//! Keeps the connections of a pool: looks the name up, opens connections and replaces those that go.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::lookup_host,
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::{
    connection::{Connection, Driver, Sender, open},
    pool::Shared,
    spread::{Peer, Plan, plan},
    target::Target,
};

/// How often the target's name is looked up: a headless Service's addresses change.
const LOOKUP: Duration = Duration::from_secs(5);

/// How often while it has no address yet.
const FIRST_LOOKUP: Duration = Duration::from_millis(500);

/// A connection that ends so soon without an answer counts as one that was refused.
const SHORT: Duration = Duration::from_secs(1);

/// What happens to connections.
pub enum Event {
    Opened(Arc<Connection>, Sender, Driver),
    Refused(SocketAddr, String),
    /// Takes no more calls.
    Gone(u64),
    /// A call waits for a connection, or was the first for a while.
    Wanted,
}

/// Looks up the name, and opens and replaces connections.
pub struct Keeper {
    target: Arc<Target>,
    /// Connections to keep, and the most that this may become.
    wanted: usize,
    most: usize,
    shared: Arc<Shared>,
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
    pub fn new(target: Target, wanted: usize, most: usize, shared: Arc<Shared>) -> Self {
        Self {
            target: Arc::new(target),
            wanted,
            most,
            shared,
            addresses: Vec::new(),
            peers: HashMap::new(),
            live: HashMap::new(),
            opened: 0,
        }
    }

    /// To the end of the process.
    pub async fn keep(mut self, mut events: mpsc::UnboundedReceiver<Event>) {
        let mut lookup = Instant::now();
        loop {
            if lookup <= Instant::now() {
                self.look_up().await;
                let wait = if self.addresses.is_empty() { FIRST_LOOKUP } else { LOOKUP };
                lookup = Instant::now() + wait;
            }
            let mut wake = lookup;
            if !self.shared.is_quiet() {
                self.spread();
                let due = self.peers.values().filter_map(Peer::retry_at).min();
                wake = due.map_or(lookup, |due| due.min(lookup));
            }
            tokio::select! {
                Some(event) = events.recv() => self.handle(event),
                () = sleep_until(wake) => {}
            }
            self.shared.open_are(self.live.len());
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
            Err(error) => self.shared.trouble_is(format!("{}: {error}", self.target.host)),
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
        let (target, shared) = (self.target.clone(), self.shared.clone());
        let in_flight = self.peer(address).in_flight.clone();
        tokio::spawn(async move {
            let connection = Connection::new(number, address, in_flight, shared.events.clone());
            let event = match open(&target, address).await {
                Ok((sender, driver)) => Event::Opened(Arc::new(connection), sender, driver),
                Err(cause) => Event::Refused(address, cause),
            };
            shared.tell(event);
        });
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Opened(connection, sender, driver) => {
                self.peer(connection.address).live += 1;
                let live = Live { connection: connection.clone(), since: Instant::now() };
                self.live.insert(connection.number, live);
                let (ending, shared) = (connection.clone(), self.shared.clone());
                tokio::spawn(async move {
                    if let Some(cause) = driver.await {
                        let cause = ending.cause.get_or_init(|| cause);
                        // The calls that it ended may have told of its end, and not why.
                        if ending.answers() == 0 {
                            shared.trouble_is(format!("{}: {cause}", ending.address));
                        }
                    }
                    ending.leave();
                });
                self.shared.offer(connection, sender);
            }
            Event::Refused(address, cause) => {
                let peer = self.peer(address);
                peer.connections -= 1;
                peer.refused(Instant::now());
                self.shared.trouble_is(cause);
            }
            Event::Wanted => {
                // While some are being opened, they may be enough.
                let quiet = self.shared.wake();
                if !quiet && self.live.len() >= self.wanted {
                    self.wanted = (self.wanted * 2).min(self.most);
                }
            }
            Event::Gone(number) => {
                // Those that were let go on purpose are removed already.
                let Some(Live { connection, since }) = self.remove(number) else { return };
                let unused = connection.answers() == 0;
                let useless = unused && since.elapsed() < SHORT;
                let address = connection.address;
                let peer = self.peer(address);
                if useless {
                    peer.refused(Instant::now());
                    let cause = connection.cause.get().map(String::as_str);
                    let cause = cause.unwrap_or("the connection was closed at once");
                    self.shared.trouble_is(format!("{address}: {cause}"));
                } else {
                    peer.accepted();
                    // Servers close what stays idle: to open it again at once would go on for ever.
                    if unused {
                        self.shared.be_quiet();
                    }
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
}
