//! Rows to orders, alike for both engines.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::NewOrder;
use crate::order::{Order, OrderId, Quantity};

/// Milliseconds since 1970.
pub(super) fn millis(time: SystemTime) -> i64 {
    let since_1970 = time.duration_since(UNIX_EPOCH).expect("no order is from before 1970");
    since_1970.as_millis().try_into().expect("milliseconds since 1970 fit an i64")
}

/// A stored order and its key.
pub(super) struct Stored {
    pub(super) order: Order,
    pub(super) key: Option<String>,
}

impl Stored {
    /// The row's columns, or what is wrong with them: only another program can have written that.
    pub(super) fn new(
        id: [u8; 16],
        product_id: &str,
        quantity: i64,
        key: Option<String>,
        placed_at: i64,
    ) -> Result<Self, String> {
        let id = OrderId::from_bytes(id);
        let wrong = |column: &str| format!("the stored order {id} has a {column} out of range");
        let product_id = product_id.parse().map_err(|_| wrong("product_id"))?;
        let quantity = u64::try_from(quantity).ok().and_then(|n| Quantity::try_from(n).ok());
        let quantity = quantity.ok_or_else(|| wrong("quantity"))?;
        let millis = u64::try_from(placed_at).map_err(|_| wrong("placed_at"))?;
        let placed_at = UNIX_EPOCH + Duration::from_millis(millis);
        Ok(Self { order: Order { id, product_id, quantity, placed_at }, key })
    }
}

/// For each order of a batch what [`Engine::commit`](super::engine::Engine::commit) tells, from the
/// rows with the batch's ids or keys; `Err` if neither is there for one.
pub(super) fn resolve(
    batch: &[NewOrder],
    rows: Vec<Stored>,
) -> Result<Vec<Option<Order>>, &'static str> {
    let mut by_key = HashMap::new();
    let mut ids = std::collections::HashSet::new();
    for Stored { order, key } in rows {
        ids.insert(order.id);
        if let Some(key) = key {
            by_key.insert(key, order);
        }
    }
    let of = |new: &NewOrder| {
        if ids.contains(&new.order.id) {
            return Ok(None);
        }
        let key = new.key.as_ref().ok_or("an order without a key was not stored")?;
        // Its key was pruned between the two statements.
        let earlier = by_key.get(key.as_str()).ok_or("a key that was taken is no longer there")?;
        Ok(Some(earlier.clone()))
    };
    batch.iter().map(of).collect()
}
