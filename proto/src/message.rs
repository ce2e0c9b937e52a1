//! Control messages between a source and its target. Byte table: `docs/formats/messages.md`.
//!
//! Every message starts with magic, version and the sender's side, so that two versions that do not understand each other
//! say so instead of guessing. What the target says is authenticated end to end ([`crate::keys::AnswerKey`]): a relay in
//! between cannot forge "durable" or "equal".

use crate::batch::VolumeDecl;
use crate::keys::AnswerKey;
use crate::{
    BatchNo, ChainHash, ChunkId, Error, Generation, GroupId, Incarnation, KeyEpoch, LogMark, Name, Position, Result,
    VaultId, VolumeIndex, WallTime, codec,
};

/// Version of the messages and of the batch format that goes with them.
pub const PROTOCOL_VERSION: u16 = 1;
/// Longest message on the wire.
pub const MESSAGE_BYTES_MAX: usize = codec::ENCODED_BYTES_MAX + PREFIX_BYTES + MAC_BYTES;

const MAGIC: [u8; 4] = *b"FSCM";
const PREFIX_BYTES: usize = 8;
const MAC_BYTES: usize = 40;
const WHAT: &str = "message";

/// From source to target.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum SourceMessage {
    /// First message of a session, of a source that does not say which key it has: answers are authenticated by the newest.
    Hello(Hello),
    /// The group's volumes changed.
    Volumes(Vec<VolumeDecl>),
    /// Answered with [`TargetMessage::Pong`].
    Ping(u64),
    /// The source stops on purpose; what it sent stays valid.
    Bye,
    /// First message of a session: answers are to be authenticated by the host's key of this epoch. A source whose bundle is
    /// older than the newest epoch has no other.
    KeyedHello {
        /// Epoch of the key with which the source seals.
        epoch: KeyEpoch,
        /// Who speaks.
        hello: Hello,
    },
}

/// Who speaks and for which stream.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Hello {
    /// Trust domain.
    pub vault: VaultId,
    /// Group, by id and name.
    pub group: GroupId,
    /// The group's name.
    pub group_name: Name,
    /// The host's name; must be the certificate's.
    pub host_name: Name,
    /// Line of history that the source is on; 0: none yet.
    pub generation: Generation,
    /// Life of its ring.
    pub incarnation: Incarnation,
    /// Random, fresh per session; binds the answers to it.
    pub nonce: [u8; 32],
    /// The group's volumes on this host.
    pub volumes: Vec<VolumeDecl>,
}

/// The last batch that the target holds of this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Tail {
    /// Life of the ring that cut it.
    pub incarnation: Incarnation,
    /// Its number.
    pub number: BatchNo,
    /// Its chain hash.
    pub chain: ChainHash,
    /// Ring position after its cut.
    pub end: Position,
}

/// From target to source.
#[expect(missing_docs, reason = "the variants say what the fields are")]
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum TargetMessage {
    /// The stream may go on behind `tail`.
    Welcome(Welcome),
    /// The stream is refused; the session ends.
    Refused { code: RefuseCode, detail: String },
    /// All batches up to this one are journaled.
    Durable { incarnation: Incarnation, number: BatchNo, chain: ChainHash, received: WallTime },
    /// What the probes of one batch found.
    Answers(Answers),
    /// Contents that may be sent by reference.
    Lease(Lease),
    /// The target takes no batches for now (disk full, …); what was sent and not acknowledged will be asked for again.
    Paused { reason: String },
    /// It takes batches again, from behind this tail.
    Resumed,
    /// To [`SourceMessage::Ping`].
    Pong(u64),
}

/// Answer to [`Hello`].
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Welcome {
    /// The group's main line.
    pub generation: Generation,
    /// Last batch held, if any.
    pub tail: Option<Tail>,
    /// Volumes of which the target holds nothing at all: their content here is zeroes.
    pub empty: Vec<VolumeIndex>,
    /// Volumes that the target's points include.
    pub joined: Vec<VolumeIndex>,
    /// An event is open in the stream: no cut is recoverable until its end.
    pub event_open: bool,
    /// Where the source's activity log was by the last batch held; none: it had none, or that is not known any more.
    pub log: Option<LogMark>,
}

