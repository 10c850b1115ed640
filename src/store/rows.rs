//! Rows to orders, alike for both engines.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    NewOrder,
    engine::{Failure, Outcome},
};
use crate::{
    metrics::StoreErrorKind,
    order::{LATEST, Order, OrderId, Quantity},
};

/// Milliseconds since 1970.
pub(super) fn millis(time: SystemTime) -> i64 {
    let since_1970 = time.duration_since(UNIX_EPOCH).expect("no order is from before 1970");
    since_1970.as_millis().try_into().expect("milliseconds since 1970 fit an i64")
}

/// A row: what names it, and the order, if another program has not written what can be none.
pub(super) struct Stored {
    id: OrderId,
    key: Option<String>,
    order: Result<Order, String>,
}

impl Stored {
    pub(super) fn new(
        id: [u8; 16],
        product_id: &str,
        quantity: i64,
        key: Option<String>,
        placed_at: i64,
    ) -> Self {
        let id = OrderId::from_bytes(id);
        Self { id, key, order: order(id, product_id, quantity, placed_at) }
    }

    /// Of a row whose columns cannot all be read.
    pub(super) fn unreadable(id: [u8; 16], column: &str) -> Self {
        let id = OrderId::from_bytes(id);
        Self { id, key: None, order: Err(out_of_range(id, column)) }
    }

    pub(super) fn id(&self) -> OrderId {
        self.id
    }

    /// The order, for a reader of this one alone.
    pub(super) fn into_order(self) -> Result<Order, Failure> {
        self.into_result().map_err(|cause| Failure::nothing_done(StoreErrorKind::Other, cause))
    }

    /// The order, or why it cannot be one.
    pub(super) fn into_result(self) -> Result<Order, String> {
        self.order
    }
}

fn out_of_range(id: OrderId, column: &str) -> String {
    format!("the stored order {id} has a {column} out of range")
}

fn order(id: OrderId, product_id: &str, quantity: i64, placed_at: i64) -> Result<Order, String> {
    let wrong = |column| out_of_range(id, column);
    let product_id = product_id.parse().map_err(|_| wrong("product_id"))?;
    let quantity = u64::try_from(quantity).ok().and_then(|n| Quantity::try_from(n).ok());
    let quantity = quantity.ok_or_else(|| wrong("quantity"))?;
    let since_1970 = u64::try_from(placed_at).ok().filter(|millis| *millis <= LATEST);
    let placed_at = since_1970.map(|millis| UNIX_EPOCH + Duration::from_millis(millis));
    Ok(Order { id, product_id, quantity, placed_at: placed_at.ok_or_else(|| wrong("placed_at"))? })
}

/// What became of each order of a batch that was committed, from the rows with the batch's ids or
/// keys.
pub(super) fn resolve(batch: &[NewOrder], rows: Vec<Stored>) -> Vec<Outcome> {
    let mut ids = HashSet::new();
    let mut by_key = HashMap::new();
    for Stored { id, key, order } in rows {
        ids.insert(id);
        if let Some(key) = key {
            by_key.insert(key, order);
        }
    }
    let of = |NewOrder { order, key }: &NewOrder| {
        if ids.contains(&order.id) {
            return Outcome::New;
        }
        match key.as_ref().and_then(|key| by_key.get(key.as_str())) {
            Some(Ok(earlier)) => Outcome::Earlier(earlier.clone()),
            Some(Err(cause)) => Outcome::Unreadable(cause.clone()),
            None => Outcome::Missing,
        }
    };
    batch.iter().map(of).collect()
}
