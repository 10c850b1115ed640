//! `calls SIDE PROTOCOL COUNT`: that many calls, for callgrind to count their instructions.

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, side, protocol, count] = &args[..] else { panic!("calls SIDE PROTOCOL COUNT") };
    let count: usize = count.parse().expect("COUNT is a number");
    peers::block_on(async {
        let mut side = peers::Side::new(side);
        for _ in 0..count {
            side.call(peers::request(protocol)).await;
        }
    });
}
