//! `place PROTOCOL COUNT`: that many orders, for callgrind to count their instructions; `place` alone
//! counts their allocations: `whole PROTOCOL COUNT` a line.

use std::alloc::System;

use peers::{PROTOCOLS, Whole, request};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CALLS: usize = 1000;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    peers::block_on(async {
        let mut whole = Whole::new().await;
        if let [protocol, count] = &args[..] {
            let count: usize = count.parse().expect("COUNT is a number");
            for _ in 0..count {
                whole.call(request(protocol)).await;
            }
            return;
        }
        for protocol in PROTOCOLS {
            // The first call may fill caches.
            whole.call(request(protocol)).await;
            let region = Region::new(ALLOCATOR);
            for _ in 0..CALLS {
                whole.call(request(protocol)).await;
            }
            let change = region.change();
            let counted = change.allocations + change.reallocations;
            println!("whole {protocol} {}.{:03}", counted / CALLS, counted % CALLS);
        }
    });
}
