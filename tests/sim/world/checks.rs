//! What must hold of the points that the target offers, and at the end.

use std::path::PathBuf;
use std::rc::Rc;

use farshore_proto::{PointId, VolumeIndex};
use farshore_target::points::Point;
use farshore_target::verify::verify_journal;
use farshore_uring::{OpenMode, Storage, StorageFile};

use super::{Kind, POINTS_MAX, World};
use crate::faults::Fault;
use crate::history::check_cut;
use crate::site::{Stream, name, open, read_volume, restore_volume, try_read};
use crate::tap::Replay;

impl World {
    fn point_images(&self, stream: &Stream, point: &Point) -> Vec<(usize, Vec<u8>)> {
        let sizes = self.host.sizes();
        let read = |volume: &VolumeIndex| {
            let index = usize::from(volume.0);
            (index, read_volume(stream, *volume, sizes[index], point))
        };
        point.volumes.iter().map(read).collect()
    }

    /// Some of the points that the target offers now.
    pub(super) fn check_points(&mut self, most: usize) {
        if self.site.needs_restart() {
            return;
        }
        let Some(stream) = self.site.stream() else { return };
        // Reading counts as the machine's work: it must not die of the check.
        self.site.spare();
        let all: Vec<Point> = stream.points().iter().cloned().collect();
        for pair in all.windows(2) {
            let (a, b) = (&pair[0], &pair[1]);
            assert!(a.id < b.id, "points are in order");
            assert!(a.time <= b.time, "{} is dated {}, and {} {}", a.id, a.time.0, b.id, b.time.0);
        }
        let horizon = stream.record().horizon;
        for (id, named) in &self.bookmarks {
            let there = all.iter().any(|point| point.id == *id && point.bookmark.as_ref() == Some(named));
            let over = horizon.is_some_and(|horizon| *id <= horizon);
            assert!(there || over, "bookmark {named} ({id}) is gone, and the horizon is {horizon:?}");
        }
        let mut points: Vec<Point> = all.into_iter().filter(|point| point.recoverable).collect();
        points.retain(|point| stream.points().recoverable().any(|offered| offered.id == point.id));
        while points.len() > most {
            // The newest stays.
            let index = self.rng.index(points.len() - 1);
            points.remove(index);
        }
        self.take_unreadable();
        let log = Rc::clone(&self.log);
        let mut replay = Replay::new(&self.host.sizes());
        // Nobody here knows what the batches of a number that was used twice hold.
        let unclear = self.log.borrow().used_again.first().copied().unwrap_or(u64::MAX);
        for point in points.iter().filter(|point| point.id.incarnation.0 < unclear) {
            assert_eq!(stream.check_point(&point.id).as_ref().ok(), Some(point), "an offered point can be had");
            replay.advance(&log.borrow(), point.id.incarnation.0, point.end.0);
            let images = self.point_images(&stream, point);
            // A volume that has not joined gets its data straight into the base: also that of a batch that the target did not get to
            // journal, and that no later life of the ring repeats.
            let exact = point.id.incarnation.0 == 1
                || !self.kinds.iter().any(|(kind, _)| matches!(kind, Kind::Target | Kind::TargetDisk));
            for (volume, image) in images.iter().filter(|_| exact) {
                let differs = image.iter().zip(&replay.images[*volume]).position(|(a, b)| a != b);
                assert_eq!(differs, None, "volume {volume} at {}: first byte that is not the stream's", point.id);
            }
            let cut = self.host.cuts.get(&(point.id.incarnation.0, point.end.0)).copied();
            let cut = cut.unwrap_or_else(|| panic!("{} is no cut that was made", point.id));
            let held: Vec<_> =
                images.iter().map(|(at, image)| (&self.host.volumes[*at].history, image.as_slice())).collect();
            if let Err(why) = check_cut(&held, cut) {
                panic!("step {}: {} of position {}: {why}", self.step, point.id, point.end);
            }
            self.coverage.hit(Fault::Points);
        }
    }

