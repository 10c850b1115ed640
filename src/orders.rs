//! The use cases: place, get and list orders. Here raw fields become valid values; the protocols only
//! translate, the store only keeps.
//!
//! Knows [`crate::order`], [`crate::store`] and [`crate::error`]; no tonic, no axum, no SQL.

use std::{str::FromStr, sync::Arc, time::Duration};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    error::{BadField, Error},
    order::{Expected, IdempotencyKey, Order, OrderId, OrderIds, Placed, ProductId, Quantity},
    store::{Listed, NewOrder, Store},
};

/// A field that should be a number: the number, or the text that is none.
pub type RawNumber<N> = Result<N, String>;

/// An order as a caller asks for it, nothing checked yet.
#[derive(Debug, Clone)]
pub struct PlaceOrder<'a> {
    /// See [`ProductId`].
    pub product_id: &'a str,
    /// See [`Quantity`]; absent means 1.
    pub quantity: Option<RawNumber<u64>>,
    /// See [`IdempotencyKey`]; empty means none.
    pub idempotency_key: &'a str,
}

impl PlaceOrder<'_> {
    /// The order with an id and a time, ready to be queued.
    fn check(&self, ids: &OrderIds) -> Result<NewOrder, Error> {
        let mut bad = Vec::new();
        let product_id = parse::<ProductId>("product_id", self.product_id, &mut bad);
        let quantity = match &self.quantity {
            None => Some(Quantity::ONE),
            Some(number) => check_quantity(number, &mut bad),
        };
        let key = match self.idempotency_key {
            "" => None,
            text => parse::<IdempotencyKey>("idempotency_key", text, &mut bad),
        };
        match (product_id, quantity) {
            (Some(product_id), Some(quantity)) if bad.is_empty() => {
                Ok(NewOrder { order: Order::new(product_id, quantity, ids), key })
            }
            _ => Err(Error::Invalid(bad)),
        }
    }
}

/// A page of the list as a caller asks for it, nothing checked yet.
#[derive(Debug, Clone)]
pub struct ListOrders<'a> {
    /// 0 means 50; capped at 1000; negative is invalid.
    pub page_size: RawNumber<i64>,
    /// The token of the page before; empty for the first page.
    pub page_token: &'a str,
}

/// A page of orders, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// At most as many as asked for; fewer if stored rows cannot be read.
    pub orders: Vec<Order>,
    /// The token of the next page; empty on the last.
    pub next_page_token: String,
}

/// The use cases over one store. A clone is cheap; each holds the store's queue open, and the store
/// ends once all are gone.
#[derive(Debug, Clone)]
pub struct Orders(Arc<Shared>);

/// Shared, since axum clones a handler's state for each request.
#[derive(Debug)]
struct Shared {
    store: Store,
    ids: OrderIds,
    processing_delay: Duration,
}

impl Orders {
    /// Orders kept in `store`; each takes `processing_delay` of simulated work before it is queued.
    pub fn new(store: Store, processing_delay: Duration) -> Self {
        Self(Arc::new(Shared { store, ids: OrderIds::new(), processing_delay }))
    }

    /// Places an order, or finds the one that its idempotency key has already placed.
    ///
    /// # Errors
    /// `Invalid` with every bad field, `KeyReused`, `Shed` if the queue is full, `StoreUnavailable`,
    /// `DeadlineExceeded`, `Internal`.
    pub async fn place(&self, order: PlaceOrder<'_>, deadline: Instant) -> Result<Placed, Error> {
        let mut new = order.check(&self.0.ids)?;
        if !self.0.processing_delay.is_zero() {
            let work = timeout_at(deadline, sleep(self.0.processing_delay)).await;
            work.map_err(|_| Error::DeadlineExceeded)?;
            // The id and the time are those of the order's queueing, close to its commit, so that
            // a page that was read is not joined later by an order that sorts into it.
            new.order = Order::new(new.order.product_id, new.order.quantity, &self.0.ids);
        }
        Ok(self.0.store.place(new, deadline).await?)
    }

    /// Reads one order.
    ///
    /// # Errors
    /// `NoSuchOrder`, also for a malformed id; `StoreUnavailable`, `DeadlineExceeded`, `Internal`.
    pub async fn get(&self, order_id: &str, deadline: Instant) -> Result<Order, Error> {
        let id = order_id.parse().map_err(|_| Error::NoSuchOrder)?;
        self.0.store.get(id, deadline).await?.ok_or(Error::NoSuchOrder)
    }

    /// Lists a page of orders, newest first (paging as in AIP-158).
    ///
    /// # Errors
    /// `Invalid` with every bad field, `StoreUnavailable`, `DeadlineExceeded`, `Internal`.
    pub async fn list(&self, list: ListOrders<'_>, deadline: Instant) -> Result<Page, Error> {
        let mut bad = Vec::new();
        let size = check_page_size(&list.page_size, &mut bad);
        let before = match list.page_token {
            "" => None,
            token => check_page_token(token, &mut bad),
        };
        let Some(size) = size.filter(|_| bad.is_empty()) else { return Err(Error::Invalid(bad)) };

        let Listed { orders, next } = self.0.store.list(before, size, deadline).await?;
        let token = |id: OrderId| BASE64_URL_SAFE_NO_PAD.encode(id.as_bytes());
        let next_page_token = next.map(token).unwrap_or_default();
        Ok(Page { orders, next_page_token })
    }
}

fn parse<T: FromStr<Err = Expected>>(
    field: &'static str,
    text: &str,
    bad: &mut Vec<BadField>,
) -> Option<T> {
    text.parse().map_err(|Expected(what)| bad.push(BadField::new(field, text, what))).ok()
}

fn check_quantity(number: &RawNumber<u64>, bad: &mut Vec<BadField>) -> Option<Quantity> {
    const EXPECTED: &str = "a whole number from 1 to 10000";
    match number {
        Ok(number) => Quantity::try_from(*number)
            .map_err(|Expected(what)| {
                bad.push(BadField::new("quantity", &number.to_string(), what));
            })
            .ok(),
        Err(text) => {
            bad.push(BadField::new("quantity", text, EXPECTED));
            None
        }
    }
}

fn check_page_size(number: &RawNumber<i64>, bad: &mut Vec<BadField>) -> Option<u32> {
    const DEFAULT: u32 = 50;
    const MOST: u32 = 1000;
    let given = match number {
        Ok(0) => return Some(DEFAULT),
        Ok(number @ 1..) => return Some(u32::try_from(*number).map_or(MOST, |n| n.min(MOST))),
        Ok(negative) => negative.to_string(),
        Err(text) => text.clone(),
    };
    bad.push(BadField::new("page_size", &given, "a whole number from 0 to 1000"));
    None
}

fn check_page_token(token: &str, bad: &mut Vec<BadField>) -> Option<OrderId> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).ok();
    let id = bytes.and_then(|bytes| Some(OrderId::from_bytes(bytes.try_into().ok()?)));
    if id.is_none() {
        bad.push(BadField::new("page_token", token, "the next_page_token of an earlier page"));
    }
    id
}
