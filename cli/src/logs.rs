//! `log dump` and `log verify`: an agent's activity log or disk log, read without the agent.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use farshore_blkfilter::activity::{self, EXTENT_BYTES, Extent};
use farshore_proto::HostId;
use farshore_proto::text::show_time;
use farshore_streamer::{Look, LookEntry, LookLine, is_disk_log};
use farshore_uring::{DirFile, DirStorage, OpenMode, Storage, StorageFile};
use serde_json::{Value, json};

use crate::args::LogCommand;
use crate::failure::Failure;
use crate::output::{Output, table};

pub(crate) fn run(command: LogCommand, output: &Output) -> Result<()> {
    match command {
        LogCommand::Dump { path } => look(&path, false, output),
        LogCommand::Verify { path } => look(&path, true, output),
    }
}

fn look(path: &Path, verify: bool, output: &Output) -> Result<()> {
    let file = open(path)?;
    let mut start = [0; 16];
    let len = file.len().with_context(|| format!("look at {}", path.display()))?;
    let short = usize::try_from(len).map_or(start.len(), |len| len.min(start.len()));
    file.read_at(&mut start[..short], 0).with_context(|| format!("read {}", path.display()))?;
    if is_disk_log(&start) {
        return disk_log(path, file, verify, output);
    }
    if activity::is_log(&start) {
        return activity_log(path, &file, verify, output);
    }
    let hint = "an agent's activity log is `activity.log` in its state directory unless --activity-log named another place; \
                its disk log is what --log named. For a target's journal: farshore journal dump";
    Err(Failure::failed(path.display().to_string(), "holds neither an activity log nor a disk log").hint(hint).into())
}

fn open(path: &Path) -> Result<Arc<DirFile>> {
    let failed = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            Failure::not_found(path.display().to_string(), "no such file or device")
        } else {
            Failure::failed(path.display().to_string(), error.to_string())
        }
    };
    let path = std::fs::canonicalize(path).map_err(failed)?;
    let relative = path.strip_prefix("/").unwrap_or(&path);
    Ok(DirStorage::open(Path::new("/")).and_then(|root| root.open(relative, OpenMode::Read)).map_err(failed)?)
}

