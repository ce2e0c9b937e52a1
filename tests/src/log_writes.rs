//! The log of the kernel's device-mapper target `log-writes` (`Documentation/admin-guide/device-mapper/log-writes.rst`): what a
//! disk was asked to write, in the order in which it became durable.
//!
//! Layout, in blocks of the logged device's logical block size, integers little-endian:
//!
//! | block | offset | size | field |
//! |---|---|---|---|
//! | 0 | 0 | 8 | magic |
//! | 0 | 8 | 8 | version, 1 |
//! | 0 | 16 | 8 | number of entries |
//! | 0 | 24 | 4 | bytes of a block |
//! | entry | 0 | 8 | first block on the device |
//! | entry | 8 | 8 | blocks |
//! | entry | 16 | 8 | flags |
//! | entry | 24 | 8 | bytes of the mark's text, which stands in the entry's block behind these 32 |
//!
//! An entry takes a block; the blocks that it wrote follow it, unless it is a discard. Entries begin at block 1.
//!
//! A write enters the log with the next flush that was *issued* after it had ended; one with FUA enters at its end, ahead of
//! earlier ones that no flush has covered yet.

use std::io;

use anyhow::{Context, Result, bail, ensure};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const HEADER_BYTES: usize = 32;
/// Blocks of devices that exist.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=4096;
/// Far longer than a request of the block layer.
const ENTRY_BYTES_MAX: u64 = 64 << 20;

const FLUSH: u64 = 1 << 0;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
const METADATA: u64 = 1 << 4;

/// One entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// First byte on the device.
    pub offset: u64,
    /// Bytes written or discarded; 0: a bare flush, or a mark.
    pub len: u64,
    /// It was a flush as well: all that had ended before it was issued is durable.
    pub flush: bool,
    /// It was durable at its end.
    pub fua: bool,
    /// The range was discarded, not written.
    pub discard: bool,
    /// Text of a mark (`dmsetup message NAME 0 mark TEXT`).
    pub mark: Option<String>,
    /// What was written.
    pub data: Vec<u8>,
}

