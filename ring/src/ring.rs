//! A ring as its owner sees it: made, opened, resumed, handed out in parts.

use std::fs::File;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex, PoisonError};

use crate::bitmap::Bitmap;
use crate::layout::{
    CLOSED, DESCRIPTORS_AT, DESCRIPTORS_MAX, DESCRIPTORS_MIN, Geometry, HEADER_BYTES, INTENT_MAP_AT, INTENTS, LINES_AT,
    MAX_VOLUMES, PAGE_BYTES, STATE_AT, StateCopy, UNITS_PER_PAGE, VOLUMES_AT, VolumeEntry, decode_header,
    encode_header,
};
use crate::memory::{Backing, Mapping, Memory, Resident, View};
use crate::recover::{Recovery, Survey, resume, survey};
use crate::shared::{Lane, Shared};
use crate::slab::Slab;
use crate::state::{self, StreamState};
use crate::sync::Ordering;
use crate::volumes::{VolumeInfo, VolumeMaps, Which};
use crate::{Consumer, Error, Producer};

/// Whose ring it is. Compared field by field when a ring is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingIdentity {
    /// Vault.
    pub vault: [u8; 16],
    /// Group.
    pub group: [u8; 16],
    /// Host.
    pub host: [u8; 16],
    /// Boot of the machine (`/proc/sys/kernel/random/boot_id`): a ring does not outlive it.
    pub boot: [u8; 16],
    /// Life of the ring: the caller's persisted counter, raised for every new ring.
    pub incarnation: u64,
    /// Line of history.
    pub generation: u64,
}

/// How a ring is made.
#[derive(Clone, Debug)]
pub struct RingConfig {
    /// Whose it is.
    pub identity: RingIdentity,
    /// Payload: bytes of the slab, rounded down to whole MiB; 1 MiB to 1 TiB. The file is about 4 % larger.
    pub slab_bytes: u64,
    /// Descriptors, a power of two from 8 to 2^24. `None`: one per 4 KiB of slab, so that small writes use up both together.
    pub descriptors: Option<u64>,
}

impl RingConfig {
    /// Default size of the slab (source design: 256 MiB).
    pub const SLAB_BYTES_DEFAULT: u64 = 256 << 20;

    /// The default size.
    #[must_use]
    pub const fn new(identity: RingIdentity) -> Self {
        Self { identity, slab_bytes: Self::SLAB_BYTES_DEFAULT, descriptors: None }
    }

    fn geometry(&self) -> Result<Geometry, Error> {
        let pages = u32::try_from(self.slab_bytes / PAGE_BYTES as u64)
            .map_err(|_| Error::Config { what: "the slab must have between 1 MiB and 1 TiB" })?;
        let one_per_unit = (u64::from(pages) * UNITS_PER_PAGE as u64).next_power_of_two();
        let descriptors = self.descriptors.unwrap_or(one_per_unit.clamp(DESCRIPTORS_MIN, DESCRIPTORS_MAX));
        Geometry::new(descriptors, pages)
    }
}

/// A capture ring: descriptors, slab, bitmaps and the streamer's scratch in one shared mapping. Share it by `Arc`; producers and
/// the consumer keep the mapping (and its exclusive lock) on their own.
#[derive(Debug)]
pub struct Ring {
    pub(crate) shared: Arc<Shared>,
    identity: RingIdentity,
    pub(crate) volume_table: View<VolumeEntry>,
    pub(crate) volume_maps: Mutex<[Option<VolumeMaps>; MAX_VOLUMES]>,
    state: Mutex<View<StateCopy>>,
    producers: AtomicU32,
}

/// A ring that was opened and not yet resumed: it can be looked at and its bitmaps marked, but gives no handles.
#[derive(Debug)]
pub struct Dormant {
    ring: Ring,
    survey: Survey,
    recovery: Recovery,
}

