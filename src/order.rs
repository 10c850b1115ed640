//! What an order is: its types and the rules they keep. A value of one of these types is valid; text
//! from outside becomes one only by [`str::parse`], whose error says what was expected.
//!
//! Depends on nothing of ours.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use uuid::Uuid;

mod ids;

pub use self::ids::OrderIds;

/// The last time that an order may have, the end of the year 9999, in milliseconds since 1970:
/// neither RFC 3339 nor protobuf's `Timestamp` has a later one.
pub(crate) const LATEST: u64 = 253_402_300_799_999;

/// Why a text or number is not the value it should be; the words complete "expected …".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct Expected(pub &'static str);

/// The id of an order: a UUIDv7 (RFC 9562), so ids sort by the millisecond in which they were minted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderId(Uuid);

impl OrderId {
    /// The id of these 16 bytes, as a store keeps it.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// The 16 bytes of the id, whose order is the order of the ids.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// When the id was minted, to the millisecond.
    pub fn minted_at(&self) -> SystemTime {
        let millis = self.0.as_u128() >> 80;
        SystemTime::UNIX_EPOCH
            + Duration::from_millis(u64::try_from(millis).expect("48 bits are left"))
    }
}

impl FromStr for OrderId {
    type Err = Expected;

    /// Only the canonical text is an id: 36 characters, lower case, hyphenated.
    fn from_str(text: &str) -> Result<Self, Expected> {
        let expected = Expected("a UUID in canonical text");
        let uuid = Uuid::try_parse(text).map_err(|_| expected)?;
        let id = Self(uuid);
        if id.to_string() == text { Ok(id) } else { Err(expected) }
    }
}

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl fmt::Debug for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is ordered: 1 to 64 characters of `A–Z a–z 0–9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProductId(String);

impl ProductId {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text.
    pub fn into_string(self) -> String {
        self.0
    }
}

impl FromStr for ProductId {
    type Err = Expected;

    fn from_str(text: &str) -> Result<Self, Expected> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Expected("1 to 64 characters of A-Z a-z 0-9 . _ -"))
        }
    }
}

/// How many are ordered: 1 to 10 000.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantity(u16);

impl Quantity {
    /// What an absent quantity means.
    pub const ONE: Self = Self(1);

    /// The number, 1 to 10 000.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u64> for Quantity {
    type Error = Expected;

    fn try_from(number: u64) -> Result<Self, Expected> {
        match u16::try_from(number) {
            Ok(quantity @ 1..=10_000) => Ok(Self(quantity)),
            _ => Err(Expected("a whole number from 1 to 10000")),
        }
    }
}

/// A caller's name for one placing of an order, so that it can be retried: 1 to 255 visible ASCII
/// characters (0x21–0x7E).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IdempotencyKey {
    type Err = Expected;

    fn from_str(text: &str) -> Result<Self, Expected> {
        if (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Expected("1 to 255 visible ASCII characters"))
        }
    }
}

/// An order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its id.
    pub id: OrderId,
    /// What is ordered.
    pub product_id: ProductId,
    /// How many.
    pub quantity: Quantity,
    /// When the service accepted it, to the millisecond; from 1970 to 9999.
    pub placed_at: SystemTime,
}

impl Order {
    /// An order of this moment with an id of its own; it is placed once a store has committed it.
    pub fn new(product_id: ProductId, quantity: Quantity, ids: &OrderIds) -> Self {
        let (id, placed_at) = ids.next();
        Self { id, product_id, quantity, placed_at }
    }
}

/// What placing an order came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The stored order: the caller's, or the one that its key named already.
    pub order: Order,
    /// Whether an earlier call with the same key had placed it.
    pub replayed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_id_is_read_back_only_from_its_canonical_text() {
        let (id, _) = OrderIds::new().next();
        let text = id.to_string();
        assert_eq!(text.parse(), Ok(id));
        assert_eq!(OrderId::from_bytes(*id.as_bytes()), id);
        for other in
            [text.to_uppercase(), text.replace('-', ""), format!("{{{text}}}"), String::new()]
        {
            assert!(other.parse::<OrderId>().is_err(), "{other}");
        }
    }

    #[test]
    fn orders_carry_the_time_at_which_they_were_made() {
        let before = SystemTime::now() - Duration::from_millis(1);
        let ids = OrderIds::new();
        let orders: Vec<_> =
            (0..1000).map(|_| Order::new("book".parse().unwrap(), Quantity::ONE, &ids)).collect();
        assert!(orders.is_sorted_by(|a, b| a.id < b.id));
        let times = before..=SystemTime::now();
        assert!(orders.iter().all(|order| times.contains(&order.placed_at)));
    }

    #[test]
    fn product_ids_keep_their_alphabet_and_length() {
        for good in ["a", "Book-1.2_x", &"x".repeat(64)] {
            assert_eq!(good.parse::<ProductId>().unwrap().as_str(), good);
        }
        for bad in ["", &"x".repeat(65), "a b", "a/b", "é", "a\0"] {
            assert!(bad.parse::<ProductId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn quantities_are_1_to_10_000() {
        for good in [1, 2, 10_000] {
            assert_eq!(u64::from(Quantity::try_from(good).unwrap().get()), good);
        }
        for bad in [0, 10_001, 65_536, 65_537, u64::MAX] {
            assert!(Quantity::try_from(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn idempotency_keys_are_visible_ascii() {
        for good in ["k", "~!", &"k".repeat(255)] {
            assert_eq!(good.parse::<IdempotencyKey>().unwrap().as_str(), good);
        }
        for bad in ["", &"k".repeat(256), "a b", "a\t", "é", "\u{7f}"] {
            assert!(bad.parse::<IdempotencyKey>().is_err(), "{bad:?}");
        }
    }
}
