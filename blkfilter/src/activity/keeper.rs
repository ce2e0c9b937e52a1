//! The owner of the log's file: reads it at the start, makes extents active and lets them leave.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use farshore_proto::states::{Limit, MachineDoc, StateDoc};
use farshore_proto::{GroupId, LogMark, SLOT_BYTES, VolumeIndex};
use farshore_uring::StorageFile;

use super::format::{self, ANCESTORS_MAX, BLOCK, CHANGES_MAX, PLACES, Read, Superblock, Transaction};
use super::marks::Marks;
use super::{
    ACTIVE, ActivityLog, EXTENT_BYTES, EXTENT_SLOTS, Extent, INSIDE, PLACE_SHIFT, USED, VolumeActivity, VolumeKey,
    place_of, raise,
};

/// Most transactions of one turn, so that those of the last one are still in the ring.
const TURN_TRANSACTIONS: usize = 64;
const _: () = assert!((*PLACES.end() as usize).div_ceil(format::SLICE) + TURN_TRANSACTIONS < format::TRANSACTIONS);

/// What a log is made for.
#[derive(Clone, Copy, Debug)]
pub struct KeeperConfig {
    /// Extents of 4 MiB that can be active at once, over all volumes of the host: 4 to 16,384. More: fewer activations, more to compare
    /// after a crash.
    pub places: u32,
    /// Whose log it is; another's is not touched.
    pub owner: [u8; 16],
}

/// What was found where the log should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// Nothing: a new one is made.
    New,
    /// A whole log.
    Whole,
    /// What is left of one cannot be relied on: a new one is made. Why.
    Damaged(String),
}

/// What the log says of the life before this one.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Whether it says anything.
    pub found: Found,
    /// Where the last life ended, and where those before it did, as far as the target may not have heard of the next: newest first. None
    /// of a log that is not whole.
    pub lives: Vec<LogMark>,
    active: Vec<Extent>,
    marks: Vec<(Extent, u64)>,
}

impl Loaded {
    /// Ranges of a volume that may differ: first byte and bytes. Some may lie behind its end, if it had another size.
    #[must_use]
    pub fn ranges(&self, group: &GroupId, volume: VolumeIndex) -> Vec<(u64, u64)> {
        let key = VolumeKey::new(group, volume);
        let start = |extent: &Extent| u64::from(extent.number) * EXTENT_BYTES;
        let active = self.active.iter().filter(|extent| extent.volume == key).map(|it| (start(it), EXTENT_BYTES));
        let marked = self.marks.iter().filter(|(extent, _)| extent.volume == key).flat_map(|(extent, mask)| {
            let bits = (0..EXTENT_SLOTS).filter(move |bit| mask & (1 << bit) != 0);
            bits.map(move |bit| (start(extent) + bit * SLOT_BYTES, SLOT_BYTES))
        });
        active.chain(marked).collect()
    }

    /// Extents that were active.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active.len()
    }

    /// Which they are.
    #[must_use]
    pub fn active_extents(&self) -> &[Extent] {
        &self.active
    }

    /// Extents of which some slots are marked, with a bit for each slot.
    #[must_use]
    pub fn marked_extents(&self) -> &[(Extent, u64)] {
        &self.marks
    }
}

/// What a turn came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turn {
    /// Invariant 1 of the log holds: nothing has gone past it that it does not cover by now.
    pub upheld: bool,
    /// No flush of a backing device has failed in this life. Otherwise nobody knows what the devices hold, in this life and in those that
    /// follow it, until the host's next boot: a later flush that ends well does not bring back what the failed one dropped.
    pub stable: bool,
    /// Nothing more can be made active before a flush ([`Keeper::poll_flush`]) has ended.
    pub starved: bool,
}

/// What somebody wants of the keeper beside extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Order {
    /// What the log has of this volume is to be taken over, and what is missing of it elsewhere is to be marked.
    Settle(VolumeKey),
    /// The volume is gone.
    Forget(VolumeKey),
}

/// A place of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Empty,
    /// Its owner is active.
    Active,
    /// Its owner has left, in memory; on disk it stands there until the place has another.
    Left,
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "a place of the activity log",
    file: file!(),
    owner: "`Keeper`, the thread `farshore-log`",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc { state: "empty", limit: Limit::Rest, exit: "an extent is written to" },
    StateDoc {
        state: "active",
        limit: Limit::None(
            "as long as it is written to, or not flushed, or neither durable at the target nor marked; guests that wait for a place go on after `stall_max`",
        ),
        exit: "places are short, its device was flushed, and all of it is durable or marked",
    },
    StateDoc { state: "left", limit: Limit::Rest, exit: "its owner is written to again, or another takes its place" },
];
const _: fn(&Place) -> &StateDoc = |place| match place {
    Place::Empty => &STATES[0],
    Place::Active => &STATES[1],
    Place::Left => &STATES[2],
};

