//! What is written on the streams. Byte tables: `docs/formats/link.md`.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, ReadError, ReadExactError, RecvStream, SendStream, VarInt, WriteError};

use crate::tls;

/// Longest control message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

pub(crate) const VERSION: u16 = 1;
const HELLO_MAGIC: [u8; 4] = *b"FSLK";
const WELCOME_MAGIC: [u8; 4] = *b"FSLW";
const HELLO_LEN: usize = 48;
const WELCOME_LEN: usize = 32;
/// A longer introduction is of a later version, which keeps the first bytes.
const INTRODUCTION_MAX: usize = 256;
/// Length and sequence of a batch.
pub(crate) const BATCH_HEADER_LEN: usize = 16;
/// The sequence, back to the source.
pub(crate) const RECEIPT_LEN: usize = 8;

/// Reasons for which a connection is closed, as codes; the words beside them are for people.
pub(crate) mod code {
    /// Orderly end.
    pub(crate) const STOPPED: u32 = 0;
    /// A newer session of the same identity stands.
    pub(crate) const REPLACED: u32 = 1;
    /// The peer broke the rules.
    pub(crate) const PROTOCOL: u32 = 2;
    /// The identity is on the deny list.
    pub(crate) const DENIED: u32 = 3;
    /// Too many sessions or connections.
    pub(crate) const BUSY: u32 = 4;
    /// The application closed the session.
    pub(crate) const CLOSED: u32 = 5;
    /// A batch stood still.
    pub(crate) const STALLED: u32 = 6;
    /// Another version of this protocol.
    pub(crate) const VERSION: u32 = 7;
    /// Another connection of the session ended.
    pub(crate) const ENDED: u32 = 8;
    /// The path or the peer is gone. Not sent: there is nobody to tell.
    pub(crate) const LOST: u32 = 9;
}

/// The end of a connection or session, whoever caused it.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) code: u32,
    pub(crate) reason: String,
    pub(crate) fatal: bool,
}

impl Fault {
    pub(crate) fn new(code: u32, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), fatal: false }
    }

    pub(crate) fn protocol(reason: impl Into<String>) -> Self {
        Self::new(code::PROTOCOL, reason)
    }

    pub(crate) fn fatal(reason: impl Into<String>) -> Self {
        Self { code: code::CLOSED, reason: reason.into(), fatal: true }
    }

    /// Closes `connection` for this reason.
    pub(crate) fn close(&self, connection: &quinn::Connection) {
        if self.code == code::LOST {
            connection.close(VarInt::from_u32(code::ENDED), b"another connection of the session was lost");
            return;
        }
        connection.close(VarInt::from_u32(self.code), self.reason.as_bytes());
    }
}

/// A peer's words, as far as they are fit for a log: no control characters, and not endless.
fn printable(reason: &[u8]) -> String {
    const LEN_MAX: usize = 400;
    let reason = &reason[..reason.len().min(LEN_MAX)];
    String::from_utf8_lossy(reason).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// TLS alerts are the codes 0x100 to 0x1ff.
fn is_handshake(code: u64) -> bool {
    (0x100..0x200).contains(&code)
}

impl From<ConnectionError> for Fault {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::VersionMismatch => Self::fatal("the other end speaks another version of QUIC"),
            ConnectionError::TransportError(error) if is_handshake(u64::from(error.code)) => {
                Self::fatal(tls::plain_reason(&error.reason))
            }
            ConnectionError::TransportError(error) => Self::protocol(format!("QUIC: {error}")),
            ConnectionError::ConnectionClosed(close) if is_handshake(u64::from(close.error_code)) => {
                let reason = printable(&close.reason);
                Self::fatal(format!("the other end refused us: {}", tls::plain_reason(&reason)))
            }
            ConnectionError::ConnectionClosed(close) => Self::new(
                code::LOST,
                format!("the other end closed: {} {}", close.error_code, printable(&close.reason)),
            ),
            ConnectionError::ApplicationClosed(close) => {
                let number = u32::try_from(close.error_code.into_inner()).unwrap_or(code::CLOSED);
                Self {
                    code: number,
                    reason: printable(&close.reason),
                    fatal: matches!(number, code::DENIED | code::VERSION),
                }
            }
            ConnectionError::Reset => Self::new(code::LOST, "the other end started anew and does not know the session"),
            ConnectionError::TimedOut => Self::new(code::LOST, "the other end has fallen silent"),
            ConnectionError::LocallyClosed => Self::new(code::ENDED, "closed at this end"),
            ConnectionError::CidsExhausted => Self::protocol("QUIC: connection ids are exhausted"),
        }
    }
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::Reset(code) => Self::protocol(format!("a stream was reset (code {code})")),
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                Self::protocol(format!("stream: {error}"))
            }
        }
    }
}

