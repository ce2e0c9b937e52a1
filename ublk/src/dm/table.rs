//! Tables: what a device is made of.

use std::fmt;
use std::io;

use zerocopy::{FromBytes, IntoBytes};
use zeroize::Zeroizing;

use super::node::DevNo;
use super::sys::TargetSpec;

/// One target: a range of a device, and what serves it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// First sector.
    pub(super) start: u64,
    pub(super) sectors: u64,
    /// The target's type: `linear`, `crypt`…
    pub(super) kind: String,
    /// As the kernel gives and takes it. A crypt target's holds its key.
    pub(super) parameters: Zeroizing<String>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, sectors, kind, .. } = self;
        write!(f, "{start}+{sectors} {kind}")?;
        if kind == "linear" { write!(f, " {}", &*self.parameters) } else { Ok(()) }
    }
}

/// A device's targets, in the order of their sectors.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Table {
    pub(super) targets: Vec<Target>,
}

impl Table {
    /// `sectors` of `device`, from its first on.
    pub(super) fn linear(device: DevNo, sectors: u64) -> Self {
        let parameters = Zeroizing::new(format!("{device} 0"));
        Self { targets: vec![Target { start: 0, sectors, kind: "linear".to_owned(), parameters }] }
    }

    /// Length of the device.
    pub(super) fn sectors(&self) -> u64 {
        self.targets.last().map_or(0, |last| last.start + last.sectors)
    }

    /// The device that this table passes everything on to, from its first sector on; `None`: it is anything else.
    pub(super) fn passes_to(&self) -> Option<DevNo> {
        let [target] = &self.targets[..] else { return None };
        let (device, offset) = target.parameters.split_once(' ')?;
        if target.kind == "linear" && target.start == 0 && offset == "0" { device.parse().ok() } else { None }
    }

    /// For the kernel to load.
    pub(super) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let length = self.targets.iter().map(|target| entry_bytes(&target.parameters)).sum();
        // No growth: that would leave copies of keys behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(length));
        for target in &self.targets {
            let end = bytes.len() + entry_bytes(&target.parameters);
            let mut spec = TargetSpec {
                sector_start: target.start,
                sectors: target.sectors,
                status: 0,
                next: u32::try_from(end - bytes.len()).expect("parameters come from answers of at most 1 MiB"),
                kind: [0; 16],
            };
            spec.kind[..target.kind.len()].copy_from_slice(target.kind.as_bytes());
            bytes.extend_from_slice(spec.as_bytes());
            bytes.extend_from_slice(target.parameters.as_bytes());
            bytes.resize(end, 0);
        }
        bytes
    }

    /// Reads `count` targets out of an answer's payload.
    ///
    /// # Errors
    /// `InvalidData`: it is not what the kernel's header describes.
    pub(super) fn decode(payload: &[u8], count: u32) -> io::Result<Self> {
        let mut targets = Vec::new();
        let mut at = 0;
        for _ in 0..count {
            let entry = payload.get(at..).ok_or_else(garbled)?;
            let (spec, rest) = TargetSpec::read_from_prefix(entry).map_err(|_| garbled())?;
            targets.push(Target {
                start: spec.sector_start,
                sectors: spec.sectors,
                kind: text(&spec.kind)?.to_owned(),
                parameters: Zeroizing::new(text(rest)?.trim_end().to_owned()),
            });
            at = spec.next as usize;
        }
        Ok(Self { targets })
    }
}

/// Bytes of a target in a load: head, parameters, a zero, up to a multiple of 8.
fn entry_bytes(parameters: &str) -> usize {
    (size_of::<TargetSpec>() + parameters.len() + 1).next_multiple_of(8)
}

/// Text up to the first zero.
pub(super) fn text(bytes: &[u8]) -> io::Result<&str> {
    let end = bytes.iter().position(|&b| b == 0).ok_or_else(garbled)?;
    std::str::from_utf8(&bytes[..end]).map_err(|_| garbled())
}

pub(super) fn garbled() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the device mapper's answer is not in the form of its header")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(start: u64, sectors: u64, kind: &str, parameters: &str) -> Target {
        Target { start, sectors, kind: kind.to_owned(), parameters: Zeroizing::new(parameters.to_owned()) }
    }

    /// Goal: what is loaded is laid out as the kernel walks it. Method: walk it, by the offsets in it.
    #[test]
    fn loads_are_chained_from_entry_to_entry() {
        let table = Table {
            targets: vec![target(0, 8, "linear", "8:1 2048"), target(8, 100, "crypt", "aes-xts-plain64 00ff 0 8:2 0")],
        };
        assert_eq!(table.sectors(), 108);
        let mut bytes = table.encode();
        let (first, rest) = TargetSpec::read_from_prefix(&bytes).expect("room for a head");
        assert_eq!((first.sector_start, first.sectors, first.next), (0, 8, 56));
        assert_eq!(&rest[..9], b"8:1 2048\0");
        let (second, _) = TargetSpec::read_from_prefix(&bytes[56..]).expect("room for a head");
        assert_eq!((second.sector_start, second.sectors), (8, 100));
        assert_eq!(bytes.len(), 56 + second.next as usize);
        // As an answer: offsets count from the start.
        bytes[20..24].copy_from_slice(&56u32.to_le_bytes());
        assert_eq!(Table::decode(&bytes, 2).expect("well formed"), table);
    }

    #[test]
    fn broken_answers_are_errors() {
        let bytes = Table::linear(DevNo { major: 8, minor: 1 }, 8).encode();
        assert!(Table::decode(&bytes, 1).is_ok());
        assert!(Table::decode(&bytes[..40], 1).is_err(), "parameters without an end");
        assert!(Table::decode(&bytes[..39], 1).is_err());
        let mut far = bytes.clone();
        far[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Table::decode(&far, 2).is_err());
    }

    #[test]
    fn only_a_plain_pass_through_is_one() {
        let device = DevNo { major: 259, minor: 7 };
        assert_eq!(Table::linear(device, 8).passes_to(), Some(device));
        for other in [target(0, 8, "linear", "8:1 2048"), target(0, 8, "crypt", "8:1 0"), target(0, 8, "linear", "")] {
            assert_eq!(Table { targets: vec![other] }.passes_to(), None);
        }
        let two = Table { targets: vec![target(0, 8, "linear", "8:1 0"), target(8, 8, "linear", "8:1 0")] };
        assert_eq!(two.passes_to(), None);
    }

    #[test]
    fn keys_are_not_printed() {
        let table = Table { targets: vec![target(0, 8, "crypt", "aes-xts-plain64 00ff 0 8:2 0")] };
        assert_eq!(format!("{table:?}"), "Table { targets: [0+8 crypt] }");
    }
}
