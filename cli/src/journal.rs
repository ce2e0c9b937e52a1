//! `journal dump` and `journal verify`: work on files, without a daemon.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use farshore_link::identity::Identity;
use farshore_proto::PointId;
use farshore_proto::record::{Kind, Record};
use farshore_proto::text::show_time;
use farshore_target::keys::StreamKeys;
use farshore_target::segment::parse_opening;
use farshore_target::server::target_keys;
use farshore_target::verify::{Dump, Fault, Report, dump_segment, read_records, verify_segment};
use farshore_uring::DirStorage;
use serde_json::{Value, json};

use crate::args::JournalCommand;
use crate::failure::Failure;
use crate::output::{Output, table};

/// Far more than the beginning of a segment, with the state of its stream, takes.
const OPENING_BYTES_MAX: u64 = 4 << 20;

/// Segment files of a path: itself, or those in the folder.
fn segments(path: &Path) -> Result<(DirStorage, Vec<PathBuf>)> {
    let missing = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            Failure::not_found(path.display().to_string(), "no such file or folder")
        } else {
            Failure::failed(path.display().to_string(), error.to_string())
        }
    };
    let is_dir = std::fs::metadata(path).map_err(missing)?.is_dir();
    let folder = if is_dir { path } else { path.parent().unwrap_or(Path::new(".")) };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let storage = DirStorage::open(folder).with_context(|| format!("open {}", folder.display()))?;
    let mut names = Vec::new();
    if is_dir {
        for entry in std::fs::read_dir(folder).context("list the journal")? {
            let name = PathBuf::from(entry.context("list the journal")?.file_name());
            if name.extension().is_some_and(|extension| extension == "seg") {
                names.push(name);
            }
        }
        names.sort();
    } else {
        names.extend(path.file_name().map(PathBuf::from));
    }
    if names.is_empty() {
        return Err(Failure::not_found(path.display().to_string(), "holds no journal segments").into());
    }
    Ok((storage, names))
}

/// Keys for the stream that a segment's header names.
fn keys_of(identity: Option<&Identity>, folder: &Path, name: &Path) -> Result<Option<StreamKeys>> {
    let Some(identity) = identity else { return Ok(None) };
    let keys = target_keys(identity).map_err(Failure::from)?;
    let path = folder.join(name);
    let mut bytes = Vec::new();
    let file = std::fs::File::open(&path).with_context(|| format!("open {}", path.display()))?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, OPENING_BYTES_MAX), &mut bytes)
        .context("read a segment's beginning")?;
    let Ok((owner, _)) = parse_opening(&bytes) else { return Ok(None) };
    Ok(Some(keys.stream(owner.group, owner.host)))
}

pub(crate) fn run(command: JournalCommand, output: &Output) -> Result<()> {
    match command {
        JournalCommand::Dump { path, records, identity } => {
            let identity = identity.filter(|_| records);
            let identity = identity.as_deref().map(Identity::load).transpose();
            dump(&path, identity.map_err(|error| Failure::from_link(&error))?.as_ref(), output)
        }
        JournalCommand::Verify { path, identity } => verify(&path, identity.as_deref(), output),
    }
}

/// With an identity every record, too.
fn dump(path: &Path, identity: Option<&Identity>, output: &Output) -> Result<()> {
    let (storage, names) = segments(path)?;
    let mut documents = Vec::new();
    for name in names {
        let dump = dump_segment(&storage, &name).map_err(Failure::from)?;
        let records = match keys_of(identity, storage.root(), &name)? {
            Some(keys) => Some(record_rows(&storage, &name, &keys)?),
            None => None,
        };
        if output.is_json() {
            let mut document = document(&name, &dump);
            if let Some(rows) = records {
                document["records"] = rows.iter().map(RecordRow::document).collect();
            }
            documents.push(document);
            continue;
        }
        output.line(&text(&name, &dump));
        if let Some(rows) = records {
            let head = ["POINT", "POSITION", "KIND", "VOLUME", "OFFSET", "LENGTH", "CONTENT"];
            output.line(&table(&head, &rows.iter().map(RecordRow::cells).collect::<Vec<_>>()));
        }
    }
    if output.is_json() {
        output.document(&json!(documents));
    }
    Ok(())
}

/// One record of a batch.
struct RecordRow {
    point: PointId,
    record: Record,
}

impl RecordRow {
    /// What it is called in `docs/formats/batch.md`.
    fn kind(&self) -> &'static str {
        match self.record.kind() {
            Kind::Noop => "no-op",
            Kind::Write => "write",
            Kind::WriteZeroes => "write zeroes",
            Kind::Discard => "discard",
            Kind::SyncData => "sync data",
            Kind::Probe => "probe",
            Kind::ProbeZero => "probe zero",
            Kind::Cut => "cut",
            Kind::EventBegin => "event begin",
            Kind::EventEnd => "event end",
            Kind::VolumeJoined => "volume joined",
            Kind::Bookmark => "bookmark",
            Kind::Unreadable => "unreadable",
            Kind::SyncZero => "sync zero",
            Kind::VolumeLeft => "volume left",
        }
    }

    /// Id of the content, where it has one.
    fn content(&self) -> Option<String> {
        let id = self.record.id();
        (id.0 != [0; 32]).then(|| id.to_string())
    }

    fn document(&self) -> Value {
        json!({
            "point": self.point.to_string(),
            "position": self.record.position().0,
            "kind": self.kind(),
            "volume": self.record.volume().0,
            "offset": self.record.start_byte(),
            "bytes": self.record.len_bytes(),
            "content": self.content(),
        })
    }

    fn cells(&self) -> Vec<String> {
        let record = &self.record;
        vec![
            self.point.to_string(),
            record.position().to_string(),
            self.kind().to_owned(),
            record.volume().0.to_string(),
            record.start_byte().to_string(),
            record.len_bytes().to_string(),
            self.content().unwrap_or_default(),
        ]
    }
}

