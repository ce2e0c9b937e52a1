//! A sync that dies.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use farshore_blkfilter::sync::SyncConfig;
use farshore_blkfilter::{BackingFile, Buf, CaptureConfig, CaptureGroup, Content, FilterVolume, VolumeSpec};
use farshore_proto::record::Kind;
use farshore_proto::{Position, SLOT_BYTES, VolumeIndex};
use farshore_uring::{Errno, Extent, FileSlot, Geometry, Io};

use super::rig::{key, name, ring};
use crate::alarms::{Alarms, code};
use crate::shared::sync_alarms;
use crate::sync_thread::{Restarts, SyncOrder, SyncReport, SyncThread};

const SLOTS: u64 = 8;

/// All holes, and a bug in its way to say so.
struct Faulty {
    panics: AtomicU32,
    file: Arc<std::fs::File>,
    /// It cannot be registered.
    closed: bool,
}

impl BackingFile for Faulty {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: SLOTS * SLOT_BYTES,
            logical_block: 512,
            optimal_block: 4096,
            max_request: 1 << 20,
            max_discard: 1 << 20,
            read_only: false,
            discard: true,
        }
    }

    fn register<I: Io<Buf>>(&self, io: &mut I) -> io::Result<FileSlot> {
        match self.closed {
            true => Err(io::ErrorKind::NotConnected.into()),
            false => io.register(Arc::clone(&self.file)),
        }
    }

    fn extents(&self, _offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let left = self.panics.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        assert!(left.is_err(), "a bug that was put here");
        Ok(vec![Extent { len, hole: true, zero: true }])
    }

    fn flusher(&self) -> Box<dyn Fn() -> io::Result<()> + Send + Sync> {
        Box::new(|| Ok(()))
    }
}

fn protect(group: &Arc<CaptureGroup>, index: u16, panics: u32, closed: bool) -> Arc<FilterVolume<Faulty>> {
    let file = Arc::new(tempfile::tempfile().expect("a file"));
    let spec = VolumeSpec {
        index: VolumeIndex(index),
        name: name(&format!("v{index}")),
        id: [u8::try_from(index).expect("few"); 16],
        content: Content::Unknown,
        joined: false,
    };
    group.add_volume(spec, Faulty { panics: panics.into(), file, closed }).expect("room")
}

/// Goal: a sync that panics says so, begins anew, is sound again, and has the volume in the stream in the end.
#[test]
fn a_sync_that_dies_begins_anew() {
    let group = CaptureGroup::new(ring(), CaptureConfig::default());
    let (published, wakes) = sync_channel(1);
    group.set_consumer_waker(move || _ = published.try_send(()));
    let (report, reports) = sync_channel(16);
    let report = move |what| report.send(what).expect("the test listens");
    let restarts = Restarts { first: Duration::ZERO, max: Duration::ZERO };
    let sync = SyncThread::start(Arc::clone(&group), SyncConfig::default(), key(), restarts, report).expect("a thread");
    let mut consumer = group.ring().consumer().expect("the only one");

    sync.tell(SyncOrder::Live { empty: vec![VolumeIndex(0)], from: Position(0) });
    sync.tell(SyncOrder::Add(protect(&group, 0, 3, false)));
    assert_eq!(reports.recv().expect("the thread lives"), SyncReport::Read(VolumeIndex(0)));
    for _ in 0..3 {
        let died = reports.recv().expect("the thread lives");
        assert!(matches!(&died, SyncReport::Died(why) if why.contains("put here")), "{died:?}");
        assert_eq!(reports.recv().expect("the thread lives"), SyncReport::Read(VolumeIndex(0)));
    }
    assert_eq!(reports.recv().expect("the thread lives"), SyncReport::Sound);
    // It asks for all of the volume: whether the target is still empty is not known any more.
    let mut asked = 0;
    while asked < SLOTS * SLOT_BYTES {
        match consumer.next() {
            Some(entry) if entry.desc.kind == Kind::ProbeZero as u8 => asked += entry.desc.length,
            Some(_) => {}
            None if consumer.prepare_sleep() => wakes.recv().expect("the group lives"),
            None => {}
        }
    }
    sync.remove(VolumeIndex(0));
    sync.stop();
    assert!(reports.try_recv().is_err(), "nothing else happened");
}

/// Goal: while sync rests, it lets volumes go, and stops when told.
#[test]
fn a_resting_sync_obeys() {
    let group = CaptureGroup::new(ring(), CaptureConfig::default());
    let (report, reports) = sync_channel(16);
    let report = move |what| report.send(what).expect("the test listens");
    let hour = Duration::from_secs(3600);
    let restarts = Restarts { first: hour, max: hour };
    let sync = SyncThread::start(Arc::clone(&group), SyncConfig::default(), key(), restarts, report).expect("a thread");
    sync.tell(SyncOrder::Live { empty: Vec::new(), from: Position(0) });
    sync.tell(SyncOrder::Add(protect(&group, 0, 1, false)));
    assert_eq!(reports.recv().expect("the thread lives"), SyncReport::Read(VolumeIndex(0)));
    assert!(matches!(reports.recv().expect("the thread lives"), SyncReport::Died(_)));
    assert_eq!(sync.progress(), None);
    sync.remove(VolumeIndex(0));
    sync.stop();
}

/// Goal: what sync reports is an alarm until it is over.
#[test]
fn reports_are_alarms() {
    let group = CaptureGroup::new(ring(), CaptureConfig::default());
    let alarms = Arc::<Alarms>::default();
    let report = sync_alarms(name("g"), Arc::clone(&group), Arc::clone(&alarms));
    let open = || alarms.list(None).into_iter().map(|alarm| (alarm.code, alarm.subject)).collect::<Vec<_>>();
    let (report_all, reports) = sync_channel(16);
    let sync: SyncThread<Faulty> =
        SyncThread::start(Arc::clone(&group), SyncConfig::default(), key(), Restarts::default(), move |what| {
            report_all.send(what).expect("the test listens")
        })
        .expect("a thread");
    sync.tell(SyncOrder::Add(protect(&group, 2, 0, true)));
    report(reports.recv().expect("the thread lives"));
    assert_eq!(open(), [(code::SYNC, "g/v2".to_owned())]);
    report(SyncReport::Died("for the test".into()));
    assert_eq!(open(), [(code::SYNC, "g".to_owned()), (code::SYNC, "g/v2".to_owned())]);
    report(SyncReport::Sound);
    report(SyncReport::Read(VolumeIndex(2)));
    assert_eq!(open(), []);
}
