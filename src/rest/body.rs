//! Reads the JSON body of an order: bounded, and read to its end even where the answer is an error,
//! since a server that answers early and closes resets the connection before its answer arrives.

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use serde_json::Value;

use crate::{error::Error, orders::RawNumber};

/// Longest body that is looked at, in bytes.
const MAX_BODY: usize = 64 * 1024;

/// How much of a body that is too long is read on and thrown away, in bytes; the request's deadline
/// bounds the time. Beyond it the connection is closed under the sender.
const MAX_DISCARDED: usize = 8 * 1024 * 1024;

/// The members of an order, none checked but for their types.
pub(super) struct AskedOrder {
    pub(super) product_id: String,
    pub(super) quantity: Option<RawNumber<u64>>,
}

/// Reads an order.
///
/// # Errors
/// `WrongContentType`, `TooLarge`, `Malformed`.
pub(super) async fn read_order(headers: &HeaderMap, body: Body) -> Result<AskedOrder, Error> {
    if let Err(error) = expect_json(headers) {
        discard(headers, body, 0).await;
        return Err(error);
    }
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

async fn read(headers: &HeaderMap, mut body: Body) -> Result<Bytes, Error> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    if declared.is_some_and(|length: u64| length > MAX_BODY as u64) {
        discard(headers, body, 0).await;
        return Err(Error::TooLarge(MAX_BODY));
    }
    let mut read = BytesMut::new();
    while let Some(frame) = body.frame().await {
        // The sender is gone or broke the protocol: nobody reads the answer, but it is recorded.
        let frame =
            frame.map_err(|error| Error::Malformed(format!("the body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > MAX_BODY {
            discard(headers, body, read.len() + data.len()).await;
            return Err(Error::TooLarge(MAX_BODY));
        }
        read.extend_from_slice(&data);
    }
    Ok(read.freeze())
}

/// Reads the rest of a body, of which `read` bytes came already, so that the answer is delivered. A
/// sender that waits to be asked for the body (`Expect: 100-continue`) gets its answer at once.
async fn discard(headers: &HeaderMap, mut body: Body, mut read: usize) {
    if read == 0 && headers.contains_key(header::EXPECT) {
        return;
    }
    while read < MAX_DISCARDED {
        match body.frame().await {
            Some(Ok(frame)) => read += frame.data_ref().map_or(0, Bytes::len),
            Some(Err(_)) | None => return,
        }
    }
}

/// Members of a wrong type are malformed, members out of range are for the rules to refuse, unknown
/// members are ignored.
fn parse_order(body: &[u8]) -> Result<AskedOrder, Error> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Error::Malformed(format!("the body is not JSON: {error}")))?;
    let Value::Object(mut members) = value else {
        return Err(Error::Malformed("the body is not a JSON object".to_owned()));
    };
    let product_id = match members.remove("product_id") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(other) => return Err(wrong_type("product_id", &other, "a string")),
    };
    let quantity = match members.remove("quantity") {
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
        for body in ["", "{", "[]", "null", "\"book\"", "{}{}"] {
            malformed(body);
        }
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
