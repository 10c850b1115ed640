//! Where orders are kept: the queue, the group commit, and the two engines. The only SQL of the
//! service is in this module's children.

use crate::order::{IdempotencyKey, Order, OrderId, Placed};

/// An order on its way to the store.
#[derive(Debug, Clone)]
pub struct NewOrder {
    /// The order, with the id that it will have if it is new.
    pub order: Order,
    /// The caller's key, if it wants to be able to retry.
    pub key: Option<IdempotencyKey>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The queue is full: nothing was done.
    #[error("the store's queue is full")]
    QueueFull,
    /// The idempotency key names an order with another product or quantity.
    #[error("the idempotency key was used for another order")]
    KeyReused,
    /// The store cannot be reached or is full; a placed order's outcome may be unknown.
    #[error("the store is unavailable")]
    Unavailable,
    /// The caller's deadline passed first; nothing was done.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// A failure that no retry mends. It was logged with its cause; clients see no detail.
    #[error("the store failed: {0}")]
    Internal(String),
}