/// Flushes that are needed so that extents can leave; to be run on a thread of its own: it blocks.
#[must_use = "extents cannot leave before it has run"]
pub struct FlushJob {
    volumes: Vec<Arc<VolumeActivity>>,
    urgent: bool,
}

impl FlushJob {
    /// Somebody waits for it; else it is ahead of need.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        self.urgent
    }

    /// Flushes. Then [`Keeper::handle_flushed`]. `false`: not all could be; extents of those stay.
    #[must_use]
    pub fn run(self) -> bool {
        let mut all = true;
        for volume in self.volumes {
            if let Err(error) = volume.flush() {
                tracing::debug!(volume = ?volume.key, %error, "a volume could not be flushed for the activity log");
                all = false;
            }
        }
        all
    }
}

impl std::fmt::Debug for FlushJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlushJob").field("volumes", &self.volumes.len()).finish()
    }
}

/// The one owner of a log's file. [`Self::open`], then [`Self::begin`], then [`Self::turn`] whenever it is waked; after an error of
/// either, [`Self::begin`] again. All of them block.
pub struct Keeper<F> {
    log: Arc<ActivityLog>,
    file: Arc<F>,
    id: [u8; 16],
    owner: [u8; 16],
    session: u64,
    ancestors: Vec<LogMark>,
    /// Number of the last transaction written, and of the last that is durable.
    number: u64,
    durable: u64,
    table: Vec<Option<Extent>>,
    state: Vec<Place>,
    /// Places that may be given away, oldest first; some have been taken again by their owner.
    spare: VecDeque<u32>,
    is_spare: Vec<bool>,
    /// Places that are not active; all of them are spare.
    idle: usize,
    owners: BTreeMap<Extent, u32>,
    hand: usize,
    marks: Marks,
    /// Extents that are to become active.
    waiting: VecDeque<Extent>,
    /// Orders, which go before.
    orders: VecDeque<Order>,
    flushing: bool,
    /// A flush has ended, and there was no place all the same.
    stuck: bool,
    /// An extent could leave, but for a flush.
    held_by_flush: bool,
    wants_flush: bool,
    /// The superblock is not on disk.
    fresh: bool,
    /// Blocks of transactions that are damaged and had their time, or are of a batch that nobody believes: they would be taken for more, once
    /// the next ones come near.
    rotten: Vec<u64>,
    /// Not one turn has failed since the last [`Self::begin`].
    sound: bool,
    /// When so many were answered, everything that went past the log is covered.
    owed: u64,
    /// Extents that have left.
    left: u64,
}

impl<F> std::fmt::Debug for Keeper<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("number", &self.number).finish_non_exhaustive()
    }
}

impl<F: StorageFile> Keeper<F> {
    /// Reads the log in `file`. `random`: an id for a new log, and a number of this life that no other has (not 0).
    ///
    /// # Errors
    /// The file cannot be read; it holds the log of another owner, or of a newer version (both as `InvalidData`): nothing is touched then.
    pub fn open(file: Arc<F>, config: KeeperConfig, random: ([u8; 16], u64)) -> io::Result<(Self, Loaded)> {
        let read = read(&*file, Some(config.owner))?;
        let (new_id, session) = random;
        let loaded = read.loaded;
        let places = config.places.clamp(*PLACES.start(), *PLACES.end());
        let mut keeper = Self {
            log: ActivityLog::new(places),
            file,
            id: read.id.filter(|_| read.places == places).unwrap_or(new_id),
            owner: config.owner,
            session: session.max(1),
            ancestors: loaded.lives.iter().copied().take(ANCESTORS_MAX).collect(),
            number: read.number,
            durable: read.number,
            table: vec![None; places as usize],
            state: vec![Place::Empty; places as usize],
            spare: VecDeque::new(),
            is_spare: vec![false; places as usize],
            idle: places as usize,
            owners: BTreeMap::new(),
            hand: 0,
            marks: read.marks,
            waiting: VecDeque::new(),
            orders: VecDeque::new(),
            flushing: false,
            stuck: false,
            held_by_flush: false,
            wants_flush: false,
            fresh: read.id.is_none() || read.places != places,
            rotten: read.rotten,
            sound: false,
            owed: 0,
            left: 0,
        };
        // Where they stand on disk, if that goes on: wherever `begin` is cut off, the table is the same. *(Packed anew, one that moves to
        // an earlier place would be in neither.)*
        let stays = keeper.id == read.id.unwrap_or_default();
        let found: Vec<(u32, Extent)> = match stays {
            true => (0..).zip(&read.table).filter_map(|(place, owner)| Some((place, (*owner)?))).collect(),
            false => (0..).zip(loaded.active.iter().copied()).collect(),
        };
        for (place, extent) in found {
            if place >= places {
                // The table has become smaller.
                keeper.marks.add(extent, u64::MAX)?;
            } else if let std::collections::btree_map::Entry::Vacant(entry) = keeper.owners.entry(extent) {
                entry.insert(place);
                keeper.table[place as usize] = Some(extent);
                keeper.state[place as usize] = Place::Active;
                keeper.idle -= 1;
            }
        }
        for place in 0..places {
            if keeper.state[place as usize] == Place::Empty {
                keeper.give(place);
            }
        }
        Ok((keeper, loaded))
    }

