//! What one hostile peer may do with 20 connections and 10 MB/s: little memory, and no polite
//! caller loses a call. The attacks are those of RFC 9113, section 10.5, and of this service's own
//! methods.
//!
//! The tests are short, and send what needs many bytes at ten times the rate; `cargo bench --bench
//! attacks` holds each attack to the whole bar and prints a table.

use std::{fmt, thread, time::Duration};

use futures_util::future::{BoxFuture, join_all};
use tokio::{runtime::Builder, time::sleep};
use tokio_util::sync::CancellationToken;

pub use self::{
    hostile_peer::HostilePeer,
    polite::{Call, Polite},
};
use self::{
    hostile_peer::Wire,
    http2_calls::{Body, Calls},
    polite::Outcome,
};
use crate::support::Process;

mod floods;
mod held_streams;
mod hostile_peer;
mod http1;
mod http2_calls;
mod polite;

/// What the process may hold in memory at its peak.
pub const MAX_BYTES: u64 = 192 << 20;

/// Bytes per second of one peer, over all of its connections.
pub const RATE: u64 = 10_000_000;

/// One way to misbehave.
#[derive(Debug, Clone, Copy)]
pub struct Attack {
    /// How many connections it has at a time.
    connections: usize,
    /// How many times [`RATE`] a short run sends, for an attack that needs its bytes to pile up;
    /// such a one also has a start of the polite callers.
    haste: u64,
    calls: &'static [Call],
    /// Misbehaves on one connection to its end.
    on_connection: fn(HostilePeer) -> BoxFuture<'static, ()>,
}

impl Attack {
    const fn new(on_connection: fn(HostilePeer) -> BoxFuture<'static, ()>) -> Self {
        Self { connections: 20, haste: 1, calls: &[Call::Place, Call::GetProduct], on_connection }
    }

    const fn in_haste(self) -> Self {
        Self { haste: 10, ..self }
    }

    const fn on_connections(self, connections: usize) -> Self {
        Self { connections, ..self }
    }

    /// An attack on the admin listener, which must go on telling that the process lives.
    const fn on_admin(self) -> Self {
        Self { calls: &[Call::Place, Call::GetProduct, Call::Livez], ..self }
    }

    /// Attacks a server while polite callers call it.
    pub async fn run(self, server: &Process, polite: Polite, rate: u64) -> Report {
        let peer = HostilePeer::new(server.api, server.admin, rate);
        let over = CancellationToken::new();
        // On a thread of its own, so that it takes no polite caller's time but the server's.
        let attacking = thread::spawn({
            let (peer, over) = (peer.clone(), over.clone());
            move || {
                let runtime = Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(over.run_until_cancelled(self.go_on(&peer)));
            }
        });
        if self.haste > 1 {
            peer.has_sent(2 * MAX_BYTES).await;
        }
        let outcome = polite.call(server.api, server.admin, self.calls).await;
        let peak_bytes = peak_bytes(server.id());
        over.cancel();
        attacking.join().unwrap();
        Report { outcome, peak_bytes, wire: peer.wire() }
    }

    /// Attacks without an end.
    async fn go_on(self, peer: &HostilePeer) {
        let connections = (0..self.connections).map(|_| async {
            loop {
                (self.on_connection)(peer.clone()).await;
                // A port that was just used is not free at once.
                sleep(Duration::from_millis(100)).await;
            }
        });
        join_all(connections).await;
    }

    async fn is_withstood(self) {
        let server = Process::start("sqlite::memory:", &[]).await;
        let polite = Polite { calls: 40, every: Duration::from_millis(50) };
        let report = self.run(&server, polite, RATE * self.haste).await;
        println!("{report}");
        assert!(report.outcome.lost.is_empty(), "{report:#?}");
        assert!(report.peak_bytes < MAX_BYTES, "{report:#?}");
    }
}

/// What became of an attack.
#[derive(Debug)]
pub struct Report {
    /// Of the polite calls.
    pub outcome: Outcome,
    /// The most that was resident at a time since the start of the process.
    pub peak_bytes: u64,
    /// What the hostile peer did.
    pub wire: Wire,
}

impl fmt::Display for Report {
    /// The columns of a table: peak, polite calls that succeeded, were lost, and took longest; what
    /// the hostile peer sent, over how many connections.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { outcome, peak_bytes, wire } = self;
        let (mib, ok, lost) = (peak_bytes >> 20, outcome.ok, outcome.lost.len());
        let slowest = outcome.slowest.as_millis();
        let sent = wire.sent as f64 / 1e6;
        let connections = wire.connections;
        write!(f, "| {mib} | {ok} | {lost} | {slowest} | {sent:.1} | {connections} |")
    }
}

/// The peak of what `process_resident_memory_bytes` reads: samples would miss what lies between
/// them.
fn peak_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// The table of all attacks, and a test of each.
macro_rules! attacks {
    ($($name:ident: $attack:expr,)*) => {
        /// All attacks and their names.
        #[allow(dead_code, reason = "for the benchmark")]
        pub const ALL: &[(&str, Attack)] = &[$((stringify!($name), $attack)),*];

        $(
            #[tokio::test]
            async fn $name() {
                ($attack).is_withstood().await;
            }
        )*
    };
}

const CHECK: &str = "/grpc.health.v1.Health/Check";
const WATCH: &str = "/grpc.health.v1.Health/Watch";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const PLACE: &str = "/orders.v1.OrderService/Place";
const LIST: &str = "/orders.v1.OrderService/List";

/// Bytes of the longest message that tonic takes by default, and that `Place` takes.
const LONGEST: usize = 4 << 20;
const LONGEST_PLACE: usize = 64 << 10;

