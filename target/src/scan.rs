//! Reading entries back from a segment: for recovery, the background check, dump and verify.

use std::path::Path;

use farshore_proto::batch::{self, BATCH_BYTES_MAX, RecordList};
use farshore_uring::StorageFile;

use crate::entries::Placement;
use crate::error::{Error, IoContext, Kind, Result};
use crate::keys::StreamKeys;
use crate::segment::{self, ALIGN, Entry, Fault, Form, Opening, Owner, Reference};

/// One entry as stored, its checksums right.
#[derive(Debug)]
pub(crate) struct StoredEntry {
    /// Byte of the entry in the segment.
    pub(crate) at: u64,
    /// Its header.
    pub(crate) entry: Entry,
    /// The batch as stored.
    pub(crate) payload: Vec<u8>,
    /// Resolved references.
    pub(crate) references: Vec<Reference>,
}

impl StoredEntry {
    /// Where its frames are. Headers are checked, sealed bytes are not (the entry's checksum covered them).
    ///
    /// # Errors
    /// What is wrong with the stored batch.
    pub(crate) fn placement(&self) -> Result<Placement, Fault> {
        let (_, frames) = segment::stored_frames(&self.payload, false)?;
        let payload_at = self.at + u64::from(self.entry.data_offset);
        Ok(Placement {
            segment: self.entry.segment,
            payload_at: u32::try_from(payload_at).map_err(|_| "an entry beyond 4 GiB".to_owned())?,
            frames,
            references: self.references.iter().map(|reference| (reference.record(), reference.place())).collect(),
        })
    }

    /// Opens the record list and checks it against the header.
    ///
    /// # Errors
    /// What is wrong with it, or that the key is unknown.
    pub(crate) fn open_list(&self, keys: &StreamKeys) -> Result<RecordList, Fault> {
        let (header, frames) = segment::stored_frames(&self.payload, false)?;
        let key = keys.host_key(header.key_epoch()).map_err(|error| error.to_string())?;
        let offsets = frames.iter().map(|(_, at)| *at).collect();
        let frames = batch::BatchFrames { header, offsets };
        batch::open_list(&self.payload, &frames, key).map_err(|error| error.to_string())
    }
}

/// Why an entry cannot be read.
#[derive(Debug)]
pub(crate) enum EntryFault {
    /// The bytes there are no entry of this segment.
    NoEntry(Fault),
    /// The header is right, what it heads is not.
    Broken(Box<Entry>, Fault),
}

impl EntryFault {
    /// What is wrong.
    #[must_use]
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::NoEntry(reason) | Self::Broken(_, reason) => reason,
        }
    }
}

/// A segment's file, to be read.
pub(crate) struct Scan<'a, F> {
    /// The file.
    pub(crate) file: &'a F,
    /// Its path, for messages.
    pub(crate) path: &'a Path,
    /// Its number.
    pub(crate) number: u32,
    /// Bytes to look at: the file's length, or where the entries end.
    pub(crate) len: u64,
}

