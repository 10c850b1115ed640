//! One call to the service, in whichever protocol the connection speaks.

use std::{fmt, time::Duration};

use http::HeaderValue;
use order_service::order::OrderId;
use tokio::time::timeout;

use crate::{args::Protocol, connection::Sender, grpc, pool::Lease, rest, target::Target};

/// The header by which a server process names itself.
pub const X_SERVED_BY: http::HeaderName = http::HeaderName::from_static("x-served-by");

/// An order to place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOrder {
    pub product: String,
    pub quantity: u32,
    pub key: String,
}

/// An order as the service tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenOrder {
    pub id: String,
    pub product: String,
    pub quantity: u32,
}

/// A page of the list, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub orders: Vec<SeenOrder>,
    /// Empty on the last page.
    pub next: String,
}

/// What was answered, and by which process.
#[derive(Debug)]
pub struct Answer<T> {
    pub value: T,
    pub served_by: Option<HeaderValue>,
}

/// How a call ended, for the report: the protocol's own code, or one of ours in lower case where the
/// protocol has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Code {
    /// By its number.
    Grpc(u8),
    /// The status.
    Http(u16),
    /// No connection could be had, or the one at hand was lost.
    Unreachable,
    /// No answer within `--timeout`.
    Timeout,
    /// An answer that is none.
    Malformed,
}

/// The names of the codes of gRPC, by their numbers.
const GRPC: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

impl Code {
    pub const DEADLINE_EXCEEDED: Self = Self::Grpc(4);
    pub const NOT_FOUND: Self = Self::Grpc(5);
    pub const INTERNAL: Self = Self::Grpc(13);
    pub const UNAVAILABLE: Self = Self::Grpc(14);

    pub fn unreachable(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Grpc => Self::UNAVAILABLE,
            Protocol::Http => Self::Unreachable,
        }
    }

    fn timeout(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Grpc => Self::DEADLINE_EXCEEDED,
            Protocol::Http => Self::Timeout,
        }
    }

    /// Whether the service says that there is no such order.
    pub fn is_not_found(self) -> bool {
        matches!(self, Self::NOT_FOUND | Self::Http(404))
    }

    /// Whether the same call may fare better later.
    pub fn may_pass(self) -> bool {
        match self {
            // CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, ABORTED, INTERNAL, UNAVAILABLE.
            Self::Grpc(code) => matches!(code, 1 | 2 | 4 | 8 | 10 | 13 | 14),
            Self::Http(status) => matches!(status, 408 | 429 | 500..),
            Self::Unreachable | Self::Timeout | Self::Malformed => true,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grpc(code) => match GRPC.get(usize::from(*code)) {
                Some(name) => f.write_str(name),
                None => write!(f, "CODE_{code}"),
            },
            Self::Http(status) => status.fmt(f),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Timeout => f.write_str("timeout"),
            Self::Malformed => f.write_str("malformed"),
        }
    }
}

/// Why a call gave no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The connection takes no more calls; this one did not begin.
    NotBegun,
    /// The connection went before an answer came: whether the service acted is unknown, or, after a
    /// GOAWAY, known not to be so.
    Lost(String),
    /// The service, or our time limit, said no.
    Refused(Code, String),
}

/// What is asked of the service, over either protocol.
#[derive(Debug)]
pub struct Api {
    grpc: grpc::Api,
    rest: rest::Api,
    protocol: Protocol,
    /// Time limit of a call.
    timeout: Duration,
}

impl Api {
    pub fn new(target: &Target, timeout: Duration) -> Self {
        Self {
            grpc: grpc::Api::new(&target.base, timeout),
            rest: rest::Api::new(&target.base),
            protocol: target.protocol,
            timeout,
        }
    }

    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Places an order; its id.
    pub async fn place(
        &self,
        lease: &mut Lease,
        order: &NewOrder,
    ) -> Result<Answer<OrderId>, Failure> {
        self.limited(lease, async |sender| match sender {
            Sender::Http2(sender) => self.grpc.place(sender, order).await,
            Sender::Http1(sender) => self.rest.place(sender, order).await,
        })
        .await
    }

    /// Reads an order.
    pub async fn get(&self, lease: &mut Lease, id: OrderId) -> Result<Answer<SeenOrder>, Failure> {
        self.limited(lease, async |sender| match sender {
            Sender::Http2(sender) => self.grpc.get(sender, id).await,
            Sender::Http1(sender) => self.rest.get(sender, id).await,
        })
        .await
    }

    /// Reads a page of at most this many orders.
    pub async fn list(
        &self,
        lease: &mut Lease,
        page_size: u16,
        token: &str,
    ) -> Result<Answer<Page>, Failure> {
        self.limited(lease, async |sender| match sender {
            Sender::Http2(sender) => self.grpc.list(sender, page_size, token).await,
            Sender::Http1(sender) => self.rest.list(sender, page_size, token).await,
        })
        .await
    }

    async fn limited<T>(
        &self,
        lease: &mut Lease,
        call: impl AsyncFnOnce(&mut Sender) -> Result<Answer<T>, Failure>,
    ) -> Result<Answer<T>, Failure> {
        let answers = lease.connection().answers();
        match timeout(self.timeout, call(lease.sender())).await {
            Ok(Err(Failure::NotBegun)) => {
                lease.connection().leave();
                Err(Failure::NotBegun)
            }
            Ok(Err(Failure::Lost(cause))) => {
                lease.connection().leave();
                Err(Failure::Lost(cause))
            }
            Ok(answer) => {
                lease.connection().answered();
                answer
            }
            Err(_) => {
                // One call may be slow; a connection that answered none in this time is dead. One of
                // HTTP/1 waits for this answer before any other.
                let alone = matches!(lease.sender(), Sender::Http1(_));
                if alone || lease.connection().answers() == answers {
                    lease.connection().leave();
                }
                let cause =
                    format!("no answer within {}", humantime::format_duration(self.timeout));
                Err(Failure::Refused(Code::timeout(self.protocol), cause))
            }
        }
    }
}