    /// What queues share with the keeper.
    #[must_use]
    pub fn log(&self) -> &Arc<ActivityLog> {
        &self.log
    }

    /// Writes all of the log: the first time, and after an error. Durable when this returns.
    ///
    /// # Errors
    /// The file's; the log on disk is then as before, or cannot be relied on.
    pub fn begin(&mut self) -> io::Result<()> {
        // What was written and not made durable is believed by nobody: all of the table follows.
        self.durable = self.number;
        self.marks.change_all();
        if self.fresh {
            let places = u32::try_from(self.table.len()).expect("at most 16,384");
            let superblock = Superblock { id: self.id, owner: self.owner, places };
            self.file.write_at(&superblock.encode(), 0)?;
            // From here on no transaction of an earlier log is believed, whatever becomes of the next.
            self.file.sync()?;
            // All of it, so that later writes need no room and change no file system's maps.
            self.file.write_at(&vec![0; (format::FIRST_PAGE - 1) * BLOCK], BLOCK as u64)?;
            Marks::clear(&*self.file, &self.id)?;
        }
        for number in &self.rotten {
            self.file.write_at(&[0; BLOCK], format::transaction_at(*number))?;
        }
        self.marks.write(&*self.file, &self.id)?;
        self.file.sync()?;
        self.rotten.clear();
        let places = u32::try_from(self.table.len()).expect("at most 16,384");
        for _ in 0..format::slices(places) {
            self.write_transaction(Vec::new())?;
        }
        self.file.sync()?;
        self.fresh = false;
        self.sound = true;
        self.made_durable();
        Ok(())
    }

    /// The target has a batch of this life: it knows of no earlier one any more.
    pub fn handle_heard(&mut self) {
        self.ancestors.clear();
    }

    /// A flush job has been run.
    pub fn handle_flushed(&mut self) {
        self.flushing = false;
        self.stuck = true;
    }

    /// What is to be flushed so that extents can leave. One at a time.
    #[must_use]
    pub fn poll_flush(&mut self) -> Option<FlushJob> {
        if self.flushing || !std::mem::take(&mut self.wants_flush) {
            return None;
        }
        let volumes: Vec<_> = self.log.volumes().values().cloned().collect();
        let urgent = !self.waiting.is_empty();
        self.flushing = !volumes.is_empty();
        self.flushing.then_some(FlushJob { volumes, urgent })
    }

