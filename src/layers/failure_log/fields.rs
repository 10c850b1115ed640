//! What a line shows of a request: copies of bounded length. A clone of a `HeaderValue` or a `Uri`
//! would keep the whole header block in memory for as long as a stream lives.

use std::fmt::{self, Display, Write as _};

use http::{HeaderValue, Method};

/// Marks the end of a text that was cut.
const MARK: &str = "…";

/// Longest path that is shown whole, in bytes.
const MAX_PATH: usize = 256;

/// Longest method that is shown whole, in bytes; the longest registered one has 17.
const MAX_METHOD: usize = 32;

/// Like [`MARK`], of characters that a method may have.
const METHOD_MARK: &[u8] = b"...";

/// Longest cause that is shown whole, in bytes.
const MAX_CAUSE: usize = 1024;

/// A text of at most `N` bytes, held inline.
#[derive(Clone, Copy)]
pub(in crate::layers) struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

/// A path of bounded length.
pub(in crate::layers) type Path = Text<{ MAX_PATH + MARK.len() }>;

/// The `traceparent` of W3C Trace Context.
pub(in crate::layers) type Traceparent = Text<55>;

impl<const N: usize> Text<N> {
    pub(in crate::layers) const EMPTY: Self = Self { bytes: [0; N], len: 0 };

    /// Copies the first `N` bytes.
    pub(in crate::layers) fn new(text: &[u8]) -> Self {
        let mut new = Self::EMPTY;
        new.push(text);
        new
    }

    fn push(&mut self, text: &[u8]) {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text[..len]);
        self.len += len;
    }

    pub(in crate::layers) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Empty if it is not UTF-8.
    pub(in crate::layers) fn as_str(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// Copies the path of a request, cut if it is long.
pub(in crate::layers) fn path(path: &str) -> Path {
    let kept = path.floor_char_boundary(MAX_PATH);
    let mut text = Path::new(&path.as_bytes()[..kept]);
    if kept < path.len() {
        text.push(MARK.as_bytes());
    }
    text
}

/// Copies the method of a request, cut if it is long.
pub(in crate::layers) fn method(method: &Method) -> Method {
    match method.as_str().as_bytes().get(..MAX_METHOD) {
        Some(kept) if kept.len() < method.as_str().len() => {
            let cut = Method::from_bytes(&[kept, METHOD_MARK].concat());
            cut.expect("a part of a method and full stops are a method")
        }
        _ => method.clone(),
    }
}

/// Copies a `traceparent` that has the form of W3C Trace Context: version 00, or the part of a
/// later version that older readers parse (W3C Trace Context, 3.2.4). Empty if it has another form.
pub(in crate::layers) fn traceparent(value: Option<&HeaderValue>) -> Traceparent {
    let known = value.and_then(|value| {
        let (known, rest) = value.as_bytes().split_at_checked(Traceparent::EMPTY.bytes.len())?;
        has_w3c_form(known, rest).then_some(known)
    });
    known.map_or(Traceparent::EMPTY, Traceparent::new)
}

fn has_w3c_form(known: &[u8], rest: &[u8]) -> bool {
    let mut parts = known.split(|byte| *byte == b'-');
    let mut hex = |digits| {
        let is_hex = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        parts.next().filter(|part| part.len() == digits && part.iter().all(is_hex))
    };
    let (Some(version), Some(trace), Some(parent), Some(_flags)) =
        (hex(2), hex(32), hex(16), hex(2))
    else {
        return false;
    };
    let is_zero = |id: &[u8]| id.iter().all(|digit| *digit == b'0');
    let ends = match (version, rest) {
        (b"ff", _) => false,
        (_, []) => true,
        (b"00", _) => false,
        (_, [next, ..]) => *next == b'-',
    };
    ends && !is_zero(trace) && !is_zero(parent)
}

/// The text of a cause, cut if it is long.
pub(super) fn shortened(cause: &dyn Display) -> String {
    let mut text = String::new();
    // Writing to a `String` does not fail.
    let _ = write!(text, "{cause}");
    let kept = text.floor_char_boundary(MAX_CAUSE);
    if kept < text.len() {
        text.truncate(kept);
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn trace(value: &str) -> String {
        traceparent(Some(&HeaderValue::from_bytes(value.as_bytes()).unwrap())).as_str().to_owned()
    }

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_path_is_cut_on_a_character_with_a_mark() {
        let longest = format!("/{}", "x".repeat(255));
        assert_eq!(path(&longest).as_str(), longest);
        assert_eq!(path(&format!("{longest}y")).as_str(), format!("{longest}…"));
        // The 256th byte is in the middle of a character.
        let odd = format!("/{}", "ä".repeat(200));
        assert_eq!(path(&odd).as_str(), format!("/{}…", "ä".repeat(127)));
    }

    #[test]
    fn methods_and_causes_are_cut_too() {
        let of_length = |length| Method::from_bytes("M".repeat(length).as_bytes()).unwrap();
        assert_eq!(method(&of_length(32)), of_length(32));
        assert_eq!(method(&of_length(33)).as_str(), format!("{}...", of_length(32)));
        assert_eq!(shortened(&"c".repeat(1024)), "c".repeat(1024));
        assert_eq!(shortened(&"c".repeat(1025)), format!("{}…", "c".repeat(1024)));
    }

    #[test]
    fn a_trace_has_the_form_of_w3c() {
        assert_eq!(trace(TRACE), TRACE);
        let later = TRACE.replacen("00", "cc", 1);
        for rest in ["", "-", "-what-comes-then"] {
            assert_eq!(trace(&format!("{later}{rest}")), later);
        }
    }

    #[test]
    fn a_value_of_another_form_is_no_trace() {
        let parts: Vec<_> = TRACE.split('-').collect();
        let with = |at: usize, part: &str| {
            let mut parts = parts.clone();
            parts[at] = part;
            parts.join("-")
        };
        for bad in [
            "",
            "00-trace-span-01",
            &TRACE.to_uppercase(),
            &TRACE[..54],
            &TRACE.replace('-', "_"),
            &format!("{TRACE}-01"),
            &format!("{TRACE}0"),
            &format!("{TRACE} "),
            &format!("{}.", TRACE.replacen("00", "01", 1)),
            &with(0, "ff"),
            &with(0, "0g"),
            &with(1, &"0".repeat(32)),
            &with(2, &"0".repeat(16)),
            &with(3, "1-"),
        ] {
            assert_eq!(trace(bad), "", "{bad:?}");
        }
        assert_eq!(traceparent(None).as_str(), "");
    }

    proptest! {
        #[test]
        fn no_path_is_shown_longer_or_changed(text in "\\PC{0,300}") {
            let shown = path(&text);
            let shown = shown.as_str();
            let kept = shown.strip_suffix(MARK).filter(|_| text.len() > MAX_PATH).unwrap_or(shown);
            prop_assert!(text.starts_with(kept) && kept.len() <= MAX_PATH);
            prop_assert!(kept.len() == text.len() || kept.len() > MAX_PATH - 4);
        }

        #[test]
        fn a_trace_is_all_or_nothing(value in "[0-9a-f-]{50,60}") {
            let shown = trace(&value);
            prop_assert!(shown.is_empty() || shown.len() == 55 && value.starts_with(&shown));
        }
    }
}
