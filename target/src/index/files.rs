//! The files around an index: which runs there are, and how far the base was moved.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_proto::BatchNo;
use farshore_uring::{OpenMode, Storage, StorageFile};

use super::merge::{parse_run_name, run_name};
use super::run::Run;
use super::{Member, MemberContent};
use crate::error::{Error, IoContext, Kind, Result};
use crate::group::SealedRun;

pub(super) fn open_footer<S: Storage>(storage: &S, run: &SealedRun) -> Result<Member<S>> {
    let opened = storage
        .open(&run.path, OpenMode::Read)
        .at("open", &run.path)
        .and_then(|file| Run::open(file, &run.path, run.offset, Some(run.len)));
    let content = match opened {
        Ok(run) => MemberContent::Run(Arc::new(run)),
        Err(error) if error.kind() == Kind::Damaged => {
            tracing::error!(segment = run.segment, error = error.context(), "index run of a segment is damaged");
            let text = format!("batches {}..={}: {}", run.first, run.last, error.context());
            MemberContent::Damaged(text.into())
        }
        Err(error) => return Err(error),
    };
    Ok(Member { first: run.first, last: run.last, merged: false, content })
}

/// The merged runs in the folder: of those that cover the same batches the widest. Removes what is not needed.
pub(super) fn open_merged<S: Storage>(storage: &S, folder: &Path, horizon: BatchNo) -> Result<Vec<Member<S>>> {
    let mut found: Vec<(BatchNo, BatchNo)> = Vec::new();
    for name in storage.list(folder).at("list", folder)? {
        let path = folder.join(&name);
        match parse_run_name(&name) {
            Some((_, last)) if last <= horizon => storage.remove(&path).at("remove", &path)?,
            Some(batches) => found.push(batches),
            // An interrupted merge's.
            None if name.extension().is_some_and(|end| end == "new") => storage.remove(&path).at("remove", &path)?,
            None => tracing::warn!(path = %path.display(), "unknown file in the index folder is left alone"),
        }
    }
    // Wider ones first.
    found.sort_by_key(|(first, last)| (std::cmp::Reverse(last.0.saturating_sub(first.0)), *first));
    let mut members: Vec<Member<S>> = Vec::new();
    for (first, last) in found {
        let path = folder.join(run_name(first, last));
        if members.iter().any(|member| member.covers(first, last)) {
            storage.remove(&path).at("remove", &path)?;
            continue;
        }
        let file = storage.open(&path, OpenMode::Read).at("open", &path)?;
        match Run::open(file, &path, 0, None) {
            Ok(run) if (run.header().first, run.header().last) == (first, last) => {
                members.push(Member { first, last, merged: true, content: MemberContent::Run(Arc::new(run)) });
            }
            // The runs it was merged from are gone, but the segments' footers are there as long as anybody needs them.
            Ok(_) => {
                tracing::error!(path = %path.display(), "index run covers other batches than its name says; not used")
            }
            Err(error) if error.kind() == Kind::Damaged => {
                tracing::error!(
                    error = error.context(),
                    "merged index run is damaged; the segments' footers serve instead"
                );
            }
            Err(error) => return Err(error),
        }
    }
    Ok(members)
}

const MOVED_MAGIC: [u8; 8] = *b"FSMOVED1";
pub(super) const MOVED_BYTES: usize = 20;

pub(super) fn moved_path(index_folder: &Path) -> PathBuf {
    index_folder.parent().unwrap_or(Path::new("")).join("base").join("moved")
}

pub(super) fn encode_moved(batch: BatchNo) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MOVED_BYTES);
    bytes.extend_from_slice(&MOVED_MAGIC);
    bytes.extend_from_slice(&batch.0.to_le_bytes());
    let crc = crc_fast::crc32_iscsi(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// Which batch the base is at; 0 where it was never moved.
pub(super) fn read_moved<S: Storage>(storage: &S, path: &Path) -> Result<BatchNo> {
    let file = match storage.open(path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BatchNo(0)),
        Err(error) => return Err(Error::io("open", path, error)),
    };
    let damaged = || Error::damaged(path, 0, "does not say how far the base was moved");
    if file.len().at("ask for the length of", path)? != MOVED_BYTES as u64 {
        return Err(damaged());
    }
    let mut bytes = [0; MOVED_BYTES];
    file.read_at(&mut bytes, 0).at("read", path)?;
    let (body, crc) = bytes.split_at(MOVED_BYTES - 4);
    let (magic, batch) = body.split_at(8);
    if magic != MOVED_MAGIC || crc_fast::crc32_iscsi(body).to_le_bytes() != crc {
        return Err(damaged());
    }
    Ok(BatchNo(u64::from_le_bytes(batch.try_into().map_err(|_| damaged())?)))
}
