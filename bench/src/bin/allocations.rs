//! Allocations of one call, for each side and protocol: `SIDE PROTOCOL COUNT` a line.

use std::alloc::System;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CALLS: usize = 1000;

fn main() {
    peers::block_on(async {
        for name in peers::SIDES {
            let mut side = peers::Side::new(name);
            for protocol in peers::PROTOCOLS {
                let counted = allocations(&mut side, protocol).await;
                println!("{name} {protocol} {}.{:03}", counted / CALLS, counted % CALLS);
            }
        }
    });
}

/// Of [`CALLS`] calls.
async fn allocations(side: &mut peers::Side, protocol: &str) -> usize {
    // The first call may fill caches.
    side.call(peers::request(protocol)).await;
    let region = Region::new(ALLOCATOR);
    for _ in 0..CALLS {
        side.call(peers::request(protocol)).await;
    }
    let change = region.change();
    change.allocations + change.reallocations
}
