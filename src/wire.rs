//! What gRPC over HTTP/2 says in a request's headers.
//!
//! Depends on `http` alone, so that the metrics layer may use it.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, header};

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The first value of a header. Looks at each in turn: among the few that gRPC's requests and
/// trailers have that takes a third of what it takes to hash a name.
pub fn first<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h HeaderValue> {
    headers.iter().find_map(|(found, value)| (found == name).then_some(value))
}

/// Whether a request is a gRPC call, told by its content type; gRPC-Web is none.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    first(headers, &header::CONTENT_TYPE).is_some_and(names_grpc)
}

/// Both in one walk over the headers: whether a request is a gRPC call and, if it is, how long its
/// client waits, as [`timeout`] says.
pub fn call(headers: &HeaderMap) -> Option<Option<Duration>> {
    let (mut content_type, mut timeout) = (None, None);
    for (name, value) in headers {
        if name == header::CONTENT_TYPE {
            content_type.get_or_insert(value);
        } else if name == GRPC_TIMEOUT {
            timeout.get_or_insert(value);
        }
    }
    content_type.filter(|value| names_grpc(value)).map(|_| timeout.and_then(parse_timeout))
}

/// Whether the messages of a gRPC call are protobuf, which they are unless the content type names
/// another codec.
pub fn is_protobuf(headers: &HeaderMap) -> bool {
    let content_type = first(headers, &header::CONTENT_TYPE).map_or(&b""[..], |v| v.as_bytes());
    let codec = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    matches!(codec, b"application/grpc" | b"application/grpc+proto")
}

fn names_grpc(content_type: &HeaderValue) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let parameters = content_type.as_bytes().strip_prefix(GRPC);
    matches!(parameters, Some([] | [b'+' | b';', ..]))
}

/// How long the client waits for the answer: at most eight digits and a unit. What is no such value
/// is as good as none.
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    first(headers, &GRPC_TIMEOUT).and_then(parse_timeout)
}

fn parse_timeout(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let amount = digits.iter().fold(0, |amount, digit| amount * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(amount * 3600),
        b'M' => Duration::from_secs(amount * 60),
        b'S' => Duration::from_secs(amount),
        b'm' => Duration::from_millis(amount),
        b'u' => Duration::from_micros(amount),
        b'n' => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with(name: HeaderName, value: &[u8]) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_bytes(value).unwrap())])
    }

    fn parse(value: &str) -> Option<Duration> {
        timeout(&with(GRPC_TIMEOUT, value.as_bytes()))
    }

    #[test]
    fn grpc_is_told_by_its_content_type() {
        for grpc in ["application/grpc", "application/grpc+proto", "application/grpc;x=y"] {
            assert!(is_grpc(&with(header::CONTENT_TYPE, grpc.as_bytes())), "{grpc}");
        }
        for http in ["application/grpc-web", "application/grpcx", "application/json", ""] {
            assert!(!is_grpc(&with(header::CONTENT_TYPE, http.as_bytes())), "{http}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }

    #[test]
    fn messages_are_protobuf_unless_another_codec_is_named() {
        for proto in ["application/grpc", "application/grpc+proto", "application/grpc;x=y"] {
            assert!(is_protobuf(&with(header::CONTENT_TYPE, proto.as_bytes())), "{proto}");
        }
        for other in ["application/grpc+json", "application/grpc+", "application/grpc+proto2"] {
            assert!(!is_protobuf(&with(header::CONTENT_TYPE, other.as_bytes())), "{other}");
        }
    }

    #[test]
    fn every_unit_of_a_timeout_is_read() {
        let read = ["2H", "3M", "4S", "5m", "6u", "7n", "99999999H"].map(parse);
        let seconds = [7200.0, 180.0, 4.0, 5e-3, 6e-6, 7e-9, 99_999_999.0 * 3600.0];
        assert_eq!(read, seconds.map(|secs| Some(Duration::from_secs_f64(secs))));
    }

    #[test]
    fn what_is_no_timeout_is_none() {
        for bad in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "123456789S", " 1S", "1S "] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        assert_eq!(timeout(&HeaderMap::new()), None);
    }

    #[test]
    fn one_walk_finds_what_two_find() {
        let read = |headers: &[(&'static str, &'static str)]| {
            let headers = headers.iter().map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_static(value))
            });
            let mut map = HeaderMap::new();
            headers.for_each(|(name, value)| _ = map.append(name, value));
            assert_eq!(call(&map).is_some(), is_grpc(&map));
            assert_eq!(call(&map).flatten(), timeout(&map).filter(|_| is_grpc(&map)));
            call(&map)
        };
        let second = Some(Duration::from_secs(1));
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[("grpc-timeout", "1S")]), None);
        assert_eq!(read(&[("content-type", "text/plain"), ("grpc-timeout", "1S")]), None);
        assert_eq!(read(&[("te", "trailers"), ("content-type", "application/grpc")]), Some(None));
        let both = ("content-type", "application/grpc");
        assert_eq!(read(&[("grpc-timeout", "1S"), both]), Some(second));
        assert_eq!(read(&[("grpc-timeout", "1S"), ("grpc-timeout", "2S"), both]), Some(second));
        assert_eq!(read(&[both, ("content-type", "text/plain")]), Some(None));
    }

    proptest! {
        #[test]
        fn no_timeout_panics(value in prop::collection::vec(0x20..0x7f_u8, 0..16)) {
            timeout(&with(GRPC_TIMEOUT, &value));
        }
    }
}