impl Ring {
    /// Makes a ring in the file `path` (mode 0600), replacing whatever is there.
    ///
    /// # Errors
    /// `Config`, `InUse`, `Io`.
    #[cfg(not(miri))]
    pub fn create(path: &Path, config: &RingConfig) -> Result<Self, Error> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(|source| Error::Io { action: "create", path: path.to_owned(), source })?;
        Self::create_on(Backing::file(file, path)?, config)
    }

    /// Makes a ring in an open file (a memfd, say), replacing its content. `name` is for messages.
    ///
    /// # Errors
    /// As [`Self::create`].
    #[cfg(not(miri))]
    pub fn create_in_file(file: File, name: &Path, config: &RingConfig) -> Result<Self, Error> {
        Self::create_on(Backing::file(file, name)?, config)
    }

    /// Makes a ring in heap memory.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_in_memory(memory: &Memory, config: &RingConfig) -> Result<Self, Error> {
        Self::create_on(Backing::memory(memory)?, config)
    }

    /// Opens the ring that another process left in the file `path`.
    ///
    /// Only once no I/O of that process can be in flight any more: cells that it lent to the kernel are given to new owners.
    ///
    /// # Errors
    /// Whatever tells that it is not a whole ring of `identity`; see [`Error::ring_is_lost`].
    #[cfg(not(miri))]
    pub fn open(path: &Path, identity: &RingIdentity) -> Result<Dormant, Error> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|source| Error::Io { action: "open", path: path.to_owned(), source })?;
        Self::open_on(Backing::file(file, path)?, identity)
    }

    /// As [`Self::open`], from an open file.
    ///
    /// # Errors
    /// As [`Self::open`].
    #[cfg(not(miri))]
    pub fn open_file(file: File, name: &Path, identity: &RingIdentity) -> Result<Dormant, Error> {
        Self::open_on(Backing::file(file, name)?, identity)
    }

    /// As [`Self::open`], from heap memory.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_memory(memory: &Memory, identity: &RingIdentity) -> Result<Dormant, Error> {
        Self::open_on(Backing::memory(memory)?, identity)
    }

    fn create_on(backing: Backing, config: &RingConfig) -> Result<Self, Error> {
        let geometry = config.geometry()?;
        backing.clear()?;
        backing.grow(0, geometry.total() as u64, true)?;
        let mapping = backing.map(0, geometry.total(), Resident::All)?;
        // All words zero is the initial state; only the header is missing, its magic last, so that a kill leaves no half ring.
        write_header(&mapping, &encode_header(&config.identity, geometry));
        Ok(Self::on(backing, mapping, config.identity, geometry))
    }

    fn open_on(backing: Backing, identity: &RingIdentity) -> Result<Dormant, Error> {
        let found = backing.len()?;
        if found < DESCRIPTORS_AT as u64 {
            return Err(Error::Truncated { found, expected: DESCRIPTORS_AT as u64 });
        }
        let header = read_header(&backing.map(0, DESCRIPTORS_AT, Resident::AsTouched)?);
        let (of, geometry) = decode_header(&header)?;
        check_identity(&of, identity)?;
        if found < geometry.total() as u64 {
            return Err(Error::Truncated { found, expected: geometry.total() as u64 });
        }
        let mapping = backing.map(0, geometry.total(), Resident::All)?;
        let ring = Self::on(backing, mapping, *identity, geometry);
        ring.map_volumes()?;
        let survey = survey(&ring.shared)?;
        let recovery = Recovery {
            writing: survey.writing.clone(),
            unpublished: survey.unpublished.clone(),
            freed: survey.freed,
            head: survey.head,
            closed: survey.closed,
            was_clean: ring.shared.clean().load(Ordering::Acquire) != 0,
            stream: ring.stream_state(),
        };
        Ok(Dormant { ring, survey, recovery })
    }

    fn on(backing: Backing, mapping: Mapping, identity: RingIdentity, geometry: Geometry) -> Self {
        // SAFETY, for every view below: `mapping` has geometry.total() bytes; the offsets come from the chain in `layout.rs`,
        // so the pieces lie inside and do not overlap; each is used as this type alone; all are made of atomics, for which
        // any bytes are valid; `Shared` (which `Ring` holds) keeps the mapping.
        macro_rules! view {
            ($offset:expr, $len:expr) => {
                // SAFETY: see above.
                unsafe { View::new(&mapping, $offset, $len) }
            };
        }
        let volume_table = view!(VOLUMES_AT, MAX_VOLUMES);
        let state = Mutex::new(view!(STATE_AT, 2));
        let slab = Slab {
            states: view!(geometry.page_states_at(), geometry.pages as usize),
            maps: view!(geometry.page_maps_at(), geometry.pages as usize),
            headers: view!(geometry.headers_at(), geometry.headers()),
            intents: view!(INTENT_MAP_AT, INTENTS / 64),
            base: mapping.at(geometry.slab_at(), geometry.slab_bytes()),
            reserved_pages: geometry.reserved_pages(),
        };
        let shared = Shared {
            geometry,
            lines: view!(LINES_AT, 1),
            descriptors: view!(DESCRIPTORS_AT, crate::layout::index(geometry.descriptors)),
            slab,
            consumer_taken: AtomicBool::new(false),
            mapping,
            backing: Some(backing),
        };
        Self {
            shared: Arc::new(shared),
            identity,
            volume_table,
            volume_maps: Mutex::default(),
            state,
            producers: AtomicU32::new(0),
        }
    }

    /// A producer, for one thread.
    #[must_use]
    pub fn producer(&self) -> Producer {
        let number = self.producers.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Producer::new(Lane::new(&self.shared), number)
    }

    /// The consumer, unless there is one already. It starts at the freed cursor.
    #[must_use]
    pub fn consumer(&self) -> Option<Consumer> {
        // Acquire: pairs with the Release in `Consumer::drop`.
        let taken = self.shared.consumer_taken.swap(true, std::sync::atomic::Ordering::Acquire);
        (!taken).then(|| Consumer::new(Lane::new(&self.shared)))
    }

    /// Sets CLOSED: from now on every claim fails until [`Consumer::reopen`]. Whether this call did it (else it was closed).
    /// The caller then asks [`Producer::consumer_sleeping`] and completes its guest request only afterwards.
    pub fn close(&self) -> bool {
        self.shared.close()
    }

    /// Whether every claim fails at present.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    /// The next position to be claimed.
    #[must_use]
    pub fn head(&self) -> u64 {
        self.shared.head().load(Ordering::Acquire) & !CLOSED
    }

    /// Positions below are freed.
    #[must_use]
    pub fn freed(&self) -> u64 {
        self.shared.freed().load(Ordering::Acquire)
    }

    /// Bytes of cells in use (whole cells). Looks at every page: for marks and gauges, not for every write.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.shared.slab.used_bytes()
    }

    /// Bytes of all cells.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shared.slab.size_bytes()
    }

    /// Descriptors in use, reserved ones included.
    #[must_use]
    pub fn used_descriptors(&self) -> u64 {
        self.shared.credits().load(Ordering::Relaxed)
    }

    /// All descriptors.
    #[must_use]
    pub fn descriptors(&self) -> u64 {
        self.shared.geometry.descriptors
    }

    /// Whose ring it is.
    #[must_use]
    pub fn identity(&self) -> &RingIdentity {
        &self.identity
    }

    /// Whether the ring is locked in memory; if not, the caller raises an alarm (swapping could block writes).
    #[must_use]
    pub fn locked(&self) -> bool {
        self.shared.mapping.locked()
    }

    /// Address and bytes of the slab, to register with io_uring. Every cell lies in it. Valid while the ring or any of its handles
    /// lives.
    #[must_use]
    pub fn slab_region(&self) -> (NonNull<u8>, usize) {
        (self.shared.slab.base, self.shared.geometry.slab_bytes())
    }

    /// The newest whole copy of the streamer's scratch; `None` if none was ever stored.
    #[must_use]
    pub fn stream_state(&self) -> Option<StreamState> {
        let copies = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state::load(&copies).map(|(_, state)| state)
    }

    /// Stores the streamer's scratch. Survives the process, not the machine; killed inside, the previous one stays.
    pub fn set_stream_state(&self, state: &StreamState) {
        let copies = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state::store(&copies, state);
    }

    /// Notes an orderly stop: nothing is in the ring or reserved. `false`, and nothing noted, if something is. The caller clears
    /// its durable flag ([`crate::InUse`]) afterwards.
    pub fn mark_clean(&self) -> bool {
        let empty = self.used_descriptors() == 0;
        if empty {
            // Release: after everything that emptied the ring.
            self.shared.clean().store(1, Ordering::Release);
        }
        empty
    }

    pub(crate) fn backing(&self) -> &Backing {
        self.shared.backing.as_ref().expect("set by `on`; absent only in the models, which have no Ring")
    }
}

