//! Many requests in flight, over several connections and threads, against a plain vector of bytes.

use std::collections::HashMap;
use std::ops::Range;

use farshore_nbd::client::{Client, Options, Reply};
use farshore_nbd::wire::{command, flag};

use crate::memory::{GEOMETRY, MemoryDevice};
use crate::protocol::serve;
use crate::rng::{Chopped, Rng};

/// One connection's part of the device, as it must be.
struct Model {
    start: u64,
    bytes: Vec<u8>,
    rng: Rng,
    /// By cookie: the range, and for reads what must come.
    open: HashMap<u64, (Range<usize>, Option<Vec<u8>>)>,
    busy: Vec<Range<usize>>,
}

impl Model {
    fn new(start: u64, len: usize, seed: u64) -> Self {
        Self { start, bytes: vec![0; len], rng: Rng::new(seed), open: HashMap::new(), busy: Vec::new() }
    }

    /// Sends one random request that overlaps no other in flight (their order would be open), if it finds room for one.
    fn step(&mut self, client: &mut Client) {
        let longest = if self.rng.below(16) == 0 { 512 } else { 24 };
        let len = 512 * (1 + self.rng.index(longest));
        let at = 512 * self.rng.index((self.bytes.len() - len) / 512);
        let range = at..at + len;
        if self.busy.iter().any(|busy| busy.start < range.end && range.start < busy.end) {
            return;
        }
        let (offset, length) = (self.start + u64::try_from(at).expect("small"), u32::try_from(len).expect("small"));
        let mut expected = None;
        let sent = match self.rng.below(10) {
            0..4 => {
                let data = self.rng.bytes(len);
                self.bytes[range.clone()].copy_from_slice(&data);
                let flags = if self.rng.below(4) == 0 { flag::FUA } else { 0 };
                client.submit(command::WRITE, flags, offset, length, &data)
            }
            4..8 => {
                expected = Some(self.bytes[range.clone()].to_vec());
                let flags = if self.rng.below(4) == 0 { flag::DF } else { 0 };
                client.submit(command::READ, flags, offset, length, &[])
            }
            8 => {
                self.bytes[range.clone()].fill(0);
                let flags = [0, flag::NO_HOLE, flag::FUA, flag::FAST_ZERO][self.rng.index(4)];
                client.submit(command::WRITE_ZEROES, flags, offset, length, &[])
            }
            _ => {
                self.bytes[range.clone()].fill(0);
                client.submit(command::TRIM, 0, offset, length, &[])
            }
        };
        self.busy.push(range.clone());
        self.open.insert(sent.expect("sent"), (range, expected));
    }

    fn check(&mut self, reply: Reply) {
        reply.result.expect("a good request");
        let (range, expected) = self.open.remove(&reply.cookie).expect("a reply to a request of ours");
        if let Some(expected) = expected {
            assert!(reply.data == expected, "{range:?} reads otherwise than it was written");
        }
        self.busy.retain(|busy| *busy != range);
    }
}

fn run(client: &mut Client, model: &mut Model, requests: usize) {
    for _ in 0..requests {
        if client.in_flight() > 0 && (client.in_flight() >= 60 || model.rng.below(3) == 0) {
            model.check(client.receive().expect("a reply"));
        } else {
            model.step(client);
        }
    }
    while client.in_flight() > 0 {
        model.check(client.receive().expect("a reply"));
    }
}

fn verify(device: &MemoryDevice, models: &[Model]) {
    let content = device.content();
    for model in models {
        let start = usize::try_from(model.start).expect("small");
        assert!(content[start..start + model.bytes.len()] == model.bytes, "the part at {start}");
    }
}

/// Goal: pipelined mixes read what was written, whatever the order of completions and however the bytes arrive.
/// Method: three connections over two threads, each with its own third of the device; writes cut at random.
#[test]
fn pipelined_mixes_match_the_model() {
    for seed in 0..6 {
        let (device, server) = serve(GEOMETRY, |config| {
            config.threads = 2;
            // Small bounds, so that stalling is part of it.
            config.requests_max = if seed % 2 == 0 { 128 } else { 5 };
            config.connection_bytes_max = 1 << 20;
        });
        let part = usize::try_from(GEOMETRY.size).expect("small") / 4;
        let models: Vec<Model> = std::thread::scope(|scope| {
            let run = |number: u64| {
                let server = &server;
                scope.spawn(move || {
                    let stream = server.connect().expect("room");
                    let longest = [28, 3000, 1 << 20][usize::try_from(number).expect("small") % 3];
                    let stream = Chopped::new(stream, seed ^ 77, longest);
                    let structured = number != 1;
                    let options = Options { structured, allocation: structured, ..Options::default() };
                    let mut client = Client::over(stream, &options).expect("a handshake");
                    let start = number * u64::try_from(part).expect("small");
                    let mut model = Model::new(start, part, seed * 16 + number);
                    // DF is an error without structured replies.
                    if structured {
                        run(&mut client, &mut model, 2000);
                    } else {
                        run_simple(&mut client, &mut model, 300);
                    }
                    client.flush().expect("a flush");
                    client.disconnect().expect("a goodbye");
                    model
                })
            };
            let threads: Vec<_> = (0..3).map(run).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        verify(&device, &models);
        server.stop().expect("a clean stop");
        assert_eq!(server.stats().totals.errors, 0, "seed {seed}");
    }
}

/// Without structured replies: reads and writes only.
fn run_simple(client: &mut Client, model: &mut Model, requests: usize) {
    for _ in 0..requests {
        let len = 512 * (1 + model.rng.index(400));
        let at = 512 * model.rng.index((model.bytes.len() - len) / 512);
        let offset = model.start + u64::try_from(at).expect("small");
        if model.rng.below(2) == 0 {
            let data = model.rng.bytes(len);
            client.write(offset, &data, false).expect("a write");
            model.bytes[at..at + len].copy_from_slice(&data);
        } else {
            let data = client.read(offset, u32::try_from(len).expect("small")).expect("a read");
            assert!(data == model.bytes[at..at + len]);
        }
    }
}
