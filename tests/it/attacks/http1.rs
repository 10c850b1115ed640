//! The same over HTTP/1.

use std::{io, time::Duration};

use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, split},
    time::sleep,
};

use super::HostilePeer;
use crate::peers::GET;

type Attacking = BoxFuture<'static, ()>;

const CHUNKED: &str = "POST /product HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                       transfer-encoding: chunked\r\n\r\n";

/// Sends `opening`, then `again` with pauses, to the end of the connection; what comes back is
/// read, or not.
fn send(
    peer: HostilePeer,
    opening: impl Into<Vec<u8>>,
    again: impl Into<Vec<u8>>,
    pause: Duration,
    reads: bool,
) -> Attacking {
    let (opening, again) = (opening.into(), again.into());
    Box::pin(async move {
        // However it ends, there is another.
        let _ = try_send(&peer, &opening, &again, pause, reads).await;
    })
}

async fn try_send(
    peer: &HostilePeer,
    opening: &[u8],
    again: &[u8],
    pause: Duration,
    reads: bool,
) -> io::Result<()> {
    let (mut reader, mut writer) = split(peer.connect().await?);
    let sending = async {
        writer.write_all(opening).await?;
        loop {
            sleep(pause).await;
            writer.write_all(again).await?;
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

pub fn slow_heads(peer: HostilePeer) -> Attacking {
    let begin = "GET /product HTTP/1.1\r\nhost: x\r\nx: ";
    send(peer, begin, "x", Duration::from_millis(100), true)
}

pub fn slow_bodies(peer: HostilePeer) -> Attacking {
    let begin = "POST /product HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                 content-length: 65000\r\n\r\n";
    send(peer, begin, " ", Duration::from_millis(100), true)
}

pub fn tiny_chunks(peer: HostilePeer) -> Attacking {
    send(peer, CHUNKED, "1\r\n \r\n".repeat(1000), Duration::ZERO, true)
}

pub fn chunk_extensions(peer: HostilePeer) -> Attacking {
    let chunk = format!("1;{}\r\n \r\n", "x".repeat(1000));
    send(peer, CHUNKED, chunk.repeat(10), Duration::ZERO, true)
}

pub fn unread_pipeline(peer: HostilePeer) -> Attacking {
    send(peer, "", GET.repeat(100), Duration::ZERO, false)
}

pub fn unread_scrapes(peer: HostilePeer) -> Attacking {
    let scrape = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n";
    send(peer, "", scrape.repeat(100), Duration::ZERO, false)
}

/// Used once, and then silent.
pub fn idle(peer: HostilePeer) -> Attacking {
    Box::pin(async move {
        let Ok(mut stream) = peer.connect().await else { return };
        if stream.write_all(GET).await.is_ok() {
            // To the end of the connection.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
    })
}
