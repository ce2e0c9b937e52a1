//! The streamer's scratch in shared memory: two copies, each with a number and a checksum, written in turn.
//!
//! A kill between two stores spoils at most the copy being written, which is the older one; the other one was complete before
//! its turn began.

use crate::crc::crc32c_words;
use crate::layout::{StateCopy, low32};
use crate::sync::Ordering;

/// What a restarted streamer needs beside the ring's content. All zeroes at first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StreamState {
    /// Number of the next batch to be made.
    pub next_batch: u64,
    /// Chain hash of the batch before it.
    pub chain_hash: [u8; 32],
    /// An event is open: no cut is recoverable until its end record.
    pub event_open: bool,
    /// For the streamer.
    pub spare: [u64; 16],
}

const NUMBER: usize = 0;
const NEXT_BATCH: usize = NUMBER + 1;
const CHAIN_HASH: usize = NEXT_BATCH + 1;
const FLAGS: usize = CHAIN_HASH + 4;
const SPARE: usize = FLAGS + 1;
const CHECKSUM: usize = SPARE + 16;
const _: () = assert!(CHECKSUM == 23 && CHECKSUM < 64);

const FLAG_EVENT_OPEN: u64 = 1;

impl StreamState {
    fn encode(&self, number: u64) -> [u64; CHECKSUM] {
        let mut words = [0; CHECKSUM];
        words[NUMBER] = number;
        words[NEXT_BATCH] = self.next_batch;
        for (word, bytes) in words[CHAIN_HASH..FLAGS].iter_mut().zip(self.chain_hash.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        words[FLAGS] = if self.event_open { FLAG_EVENT_OPEN } else { 0 };
        words[SPARE..].copy_from_slice(&self.spare);
        words
    }

    fn decode(words: &[u64; CHECKSUM]) -> Self {
        let mut chain_hash = [0; 32];
        for (bytes, word) in chain_hash.as_chunks_mut().0.iter_mut().zip(&words[CHAIN_HASH..FLAGS]) {
            *bytes = word.to_le_bytes();
        }
        Self {
            next_batch: words[NEXT_BATCH],
            chain_hash,
            event_open: words[FLAGS] & FLAG_EVENT_OPEN != 0,
            spare: std::array::from_fn(|i| words[SPARE + i]),
        }
    }
}

/// The newest valid copy and its number.
pub(crate) fn load(copies: &[StateCopy]) -> Option<(u64, StreamState)> {
    let valid = copies.iter().filter_map(|copy| {
        // Acquire: pairs with the Release in `store`; the caller's lock orders as well, except after a kill.
        let checksum = copy.words[CHECKSUM].load(Ordering::Acquire);
        let words: [u64; CHECKSUM] = std::array::from_fn(|i| copy.words[i].load(Ordering::Relaxed));
        let valid = words[NUMBER] != 0 && checksum == u64::from(crc32c_words(words));
        valid.then(|| (words[NUMBER], StreamState::decode(&words)))
    });
    valid.max_by_key(|(number, _)| *number)
}

/// Writes the older copy. One writer at a time.
pub(crate) fn store(copies: &[StateCopy], state: &StreamState) {
    let number = load(copies).map_or(0, |(number, _)| number) + 1;
    let copy = &copies[low32(number % 2) as usize];
    let words = state.encode(number);
    // Release, all: in program order behind the last turn's stores to the other copy, which must be complete before this one is
    // spoiled.
    for (word, value) in copy.words.iter().zip(words) {
        word.store(value, Ordering::Release);
    }
    copy.words[CHECKSUM].store(u64::from(crc32c_words(words)), Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::AtomicU64;

    fn copies() -> [StateCopy; 2] {
        std::array::from_fn(|_| StateCopy { words: std::array::from_fn(|_| AtomicU64::new(0)) })
    }

    fn state(n: u64) -> StreamState {
        StreamState {
            next_batch: n,
            chain_hash: std::array::from_fn(|i| (n >> (i % 8)).to_le_bytes()[0]),
            event_open: n.is_multiple_of(3),
            spare: std::array::from_fn(|i| n * 31 + i as u64),
        }
    }

    #[test]
    fn nothing_written_is_none_and_the_last_written_comes_back() {
        let copies = copies();
        assert_eq!(load(&copies), None);
        for n in 1..10 {
            store(&copies, &state(n));
            assert_eq!(load(&copies), Some((n, state(n))));
        }
    }

    /// Goal: a kill after any number of stores of an update leaves the last or the new state.
    /// Method: make the update on a copy of the words, and apply every prefix of its stores.
    #[test]
    fn every_kill_point_of_an_update_leaves_a_valid_state() {
        for n in 1..4_u64 {
            for stores in 0..=CHECKSUM + 1 {
                let copies = copies();
                (1..=n).for_each(|i| store(&copies, &state(i)));
                let words = state(n + 1).encode(n + 1);
                let target = &copies[low32((n + 1) % 2) as usize];
                let all = words.iter().copied().chain([u64::from(crc32c_words(words))]);
                for (word, value) in target.words.iter().zip(all).take(stores) {
                    word.store(value, Ordering::Relaxed);
                }
                let expected = if stores == CHECKSUM + 1 { n + 1 } else { n };
                assert_eq!(load(&copies), Some((expected, state(expected))), "after {stores} stores");
            }
        }
    }
}