/// All records of a segment, in order. What cannot be opened is among the dump's faults or named by `journal verify`.
fn record_rows(storage: &DirStorage, name: &Path, keys: &StreamKeys) -> Result<Vec<RecordRow>> {
    let mut rows = Vec::new();
    let faults = read_records(storage, name, keys, |point, records| {
        rows.extend(records.iter().map(|record| RecordRow { point, record: *record }));
    })
    .map_err(Failure::from)?;
    match faults.first() {
        None => Ok(rows),
        Some(fault) => Err(Failure::failed(format!("journal {}", name.display()), fault.reason.clone())
            .hint("`farshore journal verify --identity …` lists all that is damaged")
            .into()),
    }
}

fn verify(path: &Path, identity: Option<&Path>, output: &Output) -> Result<()> {
    let identity = identity.map(Identity::load).transpose().map_err(|error| Failure::from_link(&error))?;
    let (storage, names) = segments(path)?;
    let folder = storage.root().to_owned();
    let mut total = Report::default();
    for name in &names {
        let keys = keys_of(identity.as_ref(), &folder, name)?;
        let one = verify_segment(&storage, name, keys.as_ref()).map_err(Failure::from)?;
        total.segments += one.segments;
        total.entries += one.entries;
        total.bytes += one.bytes;
        total.faults.extend(one.faults);
    }
    let report = json!({
        "segments": total.segments,
        "entries": total.entries,
        "bytes": total.bytes,
        "faults": total.faults.iter().map(fault).collect::<Vec<_>>(),
    });
    output.show(&report, |_| {
        let mut text = format!("{} segments, {} entries, {} bytes read", total.segments, total.entries, total.bytes);
        for fault in &total.faults {
            text += &format!("\n{} at byte {}: {}", fault.path.display(), fault.at, fault.reason);
        }
        text
    });
    if total.faults.is_empty() {
        return Ok(());
    }
    let why = format!("{} places are damaged", total.faults.len());
    Err(Failure::failed(format!("journal {}", path.display()), why)
        .hint("points that need the damaged batches are refused by views and restore; the others are served")
        .into())
}

fn fault(fault: &Fault) -> Value {
    json!({ "path": fault.path, "at": fault.at, "reason": fault.reason })
}

fn document(name: &Path, dump: &Dump) -> Value {
    let entries: Vec<Value> = dump
        .entries
        .iter()
        .map(|entry| {
            json!({
                "at": entry.at,
                "point": entry.point.to_string(),
                "time": show_time(entry.time),
                "received": show_time(entry.received),
                "bytes": entry.bytes,
                "records": entry.records,
                "frames": entry.frames,
                "references": entry.references,
                "stripped": entry.stripped,
                "recoverable": entry.recoverable,
                "app_consistent": entry.app_consistent,
                "chain": entry.chain,
            })
        })
        .collect();
    json!({
        "segment": name,
        "number": dump.number,
        "sealed": dump.sealed,
        "group": dump.group,
        "host": dump.host,
        "created": show_time(dump.created),
        "entries": entries,
        "faults": dump.faults.iter().map(fault).collect::<Vec<_>>(),
    })
}

fn text(name: &Path, dump: &Dump) -> String {
    let state = if dump.sealed { "sealed" } else { "open" };
    let rows: Vec<Vec<String>> = dump
        .entries
        .iter()
        .map(|entry| {
            let flags =
                [(entry.recoverable, "recoverable"), (entry.app_consistent, "app"), (entry.stripped, "stripped")];
            let flags: Vec<&str> = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
            vec![
                entry.at.to_string(),
                entry.point.to_string(),
                show_time(entry.time),
                entry.bytes.to_string(),
                entry.records.to_string(),
                entry.frames.to_string(),
                entry.references.to_string(),
                entry.chain.clone(),
                flags.join(","),
            ]
        })
        .collect();
    let head = ["AT", "POINT", "TIME", "BYTES", "RECORDS", "FRAMES", "REFS", "CHAIN", "FLAGS"];
    let mut text = format!(
        "{} ({state}, group {}, host {}, made {})\n",
        name.display(),
        dump.group,
        dump.host,
        show_time(dump.created)
    );
    text += &table(&head, &rows);
    for fault in &dump.faults {
        text += &format!("damaged at byte {}: {}\n", fault.at, fault.reason);
    }
    text
}