fn damaged(path: &Path, what: &str, why: String, hint: &str) -> anyhow::Error {
    Failure::failed(format!("{what} {}", path.display()), why).hint(hint).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const LOST: &str = "the agent compares everything where it needed what is lost, by itself";

fn activity_log(path: &Path, file: &DirFile, verify: bool, output: &Output) -> Result<()> {
    let look = activity::look(file).map_err(|error| damaged(path, "activity log", error.to_string(), LOST))?;
    let active = look.loaded.active_extents();
    let marked = look.loaded.marked_extents();
    let slots: u32 = marked.iter().map(|(_, mask)| mask.count_ones()).sum();
    let row = |extent: &Extent, what: String| {
        vec![
            hex(&extent.volume.group),
            extent.volume.index.to_string(),
            (u64::from(extent.number) * EXTENT_BYTES).to_string(),
            what,
        ]
    };
    let document = |extent: &Extent, slots: Option<u64>| {
        json!({
            "group": hex(&extent.volume.group),
            "volume": extent.volume.index,
            "offset": u64::from(extent.number) * EXTENT_BYTES,
            "bytes": EXTENT_BYTES,
            "slots": slots.map(|mask| format!("{mask:016x}")),
        })
    };
    let lives: Vec<Value> = look
        .loaded
        .lives
        .iter()
        .map(|life| json!({ "session": format!("{:016x}", life.session), "number": life.number }))
        .collect();
    let mut report = json!({
        "kind": "activity log",
        "host": HostId(look.owner).to_string(),
        "places": look.places,
        "active": active.len(),
        "marked_slots": slots,
        "transaction": look.number,
        "lives": lives,
        "cut_off_blocks": look.rotten,
    });
    if !verify {
        let extents = active.iter().map(|extent| document(extent, None));
        report["extents"] = extents.chain(marked.iter().map(|(extent, mask)| document(extent, Some(*mask)))).collect();
    }
    output.show(&report, |_| {
        let mut text = format!(
            "activity log of host {}: whole at transaction {}, {} of {} extents active, {slots} slots marked",
            HostId(look.owner),
            look.number,
            active.len(),
            look.places,
        );
        if !look.rotten.is_empty() {
            text += &format!("\nblocks that were cut off while they were written: {:?}", look.rotten);
        }
        if !verify {
            let rows: Vec<Vec<String>> = active
                .iter()
                .map(|extent| row(extent, "active".into()))
                .chain(marked.iter().map(|(extent, mask)| row(extent, format!("marked {mask:016x}"))))
                .collect();
            text += "\n";
            text += table(&["GROUP", "VOLUME", "OFFSET", "STATE"], &rows).trim_end();
        }
        text
    });
    Ok(())
}

fn disk_log(path: &Path, file: Arc<DirFile>, verify: bool, output: &Output) -> Result<()> {
    let look =
        farshore_streamer::look(file, verify).map_err(|error| damaged(path, "disk log", error.to_string(), LOST))?;
    let Look { owner, segment, segments, free, lines } = &look;
    let batches: usize = lines.iter().map(|line| line.entries.len()).sum();
    let mut faults: Vec<String> = Vec::new();
    for LookLine { line, entries, damage, .. } in lines {
        let name = format!("line {:016x} of group {}", line.number, line.group);
        faults.extend(damage.iter().map(|why| format!("{name}: {why}")));
        let bad = entries.iter().filter_map(|entry| Some((entry.batch.number, entry.damage.as_ref()?)));
        faults.extend(bad.map(|(number, why)| format!("{name}: batch {number}: {why}")));
    }
    let line_document = |line: &LookLine| {
        let mut document = json!({
            "group": line.line.group.to_string(),
            "line": format!("{:016x}", line.line.number),
            "segments": line.segments,
            "batches": line.entries.len(),
            "damage": line.damage,
        });
        if !verify {
            document["entries"] = line.entries.iter().map(entry_document).collect();
        }
        document
    };
    let report = json!({
        "kind": "disk log",
        "host": owner.to_string(),
        "segment_bytes": segment,
        "segments": segments,
        "free": free,
        "batches": batches,
        "lines": lines.iter().map(line_document).collect::<Vec<_>>(),
        "faults": faults,
    });
    output.show(&report, |_| {
        let mut text = format!(
            "disk log of host {owner}: {segments} segments of {segment} bytes, {free} free, {} lines, {batches} batches",
            lines.len()
        );
        for line in lines {
            text += &format!("\ngroup {}, line {:016x}, {} segments", line.line.group, line.line.number, line.segments);
            if !verify {
                let head = ["AT", "POINT", "TIME", "BYTES", "WRITTEN", "BOOKMARK", "FLAGS"];
                text += "\n";
                text += table(&head, &line.entries.iter().map(entry_row).collect::<Vec<_>>()).trim_end();
            }
        }
        for fault in &faults {
            text += &format!("\n{fault}");
        }
        text
    });
    if faults.is_empty() {
        return Ok(());
    }
    let hint = "what a crash cut off, and lines that the agent does not keep any more, may look like this; where the agent needs what is \
                lost it says `disk-log.lost` and compares everything, by itself";
    Err(damaged(path, "disk log", format!("{} places are damaged", faults.len()), hint))
}

fn point(entry: &LookEntry) -> String {
    let batch = &entry.batch;
    farshore_proto::PointId { generation: batch.generation, incarnation: batch.incarnation, batch: batch.number }
        .to_string()
}

fn entry_document(entry: &LookEntry) -> Value {
    let batch = &entry.batch;
    json!({
        "at": entry.at,
        "point": point(entry),
        "time": show_time(batch.time),
        "bytes": batch.len,
        "written_bytes": batch.written_bytes,
        "bookmark": batch.bookmark.as_ref().map(ToString::to_string),
        "recoverable": batch.recoverable,
        "app_consistent": batch.app_consistent,
        "chain": hex(&batch.chain.0),
    })
}

fn entry_row(entry: &LookEntry) -> Vec<String> {
    let batch = &entry.batch;
    let flags = [(batch.recoverable, "recoverable"), (batch.app_consistent, "app")];
    let flags: Vec<&str> = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    vec![
        entry.at.to_string(),
        point(entry),
        show_time(batch.time),
        batch.len.to_string(),
        batch.written_bytes.to_string(),
        batch.bookmark.as_ref().map(ToString::to_string).unwrap_or_default(),
        flags.join(","),
    ]
}
