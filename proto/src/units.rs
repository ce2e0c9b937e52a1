use std::time::Duration;

/// Bytes in a sector: the unit of offsets and lengths in every format. Always 512, as in the kernel.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes in a slot, the aligned piece of a volume by which indexes, bitmaps and hashes are keyed. 64 KiB: one bit per
/// slot makes 2 MiB of bitmap per TiB, and one zstd call per slot is long enough to compress well.
pub const SLOT_BYTES: u64 = 64 * 1024;
/// Sectors in a slot.
pub const SLOT_SECTORS: u32 = 128;

/// Number of a slot within its volume: byte offset / 64 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotNo(pub u64);

impl SlotNo {
    /// The slot that holds byte `offset`.
    #[must_use]
    pub const fn of_byte(offset: u64) -> Self {
        Self(offset / SLOT_BYTES)
    }

    /// The slot that holds `sector`.
    #[must_use]
    pub const fn of_sector(sector: u64) -> Self {
        Self(sector / SLOT_SECTORS as u64)
    }

    /// First byte of the slot.
    #[must_use]
    pub const fn start_byte(self) -> u64 {
        self.0 * SLOT_BYTES
    }

    /// First sector of the slot.
    #[must_use]
    pub const fn start_sector(self) -> u64 {
        self.0 * SLOT_SECTORS as u64
    }
}

/// A reading of a monotonic clock: nanoseconds since an arbitrary zero that is fixed for the life of the process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Now(pub u64);

impl Now {
    /// `self + d`, saturating.
    #[must_use]
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Time since `earlier`; zero if that is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A reading of the wall clock: nanoseconds since the Unix epoch, UTC. Good until the year 2554.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct WallTime(pub u64);

impl WallTime {
    /// Time since `earlier`; zero if that is later (clocks step).
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
