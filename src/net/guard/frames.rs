//! Where one WebSocket frame ends and the next begins, in what is written to a client.
//!
//! Nothing is checked or kept: this only finds the places where a frame of ours may stand.

/// Follows the bytes of an answer that switches protocols, from the first of its head.
#[derive(Clone, Copy, Debug)]
pub(super) enum Frames {
    /// In the head of the answer: so many bytes of its end were seen.
    Head(usize),
    /// Between two frames.
    Boundary,
    /// After a frame's first byte.
    Length,
    /// In the longer form of a length: its bytes to come, and its value so far.
    LongLength { missing: u8, value: u64 },
    /// So many bytes of a frame are to come.
    Payload(u64),
    /// In what no server sends.
    Lost,
}

const END_OF_HEAD: &[u8] = b"\r\n\r\n";
/// No frame of a server has it (RFC 6455 section 5.1).
const MASKED: u8 = 0x80;

impl Frames {
    /// Before the first byte of the head.
    pub(super) const START: Self = Self::Head(0);

    /// Whether a frame may be written now.
    pub(super) fn is_at_boundary(self) -> bool {
        matches!(self, Self::Boundary)
    }

    /// These bytes were written.
    pub(super) fn pass(&mut self, mut bytes: &[u8]) {
        while let Some((&byte, rest)) = bytes.split_first() {
            if let Self::Payload(left) = *self {
                let skipped = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                *self = Self::payload(left - skipped as u64);
                bytes = &bytes[skipped..];
            } else {
                *self = self.after(byte);
                bytes = rest;
            }
        }
    }

    fn after(self, byte: u8) -> Self {
        match self {
            Self::Head(seen) if byte == END_OF_HEAD[seen] => {
                if seen + 1 == END_OF_HEAD.len() {
                    Self::Boundary
                } else {
                    Self::Head(seen + 1)
                }
            }
            Self::Head(_) => Self::Head(usize::from(byte == END_OF_HEAD[0])),
            Self::Boundary => Self::Length,
            Self::Length => match byte {
                _ if byte & MASKED != 0 => Self::Lost,
                126 => Self::LongLength { missing: 2, value: 0 },
                127 => Self::LongLength { missing: 8, value: 0 },
                short => Self::payload(short.into()),
            },
            Self::LongLength { missing, value } => {
                let value = (value << 8) | u64::from(byte);
                match missing {
                    1 => Self::payload(value),
                    _ => Self::LongLength { missing: missing - 1, value },
                }
            }
            Self::Payload(_) | Self::Lost => self,
        }
    }

    fn payload(left: u64) -> Self {
        if left == 0 { Self::Boundary } else { Self::Payload(left) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer's head and frames with payloads of these sizes, and where each frame ends.
    fn stream(sizes: &[usize]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = b"HTTP/1.1 101 x\r\nA: \r\r\n\r\n".to_vec();
        let mut ends = vec![bytes.len()];
        for &size in sizes {
            bytes.push(0x82);
            match size {
                0..126 => bytes.push(size as u8),
                126..0x1_0000 => {
                    bytes.push(126);
                    bytes.extend((size as u16).to_be_bytes());
                }
                _ => {
                    bytes.push(127);
                    bytes.extend((size as u64).to_be_bytes());
                }
            }
            bytes.extend(vec![b'\r'; size]);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    #[test]
    fn boundaries_are_found_however_the_bytes_come() {
        let (bytes, ends) = stream(&[0, 1, 125, 126, 65_535, 0, 65_536, 5]);
        for step in [1, 2, 3, 7, 1000, bytes.len()] {
            let mut frames = Frames::START;
            let mut written = 0;
            for part in bytes.chunks(step) {
                frames.pass(part);
                written += part.len();
                assert_eq!(frames.is_at_boundary(), ends.contains(&written), "{step} {written}");
            }
        }
    }

    #[test]
    fn what_no_server_sends_is_not_understood() {
        let mut frames = Frames::START;
        frames.pass(b"HTTP/1.1 101 x\r\n\r\n\x82\x81keysx");
        assert!(!frames.is_at_boundary());
        let mut frames = Frames::START;
        frames.pass(b"HTTP/1.1 101 x\r\n\r\n\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xffxx");
        assert!(!frames.is_at_boundary());
    }
}
