//! The target alone: batches replayed from memory into the journal, against plain sequential writes of the same bytes.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use farshore_proto::batch::{Annotations, BatchBuilder, BatchPlace, CutFlags, VolumeDecl};
use farshore_proto::keys::{DedupKey, HostKey, VaultKey};
use farshore_proto::message::{Hello, SourceMessage};
use farshore_proto::record::{Home, Kind, Record};
use farshore_proto::{
    BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, KeyEpoch, Name, Now, Position, Role, VaultId,
    VolumeIndex, WallTime,
};
use farshore_target::ingest::OwnedBatch;
use farshore_target::keys::TargetKeys;
use farshore_target::target::{Peer, Target, TargetConfig};
use farshore_uring::DirStorage;

use super::fio::{Fio, FioTarget};
use super::{Bench, Row};

const VAULT: VaultId = VaultId([7; 16]);
const EPOCH: KeyEpoch = KeyEpoch(1);
/// Payload of a batch: what a source cuts under load.
const BATCH_BYTES: u64 = 8 << 20;
/// Batches that the target is given before it is run: what arrives during one commit.
const IN_FLIGHT: usize = 4;

/// Makes a stream of sealed batches with incompressible content.
struct Stream {
    host_key: HostKey,
    dedup: DedupKey,
    place: BatchPlace,
    chain: ChainHash,
    random: u64,
}

impl Stream {
    fn new(host: &Name, group: &Name) -> Self {
        let host_id = HostId::derive(VAULT, host);
        let host_key = HostKey::derive(&VaultKey::new([3; 32]), host_id, EPOCH);
        let place = BatchPlace {
            vault: VAULT,
            group: GroupId::derive(VAULT, group),
            host: host_id,
            generation: Generation(1),
            incarnation: Incarnation(1),
            number: BatchNo(1),
            first: Position(0),
            end: Position(1),
            time: WallTime(1),
        };
        let dedup = host_key.dedup_key(place.group);
        Self { host_key, dedup, place, chain: ChainHash::default(), random: 1 }
    }

    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random ^ (self.random >> 29)
    }

    /// The next batch: `records` writes of `sectors` sectors each, at random places; the first also lets the volume join.
    fn batch(&mut self, records: u64, sectors: u32, volume_bytes: u64) -> Result<Vec<u8>> {
        let salt = self.host_key.salt(&[5; 32], self.place.incarnation, self.place.number.0, &self.chain);
        let key = self.host_key.frame_key(&salt);
        let len = sectors as usize * 512;
        let per_frame = 65_536 / len;
        let (mut list, mut body, mut plain, mut frames) = (Vec::new(), Vec::new(), Vec::new(), 0u32);
        let mut position = self.place.first.0;
        if self.place.number == BatchNo(1) {
            list.push(Record::new(Kind::VolumeJoined, VolumeIndex(0), Position(position), 0, 0));
            position += 1;
        }
        for index in 0..records {
            let place = self.next() % (volume_bytes / len as u64);
            let offset = plain.len();
            while plain.len() < offset + len {
                let word = self.next();
                plain.extend_from_slice(&word.to_le_bytes());
            }
            let id = self.dedup.chunk_id(&plain[offset..]);
            let home = Home::Here { frame: frames + 1, offset: u32::try_from(offset).context("offset in a frame")? };
            let start = place * u64::from(sectors);
            list.push(
                Record::new(Kind::Write, VolumeIndex(0), Position(position), start, sectors)
                    .with_id(id)
                    .with_home(home),
            );
            position += 1;
            if plain.len() / len == per_frame || index + 1 == records {
                frames += 1;
                key.seal(frames, &plain, None, |_| &[], &mut body).context("seal a frame")?;
                plain.clear();
            }
        }
        self.place.end = Position(position + 1);
        let chain = self.place.chain(&self.chain, &list);
        let builder = BatchBuilder {
            place: self.place,
            cut: CutFlags { recoverable: true, app_consistent: false },
            previous: self.chain,
            chain,
            salt,
            host_key: &self.host_key,
            raw_bytes: records * len as u64,
            log: None,
        };
        let mut bytes = Vec::new();
        builder
            .finish(&list, &Annotations::default(), frames, body.len() as u64, None, &mut bytes)
            .context("finish a batch")?;
        bytes.extend_from_slice(&body);
        self.chain = chain;
        self.place.number = self.place.number.next();
        self.place.first = self.place.end;
        self.place.time.0 += 1;
        Ok(bytes)
    }
}