    /// At rest: the newest point is what the source's disks hold, and every older one is what it should be.
    pub(crate) fn check_settled(&mut self) {
        let stream = self.site.stream().expect("the target is up and knows the stream");
        let newest = stream.points().newest().cloned().expect("a point");
        let agent = self.agent.as_ref().expect("it runs");
        assert_eq!(newest.end.0, agent.ring.head(), "all of the ring is in it");
        assert_eq!(newest.id.incarnation.0, self.host.kept.incarnation);
        let sizes = self.host.sizes();
        assert_eq!(newest.volumes.len(), sizes.len(), "all volumes have joined");
        for (volume, image) in self.point_images(&stream, &newest) {
            let disk = self.host.image(volume);
            let history = &self.host.volumes[volume].history;
            let differs = history.difference(&image, &disk);
            assert_eq!(differs, None, "volume {volume}: first byte that differs from the source's disk");
            let index = VolumeIndex(u16::try_from(volume).expect("few"));
            let restored = restore_volume(&stream, index, sizes[volume], &newest);
            assert!(restored == image, "volume {volume} restores to something else than its point");
        }
        self.check_points(POINTS_MAX);
        // Another life of the target offers the same.
        let ids = |stream: &Stream| stream.points().recoverable().map(|point| point.id).collect::<Vec<_>>();
        let before = ids(&stream);
        drop(stream);
        self.site.die_now(&mut self.rng);
        self.site.boot();
        let stream = self.site.stream().expect("opens again");
        let after = ids(&stream);
        // The base alone still holds the horizon's own point, but its row goes with its segment: a restart may forget it.
        let horizon = stream.record().horizon;
        let above = |ids: &[PointId]| ids.iter().copied().filter(|id| Some(*id) != horizon).collect::<Vec<_>>();
        assert_eq!(above(&after), above(&before), "no point is lost or made by a crash at rest");
        assert_eq!(after.last(), before.last(), "nor is the newest, wherever the horizon is");
        self.check_points(3);
        self.check_rot();
    }

    /// A bit that rotted at either side is found, and nothing of it is ever served.
    fn check_rot(&mut self) {
        let stream = self.site.stream().expect("it is up");
        let newest = stream.points().newest().cloned().expect("a point");
        let good = self.point_images(&stream, &newest);
        let folder = stream.id.folder();
        let disk = self.site.copy();
        let journal = folder.join("journal");
        let files: Vec<PathBuf> = disk.list(&journal).expect("there").into_iter().map(|it| journal.join(it)).collect();
        let path = files[self.rng.index(files.len())].clone();
        let len = disk.open(&path, OpenMode::Read).and_then(|file| file.len()).expect("there");
        disk.corrupt(&path, self.rng.below(len), 1 << self.rng.below(8)).expect("there");
        self.coverage.hit(Fault::TargetRot);
        let report = verify_journal(&disk, &journal, None).expect("no disk fails here");
        assert!(!report.faults.is_empty(), "a flipped bit in {} is not found", path.display());
        // It may not open at all: that is said.
        if let Ok(target) = open(&disk)
            && let Ok(stream) = target.stream(&name("db"), None)
            && stream.check_point(&newest.id).is_ok()
        {
            for (volume, image) in &good {
                let index = VolumeIndex(u16::try_from(*volume).expect("few"));
                if let Ok(read) = try_read(&stream, index, image.len() as u64, &newest) {
                    assert!(read == *image, "{} has a flipped bit, which is served", path.display());
                }
            }
        }
        drop(stream);
        self.check_source_rot();
    }

    fn check_source_rot(&mut self) {
        let at = self.rng.index(self.host.volumes.len());
        let volume = &self.host.volumes[at];
        let offset = self.rng.below(volume.disk.size());
        if !volume.history.is_known(offset / 512 * 512, 512) {
            return;
        }
        volume.disk.corrupt(offset, 1 << self.rng.below(8));
        self.coverage.hit(Fault::SourceRot);
        self.lose_target();
        let index = u16::try_from(at).expect("few");
        let mut begun = false;
        for _ in 0..40_000 {
            self.step += 2;
            let (now, step) = (self.now(), self.step);
            self.connect();
            let agent = self.agent.as_mut().expect("it runs");
            if agent.live && !begun {
                agent.begin_verify(index);
                begun = true;
            }
            agent.turn_sync(&mut self.host, now);
            agent.turn_log(&mut self.host, step);
            let (mut found, over) = (std::mem::take(&mut agent.differs), begun && !agent.is_verifying());
            // What could not be read differs, too.
            found.retain(|(of, range)| {
                let history = &self.host.volumes[usize::from(*of)].history;
                (*of == index && range.contains(&offset)) || history.is_known(range.start, range.end - range.start)
            });
            if let Some((volume, range)) = found.first() {
                assert!(*volume == index && range.contains(&offset), "{range:?} of volume {volume} differs: {offset}");
                return;
            }
            assert!(!over, "verify has not found a flipped bit of the source");
            self.turn_streamer();
            self.agent.as_mut().expect("it runs").work(now);
            self.arrive_at_target();
            self.turn_target();
            self.arrive_at_source();
        }
        panic!("verify does not end");
    }
}
