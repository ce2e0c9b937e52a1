//! Where a source's activity log was: how a host whose disk was put back to an older state is told from one that was not.

/// A point in the lives of an activity log. A life begins with each start of the agent and takes a random number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct LogMark {
    /// Random number of the life; 0: there is no log.
    pub session: u64,
    /// Number of its last transaction; goes on through lives.
    pub number: u64,
}

impl LogMark {
    /// The mark, if there is a log.
    #[must_use]
    pub fn known(self) -> Option<Self> {
        (self.session != 0).then_some(self)
    }

    /// Whether a log that ended its lives at `lives` has in it all that a host had done when it was at this mark: same life, and not
    /// further. *(A life's number is never drawn twice, so two logs that went different ways from a common beginning do not pass for
    /// each other.)*
    #[must_use]
    pub fn is_in(self, lives: &[Self]) -> bool {
        lives.iter().any(|life| life.session == self.session && self.number <= life.number)
    }
}
