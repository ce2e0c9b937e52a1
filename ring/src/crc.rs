//! CRC-32C (Castagnoli, reflected, polynomial 0x1EDC6F41; RFC 3720 appendix B.4) for the few hundred bytes of headers and scratch
//! copies. A table of our own keeps the core free of SIMD, so that it runs under interpreters.

const POLYNOMIAL_REFLECTED: u32 = 0x82F6_3B78;

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0_u32; 256];
    let mut byte: u32 = 0;
    while byte < 256 {
        let mut value = byte;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ POLYNOMIAL_REFLECTED } else { value >> 1 };
            bit += 1;
        }
        table[byte as usize] = value;
        byte += 1;
    }
    table
}

/// CRC-32C of `bytes`.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| (crc >> 8) ^ TABLE[((crc ^ u32::from(byte)) & 0xFF) as usize])
}

/// CRC-32C of the little-endian bytes of `words`.
pub(crate) fn crc32c_words(words: impl IntoIterator<Item = u64>) -> u32 {
    !words
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .fold(!0, |crc, byte| (crc >> 8) ^ TABLE[((crc ^ u32::from(byte)) & 0xFF) as usize])
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn matches_the_check_value_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c_words([0, 0, 0, 0]), 0x8A91_36AA, "32 bytes of zeroes, RFC 3720 B.4");
    }
}