    /// Answers what was asked for, as far as it can without waiting for a flush, and lets extents leave ahead of need.
    ///
    /// # Errors
    /// The file's, or that there is no room for marks. What was asked for is not lost: [`Self::begin`], then a turn, answers it.
    pub fn turn(&mut self) -> io::Result<Turn> {
        if !self.sound {
            return Err(not_sound());
        }
        let result = self.answer();
        self.sound = result.is_ok();
        self.publish_marked();
        let starved = result?;
        if self.log.passing.load(Ordering::Acquire) && !starved {
            // All that had asked by the begin of this turn are answered. Who asked since may have gone past: see `owed`.
            self.log.passing.store(false, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            self.owed = self.log.asked();
        }
        let stable = !self.log.unstable.load(Ordering::Acquire);
        let upheld = stable && !self.log.passes() && self.log.answered() >= self.owed;
        Ok(Turn { upheld, stable, starved })
    }

    /// Answers what can be answered. `true`: more is asked for than there are places.
    fn answer(&mut self) -> io::Result<bool> {
        {
            let mut asked = self.log.asked_list();
            self.waiting.extend(asked.activations.drain(..));
            self.orders.extend(asked.orders.drain(..));
        }
        while let Some(order) = self.orders.front().copied() {
            match order {
                Order::Settle(volume) => self.settle(volume)?,
                Order::Forget(volume) => self.forget(&|known| known != volume),
            }
            self.orders.pop_front();
            self.log.obeyed_count.fetch_add(1, Ordering::AcqRel);
        }
        self.make_room()?;
        let (mut changes, mut answered) = (Vec::new(), Vec::new());
        while changes.len() < TURN_TRANSACTIONS * CHANGES_MAX
            && let Some(extent) = self.waiting.front().copied()
            && self.place_for(extent, &mut changes)
        {
            self.waiting.pop_front();
            answered.push(extent);
        }
        if let Err(error) = self.write(&changes) {
            // Nobody has heard anything: all of them are answered when the log has been written anew.
            answered.into_iter().rev().for_each(|extent| self.waiting.push_front(extent));
            return Err(error);
        }
        let mut volumes = BTreeMap::new();
        for extent in &answered {
            if let Some(place) = self.owners.get(extent)
                && let Some(volume) = self.log.volume(extent.volume)
            {
                self.activate(&volume, *extent, *place);
                volumes.insert(extent.volume, volume);
            }
        }
        let count = u64::try_from(answered.len()).expect("a count");
        self.log.answered_count.fetch_add(count, Ordering::AcqRel);
        volumes.values().for_each(|volume| volume.wake_queues());
        self.stuck = false;
        let wants = !self.waiting.is_empty() || self.idle < self.low_water();
        self.wants_flush |= wants && self.held_by_flush;
        Ok(!self.waiting.is_empty())
    }

    /// Lets extents leave for those that wait, and ahead of need.
    fn make_room(&mut self) -> io::Result<()> {
        let (needed, low) = (self.waiting.len(), self.low_water());
        self.held_by_flush = false;
        if self.idle < needed + low {
            self.let_leave(needed + low + low / 2, Leave::Durable)?;
        }
        if self.idle < needed + low / 2 {
            // The link is slow, or down.
            self.let_leave(needed + low, Leave::Marked)?;
        }
        if self.stuck && self.idle < needed {
            // A device cannot be flushed, or a volume is not there.
            self.let_leave(needed, Leave::Unflushed)?;
        }
        // One that is there after the flush has waited for it in vain.
        self.held_by_flush |= self.idle < needed;
        Ok(())
    }

    /// Places that are kept spare.
    fn low_water(&self) -> usize {
        self.table.len() / 8
    }

    /// Finds a place for `extent`; `false`: there is no spare one. A change of the table is added to `changes`.
    fn place_for(&mut self, extent: Extent, changes: &mut Vec<(u32, Option<Extent>)>) -> bool {
        if let Some(place) = self.owners.get(&extent) {
            // It is, or still stands, in the table on disk.
            let before = std::mem::replace(&mut self.state[*place as usize], Place::Active);
            self.idle -= usize::from(before != Place::Active);
            return true;
        }
        let place = loop {
            let Some(place) = self.spare.pop_front() else { return false };
            self.is_spare[place as usize] = false;
            if self.state[place as usize] != Place::Active {
                break place;
            }
        };
        if let Some(old) = self.table[place as usize].replace(extent) {
            self.owners.remove(&old);
            if let Some(volume) = self.log.volume(old.volume) {
                forget_place(&volume, old, place);
            }
        }
        self.owners.insert(extent, place);
        self.state[place as usize] = Place::Active;
        self.idle -= 1;
        let of = &self.log.places[place as usize];
        of.position.store(0, Ordering::Release);
        of.stamp.store(0, Ordering::Release);
        changes.push((place, Some(extent)));
        true
    }

    fn give(&mut self, place: u32) {
        if !std::mem::replace(&mut self.is_spare[place as usize], true) {
            self.spare.push_back(place);
        }
    }

    /// What is changed on disk: marks first, then the table. Durable when this returns.
    fn write(&mut self, changes: &[(u32, Option<Extent>)]) -> io::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.write_marks()?;
        for chunk in changes.chunks(CHANGES_MAX) {
            self.write_transaction(chunk.to_vec())?;
        }
        self.file.sync()?;
        self.made_durable();
        Ok(())
    }

