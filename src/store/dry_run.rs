//! The order with which the engines try, at the start, whether orders can be placed.

use super::NewOrder;
use crate::order::{Order, OrderIds, Quantity};

/// An order that is in no use: its transaction is rolled back.
pub(super) fn order() -> NewOrder {
    let product_id = "dry-run".parse().expect("it is of the alphabet");
    NewOrder { order: Order::new(product_id, Quantity::ONE, &OrderIds::new()), key: None }
}