impl From<WriteError> for Fault {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::Stopped(code) => Self::protocol(format!("a stream was stopped (code {code})")),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::protocol(format!("stream: {error}")),
        }
    }
}

impl From<ReadExactError> for Fault {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(bytes) => {
                Self::protocol(format!("a stream ended after {bytes} bytes of a header"))
            }
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

fn bytes_at<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&from[at..at + N]);
    bytes
}

fn all_zero(from: &[u8], reserved: &[Range<usize>]) -> bool {
    reserved.iter().all(|range| from[range.clone()].iter().all(|byte| *byte == 0))
}

/// A connection's introduction by the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Hello {
    pub(crate) version: u16,
    /// The session's random name, by which further connections join it.
    pub(crate) token: [u8; 16],
    /// 0 for the connection that opens the session.
    pub(crate) index: u16,
    /// Which of its streams the source brings: a newer session of the same identity and channel replaces an older one.
    pub(crate) channel: [u8; 16],
}

impl Hello {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut out = vec![0; HELLO_LEN];
        out[0..4].copy_from_slice(&HELLO_MAGIC);
        out[4..6].copy_from_slice(&self.version.to_le_bytes());
        out[8..24].copy_from_slice(&self.token);
        out[24..26].copy_from_slice(&self.index.to_le_bytes());
        out[32..48].copy_from_slice(&self.channel);
        out
    }

    pub(crate) fn decode(from: &[u8]) -> Option<Self> {
        if from.len() < HELLO_LEN || from[..4] != HELLO_MAGIC {
            return None;
        }
        let version = u16::from_le_bytes(bytes_at(from, 4));
        // A later version may use them; it is refused by its number, with that reason.
        if version == VERSION && !all_zero(from, &[6..8, 26..32]) {
            return None;
        }
        let index = u16::from_le_bytes(bytes_at(from, 24));
        Some(Self { version, token: bytes_at(from, 8), index, channel: bytes_at(from, 32) })
    }
}

/// The target's answer: what it will take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Welcome {
    pub(crate) batch_bytes_max: u64,
    pub(crate) stream_window: u32,
    pub(crate) connection_window: u32,
    pub(crate) connections: u16,
}

impl Welcome {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut out = vec![0; WELCOME_LEN];
        out[0..4].copy_from_slice(&WELCOME_MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[8..16].copy_from_slice(&self.batch_bytes_max.to_le_bytes());
        out[16..20].copy_from_slice(&self.stream_window.to_le_bytes());
        out[20..24].copy_from_slice(&self.connection_window.to_le_bytes());
        out[24..26].copy_from_slice(&self.connections.to_le_bytes());
        out
    }

    pub(crate) fn decode(from: &[u8]) -> Option<Self> {
        if from.len() < WELCOME_LEN || from[..4] != WELCOME_MAGIC || u16::from_le_bytes(bytes_at(from, 4)) != VERSION {
            return None;
        }
        if !all_zero(from, &[6..8, 26..WELCOME_LEN]) {
            return None;
        }
        Some(Self {
            batch_bytes_max: u64::from_le_bytes(bytes_at(from, 8)),
            stream_window: u32::from_le_bytes(bytes_at(from, 16)),
            connection_window: u32::from_le_bytes(bytes_at(from, 20)),
            connections: u16::from_le_bytes(bytes_at(from, 24)),
        })
    }
}

/// Writes one message: its length, then its bytes.
pub(crate) async fn write_message(send: &mut SendStream, message: Vec<u8>) -> Result<(), Fault> {
    let Ok(len) = u32::try_from(message.len()) else { return Err(Fault::protocol("message beyond 4 GiB")) };
    let mut pieces = [Bytes::copy_from_slice(&len.to_le_bytes()), Bytes::from(message)];
    send.write_all_chunks(&mut pieces).await.map_err(Fault::from)
}

