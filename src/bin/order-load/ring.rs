//! The connections that can take a call, by address, so that each address gets as many calls as any
//! other, however many connections it has.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use crate::connection::{Connection, Sender};

/// Connections that can take a call. The address and the connection unused longest come first.
#[derive(Debug, Default)]
pub struct Ring(VecDeque<Address>);

#[derive(Debug)]
struct Address {
    address: SocketAddr,
    free: VecDeque<Entry>,
}

/// A connection that can take a call.
#[derive(Debug)]
pub struct Entry {
    pub connection: Arc<Connection>,
    pub sender: Sender,
}

impl Entry {
    fn in_flight(&self) -> usize {
        self.connection.in_flight.load(Ordering::Relaxed)
    }
}

impl Address {
    /// Calls in flight on all its connections, those that can take no other included.
    fn in_flight(&self) -> usize {
        let any = self.free.front();
        any.map_or(0, |entry| entry.connection.address_in_flight.load(Ordering::Relaxed))
    }
}

impl Ring {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn push(&mut self, entry: Entry) {
        let address = entry.connection.address;
        match self.0.iter_mut().find(|known| known.address == address) {
            Some(known) => known.free.push_back(entry),
            None => self.0.push_back(Address { address, free: [entry].into() }),
        }
    }

    /// Takes the least busy connection of the address with the fewest calls in flight.
    pub fn pop(&mut self) -> Option<Entry> {
        let (index, _) =
            self.0.iter().enumerate().min_by_key(|(_, address)| address.in_flight())?;
        let mut address = self.0.remove(index)?;
        let (index, _) = address.free.iter().enumerate().min_by_key(|(_, e)| e.in_flight())?;
        let entry = address.free.remove(index);
        if !address.free.is_empty() {
            self.0.push_back(address);
        }
        entry
    }
}
