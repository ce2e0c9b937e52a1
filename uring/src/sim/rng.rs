//! The generator of all choices in a simulation.

/// SplitMix64: small, fast, good enough for choosing, and the same everywhere for ever.
#[derive(Clone, Debug)]
pub struct SimRng {
    state: u64,
}

impl SimRng {
    /// Any seed is good.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Any 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `0 <= n < limit`, evenly.
    ///
    /// # Panics
    /// If `limit` is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0, "nothing to choose from");
        // The upper half of the product; its bias is below limit / 2^64.
        ((u128::from(self.next_u64()) * u128::from(limit)) >> 64) as u64
    }

    /// An index into something with `len` entries.
    ///
    /// # Panics
    /// If `len` is 0.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).expect("below a usize")
    }

    /// True with the probability `part / whole`.
    pub fn chance(&mut self, part: u64, whole: u64) -> bool {
        self.below(whole) < part
    }

    /// Fills with any bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    /// A generator whose choices do not depend on how often this one is used afterwards.
    pub fn fork(&mut self) -> Self {
        Self { state: self.next_u64() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_choices_within_limits() {
        let (mut one, mut two) = (SimRng::new(7), SimRng::new(7));
        let mut counts = [0u32; 5];
        for _ in 0..5000 {
            let n = one.below(5);
            assert_eq!(n, two.below(5));
            counts[usize::try_from(n).expect("small")] += 1;
        }
        assert!(counts.iter().all(|&count| (800..1200).contains(&count)), "{counts:?}");
        // From the reference implementation (Vigna, splitmix64.c).
        assert_eq!(SimRng::new(1_234_567).next_u64(), 6_457_827_717_110_365_317);
    }
}