attacks! {
    health_checks_of_4_mib_that_lack_their_last_bytes: Attack::new(|peer| {
        Calls::grpc(CHECK).body(Body::lacking(LONGEST, 10)).run(peer)
    }).in_haste(),
    health_checks_of_4_kib_that_lack_their_last_byte: Attack::new(|peer| {
        Calls::grpc(CHECK).body(Body::lacking(4096, 1)).run(peer)
    }).in_haste(),
    health_watches_with_long_queries: Attack::new(held_streams::watches_with_long_queries).in_haste(),
    health_watches_with_long_header_fields: Attack::new(held_streams::watches_with_long_fields)
        .in_haste(),
    reflection_of_4_mib_hosts_that_is_not_read: Attack::new(|peer| {
        let host = http2_calls::reflection_of_host(LONGEST - 100);
        Calls::grpc(REFLECTION).body(Body::repeated(&host)).at_a_time(64).unread().run(peer)
    }).in_haste(),
    reflection_of_small_requests_that_is_not_read: Attack::new(|peer| {
        let request = http2_calls::reflection_of_symbol("orders.v1.OrderService");
        Calls::grpc(REFLECTION).body(Body::repeated(&request)).unread().run(peer)
    }),
    reflection_that_is_opened_and_left: Attack::new(|peer| {
        Calls::grpc(REFLECTION).body(Body::NONE).run(peer)
    }),
    places_without_a_body: Attack::new(|peer| Calls::grpc(PLACE).body(Body::NONE).run(peer)),
    places_of_five_connections_without_a_body: Attack::new(|peer| {
        Calls::grpc(PLACE).body(Body::NONE).run(peer)
    }).on_connections(5),
    places_whose_bodies_trickle: Attack::new(|peer| {
        Calls::grpc(PLACE).body(Body::trickling(LONGEST_PLACE - 1)).run(peer)
    }),
    places_of_64_kib_that_lack_their_last_byte: Attack::new(|peer| {
        Calls::grpc(PLACE).body(Body::lacking(LONGEST_PLACE - 1, 1)).run(peer)
    }).in_haste(),
    json_of_64_kib_that_lacks_its_last_byte: Attack::new(|peer| {
        Calls::http("POST", "/product").body(Body::lacking_json(LONGEST_PLACE, 1)).run(peer)
    }).in_haste(),
    places_with_440_header_fields_without_a_body: Attack::new(held_streams::places_with_many_fields)
        .in_haste(),
    places_without_a_body_between_large_unknown_frames: Attack::new(held_streams::pinning_places)
        .in_haste(),
    places_whose_responses_are_not_read: Attack::new(|peer| {
        Calls::grpc(PLACE).body(Body::message(b"\n\x04book")).unread().run(peer)
    }),
    gets_whose_responses_are_not_read: Attack::new(|peer| {
        Calls::http("GET", "/product").unread().run(peer)
    }),
    grpc_lists_of_1000_orders_that_are_not_read: Attack::new(|peer| {
        // The page size, a thousand.
        Calls::grpc(LIST).body(Body::message(b"\x08\xe8\x07")).unread().after_orders(60).run(peer)
    }),
    json_lists_of_1000_orders_that_are_not_read: Attack::new(|peer| {
        Calls::http("GET", "/orders?page_size=1000").unread().after_orders(60).run(peer)
    }),
    lists_that_are_read_in_small_pieces: Attack::new(|peer| {
        Calls::http("GET", "/orders?page_size=1000").window(300).after_orders(60).run(peer)
    }),

    rapid_resets: Attack::new(floods::rapid_resets),
    resets_that_the_server_is_made_to_send: Attack::new(floods::induced_resets),
    continuations_without_end: Attack::new(floods::continuations),
    settings_without_end: Attack::new(floods::settings),
    settings_that_move_the_windows_of_256_streams: Attack::new(floods::moving_windows),
    pings_without_end: Attack::new(floods::pings),
    priorities_without_end: Attack::new(floods::priorities),
    window_updates_without_end: Attack::new(floods::window_updates),
    unknown_frames_without_end: Attack::new(floods::unknown_frames),
    empty_data_frames: Attack::new(floods::empty_data),
    data_frames_of_one_byte: Attack::new(floods::one_byte_data),
    data_frames_of_one_byte_between_large_unknown_frames: Attack::new(floods::pinning_data)
        .in_haste(),
    padded_data_frames: Attack::new(floods::padded_data),
    header_blocks_over_the_limit: Attack::new(floods::oversized_heads),
    header_blocks_that_unpack_to_megabytes: Attack::new(floods::header_bombs),

    http_1_heads_byte_by_byte: Attack::new(http1::slow_heads),
    http_1_bodies_that_trickle: Attack::new(http1::slow_bodies),
    http_1_bodies_in_tiny_chunks: Attack::new(http1::tiny_chunks),
    http_1_chunk_extensions: Attack::new(http1::chunk_extensions),
    http_1_pipelines_that_are_not_read: Attack::new(http1::unread_pipeline),
    http_1_connections_300_of_them_idle: Attack::new(http1::idle).on_connections(300),

    scrapes_without_a_pause: Attack::new(|peer| {
        Calls::http("GET", "/metrics").at_a_time(100).run(peer.against_admin())
    }).on_connections(10).on_admin(),
    compressed_scrapes_without_a_pause: Attack::new(|peer| {
        Calls::http("GET", "/metrics").gzip().at_a_time(100).run(peer.against_admin())
    }).on_connections(10).on_admin(),
    scrapes_that_are_not_read: Attack::new(|peer| {
        Calls::http("GET", "/metrics").unread().run(peer.against_admin())
    }).on_admin(),
    http_1_scrapes_that_are_not_read: Attack::new(|peer| {
        http1::unread_scrapes(peer.against_admin())
    }).on_admin(),
}