    fn write_transaction(&mut self, changes: Vec<(u32, Option<Extent>)>) -> io::Result<()> {
        let places = u32::try_from(self.table.len()).expect("at most 16,384");
        self.number += 1;
        let slice = format::slice_of(self.number, places);
        let transaction = Transaction {
            at: LogMark { session: self.session, number: self.number },
            base: self.durable,
            places,
            ancestors: self.ancestors.clone(),
            changes,
            first: slice.start,
            slice: self.table[slice.start as usize..slice.end as usize].to_vec(),
        };
        self.file.write_at(&transaction.encode(&self.id), format::transaction_at(self.number))
    }

    fn made_durable(&mut self) {
        self.durable = self.number;
        self.log.session.store(self.session, Ordering::Release);
        // Release: before any extent becomes active by it, so that a batch with a write to that extent has this number.
        self.log.number.store(self.number, Ordering::Release);
    }

    fn activate(&self, volume: &VolumeActivity, extent: Extent, place: u32) {
        let Some(word) = volume.extents.get(extent.number as usize) else { return };
        let bits = (u64::from(place) + 1) << PLACE_SHIFT | ACTIVE | USED;
        let keep = |word: u64| Some(word & INSIDE | bits);
        // Release: behind the sync. Always succeeds.
        let _ = word.fetch_update(Ordering::SeqCst, Ordering::Acquire, keep);
        // Whoever was inside before and has left without seeing the place, had its ticket before this look.
        fence(Ordering::SeqCst);
        let of = &self.log.places[place as usize];
        raise(&of.position, volume.ring.head());
        raise(&of.stamp, volume.flushes_begun.load(Ordering::SeqCst));
    }

    /// Lets extents leave, in memory, until `wanted` places are spare: oldest first, those that nobody has used since the last look.
    fn let_leave(&mut self, wanted: usize, which: Leave) -> io::Result<()> {
        let mut cache: BTreeMap<VolumeKey, Option<Arc<VolumeActivity>>> = BTreeMap::new();
        for _ in 0..2 * self.table.len() {
            if self.idle >= wanted {
                break;
            }
            let place = self.hand;
            self.hand = (self.hand + 1) % self.table.len();
            let (Place::Active, Some(extent)) = (self.state[place], self.table[place]) else { continue };
            let volume = cache.entry(extent.volume).or_insert_with(|| self.log.volume(extent.volume));
            let settled = volume.as_ref().filter(|volume| volume.settled.load(Ordering::Acquire));
            let left = match settled {
                Some(volume) => leave(volume, extent, &self.log.places[place], which),
                // Nobody is inside by what the log says; all of it is compared when the volume is there.
                None if which == Leave::Unflushed && volume.is_none() => Ok((u64::MAX, u64::MAX)),
                None => Err(Held::Otherwise),
            };
            match left {
                Ok((mask, until)) => self.set_mark(extent, mask, until)?,
                Err(held) => {
                    self.held_by_flush |= held == Held::ByFlush;
                    continue;
                }
            }
            self.state[place] = Place::Left;
            self.left += 1;
            self.idle += 1;
            self.give(u32::try_from(place).expect("at most 16,384"));
        }
        Ok(())
    }