/// Why a stream is refused; the text beside it names the particulars.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum RefuseCode {
    /// Another vault.
    Vault,
    /// Messages or batches of another version.
    Version,
    /// This host may not write the group.
    NotAMember,
    /// The stream does not continue what the target holds (gap, fork, lower incarnation).
    Chain,
    /// Another line of history.
    Generation,
    /// A volume's size or name contradicts what the target holds.
    Volume,
    /// Malformed or forged bytes.
    Malformed,
    /// A newer session of the same host took over.
    Replaced,
    /// The target cannot serve the group now (failed journal, damaged catalog).
    Unavailable,
}

/// Results of the probes of one batch, in the order of their records.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Answers {
    /// The batch.
    pub number: BatchNo,
    /// One per probe; a probe of zeroes over several slots has one per range that differs, or one for all if none does. Never a part
    /// of those of one probe: what they do not name is equal.
    pub results: Vec<Answer>,
}

/// Result of one comparison.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Answer {
    /// Volume compared.
    pub volume: VolumeIndex,
    /// The probe's ticket.
    pub position: Position,
    /// First byte compared.
    pub offset: u64,
    /// Bytes compared.
    pub len: u64,
    /// Same content on both sides at that ticket.
    pub equal: bool,
}

/// Contents that the target vouches for: it recomputed their ids and keeps them at least until it has received the batch
/// `through`.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Lease {
    /// Last batch that may refer to them.
    pub through: BatchNo,
    /// The contents; they replace those of the lease before.
    pub ids: Vec<ChunkId>,
}

fn prefix(side: u8) -> [u8; PREFIX_BYTES] {
    let mut bytes = [0; PREFIX_BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    bytes[6] = side;
    bytes
}

fn strip_prefix(bytes: &[u8], side: u8) -> Result<&[u8]> {
    let (head, rest) =
        bytes.split_at_checked(PREFIX_BYTES).ok_or_else(|| Error::truncated(WHAT, PREFIX_BYTES, bytes.len()))?;
    if head[..4] != MAGIC {
        return Err(Error::Magic { what: WHAT });
    }
    let found = u16::from_le_bytes([head[4], head[5]]);
    if found != PROTOCOL_VERSION {
        return Err(Error::Version { what: WHAT, found, known: PROTOCOL_VERSION });
    }
    if head[6] != side || head[7] != 0 {
        return Err(Error::Malformed { what: WHAT, reason: "is from the wrong side".into() });
    }
    Ok(rest)
}

impl SourceMessage {
    /// To bytes.
    ///
    /// # Errors
    /// When it exceeds the limit (too many volumes).
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = prefix(b'S').to_vec();
        bytes.extend_from_slice(&codec::encode(WHAT, self)?);
        Ok(bytes)
    }

    /// From bytes.
    ///
    /// # Errors
    /// Magic, version, or malformed content.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        codec::decode(WHAT, strip_prefix(bytes, b'S')?)
    }
}

impl TargetMessage {
    /// To bytes, authenticated for the session `nonce` as its message number `counter`.
    ///
    /// # Errors
    /// When it exceeds the limit.
    pub fn seal(&self, key: &AnswerKey, nonce: &[u8; 32], counter: u64) -> Result<Vec<u8>> {
        let body = codec::encode(WHAT, self)?;
        let mut bytes = prefix(b'T').to_vec();
        bytes.extend_from_slice(&counter.to_le_bytes());
        bytes.extend_from_slice(&key.mac(nonce, counter, &body));
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// From bytes; `counter` is the number that must come next.
    ///
    /// # Errors
    /// [`Error::Forged`] for a message that the target did not make for this session and place.
    pub fn open(bytes: &[u8], key: &AnswerKey, nonce: &[u8; 32], counter: u64) -> Result<Self> {
        let rest = strip_prefix(bytes, b'T')?;
        let (head, body) =
            rest.split_at_checked(MAC_BYTES).ok_or_else(|| Error::truncated(WHAT, MAC_BYTES, rest.len()))?;
        let mac: &[u8; 32] = head[8..].try_into().expect("the head has 40 bytes");
        if head[..8] != counter.to_le_bytes() || !key.verify(nonce, counter, body, mac) {
            return Err(Error::Forged { what: "answer of the target" });
        }
        codec::decode(WHAT, body)
    }
}