impl Dormant {
    /// What was found.
    #[must_use]
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// As [`Ring::bitmap`]: to mark what [`Recovery::writing`] reports.
    #[must_use]
    pub fn bitmap(&self, volume: u16, which: Which) -> Option<Bitmap> {
        self.ring.bitmap(volume, which)
    }

    /// As [`Ring::volumes`].
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.ring.volumes()
    }

    /// As [`Ring::set_stream_state`]: to open an event before anything is marked.
    pub fn set_stream_state(&self, state: &StreamState) {
        self.ring.set_stream_state(state);
    }

    /// Frees what died with the last process, turns unpublished positions into no-ops and hands the ring out. What
    /// [`Recovery::writing`] reported is forgotten from here on. A closed ring stays closed.
    #[must_use]
    pub fn resume(self) -> Ring {
        resume(&self.ring.shared, &self.survey);
        self.ring
    }
}

fn check_identity(found: &RingIdentity, expected: &RingIdentity) -> Result<(), Error> {
    // The boot first: after it, nothing else matters.
    if found.boot != expected.boot {
        return Err(Error::OtherBoot);
    }
    let fields = [
        ("vault", found.vault == expected.vault),
        ("group", found.group == expected.group),
        ("host", found.host == expected.host),
        ("generation", found.generation == expected.generation),
    ];
    if let Some((field, _)) = fields.into_iter().find(|(_, same)| !same) {
        return Err(Error::OtherIdentity { field });
    }
    if found.incarnation != expected.incarnation {
        return Err(Error::OtherIncarnation { found: found.incarnation, expected: expected.incarnation });
    }
    Ok(())
}

fn write_header(mapping: &Mapping, header: &[u8; HEADER_BYTES]) {
    let ptr = mapping.at(0, HEADER_BYTES).as_ptr();
    // SAFETY: HEADER_BYTES bytes at `ptr` lie in the mapping (`at`), which nobody else has yet: the backing's lock is ours and no
    // view was made. The magic's eight bytes are written by the second copy.
    unsafe { std::ptr::copy_nonoverlapping(header[8..].as_ptr(), ptr.add(8), HEADER_BYTES - 8) };
    // Keeps the compiler from moving the magic forward; a kill sees stores in program order.
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), ptr, 8) };
}

fn read_header(mapping: &Mapping) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let ptr = mapping.at(0, HEADER_BYTES).as_ptr();
    // SAFETY: HEADER_BYTES bytes at `ptr` lie in the mapping (`at`), and nobody writes them while the backing's lock is ours.
    unsafe { std::ptr::copy_nonoverlapping(ptr, header.as_mut_ptr(), HEADER_BYTES) };
    header
}