    /// Marks an extent. Where there is no room for more marks, it goes on without: the log does not cover everything any more, in this
    /// life.
    fn set_mark(&mut self, extent: Extent, mask: u64, until: u64) -> io::Result<()> {
        match self.marks.set(extent, mask, until) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                if !self.log.unstable.swap(true, Ordering::AcqRel) {
                    tracing::warn!(%error, "the activity log does not cover everything until the next start");
                }
                Ok(())
            }
            marked => marked,
        }
    }

    /// Takes over a volume's extents from an earlier life, and marks what it misses, or sync has under way, outside of them.
    fn settle(&mut self, key: VolumeKey) -> io::Result<()> {
        let Some(volume) = self.log.volume(key) else { return Ok(()) };
        self.marks.keep_until(key, volume.ring.head());
        let first = Extent { volume: key, number: 0 };
        let last = Extent { volume: key, number: u32::MAX };
        for (extent, place) in self.owners.range(first..=last) {
            if self.state[*place as usize] == Place::Active {
                self.activate(&volume, *extent, *place);
            }
        }
        let extents = u32::try_from(volume.extents.len()).expect("a volume has below 2^32 extents");
        for number in 0..extents {
            let extent = Extent { volume: key, number };
            let mask = volume.marked(number);
            if mask != 0 && !self.is_active(extent) {
                let (before, until) = self.marks.get(extent);
                self.set_mark(extent, before | mask, until)?;
            }
        }
        self.write_marks()?;
        volume.settled.store(true, Ordering::Release);
        Ok(())
    }

    fn is_active(&self, extent: Extent) -> bool {
        self.owners.get(&extent).is_some_and(|place| self.state[*place as usize] == Place::Active)
    }

    /// Forgets volumes that `known` does not know, in the table and the marks.
    fn forget(&mut self, known: &dyn Fn(VolumeKey) -> bool) {
        for place in 0..self.table.len() {
            let Some(extent) = self.table[place].filter(|extent| !known(extent.volume)) else { continue };
            self.owners.remove(&extent);
            self.table[place] = None;
            let before = std::mem::replace(&mut self.state[place], Place::Empty);
            self.idle += usize::from(before == Place::Active);
            self.give(u32::try_from(place).expect("at most 16,384"));
        }
        self.marks.retain(known);
    }

    /// Forgets what the log has of volumes that do not exist any more. Before [`Self::begin`], or at any time.
    pub fn retain(&mut self, known: impl Fn(VolumeKey) -> bool) {
        self.forget(&known);
    }

    /// Clears marks that are not needed any more, durably, as far as it gets in a few milliseconds. For every few seconds, and when a resync
    /// has ended. `true`: there is more to look at, after a turn.
    ///
    /// # Errors
    /// As [`Self::turn`].
    pub fn tidy(&mut self) -> io::Result<bool> {
        if !self.sound {
            return Err(not_sound());
        }
        let (log, owners, state) = (&self.log, &self.owners, &self.state);
        let mut wants_flush = false;
        let mut known: BTreeMap<VolumeKey, Option<Arc<VolumeActivity>>> = BTreeMap::new();
        let more = self.marks.tidy(|extent, until| {
            // While it is active, on disk, nothing has to be marked; what it will need is found when it leaves.
            if owners.get(&extent).is_some_and(|place| state[*place as usize] == Place::Active) {
                return Some(0);
            }
            let volume = known.entry(extent.volume).or_insert_with(|| log.volume(extent.volume)).as_ref()?;
            let is_known = volume.settled.load(Ordering::Acquire) && volume.durable.load(Ordering::Acquire) >= until;
            // What an earlier life has marked may not be stable yet.
            let stable = volume.flushes_ended.load(Ordering::Acquire) > 0;
            wants_flush |= is_known && !stable;
            (is_known && stable).then(|| volume.marked(extent.number))
        });
        self.wants_flush |= wants_flush;
        let written = self.write_marks();
        self.sound = written.is_ok();
        self.publish_marked();
        written.map(|()| more)
    }

    fn publish_marked(&self) {
        self.log.marked.store(self.marks.count(), Ordering::Relaxed);
    }

    fn write_marks(&mut self) -> io::Result<()> {
        if self.marks.is_changed() {
            self.marks.write(&*self.file, &self.id)?;
            self.file.sync()?;
        }
        Ok(())
    }

    /// Extents that have left since [`Self::open`].
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Extents that have a mark.
    #[must_use]
    pub fn marked(&self) -> u64 {
        self.marks.count()
    }
}

/// Which extents may leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leave {
    /// Stable on their device and durable at the target.
    Durable,
    /// Those, and what is not durable: it is marked.
    Marked,
    /// Those, and what is not stable, or of a volume that is not there: it is marked as a whole, for the rest of this life.
    Unflushed,
}

/// Why an extent stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Held {
    /// Nothing else than that its device was not flushed since its last write.
    ByFlush,
    Otherwise,
}

