//! Reads the JSON body of an order, up to a limit.

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use serde_json::Value;

use crate::{error::Error, orders::RawNumber};

/// Longest body that is looked at, in bytes.
const MAX_BODY: usize = 64 * 1024;

/// The members of an order, none checked but for their types.
pub(super) struct AskedOrder {
    pub(super) product_id: String,
    pub(super) quantity: Option<RawNumber<u64>>,
}

/// Reads an order.
///
/// # Errors
/// `WrongContentType`, `WrongContentEncoding`, `TooLarge`, `Malformed`.
pub(super) async fn read_order(headers: &HeaderMap, body: Body) -> Result<AskedOrder, Error> {
    expect_json(headers)?;
    expect_identity(headers)?;
    parse_order(&read(headers, body).await?)
}

fn expect_json(headers: &HeaderMap) -> Result<(), Error> {
    let given = headers.get(header::CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    let media_type = given.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    if media_type.eq_ignore_ascii_case(b"application/json") {
        return Ok(());
    }
    let given = String::from_utf8_lossy(&given[..given.len().min(64)]);
    Err(Error::WrongContentType(format!("content-type {given:?} given, expected application/json")))
}

/// A compressed body would be read as malformed JSON.
fn expect_identity(headers: &HeaderMap) -> Result<(), Error> {
    let encodings = headers.get_all(header::CONTENT_ENCODING).iter();
    let encodings = encodings.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let other = encodings
        .map(<[u8]>::trim_ascii)
        .find(|encoding| !encoding.is_empty() && !encoding.eq_ignore_ascii_case(b"identity"));
    let Some(other) = other else { return Ok(()) };
    let given = String::from_utf8_lossy(&other[..other.len().min(64)]);
    Err(Error::WrongContentEncoding(format!(
        "content-encoding {given:?} given, expected identity or none"
    )))
}

async fn read(headers: &HeaderMap, mut body: Body) -> Result<Bytes, Error> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    if declared.is_some_and(|length: u64| length > MAX_BODY as u64) {
        return Err(Error::TooLarge(MAX_BODY));
    }
    let mut read = BytesMut::new();
    while let Some(frame) = body.frame().await {
        // The sender is gone or broke the protocol: nobody reads the answer, but it is recorded.
        let frame =
            frame.map_err(|error| Error::Malformed(format!("the body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > MAX_BODY {
            return Err(Error::TooLarge(MAX_BODY));
        }
        read.extend_from_slice(&data);
    }
    Ok(read.freeze())
}

/// The members as they were sent; unknown ones are ignored.
#[derive(Deserialize)]
struct Members {
    product_id: Option<Value>,
    quantity: Option<Value>,
}

/// Members of a wrong type, or given twice, are malformed; members out of range are for the rules
/// to refuse.
fn parse_order(body: &[u8]) -> Result<AskedOrder, Error> {
    // An array would be taken for the members in their order.
    if body.trim_ascii_start().first().is_some_and(|first| matches!(first, b'[')) {
        return Err(Error::Malformed("the body is not a JSON object".to_owned()));
    }
    let members: Members = serde_json::from_slice(body).map_err(|error| {
        Error::Malformed(format!("the body is not a JSON object of an order: {error}"))
    })?;
    let product_id = match members.product_id {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(other) => return Err(wrong_type("product_id", &other, "a string")),
    };
    let quantity = match members.quantity {
        None | Some(Value::Null) => None,
        Some(Value::Number(number)) => Some(number.as_u64().ok_or_else(|| number.to_string())),
        Some(other) => return Err(wrong_type("quantity", &other, "a number")),
    };
    Ok(AskedOrder { product_id, quantity })
}

fn wrong_type(member: &str, value: &Value, expected: &str) -> Error {
    let given = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    Error::Malformed(format!("{member}: {given} given, expected {expected}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn malformed(body: &str) -> String {
        match parse_order(body.as_bytes()) {
            Err(Error::Malformed(detail)) => detail,
            _ => panic!("{body} was not malformed"),
        }
    }

    #[test]
    fn wrong_types_are_malformed_and_named() {
        assert!(malformed(r#"{"product_id":7}"#).contains("product_id: a number given"));
        assert!(malformed(r#"{"product_id":"a","quantity":"2"}"#).contains("quantity: a string"));
        for body in ["", "{", "[]", " [\"book\",1]", "null", "\"book\"", "{}{}"] {
            malformed(body);
        }
        assert!(malformed(r#"{"quantity":1,"quantity":2}"#).contains("duplicate field `quantity`"));
    }

    #[test]
    fn absent_and_odd_members_are_left_to_the_rules() {
        let order =
            parse_order(br#"{"quantity":1.5,"colour":"red"}"#).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((order.product_id.as_str(), order.quantity), ("", Some(Err("1.5".to_owned()))));
        let order =
            parse_order(br#"{"product_id":"a","quantity":null}"#).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((order.product_id.as_str(), order.quantity), ("a", None));
    }

    proptest! {
        #[test]
        fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse_order(&body);
        }

        #[test]
        fn deep_nesting_is_refused(depth in 1_000_usize..60_000) {
            prop_assert!(parse_order("[".repeat(depth).as_bytes()).is_err());
        }
    }
}
