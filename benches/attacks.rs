//! One hostile peer against a server: what each attack takes from its memory and its polite
//! callers. 20 connections and 10 MB/s; 1 000 polite calls, ten a second. It takes 100 s for each
//! attack.
//!
//! `cargo bench --bench attacks [-- NAME…]`, with parts of the attacks' names. `CALLS` is another
//! number of polite calls, `EVERY` another time between them in milliseconds, `SERVICE` another
//! build of the server.

#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark that cannot go on has failed")]

use std::{env, time::Duration};

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../tests/it"]
mod it {
    pub mod attacks;
    pub mod peers;
    pub mod support;
}

use it::{
    attacks::{ALL, MAX_BYTES, Polite, RATE},
    peers,
    support::{self, Process, run_as},
};

fn main() {
    tokio::runtime::Runtime::new().unwrap().block_on(attack());
}

async fn attack() {
    let calls = env::var("CALLS").map_or(1000, |calls| calls.parse().unwrap());
    let every = env::var("EVERY").map_or(100, |every| every.parse().unwrap());
    let polite = Polite { calls, every: Duration::from_millis(every) };
    let service = env::var("SERVICE").ok();
    let names: Vec<_> = env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    println!("{calls} polite calls; the bar is a peak of {} MiB and none lost\n", MAX_BYTES >> 20);
    println!("| attack | peak MiB | ok | lost | slowest ms | sent MB | connections |");
    println!("|---|---|---|---|---|---|---|");
    let mut missed = false;
    for (name, attack) in ALL {
        if !names.is_empty() && !names.iter().any(|part| name.contains(part)) {
            continue;
        }
        let server = Process::start_command("sqlite::memory:", &[], |command| {
            if let Some(service) = &service {
                run_as(command, &[service]);
            }
        })
        .await;
        let report = attack.run(&server, polite, RATE).await;
        missed |= !report.outcome.lost.is_empty() || report.peak_bytes >= MAX_BYTES;
        println!("| {} {report}", name.replace('_', " "));
        for why in report.outcome.lost.iter().take(2) {
            eprintln!("{name}: {why}");
        }
        server.kill_9().await;
    }
    if missed {
        eprintln!("the bar is missed");
        std::process::exit(1);
    }
}
