//! Reads hyper's and h2's errors: who ended a connection or a request's body, and why.

use std::{error::Error, io};

use h2::Reason;

use crate::metrics::AbortReason;

/// Returns the reason if the HTTP layer closed the connection, `None` if the peer or the network
/// did.
pub(super) fn abort_reason(error: &(dyn Error + 'static)) -> Option<AbortReason> {
    if let Some(h2) = find::<h2::Error>(error) {
        return if h2.is_remote() || h2.is_io() { None } else { of_http2(h2.reason()?) };
    }
    let hyper = find::<hyper::Error>(error)?;
    if hyper.is_parse_too_large() {
        Some(AbortReason::HeadTooLarge)
    } else {
        hyper.is_parse().then_some(AbortReason::BadRequest)
    }
}

fn of_http2(reason: Reason) -> Option<AbortReason> {
    Some(match reason {
        Reason::NO_ERROR => return None,
        Reason::ENHANCE_YOUR_CALM => AbortReason::EnhanceYourCalm,
        Reason::COMPRESSION_ERROR => AbortReason::CompressionError,
        Reason::FLOW_CONTROL_ERROR => AbortReason::FlowControlError,
        Reason::FRAME_SIZE_ERROR => AbortReason::FrameSizeError,
        Reason::PROTOCOL_ERROR => AbortReason::ProtocolError,
        _ => AbortReason::Other,
    })
}

/// Whether a request's body ended with this error because its caller reset the stream or closed the
/// connection, and not because its bytes are malformed.
pub fn caller_is_gone(error: &(dyn Error + 'static)) -> bool {
    if let Some(h2) = find::<h2::Error>(error) {
        // A connection that ends takes its streams with it.
        return h2.is_remote() || h2.is_io() || h2.is_go_away();
    }
    if let Some(io) = find::<io::Error>(error) {
        // hyper's chunked decoder reports malformed chunks so.
        return !matches!(io.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData);
    }
    find::<hyper::Error>(error)
        .is_some_and(|error| error.is_incomplete_message() || error.is_canceled())
}

fn find<'e, E: Error + 'static>(error: &'e (dyn Error + 'static)) -> Option<&'e E> {
    std::iter::successors(Some(error), |error| (*error).source()).find_map(|e| e.downcast_ref())
}
