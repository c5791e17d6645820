//! HTTP/2 by hand: frames and header blocks as no library would send them.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::peers::bounded;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;

/// Flags of HEADERS and DATA; `ACK` of SETTINGS is the same bit as `END_STREAM`.
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const PADDED: u8 = 8;

/// One frame (RFC 9113 section 4.1).
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A header block of literals that are never indexed (RFC 7541 section 6.2.3), without Huffman codes.
pub(crate) fn block(fields: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut block = Vec::new();
    let text = |block: &mut Vec<u8>, text: &[u8]| {
        integer(block, text.len());
        block.extend_from_slice(text);
    };
    for (name, value) in fields {
        block.push(0x10);
        text(&mut block, name);
        text(&mut block, value);
    }
    block
}

/// An integer with a prefix of seven bits (RFC 7541 section 5.1).
fn integer(block: &mut Vec<u8>, number: usize) {
    let Some(mut rest) = number.checked_sub(127) else {
        return block.push(u8::try_from(number).unwrap());
    };
    block.push(127);
    while rest >= 128 {
        block.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    block.push(u8::try_from(rest).unwrap());
}

/// What came of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// An answer with this status.
    Status(u16),
    /// The stream was reset, or the whole connection ended.
    Broken,
}

/// Sends frames on a fresh connection, and tells what became of stream 1.
pub(crate) async fn send(address: SocketAddr, frames: &[u8]) -> End {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    bytes.extend_from_slice(frames);
    let _ = stream.write_all(&bytes).await;
    bounded("the end of the stream", async {
        loop {
            let Some((kind, flags, id, payload)) = read(&mut stream).await else {
                return End::Broken;
            };
            match kind {
                HEADERS if id == 1 => return End::Status(status(&payload)),
                RST_STREAM if id == 1 => return End::Broken,
                // Sent only behind a reset of our own, which has no answer.
                PING | GOAWAY => return End::Broken,
                SETTINGS if flags & END_STREAM == 0 => {
                    let _ = stream.write_all(&frame(SETTINGS, END_STREAM, 0, &[])).await;
                }
                _ => {}
            }
        }
    })
    .await
}

async fn read(stream: &mut TcpStream) -> Option<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    stream.read_exact(&mut payload).await.ok()?;
    let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some((head[3], head[4], id, payload))
}

/// The `:status` of a connection's first header block: there its name is index 8 to 14 of the static table, or
/// the whole field stands there (RFC 7541 appendix A).
fn status(block: &[u8]) -> u16 {
    // What comes before it are sizes of the dynamic table.
    let block = &block[block.iter().take_while(|byte| *byte >> 5 == 1).count()..];
    match block {
        [0x88, ..] => 200,
        [0x89, ..] => 204,
        [0x8a, ..] => 206,
        [0x8b, ..] => 304,
        [0x8c, ..] => 400,
        [0x8d, ..] => 404,
        [0x8e, ..] => 500,
        [0x48..=0x4e | 0x08..=0x0e | 0x18..=0x1e, length, text @ ..] if length & 128 != 0 => {
            huffman_digits(&text[..usize::from(length & 127)])
        }
        [0x48..=0x4e | 0x08..=0x0e | 0x18..=0x1e, 3, text @ ..] => {
            std::str::from_utf8(&text[..3]).unwrap().parse().unwrap()
        }
        other => panic!("no status: {other:x?}"),
    }
}

/// Three digits (RFC 7541 appendix B): `0` to `2` have five bits, the others six.
fn huffman_digits(bytes: &[u8]) -> u16 {
    let bits = bytes.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
    let mut left = bytes.len() * 8;
    (0..3).fold(0, |number, _| {
        let top = |count: usize| bits >> (left - count) & ((1 << count) - 1);
        let (digit, size) = if top(5) < 3 { (top(5), 5) } else { (top(6) - 0b01_1001 + 3, 6) };
        left -= size;
        number * 10 + u16::try_from(digit).unwrap()
    })
}

#[test]
fn statuses_are_read() {
    for (block, expected) in [
        (&[0x88][..], 200),
        (&[0x48, 0x82, 0x68, 0x01], 401),
        (&[0x48, 3, b'5', b'0', b'3'], 503),
        (&[0x20, 0x8c], 400),
    ] {
        assert_eq!(status(block), expected);
    }
}