/// Reads one message of at most `max` bytes; `None` at the orderly end of the stream.
pub(crate) async fn read_message(recv: &mut RecvStream, max: usize) -> Result<Option<Vec<u8>>, Fault> {
    let mut len = [0; 4];
    match recv.read_exact(&mut len).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
    if len == 0 || len > max {
        return Err(Fault::protocol(format!("a message of {len} bytes, allowed are 1 to {max}")));
    }
    let mut message = vec![0; len];
    recv.read_exact(&mut message).await?;
    Ok(Some(message))
}

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_elapsed) => Err(Fault::new(code::STALLED, format!("no {what} within {limit:?}"))),
    }
}

pub(crate) async fn read_hello(recv: &mut RecvStream, limit: Duration) -> Result<Hello, Fault> {
    let message = within(limit, "introduction", read_message(recv, INTRODUCTION_MAX)).await?;
    let hello =
        message.as_deref().and_then(Hello::decode).ok_or_else(|| Fault::protocol("not an introduction of a source"))?;
    if hello.version != VERSION {
        let reason = format!("the source speaks version {} of the link, the target {VERSION}", hello.version);
        return Err(Fault::new(code::VERSION, reason));
    }
    Ok(hello)
}

pub(crate) async fn read_welcome(recv: &mut RecvStream, limit: Duration) -> Result<Welcome, Fault> {
    let message = within(limit, "welcome", read_message(recv, INTRODUCTION_MAX)).await?;
    message.as_deref().and_then(Welcome::decode).ok_or_else(|| Fault::protocol("not a welcome of a target"))
}

pub(crate) fn batch_header(len: u64, sequence: u64) -> [u8; BATCH_HEADER_LEN] {
    let mut header = [0; BATCH_HEADER_LEN];
    header[..8].copy_from_slice(&len.to_le_bytes());
    header[8..].copy_from_slice(&sequence.to_le_bytes());
    header
}

/// Length and sequence.
pub(crate) fn read_batch_header(header: &[u8; BATCH_HEADER_LEN]) -> (u64, u64) {
    (u64::from_le_bytes(bytes_at(header, 0)), u64::from_le_bytes(bytes_at(header, 8)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn introductions_keep_their_bytes() {
        let hello = Hello { version: VERSION, token: [7; 16], index: 3, channel: [9; 16] };
        let mut golden = b"FSLK\x01\0\0\0".to_vec();
        golden.extend([7; 16]);
        golden.extend([3, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend([9; 16]);
        assert_eq!(hello.encode(), golden);
        assert_eq!(Hello::decode(&golden), Some(hello));

        let welcome =
            Welcome { batch_bytes_max: 0x0102, stream_window: 0x0304, connection_window: 0x0506, connections: 0x0708 };
        let golden = b"FSLW\x01\0\0\0\x02\x01\0\0\0\0\0\0\x04\x03\0\0\x06\x05\0\0\x08\x07\0\0\0\0\0\0".to_vec();
        assert_eq!(welcome.encode(), golden);
        assert_eq!(Welcome::decode(&golden), Some(welcome));
        assert_eq!(read_batch_header(&batch_header(5, 1 << 40)), (5, 1 << 40));
    }

    #[test]
    fn short_or_foreign_introductions_are_refused() {
        let hello = Hello { version: VERSION, token: [0; 16], index: 0, channel: [0; 16] }.encode();
        for len in 0..hello.len() {
            assert_eq!(Hello::decode(&hello[..len]), None);
            assert_eq!(Welcome::decode(&hello[..len]), None);
        }
        assert_eq!(Welcome::decode(&hello), None);
        let welcome = Welcome { batch_bytes_max: 1, stream_window: 1, connection_window: 1, connections: 1 }.encode();
        for at in [6, 7, 26, 31] {
            for (good, reads) in [
                (&hello, (|b| Hello::decode(b).is_some()) as fn(&[u8]) -> bool),
                (&welcome, |b| Welcome::decode(b).is_some()),
            ] {
                let mut bad = good.clone();
                bad[at] = 1;
                assert!(reads(good) && !reads(&bad), "reserved byte {at}");
            }
        }
    }
}
