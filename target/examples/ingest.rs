//! How fast a target takes batches, replayed from memory, against plain writes of the same bytes to the same disk.
//!
//! `cargo run --release -p farshore-target --example ingest -- FOLDER [MIB] [BATCH_KIB]`
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement, not a machine")]

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use farshore_proto::batch::{Annotations, BatchBuilder, BatchPlace, CutFlags, VolumeDecl};
use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::record::{Home, Kind, Record};
use farshore_proto::session::{SourceConfig, SourceEvent, SourceSession};
use farshore_proto::{
    BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, KeyEpoch, Name, Now, Position, Role, VaultId,
    VolumeIndex, WallTime,
};
use farshore_target::ingest::{BatchBuf, OwnedBatch};
use farshore_target::keys::TargetKeys;
use farshore_target::lane::Output;
use farshore_target::target::{Peer, Target, TargetConfig};
use farshore_uring::DirStorage;

const VAULT: VaultId = VaultId([1; 16]);
const VOLUME_BYTES: u64 = 1 << 40;
/// As many batches as are in flight at once.
const WINDOW: usize = 8;

struct Maker {
    key: HostKey,
    group: Name,
    host: Name,
    chain: ChainHash,
    number: u64,
    position: u64,
}

impl Maker {
    /// A batch of `frames` frames of 64 KiB random content each, one record per frame; no frames: the join.
    fn batch(&mut self, frames: u32) -> Result<Vec<u8>, Box<dyn Error>> {
        self.number += 1;
        let first = self.position;
        let mut plain = vec![0u8; 65536];
        let mut records = Vec::new();
        if frames == 0 {
            records.push(Record::new(Kind::VolumeJoined, VolumeIndex(0), Position(first), 0, 0));
        }
        let group = GroupId::derive(VAULT, &self.group);
        let dedup = self.key.dedup_key(group);
        let mut contents = Vec::new();
        for frame in 0..frames {
            let mut seed = blake3::Hasher::new();
            seed.update(&self.number.to_le_bytes()).update(&frame.to_le_bytes());
            seed.finalize_xof().fill(&mut plain);
            let slot = (self.number * 1009 + u64::from(frame)) % (VOLUME_BYTES / 65536);
            let record = Record::new(Kind::Write, VolumeIndex(0), Position(first + u64::from(frame)), slot * 128, 128);
            records.push(record.with_id(dedup.chunk_id(&plain)).with_home(Home::Here { frame: frame + 1, offset: 0 }));
            contents.push(plain.clone());
        }
        let place = BatchPlace {
            vault: VAULT,
            group,
            host: HostId::derive(VAULT, &self.host),
            generation: Generation(1),
            incarnation: Incarnation(1),
            number: BatchNo(self.number),
            first: Position(first),
            end: Position(first + u64::from(frames) + 1),
            time: WallTime(self.number),
        };
        let chain = place.chain(&self.chain, &records);
        let salt = self.key.salt(&[1; 32], Incarnation(1), self.number, &chain);
        let frame_key = self.key.frame_key(&salt);
        let mut data = Vec::new();
        for (number, content) in (1u32..).zip(&contents) {
            frame_key.seal(number, content, None, |_| &[], &mut data)?;
        }
        let cut = CutFlags { recoverable: true, app_consistent: false };
        let builder = BatchBuilder {
            place,
            cut,
            previous: self.chain,
            chain,
            salt,
            host_key: &self.key,
            raw_bytes: u64::from(frames) << 16,
        };
        let mut bytes = Vec::new();
        builder.finish(&records, &Annotations::default(), frames, data.len() as u64, None, &mut bytes)?;
        bytes.extend_from_slice(&data);
        self.chain = chain;
        self.position = place.end.0;
        Ok(bytes)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("give a folder")?);
    let total = arguments.next().map_or(Ok(2048), |text| text.parse::<usize>())? << 20;
    let batch_kib = arguments.next().map_or(Ok(16 << 10), |text| text.parse::<usize>())?;
    let frames = u32::try_from(batch_kib / 64)?.max(1);
    std::fs::create_dir_all(folder.join("data"))?;

    let vault_key = VaultKey::new([2; 32]);
    let (group, host) = (Name::new("bench")?, Name::new("source")?);
    let key = HostKey::derive(&vault_key, HostId::derive(VAULT, &host), KeyEpoch(1));
    let storage = DirStorage::open(&folder.join("data"))?;
    let target = Target::open(storage, TargetKeys::new(VAULT, [(KeyEpoch(1), vault_key)])?, TargetConfig::default())?;
    let config = SourceConfig { vault: VAULT, group: group.clone(), host: host.clone(), host_key: key.clone() };
    let mut session = SourceSession::new(config);
    let volume = VolumeDecl { index: VolumeIndex(0), name: Name::new("vol")?, size: VOLUME_BYTES, block: 512 };
    target.handle_up(1, Peer { role: Role::Agent, name: host.clone() });
    session.handle_up(Now(1), [1; 32], Generation(0), Incarnation(1), vec![volume])?;
    let mut maker = Maker { key, group, host, chain: ChainHash::default(), number: 0, position: 1 };

    let mut talk = |batches: Vec<Box<dyn BatchBuf>>| -> Result<u64, Box<dyn Error>> {
        while let Some(bytes) = session.poll_control() {
            target.handle_control(1, bytes);
        }
        batches.into_iter().for_each(|batch| drop(target.handle_batch(1, batch)));
        target.run(Now(1), WallTime(1));
        while let Some(output) = target.poll_output() {
            if let Output::Control { bytes, .. } = output {
                session.handle_control(Now(1), &bytes)?;
            }
        }
        let mut acked = 0;
        while let Some(event) = session.poll_event() {
            match event {
                SourceEvent::Durable { number, .. } => acked = number.0,
                SourceEvent::Refused { code, detail } => return Err(format!("{code:?}: {detail}").into()),
                SourceEvent::Paused { reason } => return Err(reason.into()),
                _ => {}
            }
        }
        Ok(acked)
    };
    talk(Vec::new())?;
    talk(vec![Box::new(OwnedBatch::new(&maker.batch(0)?))])?;

    let count = total / (batch_kib << 10);
    let all: Vec<Vec<u8>> = (0..count).map(|_| maker.batch(frames)).collect::<Result<_, _>>()?;
    let bytes: usize = all.iter().map(Vec::len).sum();
    let mut groups: Vec<Vec<Box<dyn BatchBuf>>> = Vec::new();
    for group in all.chunks(WINDOW) {
        groups.push(group.iter().map(|batch| Box::new(OwnedBatch::new(batch)) as Box<dyn BatchBuf>).collect());
    }
    let started = Instant::now();
    let mut acked = 0;
    for group in groups {
        acked = talk(group)?.max(acked);
    }
    let ingest = started.elapsed().as_secs_f64();
    println!(
        "ingest: {count} batches of {batch_kib} KiB, acknowledged up to {acked}: {:.0} MB/s",
        bytes as f64 / 1e6 / ingest
    );

    let mut file = std::fs::File::create(folder.join("plain"))?;
    let started = Instant::now();
    for group in all.chunks(WINDOW) {
        for batch in group {
            file.write_all(batch)?;
        }
        file.sync_data()?;
    }
    let plain = started.elapsed().as_secs_f64();
    println!("plain writes and fdatasync: {:.0} MB/s; ratio {:.2}", bytes as f64 / 1e6 / plain, plain / ingest);
    let stream = target.stream(&Name::new("bench")?, None)?;
    println!("group commits {}, segments {}", stream.counters.commits.value(), stream.segments.list().len());
    drop(Arc::clone(&stream));
    Ok(())
}