/// Takes an extent's activity away, in memory, if nobody is inside and nobody has used it since the last look. Gives what has to be marked of
/// it, and the ring position that must be durable before that may be forgotten.
fn leave(volume: &VolumeActivity, extent: Extent, place: &super::Place, which: Leave) -> Result<(u64, u64), Held> {
    let stable = || place.stamp.load(Ordering::Acquire) < volume.flushes_ended.load(Ordering::Acquire);
    let position = || place.position.load(Ordering::Acquire);
    let durable = |position: u64| position <= volume.durable.load(Ordering::Acquire);
    let may = || (stable() || which == Leave::Unflushed) && (durable(position()) || which != Leave::Durable);
    // None: the volume has shrunk.
    let Some(word) = volume.extents.get(extent.number as usize) else { return Ok((0, 0)) };
    let seen = word.load(Ordering::Acquire);
    if seen & INSIDE != 0 {
        return Err(Held::Otherwise);
    }
    if !may() {
        let by_flush = !stable() && (durable(position()) || which != Leave::Durable);
        return Err(if by_flush { Held::ByFlush } else { Held::Otherwise });
    }
    if seen & USED != 0 {
        word.fetch_and(!USED, Ordering::AcqRel);
        return Err(Held::Otherwise);
    }
    if word.compare_exchange(seen, seen & !ACTIVE, Ordering::SeqCst, Ordering::Acquire).is_err() {
        return Err(Held::Otherwise);
    }
    // Somebody may have come and gone between the first look and the exchange. From here on nobody is inside without asking.
    if !may() {
        word.fetch_or(ACTIVE, Ordering::SeqCst);
        return Err(Held::Otherwise);
    }
    let position = position();
    match (stable(), durable(position)) {
        // What the device loses is compared, too.
        (false, _) => Ok((volume.all_slots(extent.number), u64::MAX)),
        (true, false) => Ok((volume.all_slots(extent.number), position)),
        (true, true) => Ok((volume.marked(extent.number), 0)),
    }
}

/// The extent's place has another owner.
fn forget_place(volume: &VolumeActivity, extent: Extent, place: u32) {
    let Some(word) = volume.extents.get(extent.number as usize) else { return };
    let none = |word: u64| (place_of(word) == Some(place as usize)).then_some(word & ((1 << PLACE_SHIFT) - 1));
    // `Err`: it has none, or another.
    let _ = word.fetch_update(Ordering::SeqCst, Ordering::Acquire, none);
}

fn not_sound() -> io::Error {
    io::Error::other("the activity log has to be written anew first")
}

struct ReadLog {
    id: Option<[u8; 16]>,
    owner: [u8; 16],
    places: u32,
    number: u64,
    table: Vec<Option<Extent>>,
    marks: Marks,
    rotten: Vec<u64>,
    loaded: Loaded,
}

fn nothing(found: Found) -> ReadLog {
    let loaded = Loaded { found, lives: Vec::new(), active: Vec::new(), marks: Vec::new() };
    ReadLog {
        id: None,
        owner: [0; 16],
        places: 0,
        number: 0,
        table: Vec::new(),
        marks: Marks::default(),
        rotten: Vec::new(),
        loaded,
    }
}

/// An activity log as it lies there, for people.
#[derive(Debug)]
pub struct Look {
    /// Whose it is.
    pub owner: [u8; 16],
    /// Extents that can be active.
    pub places: u32,
    /// Number of the newest transaction that counts.
    pub number: u64,
    /// What an agent that starts after a crash of the host would find.
    pub loaded: Loaded,
    /// Blocks of transactions that are damaged, or newer than what counts, as after a write that was cut off; the log is whole nevertheless.
    pub rotten: Vec<u64>,
}

/// Reads a log, whoever owns it, and writes nothing. Of a log in use it tells what it saw on its way.
///
/// # Errors
/// The file cannot be read; `InvalidData`: it holds none, one of a newer version, or one that cannot be relied on, with the reason.
pub fn look(file: &impl StorageFile) -> io::Result<Look> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let ReadLog { owner, places, number, rotten, loaded, .. } = read(file, None)?;
    match &loaded.found {
        Found::Whole => Ok(Look { owner, places, number, loaded, rotten }),
        Found::New => Err(invalid("holds no activity log, or one that was never begun".into())),
        Found::Damaged(reason) => Err(invalid(format!("{reason}: after a crash of the host everything is compared"))),
    }
}

