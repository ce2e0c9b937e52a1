//! A volume that comes back in another shape.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::volume::Mode;
use crate::{BackingFile, CaptureGroup, Content, Error, FilterVolume, VolumeSpec};

impl CaptureGroup {
    /// As [`Self::add_volume`], for a volume that has grown, or that the ring knows by another shape: all of it is missing, and it
    /// stays in the points, so that there is none until all of it was compared. The one before has no open queue, and sync does
    /// not have it.
    ///
    /// # Errors
    /// The ring has no room for its bitmaps. Then nothing is captured, and the marks of the one before stay, so that no point is
    /// made.
    pub fn replace_volume<F: BackingFile>(
        self: &Arc<Self>,
        spec: VolumeSpec,
        file: F,
    ) -> Result<Arc<FilterVolume<F>>, Error> {
        let (index, joined) = (spec.index, spec.joined);
        let _claims = self.claims();
        self.epoch.fetch_add(1, Ordering::AcqRel);
        // Held until the new marks are in place: nobody ends an event for want of the old ones.
        let mut events = self.events();
        if joined && !events.open && !self.ring.is_closed() && !self.begin(&mut events) {
            self.close_under(&events);
        }
        if self.ring.volumes().iter().any(|known| known.volume == index.0) {
            self.ring.remove_volume(index.0).map_err(|_| Error::NoVolume(index.0))?;
        }
        let volume = self.insert(VolumeSpec { content: Content::Unknown, ..spec }, file.geometry(), file.flusher())?;
        drop(events);
        self.poke_sync();
        Ok(Arc::new(FilterVolume::new(file, Mode::Captured(Arc::clone(self), volume))))
    }
}
