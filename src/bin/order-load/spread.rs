//! How many connections go to which address: as even as can be over those that accept.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use tokio::time::Instant;

/// How long an address that refused is left alone: doubled at each refusal, from the first to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What is known of an address.
#[derive(Debug, Default)]
pub struct Peer {
    /// Connections that are open or being opened.
    pub connections: usize,
    /// Of these the open ones.
    pub live: usize,
    /// Calls in flight on them.
    pub in_flight: Arc<AtomicUsize>,
    refusals: u32,
    retry_at: Option<Instant>,
}

impl Peer {
    /// It refused a connection.
    pub fn refused(&mut self, now: Instant) {
        let pause = PAUSE.0 * 2_u32.pow(self.refusals.min(10));
        self.refusals += 1;
        self.retry_at = Some(now + pause.min(PAUSE.1));
    }

    /// It served a connection.
    pub fn accepted(&mut self) {
        self.refusals = 0;
        self.retry_at = None;
    }

    /// When it may be tried again, if it must be left alone.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }
}

/// What to do now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Addresses to connect to, each once for each connection; they are counted as connections.
    pub open: Vec<SocketAddr>,
    /// How many open connections of which address to let go.
    pub retire: Vec<(SocketAddr, usize)>,
}

/// Spreads so many connections, at least one for each address, over the addresses that accept. An
/// address that refused gets one attempt at a time, and its share once that has come to something.
/// No connection is let go before another is open in its place, save to an address that is no more.
pub fn plan(
    addresses: &[SocketAddr],
    peers: &mut HashMap<SocketAddr, Peer>,
    wanted: usize,
    now: Instant,
) -> Plan {
    let mut plan = Plan::default();
    for address in addresses {
        peers.entry(*address).or_default();
    }
    for peer in peers.values_mut() {
        if peer.retry_at.is_some_and(|at| at <= now) {
            peer.retry_at = None;
        }
    }
    let mut usable: Vec<_> =
        addresses.iter().filter(|address| peers[address].retry_at.is_none()).collect();
    // What cannot be divided goes where connections are: none is moved for it.
    usable.sort_by_key(|address| std::cmp::Reverse(peers[*address].connections));
    let wanted = wanted.max(addresses.len());
    let mut targets = HashMap::new();
    for (i, address) in usable.iter().enumerate() {
        let target = wanted / usable.len() + usize::from(i < wanted % usable.len());
        targets.insert(**address, target);
        let peer = peers.get_mut(*address).expect("made above");
        let now = if peer.refusals > 0 { target.min(peer.live + 1) } else { target };
        while peer.connections < now {
            peer.connections += 1;
            plan.open.push(**address);
        }
    }
    let mut spare = peers.values().map(|peer| peer.live).sum::<usize>().saturating_sub(wanted);
    let mut full: Vec<_> = peers.iter().filter(|(_, peer)| peer.live > 0).collect();
    full.sort_by_key(|(address, peer)| (std::cmp::Reverse(peer.live), **address));
    for (address, peer) in full {
        if !addresses.contains(address) {
            plan.retire.push((*address, peer.live));
            spare = spare.saturating_sub(peer.live);
        } else if let Some(target) = targets.get(address) {
            let excess = peer.live.saturating_sub(*target).min(spare);
            if excess > 0 {
                plan.retire.push((*address, excess));
                spare -= excess;
            }
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> SocketAddr {
        ([10, 0, 0, n], 80).into()
    }

    /// Carries a plan out, all attempts succeeding; what was opened.
    fn settle(
        addresses: &[SocketAddr],
        peers: &mut HashMap<SocketAddr, Peer>,
        wanted: usize,
    ) -> usize {
        let mut opened = 0;
        for _ in 0..20 {
            let plan = plan(addresses, peers, wanted, Instant::now());
            if plan == Plan::default() {
                return opened;
            }
            opened += plan.open.len();
            for address in plan.open {
                peers.get_mut(&address).unwrap().live += 1;
            }
            for (address, excess) in plan.retire {
                let peer = peers.get_mut(&address).unwrap();
                peer.live -= excess;
                peer.connections -= excess;
            }
        }
        panic!("never settles: {peers:?}");
    }

    fn live(peers: &HashMap<SocketAddr, Peer>, count: u8) -> Vec<usize> {
        (1..=count).map(|n| peers.get(&address(n)).map_or(0, |peer| peer.live)).collect()
    }

    #[test]
    fn connections_are_spread_evenly_and_move_only_as_far_as_they_must() {
        let mut peers = HashMap::new();
        assert_eq!(settle(&[address(1)], &mut peers, 10), 10);
        let three: Vec<_> = (1..=3).map(address).collect();
        assert_eq!(settle(&three, &mut peers, 10), 6);
        assert_eq!(live(&peers, 3), [4, 3, 3]);
        assert_eq!(settle(&three[1..], &mut peers, 10), 4);
        assert_eq!(live(&peers, 3), [0, 5, 5]);
    }

    #[test]
    fn every_address_gets_a_connection() {
        let many: Vec<_> = (1..=5).map(address).collect();
        let mut peers = HashMap::new();
        settle(&many, &mut peers, 2);
        assert_eq!(live(&peers, 5), [1; 5]);
    }

    #[test]
    fn nothing_is_let_go_before_its_replacement_is_open() {
        let mut peers = HashMap::new();
        settle(&[address(1)], &mut peers, 4);
        let both = [address(1), address(2)];
        let now = Instant::now();
        assert_eq!(
            plan(&both, &mut peers, 4, now),
            Plan { open: vec![address(2); 2], retire: vec![] }
        );
        // While these are being opened there is nothing to do.
        assert_eq!(plan(&both, &mut peers, 4, now), Plan::default());
        peers.get_mut(&address(2)).unwrap().live = 1;
        assert_eq!(plan(&both, &mut peers, 4, now).retire, [(address(1), 1)]);
    }

    #[test]
    fn an_address_that_refuses_is_tried_again_one_by_one_and_the_others_carry_its_share() {
        let both = [address(1), address(2)];
        let mut peers = HashMap::new();
        let now = Instant::now();
        assert_eq!(plan(&both, &mut peers, 4, now).open.len(), 4);
        peers.get_mut(&address(1)).unwrap().live = 2;
        let dead = peers.get_mut(&address(2)).unwrap();
        dead.connections = 0;
        dead.refused(now);
        assert_eq!(plan(&both, &mut peers, 4, now).open, [address(1), address(1)]);
        peers.get_mut(&address(1)).unwrap().live = 4;

        let later = peers[&address(2)].retry_at().unwrap();
        assert_eq!(plan(&both, &mut peers, 4, later).open, [address(2)]);
        let dead = peers.get_mut(&address(2)).unwrap();
        dead.connections = 0;
        dead.refused(later);
        assert!(dead.retry_at().unwrap() - later > later - now, "the pause grows");

        let later = dead.retry_at().unwrap();
        assert_eq!(plan(&both, &mut peers, 4, later).open, [address(2)]);
        peers.get_mut(&address(2)).unwrap().accepted();
        peers.get_mut(&address(2)).unwrap().live = 1;
        settle(&both, &mut peers, 4);
        assert_eq!(live(&peers, 2), [2, 2]);
    }

    #[test]
    fn the_pause_has_an_end() {
        let mut peer = Peer::default();
        let now = Instant::now();
        for _ in 0..100 {
            peer.refused(now);
        }
        assert_eq!(peer.retry_at(), Some(now + PAUSE.1));
    }
}
