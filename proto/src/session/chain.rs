//! Where a stream goes on after a break, and whether a batch continues it (I6).

use crate::batch::BatchHeader;
use crate::message::{RefuseCode, Tail};
use crate::{BatchNo, ChainHash, Generation, Incarnation, Position};

/// The last batch that the source knows to be durable at the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SourceTail {
    /// Life of the source's ring, now.
    pub incarnation: Incarnation,
    /// Number of the last durable batch; 0: none yet.
    pub number: BatchNo,
    /// Its chain hash; zeroes: none yet.
    pub chain: ChainHash,
    /// No batch of this incarnation was sent yet: it may continue behind any tail.
    pub unsent: bool,
}

/// What the source does with the target's tail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// Both agree: the next batch follows the source's own tail.
    Continue,
    /// The target holds more of this incarnation than the source knows: form batches up to `number` again, check that the
    /// last one's chain hash is `chain`, and go on behind it. If it is not: [`Resume::StartOver`].
    CatchUp {
        /// The target's last batch.
        number: BatchNo,
        /// Its chain hash.
        chain: ChainHash,
    },
    /// A new incarnation continues behind a tail of an older one. `proved`: the tail is exactly the last batch that the
    /// source knows to be durable, so nothing was lost in between.
    Append {
        /// The target's last batch.
        number: BatchNo,
        /// Its chain hash.
        chain: ChainHash,
        /// Nothing to compare.
        proved: bool,
    },
    /// Histories differ or the target lost batches: take incarnation `incarnation` and compare everything (I10).
    StartOver {
        /// The new incarnation, above both sides'.
        incarnation: Incarnation,
    },
}

/// Decides how a stream goes on.
#[must_use]
pub fn resume(own: &SourceTail, tail: Option<&Tail>) -> Resume {
    let start_over =
        |other: Incarnation| Resume::StartOver { incarnation: Incarnation(own.incarnation.0.max(other.0) + 1) };
    let Some(tail) = tail else {
        return if own.number == BatchNo(0) { Resume::Continue } else { start_over(Incarnation(0)) };
    };
    let same = tail.number == own.number && tail.chain == own.chain;
    if tail.incarnation > own.incarnation {
        start_over(tail.incarnation)
    } else if tail.incarnation < own.incarnation {
        if own.unsent {
            Resume::Append { number: tail.number, chain: tail.chain, proved: same }
        } else {
            start_over(tail.incarnation)
        }
    } else if same {
        Resume::Continue
    } else if tail.number > own.number {
        Resume::CatchUp { number: tail.number, chain: tail.chain }
    } else {
        start_over(tail.incarnation)
    }
}

/// The target's view of one host's chain: which batch may come next.
///
/// Invariant: `tail` only moves forward, one batch at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChainCheck {
    generation: Generation,
    tail: Option<Tail>,
}

/// What to do with a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It continues the chain: open it, journal it, then [`ChainCheck::advance`].
    Next,
    /// It is the tail itself, or was journaled before: acknowledge again, do nothing.
    Repeat,
    /// It does not continue the chain.
    Refuse(RefuseCode, String),
}

impl ChainCheck {
    /// For the line of history `generation`, behind `tail`.
    #[must_use]
    pub fn new(generation: Generation, tail: Option<Tail>) -> Self {
        Self { generation, tail }
    }

    /// The last batch held.
    #[must_use]
    pub fn tail(&self) -> Option<&Tail> {
        self.tail.as_ref()
    }

    /// Judges a batch by its header. `journaled` tells the chain hash of an older batch that is still held, so that an
    /// honest repeat is told from a fork; a batch so old that nothing is known of it any more counts as a repeat only if
    /// its number and incarnation lie below the tail's.
    #[must_use]
    pub fn judge(&self, header: &BatchHeader, journaled: impl Fn(BatchNo) -> Option<ChainHash>) -> Verdict {
        let place = header.place();
        if place.generation != self.generation {
            return Verdict::Refuse(
                RefuseCode::Generation,
                format!("batch of generation {}, the group is at {}", place.generation, self.generation),
            );
        }
        let (number, chain, incarnation, end) =
            self.tail.map_or((BatchNo(0), ChainHash::default(), Incarnation(0), Position(0)), |tail| {
                (tail.number, tail.chain, tail.incarnation, tail.end)
            });
        let refuse = |reason: String| Verdict::Refuse(RefuseCode::Chain, reason);
        if place.number <= number {
            return match journaled(place.number) {
                Some(held) if held == header.chain() => Verdict::Repeat,
                Some(_) => refuse(format!("fork: batch {} has another chain hash than the one held", place.number)),
                None if place.incarnation <= incarnation => Verdict::Repeat,
                None => {
                    refuse(format!("batch {} of incarnation {} is below the tail", place.number, place.incarnation))
                }
            };
        }
        if place.number != number.next() {
            return refuse(format!("gap: batch {} after {}", place.number, number));
        }
        if place.incarnation < incarnation {
            return refuse(format!("incarnation {} after {}", place.incarnation, incarnation));
        }
        if header.previous() != chain {
            return refuse(format!("fork: batch {} does not follow the chain held", place.number));
        }
        if place.incarnation == incarnation && place.first != end {
            return refuse(format!(
                "batch {} starts at ticket {}, the tail ends at {}",
                place.number, place.first, end
            ));
        }
        Verdict::Next
    }

    /// The judged batch is now the tail.
    pub fn advance(&mut self, header: &BatchHeader) {
        let place = header.place();
        self.tail =
            Some(Tail { incarnation: place.incarnation, number: place.number, chain: header.chain(), end: place.end });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(incarnation: u64, number: u64, chain: u8, unsent: bool) -> SourceTail {
        SourceTail {
            incarnation: Incarnation(incarnation),
            number: BatchNo(number),
            chain: ChainHash([chain; 32]),
            unsent,
        }
    }

    fn tail(incarnation: u64, number: u64, chain: u8) -> Tail {
        Tail {
            incarnation: Incarnation(incarnation),
            number: BatchNo(number),
            chain: ChainHash([chain; 32]),
            end: Position(0),
        }
    }

    #[test]
    fn a_stream_goes_on_only_on_evidence() {
        let over = |i| Resume::StartOver { incarnation: Incarnation(i) };
        let cases = [
            (own(1, 0, 0, true), None, Resume::Continue),
            (own(1, 5, 5, false), None, over(2)),
            (own(1, 5, 5, false), Some(tail(1, 5, 5)), Resume::Continue),
            (
                own(1, 5, 5, false),
                Some(tail(1, 7, 7)),
                Resume::CatchUp { number: BatchNo(7), chain: ChainHash([7; 32]) },
            ),
            (own(1, 5, 5, false), Some(tail(1, 5, 6)), over(2)),
            (own(1, 5, 5, false), Some(tail(1, 4, 4)), over(2)),
            (own(1, 5, 5, false), Some(tail(3, 5, 5)), over(4)),
            (
                own(2, 5, 5, true),
                Some(tail(1, 5, 5)),
                Resume::Append { number: BatchNo(5), chain: ChainHash([5; 32]), proved: true },
            ),
            (
                own(2, 5, 5, true),
                Some(tail(1, 9, 9)),
                Resume::Append { number: BatchNo(9), chain: ChainHash([9; 32]), proved: false },
            ),
            (own(2, 5, 5, false), Some(tail(1, 5, 5)), over(3)),
        ];
        for (own, tail, expected) in cases {
            assert_eq!(resume(&own, tail.as_ref()), expected, "{own:?} {tail:?}");
        }
    }
}
