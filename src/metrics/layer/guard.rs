//! The one guard of a request: made when the request arrives, moved from the response's future into
//! its body, and finished at the first sign of the end. Dropped before that, it records what the drop
//! means.

use std::{
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, Method, Request, StatusCode};

use super::{
    super::Protocol,
    table::{GrpcHandles, GrpcIndex, HttpIndex, Table},
};
use crate::wire;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// gRPC codes by number.
const CANCELLED: usize = 1;
const UNKNOWN: usize = 2;
const DEADLINE_EXCEEDED: usize = 4;
const PERMISSION_DENIED: usize = 7;
const UNIMPLEMENTED: usize = 12;
const INTERNAL: usize = 13;
const UNAVAILABLE: usize = 14;
const UNAUTHENTICATED: usize = 16;

/// nginx's code for a client that closed the request.
const CLIENT_CLOSED_REQUEST: u16 = 499;

#[derive(Debug)]
pub(super) struct Guard {
    table: Arc<Table>,
    call: Call,
    /// A response to HEAD has no body, whatever its handler made.
    is_head: bool,
    started: Instant,
    /// Whether code of the inner service is running: the guard is dropped then only if it panicked.
    polling: bool,
    finished: bool,
}

#[derive(Debug)]
enum Call {
    Grpc {
        index: GrpcIndex,
        /// What the client asked for.
        timeout: Option<Duration>,
        /// By the head.
        code: usize,
    },
    Http {
        index: HttpIndex,
        /// By the head.
        code: u16,
    },
}

impl Guard {
    /// Begins to record a request; `None` if it is not to be recorded.
    pub(super) fn start<B>(table: &Arc<Table>, request: &Request<B>) -> Option<Self> {
        let call = if let Some(timeout) = wire::call(request.headers()) {
            let index = table.find_grpc(request.uri().path())?;
            table.grpc(index).started.inc();
            table.in_flight[Protocol::Grpc as usize].inc();
            Call::Grpc { index, timeout, code: UNKNOWN }
        } else {
            let index = table.find_http(request.uri().path(), request.method());
            table.in_flight[Protocol::Http as usize].inc();
            let code = StatusCode::INTERNAL_SERVER_ERROR.as_u16();
            Call::Http { index, code }
        };
        Some(Self {
            table: table.clone(),
            call,
            is_head: request.method() == Method::HEAD,
            started: Instant::now(),
            polling: false,
            finished: false,
        })
    }

    /// Code of the inner service begins or ends to run, so that a panic in it is known from a
    /// cancellation.
    pub(super) fn set_polling(guard: &mut Option<Self>, polling: bool) {
        if let Some(guard) = guard {
            guard.polling = polling;
        }
    }

    /// The head of the response has come.
    pub(super) fn head(&mut self, status: StatusCode, headers: &HeaderMap) {
        match &mut self.call {
            Call::Grpc { code, .. } => {
                *code = grpc_status(headers).unwrap_or_else(|| grpc_code_of(status));
            }
            Call::Http { code, .. } => *code = status.as_u16(),
        }
    }

    /// The response ended, with these trailers if it had any.
    pub(super) fn ended(mut self, trailers: Option<&HeaderMap>) {
        if let (Call::Grpc { code, .. }, Some(trailers)) = (&mut self.call, trailers) {
            *code = grpc_status(trailers).unwrap_or(UNKNOWN);
        }
        self.finish();
    }

    /// The inner service or its body ended with an error, whatever the head had said.
    pub(super) fn failed(mut self) {
        match &mut self.call {
            Call::Grpc { code, .. } => *code = UNKNOWN,
            Call::Http { code, .. } => *code = StatusCode::INTERNAL_SERVER_ERROR.as_u16(),
        }
        self.finish();
    }

    /// The handles of a gRPC call.
    pub(super) fn grpc(&self) -> Option<&GrpcHandles> {
        match self.call {
            Call::Grpc { index, .. } => Some(self.table.grpc(index)),
            Call::Http { .. } => None,
        }
    }

    /// Whether the response has no body by its request or its code (RFC 9110, 6.4.1): hyper drops it
    /// unpolled.
    pub(super) fn is_bodiless(&self, status: StatusCode) -> bool {
        self.is_head || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
    }

    fn finish(&mut self) {
        self.finished = true;
        let seconds = self.started.elapsed().as_secs_f64();
        // With the collector's acquire fence: whoever sees the end sees the start.
        fence(Ordering::Release);
        match self.call {
            Call::Grpc { index, code, .. } => {
                let handles = self.table.grpc(index);
                handles.handled[code].inc();
                handles.seconds.observe(seconds);
                self.table.in_flight[Protocol::Grpc as usize].dec();
            }
            Call::Http { index, code, .. } => {
                let handles = self.table.http(index);
                handles.code(code).inc();
                handles.seconds.observe(seconds);
                self.table.in_flight[Protocol::Http as usize].dec();
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let (elapsed, panicked) = (self.started.elapsed(), self.polling);
        match &mut self.call {
            Call::Grpc { code, timeout, .. } => {
                *code = match timeout {
                    _ if panicked => INTERNAL,
                    Some(timeout) if elapsed >= *timeout => DEADLINE_EXCEEDED,
                    _ => CANCELLED,
                }
            }
            Call::Http { code, .. } if panicked => {
                *code = StatusCode::INTERNAL_SERVER_ERROR.as_u16();
            }
            Call::Http { code, .. } => *code = CLIENT_CLOSED_REQUEST,
        }
        self.finish();
    }
}

/// The status in headers or trailers; what is no known code is `Unknown`.
fn grpc_status(headers: &HeaderMap) -> Option<usize> {
    let status = wire::first(headers, &GRPC_STATUS)?.as_bytes();
    Some(match *status {
        [digit @ b'0'..=b'9'] => usize::from(digit - b'0'),
        [b'1', digit @ b'0'..=b'6'] => 10 + usize::from(digit - b'0'),
        _ => UNKNOWN,
    })
}

/// What a client makes of an answer without a status (gRPC, "HTTP to gRPC Status Code Mapping").
fn grpc_code_of(status: StatusCode) -> usize {
    match status.as_u16() {
        400 => INTERNAL,
        401 => UNAUTHENTICATED,
        403 => PERMISSION_DENIED,
        404 => UNIMPLEMENTED,
        429 | 502 | 503 | 504 => UNAVAILABLE,
        _ => UNKNOWN,
    }
}