/// Reads a log, of anybody or of `owner` only. Rules: `docs/formats/activity-log.md`.
fn read(file: &impl StorageFile, owner: Option<[u8; 16]>) -> io::Result<ReadLog> {
    let invalid = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
    let damaged = |text: &str| Ok(nothing(Found::Damaged(text.to_owned())));
    let len = file.len()?;
    if len == 0 {
        return Ok(nothing(Found::New));
    }
    if len < (format::FIRST_PAGE * BLOCK) as u64 {
        return damaged("it is too short");
    }
    let mut block = [0; BLOCK];
    file.read_at(&mut block, 0)?;
    let superblock = match Superblock::decode(&block) {
        Err(version) => return invalid(format!("is an activity log of version {version}, this build reads 1")),
        Ok(Read::Empty) => return Ok(nothing(Found::New)),
        Ok(Read::Damaged) => return damaged("its first block is damaged, or it is no activity log"),
        Ok(Read::Whole(superblock)) if owner.is_some_and(|owner| superblock.owner != owner) => {
            return invalid("is the activity log of another host".into());
        }
        Ok(Read::Whole(superblock)) if !PLACES.contains(&superblock.places) => {
            return damaged("its table has an impossible size");
        }
        Ok(Read::Whole(superblock)) => superblock,
    };
    let id = superblock.id;
    let mut blocks = Vec::new();
    for number in 0..format::TRANSACTIONS as u64 {
        file.read_at(&mut block, format::transaction_at(number))?;
        blocks.push(Transaction::decode(&block, &id));
    }
    let newest = match last_complete(&blocks, superblock.places) {
        Ok(Some(newest)) => newest,
        // Made, and never begun: nothing was ever written under it.
        Ok(None) => return Ok(nothing(Found::New)),
        Err(reason) => return damaged(reason),
    };
    let Some(marks) = Marks::read(file, &id)? else { return damaged("a page of marks is damaged") };
    let mut table = vec![None; superblock.places as usize];
    for number in newest.at.number + 1 - format::slices(superblock.places)..=newest.at.number {
        let Some(transaction) = at(&blocks, number) else { return damaged("a transaction is missing") };
        for (place, owner) in &transaction.changes {
            table[*place as usize] = *owner;
        }
        for (place, owner) in (transaction.first..).zip(&transaction.slice) {
            table[place as usize] = *owner;
        }
    }
    let mut lives = vec![newest.at];
    lives.extend(newest.ancestors.iter().copied());
    let loaded = Loaded {
        found: Found::Whole,
        lives,
        active: table.iter().copied().flatten().collect::<BTreeSet<_>>().into_iter().collect(),
        marks: marks.iter().collect(),
    };
    let is_rotten = |block: &Read<Transaction>| match block {
        Read::Empty => false,
        Read::Damaged => true,
        Read::Whole(transaction) => transaction.at.number > newest.at.number,
    };
    let rotten = (0..).zip(&blocks).filter(|(_, block)| is_rotten(block)).map(|(number, _)| number).collect();
    let Superblock { owner, places, .. } = superblock;
    Ok(ReadLog { id: Some(id), owner, places, number: newest.at.number, table, marks, rotten, loaded })
}

/// The transaction of this number, if it is still in the ring.
fn at(blocks: &[Read<Transaction>], number: u64) -> Option<&Transaction> {
    match &blocks[format::index_of(number)] {
        Read::Whole(transaction) if transaction.at.number == number => Some(transaction),
        Read::Whole(_) | Read::Empty | Read::Damaged => None,
    }
}

/// The last transaction whose whole batch is there, so that it may have been believed durable. `None`: none was ever.
fn last_complete(blocks: &[Read<Transaction>], places: u32) -> Result<Option<Transaction>, &'static str> {
    let whole = blocks.iter().filter_map(|block| match block {
        Read::Whole(transaction) => Some(transaction),
        Read::Empty | Read::Damaged => None,
    });
    let Some(newest) = whole.max_by_key(|transaction| transaction.at.number) else {
        let any = blocks.contains(&Read::Damaged);
        return if any { Err("its transactions are damaged") } else { Ok(None) };
    };
    // A block that is neither old nor new, where the next ones go, or inside of the last batch: cut off while it was written, or damaged
    // since. Nothing tells which.
    let sane = newest.base < newest.at.number && newest.at.number < 1 << 63;
    let (first, last) = (newest.base + u64::from(sane), newest.at.number.saturating_add(TURN_TRANSACTIONS as u64));
    let suspect = |number: u64| blocks[format::index_of(number)] == Read::Damaged;
    if !sane || last - first >= format::TRANSACTIONS as u64 || (first..=last).any(suspect) {
        return Err("a transaction was cut off, or is damaged");
    }
    let batch_is_whole = (first..=newest.at.number).all(|number| at(blocks, number).is_some());
    let complete = if batch_is_whole {
        newest
    } else if newest.base == 0 {
        return Ok(None);
    } else {
        at(blocks, newest.base).ok_or("its last durable transaction is missing")?
    };
    let needed = format::slices(places);
    if complete.places != places || complete.at.number < needed {
        return Err("its transactions are of another table");
    }
    let run = complete.at.number + 1 - needed..=complete.at.number;
    if run.clone().all(|number| at(blocks, number).is_some_and(|it| it.places == places)) {
        Ok(Some(complete.clone()))
    } else {
        Err("a transaction is missing")
    }
}
