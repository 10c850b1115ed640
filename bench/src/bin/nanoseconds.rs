//! Nanoseconds of one call, for each side and protocol, the sides by turns in one run: `SIDE PROTOCOL
//! MEDIAN` a line.

use std::time::Instant;

const TURNS: usize = 41;
const CALLS: u32 = 5000;

fn main() {
    peers::block_on(async {
        let mut sides = peers::SIDES.map(|name| (name, peers::Side::new(name)));
        for protocol in peers::PROTOCOLS {
            let mut times = [const { Vec::new() }; peers::SIDES.len()];
            for _ in 0..TURNS {
                for (times, (_, side)) in times.iter_mut().zip(&mut sides) {
                    times.push(nanoseconds(side, protocol).await);
                }
            }
            for (times, (name, _)) in times.iter_mut().zip(&sides) {
                times.sort_unstable();
                println!("{name} {protocol} {}", times[TURNS / 2]);
            }
        }
    });
}

/// Of one call, the mean of [`CALLS`].
async fn nanoseconds(side: &mut peers::Side, protocol: &str) -> u128 {
    let begun = Instant::now();
    for _ in 0..CALLS {
        side.call(peers::request(protocol)).await;
    }
    begun.elapsed().as_nanos() / u128::from(CALLS)
}