/// Bytes per second of ingest, and the bytes.
fn replay(bench: &Bench<'_>, name: &str, sectors: u32) -> Result<(f64, u64)> {
    let (host, group) = (Name::new("source")?, Name::new("bench")?);
    let volume_bytes = bench.args.size.max(1 << 30);
    let total = bench.args.size.min(2 << 30);
    let mut stream = Stream::new(&host, &group);
    let records = BATCH_BYTES / (u64::from(sectors) * 512);
    let batches =
        (0..total / BATCH_BYTES).map(|_| stream.batch(records, sectors, volume_bytes)).collect::<Result<Vec<_>>>()?;
    let dir = bench.dir.join(name);
    std::fs::create_dir(&dir).context("make a folder for the target")?;
    let storage = DirStorage::open(&dir).context("open the target's folder")?;
    let keys = TargetKeys::new(VAULT, [(EPOCH, VaultKey::new([3; 32]))])?;
    let target = Target::open(storage, keys, TargetConfig::default())?;
    let session = 1;
    target.handle_up(session, Peer { role: Role::Agent, name: host.clone() });
    let volumes = vec![VolumeDecl { index: VolumeIndex(0), name: Name::new("disk")?, size: volume_bytes, block: 4096 }];
    let hello = Hello {
        vault: VAULT,
        group: stream.place.group,
        group_name: group.clone(),
        host_name: host,
        generation: Generation(0),
        incarnation: Incarnation(1),
        nonce: [1; 32],
        volumes,
    };
    target.handle_control(session, SourceMessage::Hello(hello).encode()?);
    let bytes: u64 = batches.iter().map(|batch| batch.len() as u64).sum();
    let mut buffers: Vec<OwnedBatch> = batches.iter().map(|batch| OwnedBatch::new(batch)).collect();
    drop(batches);
    buffers.reverse();
    let (mut now, count) = (0u64, buffers.len());
    target.run(Now(now), WallTime(1));
    let begin = Instant::now();
    while !buffers.is_empty() {
        for _ in 0..IN_FLIGHT {
            if let Some(buffer) = buffers.pop() {
                target.handle_batch(session, Box::new(buffer));
            }
        }
        now += 1_000_000;
        target.run(Now(now), WallTime(now));
        while target.poll_output().is_some() {}
    }
    let seconds = begin.elapsed().as_secs_f64();
    let points = target.stream(&group, None)?.points().len();
    ensure!(points == count, "{points} of {count} batches were journaled");
    drop(target);
    std::fs::remove_dir_all(dir).context("clean up")?;
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    Ok((bytes as f64 / seconds, bytes))
}

/// fio: sequential direct writes of 1 MiB with an fdatasync as often as the target makes one.
fn plain(bench: &Bench<'_>, bytes: u64) -> Result<f64> {
    let path = bench.dir.join("fio.dat");
    let block = 1 << 20;
    let sync_every = u32::try_from(BATCH_BYTES * IN_FLIGHT as u64 / block).context("writes between syncs")?;
    let fio = Fio {
        target: FioTarget::File(&path, sync_every),
        rw: "write",
        block,
        depth: 8,
        size: bytes / block * block,
        amount: None,
        seconds: None,
        compressible: 0,
        rate: None,
        jobs: 1,
    };
    let result = fio.run()?;
    std::fs::remove_file(path).context("clean up")?;
    Ok(result.bytes_per_second)
}

pub(super) fn ingest(bench: &Bench<'_>) -> Result<Vec<Row>> {
    // Turns, so that a slow minute of a shared machine does not decide.
    let (mut large, mut small, mut peer) = (0f64, 0f64, 0f64);
    for turn in 0..2 {
        let (rate, bytes) = replay(bench, &format!("large{turn}"), 128)?;
        large = large.max(rate);
        peer = peer.max(plain(bench, bytes)?);
        small = small.max(replay(bench, &format!("small{turn}"), 8)?.0);
    }
    let name = "fio sequential direct + fdatasync";
    Ok(vec![
        Row::new("target ingest, 64 KiB records", large / 1e6, "MB/s").against(name, peer / 1e6).at_least(0.8),
        Row::new("target ingest, 4 KiB records", small / 1e6, "MB/s").against(name, peer / 1e6).at_least(0.8),
    ])
}