/// Reads a whole log. `read` fills a buffer from a byte position of the log device.
///
/// # Errors
/// What is wrong with the log, or the device's error.
pub fn read(mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> Result<Vec<Entry>> {
    let mut head = [0; 512];
    read(0, &mut head).context("read the log's head")?;
    let (magic, version, count) = (word(&head, 0), word(&head, 8), word(&head, 16));
    ensure!(magic == MAGIC, "no log of log-writes: it begins with {magic:#x}");
    ensure!(version == VERSION, "version {version} of the log is unknown");
    let block = u32::from_le_bytes(head[24..28].try_into().expect("four bytes"));
    ensure!(BLOCK_BYTES.contains(&block) && block.is_power_of_two(), "blocks of {block} bytes");
    let block = u64::from(block);
    let mut at = block;
    let mut entries = Vec::new();
    for number in 0..count {
        let entry = read_entry(&mut read, &mut at, block).with_context(|| format!("entry {number} of {count}"))?;
        entries.push(entry);
    }
    Ok(entries)
}

fn read_entry(read: &mut impl FnMut(u64, &mut [u8]) -> io::Result<()>, at: &mut u64, block: u64) -> Result<Entry> {
    let mut page = vec![0; usize::try_from(block)?];
    read(*at, &mut page).with_context(|| format!("read byte {at}"))?;
    let (first, blocks, flags, text) = (word(&page, 0), word(&page, 8), word(&page, 16), word(&page, 24));
    ensure!(flags & !(FLUSH | FUA | DISCARD | MARK | METADATA) == 0, "unknown flags {flags:#x}");
    let offset = first.checked_mul(block).context("beyond all devices")?;
    let len = blocks.checked_mul(block).context("longer than all devices")?;
    let is = |flag| flags & flag != 0;
    *at += block;
    let mut data = Vec::new();
    if !is(DISCARD) {
        ensure!(len <= ENTRY_BYTES_MAX, "{len} bytes in one entry");
        data.resize(usize::try_from(len)?, 0);
        read(*at, &mut data).with_context(|| format!("read byte {at}"))?;
        *at += len;
    }
    let mark = if is(MARK) { Some(mark_text(&page, text)?) } else { None };
    Ok(Entry { offset, len, flush: is(FLUSH), fua: is(FUA), discard: is(DISCARD), mark, data })
}

fn mark_text(page: &[u8], len: u64) -> Result<String> {
    let text = usize::try_from(len).ok().and_then(|len| page[HEADER_BYTES..].get(..len));
    let Some(text) = text else { bail!("a mark of {len} bytes in a block of {}", page.len()) };
    // The kernel gives the room that there is, whatever the text's length.
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entry header as the kernel writes it: first block, blocks, flags, bytes of text.
    fn header(words: [u64; 4], text: &[u8], block: usize) -> Vec<u8> {
        let mut page: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).chain(text.iter().copied()).collect();
        page.resize(block, 0);
        page
    }

    fn log(block: u32, entries: u64, body: &[Vec<u8>]) -> Vec<u8> {
        let size = usize::try_from(block).expect("small");
        let mut bytes: Vec<u8> = [MAGIC, VERSION, entries].iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(block.to_le_bytes());
        bytes.resize(size, 0);
        bytes.extend(body.concat());
        bytes.resize(bytes.len() + 4096, 0);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Vec<Entry>> {
        read(|at, buf| {
            let at = usize::try_from(at).expect("small");
            let piece = bytes.get(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buf.copy_from_slice(piece);
            Ok(())
        })
    }

    #[test]
    fn entries_with_and_without_data_are_read_in_order() {
        for block in [512u32, 4096] {
            let size = usize::try_from(block).expect("small");
            let text = vec![b'e', b'n', b'd'];
            let body = [
                header([3, 2, 0, 0], &[], size),
                vec![7; 2 * size],
                header([9, 4, DISCARD, 0], &[], size),
                header([0, 0, FLUSH, 0], &[], size),
                header([1, 1, FLUSH | FUA | METADATA, 0], &[], size),
                vec![8; size],
                header([0, 0, MARK, size as u64 - 33], &text, size),
            ];
            let entries = parse(&log(block, 5, &body)).expect("good");
            let bytes = u64::from(block);
            assert_eq!((entries[0].offset, entries[0].len), (3 * bytes, 2 * bytes));
            assert_eq!(entries[0].data, vec![7; 2 * size]);
            assert!(entries[1].discard && entries[1].data.is_empty() && entries[1].len == 4 * bytes);
            assert!(entries[2].flush && entries[2].len == 0);
            assert!(entries[3].flush && entries[3].fua && entries[3].data == vec![8; size]);
            assert_eq!(entries[4].mark.as_deref(), Some("end"));
        }
    }

    #[test]
    fn what_is_no_log_is_an_error() {
        let good = log(512, 1, &[header([0, 1, 0, 0], &[], 512), vec![1; 512]]);
        parse(&good).expect("good");
        let spoilt = |at: usize, to: u8| {
            let mut bytes = good.clone();
            bytes[at] = to;
            parse(&bytes).expect_err("spoilt")
        };
        assert!(spoilt(0, 0).to_string().contains("no log"));
        assert!(spoilt(8, 2).to_string().contains("version 2"));
        assert!(spoilt(25, 3).to_string().contains("blocks of 768"));
        assert!(format!("{:#}", spoilt(512 + 17, 1)).contains("unknown flags"));
        assert!(format!("{:#}", spoilt(512 + 12, 1)).contains("bytes in one entry"));
        assert!(format!("{:#}", spoilt(16, 200)).contains("entry"), "more entries than there are");
        let mark = log(512, 1, &[header([0, 0, MARK, 481], &[], 512)]);
        assert!(format!("{:#}", parse(&mark).expect_err("too long")).contains("a mark of 481 bytes"));
    }
}
