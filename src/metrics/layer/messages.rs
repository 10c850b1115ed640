//! Counts gRPC messages in a stream of bytes, wherever its frames are split (gRPC over HTTP/2,
//! "Length-Prefixed-Message"): a flag of one byte, a length of four, and that many bytes.

/// Where in a stream of messages we are.
#[derive(Debug, Clone, Default)]
pub(super) struct Messages {
    /// Bytes of the prefix that were seen, 0 to 4.
    prefix: u8,
    /// The length, as far as its bytes were seen.
    length: u32,
    /// Bytes of the message that are still to come.
    rest: u32,
}

impl Messages {
    /// How many messages end in these bytes.
    pub(super) fn count(&mut self, mut bytes: &[u8]) -> u64 {
        // Nearly always a frame is one message.
        if self.prefix == 0
            && self.rest == 0
            && let [_, a, b, c, d, message @ ..] = bytes
            && u32::from_be_bytes([*a, *b, *c, *d]) as usize == message.len()
        {
            return 1;
        }
        let mut ended = 0;
        while let Some((&byte, after)) = bytes.split_first() {
            if self.rest > 0 {
                let skipped = bytes.len().min(self.rest as usize);
                bytes = &bytes[skipped..];
                self.rest -= u32::try_from(skipped).expect("at most the rest, which is an u32");
                ended += u64::from(self.rest == 0);
                continue;
            }
            // Mostly a prefix is in one piece.
            if self.prefix == 0
                && let [_, a, b, c, d, after @ ..] = bytes
            {
                bytes = after;
                self.rest = u32::from_be_bytes([*a, *b, *c, *d]);
                ended += u64::from(self.rest == 0);
                continue;
            }
            bytes = after;
            if self.prefix > 0 {
                self.length = self.length << 8 | u32::from(byte);
            }
            self.prefix += 1;
            if self.prefix == 5 {
                self.rest = self.length;
                ended += u64::from(self.rest == 0);
                (self.prefix, self.length) = (0, 0);
            }
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(lengths: &[usize]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (i, length) in lengths.iter().enumerate() {
            bytes.push(u8::try_from(i % 2).unwrap());
            bytes.extend(u32::try_from(*length).unwrap().to_be_bytes());
            bytes.extend(std::iter::repeat_n(0xff, *length));
        }
        bytes
    }

    proptest! {
        #[test]
        fn messages_are_counted_across_all_splits(
            lengths in prop::collection::vec(prop_oneof![0..4_usize, 250..600_usize], 0..8),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let bytes = encode(&lengths);
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut messages = Messages::default();
            let counted: u64 = cuts.windows(2).map(|w| messages.count(&bytes[w[0]..w[1]])).sum();
            prop_assert_eq!(counted, lengths.len() as u64);
        }

        #[test]
        fn no_bytes_panic(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..8)) {
            let mut messages = Messages::default();
            for frame in frames {
                messages.count(&frame);
            }
        }
    }

    #[test]
    fn a_message_counts_once_it_is_whole() {
        let mut messages = Messages::default();
        assert_eq!(messages.count(&[0, 0, 0, 0, 2, 9]), 0);
        assert_eq!(messages.count(&[9]), 1);
        assert_eq!(messages.count(&[0, 0, 0, 0, 0]), 1);
    }
}
