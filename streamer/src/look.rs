//! A cheap look: whether a frame's bytes could shrink at all.

/// Bytes looked at, in short runs spread over the frame.
const SAMPLE: usize = 1024;
/// Bytes in one run: enough that words of text show, few enough for many runs.
const RUN: usize = 32;

/// Looks random: trying to compress it would cost time and gain nothing. Looks at the frequencies of about a thousand bytes:
/// the sum of their squares is near `n + n²/256` for random bytes and several times that for anything that an entropy coder
/// shrinks by a sixteenth. (Random content that repeats is missed; dedup takes that.)
#[must_use]
pub fn looks_random(plain: &[u8]) -> bool {
    if plain.len() < SAMPLE {
        return false;
    }
    // Four tables: counting a byte does not wait for the byte before it.
    let mut counts = [[0u8; 256]; 4];
    let stride = (plain.len() - RUN) / (SAMPLE / RUN - 1);
    for run in 0..SAMPLE / RUN {
        let at = run * stride;
        for four in plain[at..at + RUN].as_chunks::<4>().0 {
            for (table, byte) in counts.iter_mut().zip(four) {
                // At most SAMPLE / 4 = 256 of one byte; one too few in that case changes nothing.
                table[usize::from(*byte)] = table[usize::from(*byte)].saturating_add(1);
            }
        }
    }
    let squares: u32 = (0..256)
        .map(|byte| counts.iter().map(|table| u32::from(table[byte])).sum::<u32>())
        .map(|count| count * count)
        .sum();
    const N: u32 = 1024;
    const _: () = assert!(SAMPLE == 1024);
    // Random: 5116 on average, standard deviation about 90. Base64, which shrinks by a quarter: above 17000.
    squares < (N + N * N / 256) * 13 / 10
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)).to_le_bytes()
        };
        (0..len / 8).flat_map(|_| next()).collect()
    }

    #[test]
    fn tells_noise_from_what_shrinks() {
        for seed in 0..20 {
            assert!(looks_random(&noise(64 << 10, seed)), "seed {seed}");
        }
        let text = b"The quick brown fox jumps over the lazy dog. ".repeat(1500);
        let mut half = noise(64 << 10, 1);
        for block in half.chunks_mut(4096) {
            block[2048..].fill(0);
        }
        let letters: Vec<u8> = noise(64 << 10, 2).iter().map(|byte| b'A' + byte % 64).collect();
        for (name, data) in [("text", &text), ("half zeroes", &half), ("64 letters", &letters)] {
            assert!(!looks_random(data), "{name}");
        }
        assert!(!looks_random(&noise(512, 1)), "too short to say");
    }
}