impl<F: StorageFile> Scan<'_, F> {
    /// Reads up to `len` bytes at `at`, fewer at the end.
    fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let len = len.min(self.len.saturating_sub(at));
        let mut bytes = vec![0; usize::try_from(len).expect("bounded by a segment's limits")];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        self.file.read_at(&mut bytes, at).at("read", self.path)?;
        Ok(bytes)
    }

    /// Reads the segment's beginning.
    ///
    /// # Errors
    /// [`Kind::Damaged`], or [`Kind::Foreign`] for the segment of another stream; otherwise from the disk.
    pub(crate) fn opening(&self, owner: &Owner) -> Result<Opening> {
        let (found, opening) = self.any_opening()?;
        if found != *owner || opening.number != self.number {
            let what = format!(
                "{}: is segment {} of group {}, host {}, vault {}: move it away",
                self.path.display(),
                opening.number,
                found.group,
                found.host,
                found.vault
            );
            return Err(Error::new(Kind::Foreign, what));
        }
        Ok(opening)
    }

    /// Reads the segment's beginning, whosever it is.
    ///
    /// # Errors
    /// [`Kind::Damaged`]; otherwise from the disk.
    pub(crate) fn any_opening(&self) -> Result<(Owner, Opening)> {
        // Most states fit the first pages; a longer one is read whole.
        let mut bytes = self.read(0, 4 * ALIGN as u64)?;
        if let Some(len) = bytes.get(72..76) {
            let data_start = u64::from(u32::from_le_bytes(len.try_into().expect("four bytes")));
            let limit = (segment::STATE_BYTES_MAX + 2 * ALIGN) as u64;
            if data_start > bytes.len() as u64 && data_start <= limit {
                bytes = self.read(0, data_start)?;
            }
        }
        segment::parse_opening(&bytes).map_err(|fault| Error::damaged(self.path, 0, fault))
    }

    /// Reads the entry at `at`.
    ///
    /// # Errors
    /// From the disk; what is wrong with the bytes is the inner result.
    pub(crate) fn entry(&self, at: u64) -> Result<Result<StoredEntry, EntryFault>> {
        let page = self.read(at, ALIGN as u64)?;
        let entry = match self.parse_header(&page) {
            Ok(entry) => entry,
            Err(fault) => return Ok(Err(EntryFault::NoEntry(fault))),
        };
        let broken = |fault: &str| Ok(Err(EntryFault::Broken(Box::new(entry), fault.to_owned())));
        let payload_at = at + u64::from(entry.data_offset);
        if entry.payload_len as usize > BATCH_BYTES_MAX || payload_at + u64::from(entry.payload_len) > self.len {
            return broken("the entry is cut off");
        }
        let payload = self.read(payload_at, entry.payload_len.into())?;
        if segment::crc(&payload) != entry.payload_crc {
            return broken("checksum of the batch differs");
        }
        let references =
            self.read(at + entry.references_at(), u64::from(entry.reference_count) * segment::REFERENCE_BYTES as u64)?;
        match segment::parse_references(&entry, &references) {
            Ok(references) => Ok(Ok(StoredEntry { at, entry, payload, references })),
            Err(fault) => broken(&fault),
        }
    }

    /// The next page from `at` on with an entry's header of this segment and a sequence of at least `sequence`.
    ///
    /// # Errors
    /// From the disk.
    pub(crate) fn find_entry(&self, mut at: u64, sequence: u32) -> Result<Option<(u64, Entry)>> {
        const STEP: u64 = 1 << 20;
        while at < self.len {
            let bytes = self.read(at, STEP)?;
            for (index, page) in bytes.chunks(ALIGN).enumerate() {
                if let Ok(entry) = self.parse_header(page)
                    && entry.sequence >= sequence
                {
                    return Ok(Some((at + (index * ALIGN) as u64, entry)));
                }
            }
            at += STEP;
        }
        Ok(None)
    }

    fn parse_header(&self, page: &[u8]) -> Result<Entry, Fault> {
        let entry = Entry::parse(page)?;
        if entry.segment == self.number { Ok(entry) } else { Err(format!("entry of segment {}", entry.segment)) }
    }

    /// Checks that all bytes of an entry that say nothing are zero, and the stored batch's own checksums.
    ///
    /// # Errors
    /// From the disk; what is wrong is the inner result.
    pub(crate) fn check_rest(&self, stored: &StoredEntry) -> Result<Result<(), Fault>> {
        let entry = &stored.entry;
        let gaps = [
            (segment::ENTRY_HEADER_BYTES as u64, u64::from(entry.data_offset)),
            (u64::from(entry.data_offset) + u64::from(entry.payload_len), entry.references_at()),
            (
                entry.references_at() + u64::from(entry.reference_count) * segment::REFERENCE_BYTES as u64,
                entry.total_len(),
            ),
        ];
        for (from, to) in gaps {
            if !segment::is_zero(&self.read(stored.at + from, to.saturating_sub(from))?) {
                return Ok(Err("padding is not zero".into()));
            }
        }
        let checked = match entry.form {
            Form::Whole => batch::parse(&stored.payload).map(|frames| frames.header).map_err(|error| error.to_string()),
            Form::Stripped => segment::stored_frames(&stored.payload, true).map(|(header, _)| header),
        };
        Ok(checked.and_then(|header| {
            let place = header.place();
            if place.point() == entry.point && header.chain() == entry.chain {
                Ok(())
            } else {
                Err("the entry's header names another batch".into())
            }
        }))
    }
}
