use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

macro_rules! opaque_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, bincode::Encode, bincode::Decode)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                let bad = || Error::Malformed { what: stringify!($name), reason: format!("{text:?} is not hexadecimal of {} bytes", $len) };
                if text.len() != $len * 2 || !text.is_ascii() {
                    return Err(bad());
                }
                let mut id = [0u8; $len];
                for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
                    *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
                }
                Ok(Self(id))
            }
        }
    };
}

opaque_id!(
    /// One trust domain; random, made by `vault init`.
    VaultId, 16
);
opaque_id!(
    /// A group of volumes; derived from the vault and the group's name ([`GroupId::derive`]).
    GroupId, 16
);
opaque_id!(
    /// A protected host; derived from the vault and the host's name ([`HostId::derive`]).
    HostId, 16
);
opaque_id!(
    /// Keyed BLAKE3 of a chunk's content; equal content has equal ids within one dedup domain.
    ChunkId, 32
);
opaque_id!(
    /// Hash over a batch's plaintext record list and its predecessor's hash (I6).
    ChainHash, 32
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, bincode::Encode, bincode::Decode,
        )]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

counter!(
    /// An unbroken line of history; every failover starts the next. The first is 1.
    Generation, u32
);
counter!(
    /// One life of a ring; persisted, raised for every new ring. The first is 1.
    Incarnation, u64
);
counter!(
    /// Place of a write in a ring; with generation and incarnation it is the write's ticket.
    Position, u64
);
counter!(
    /// Number of a batch within its group and host; goes on through incarnations, the first is 1.
    BatchNo, u64
);
counter!(
    /// Which of the vault's data keys a host key was derived from. The first is 1.
    KeyEpoch, u32
);
counter!(
    /// Number of a volume within its group; given by the agent, never reused.
    VolumeIndex, u16
);

impl BatchNo {
    /// The next batch's number.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

fn derive_id(context: &str, vault: VaultId, name: &Name) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(&vault.0).update(name.as_str().as_bytes());
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    id
}

impl GroupId {
    /// The id of the group called `name` in `vault`.
    #[must_use]
    pub fn derive(vault: VaultId, name: &Name) -> Self {
        Self(derive_id("farshore 2026-11 group id v1", vault, name))
    }
}

impl HostId {
    /// The id of the host called `name` in `vault`.
    #[must_use]
    pub fn derive(vault: VaultId, name: &Name) -> Self {
        Self(derive_id("farshore 2026-11 host id v1", vault, name))
    }
}

/// Name of a vault, group, host, volume or bookmark: 1 to 63 of `a–z A–Z 0–9 . _ -`, not beginning with `.` or `-`; so it
/// is safe as a file name and on a command line.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Name(String);

impl Name {
    /// Longest name in bytes: one below a DNS label's limit plus its length byte.
    pub const LEN_MAX: usize = 63;

    /// Checks and wraps.
    ///
    /// # Errors
    /// [`Error::Name`] with the reason.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let reason = if name.is_empty() {
            Some("is empty")
        } else if name.len() > Self::LEN_MAX {
            Some("is longer than 63 bytes")
        } else if name.starts_with(['.', '-']) {
            Some("begins with '.' or '-'")
        } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
            Some("may hold letters, digits, '.', '_' and '-' only")
        } else {
            None
        };
        match reason {
            Some(reason) => Err(Error::Name { name, reason }),
            None => Ok(Self(name)),
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}

impl bincode::Encode for Name {
    fn encode<E: bincode::enc::Encoder>(
        &self,
        encoder: &mut E,
    ) -> std::result::Result<(), bincode::error::EncodeError> {
        bincode::Encode::encode(&self.0, encoder)
    }
}

impl<C> bincode::Decode<C> for Name {
    fn decode<D: bincode::de::Decoder<Context = C>>(
        decoder: &mut D,
    ) -> std::result::Result<Self, bincode::error::DecodeError> {
        let text = <String as bincode::Decode<C>>::decode(decoder)?;
        Self::new(text).map_err(|error| bincode::error::DecodeError::OtherString(error.to_string()))
    }
}

bincode::impl_borrow_decode!(Name);

/// What a certificate's holder may be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// On a protected host.
    Agent,
    /// Gateway near the source.
    Relay,
    /// Second site.
    Target,
    /// Configuration server.
    Control,
    /// A person or script with the command line.
    Operator,
}

impl Role {
    /// As written in certificates and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Relay => "relay",
            Self::Target => "target",
            Self::Control => "control",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Agent, Self::Relay, Self::Target, Self::Control, Self::Operator]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| Error::Malformed {
                what: "role",
                reason: format!("{text:?} is none of agent, relay, target, control, operator"),
            })
    }
}

/// A recovery point: the cut that ended one batch. Shown as `g1-i2-b345`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, bincode::Encode, bincode::Decode)]
pub struct PointId {
    /// The line of history it lies on.
    pub generation: Generation,
    /// The ring's life that cut it.
    pub incarnation: Incarnation,
    /// The batch it ended.
    pub batch: BatchNo,
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}-i{}-b{}", self.generation, self.incarnation, self.batch)
    }
}

impl FromStr for PointId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split('-');
        let mut field = |letter: char| parts.next()?.strip_prefix(letter)?.parse::<u64>().ok();
        let read = (field('g'), field('i'), field('b'));
        match (read, parts.next()) {
            ((Some(generation), Some(incarnation), Some(batch)), None) if u32::try_from(generation).is_ok() => {
                Ok(Self {
                    generation: Generation(u32::try_from(generation).unwrap_or(u32::MAX)),
                    incarnation: Incarnation(incarnation),
                    batch: BatchNo(batch),
                })
            }
            _ => Err(Error::Malformed { what: "point id", reason: format!("{text:?} is not of the form g1-i2-b345") }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_refuse_what_is_unsafe_in_paths() {
        for bad in ["", ".", "..", "a/b", "-x", "a b", "ä", &"x".repeat(64)] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        for good in ["db", "pg-data.1", "A_b", &"x".repeat(63)] {
            assert!(Name::new(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn ids_print_and_parse() {
        let point = PointId { generation: Generation(3), incarnation: Incarnation(7), batch: BatchNo(99) };
        assert_eq!(point.to_string().parse::<PointId>(), Ok(point));
        for bad in ["g1-i2", "g1-i2-b3-x", "1-2-3", "g-i-b", "g4294967296-i1-b1"] {
            assert!(bad.parse::<PointId>().is_err(), "{bad}");
        }
        let vault = VaultId([0xa5; 16]);
        assert_eq!(vault.to_string().parse::<VaultId>(), Ok(vault));
        assert!("zz".parse::<VaultId>().is_err());
    }
}
