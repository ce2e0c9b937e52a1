//! Frames: about 64 KiB of packed chunks, compressed and sealed as one. A frame describes itself and says nothing about
//! where it is stored, so it can be moved between batches and segments. Byte table: `docs/formats/batch.md`.

use std::cell::RefCell;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Error, KeyEpoch, Result};

/// Bytes of a [`FrameHeader`].
pub const FRAME_HEADER_BYTES: usize = 64;
/// Bytes that sealing adds (the GCM tag).
pub const TAG_BYTES: usize = 16;
/// Plain bytes at which a data frame is closed. One chunk (at most one slot) always fits an empty frame.
pub const FRAME_PLAIN_TARGET: usize = 64 * 1024;
/// Longest plain content of a data frame: a chunk may be added while the frame is below the target.
pub const FRAME_PLAIN_MAX: usize = 2 * FRAME_PLAIN_TARGET;
/// Longest plain content of a record list (frame 0): about a million records.
pub const LIST_PLAIN_MAX: usize = 80 << 20;

const MAGIC: [u8; 4] = *b"FSFR";
const VERSION: u8 = 1;
const WHAT: &str = "frame";

/// How a frame's plain bytes were packed before sealing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// As they are.
    None,
    /// One zstd frame.
    Zstd,
}

/// The 64 bytes before a frame's sealed bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct FrameHeader {
    magic: [u8; 4],
    version: u8,
    compression: u8,
    reserved: U16,
    number: U32,
    key_epoch: U32,
    salt: [u8; 32],
    plain_len: U32,
    sealed_len: U32,
    sealed_crc: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<FrameHeader>() == FRAME_HEADER_BYTES);
/// What of the header is associated data: all but the two checksums.
const AUTHENTICATED: usize = 56;

impl FrameHeader {
    /// Parses and checks the header at the start of `bytes` (not the sealed bytes behind it).
    ///
    /// # Errors
    /// Truncation, magic, version, checksum, or a length over `plain_max`.
    pub fn parse(bytes: &[u8], plain_max: usize) -> Result<Self> {
        let Ok((header, _)) = Self::read_from_prefix(bytes) else {
            return Err(Error::truncated(WHAT, FRAME_HEADER_BYTES, bytes.len()));
        };
        if header.magic != MAGIC {
            return Err(Error::Magic { what: WHAT });
        }
        let computed = crc_fast::crc32_iscsi(&bytes[..FRAME_HEADER_BYTES - 4]);
        if computed != header.header_crc.get() {
            return Err(Error::Checksum { what: "frame header", stored: header.header_crc.get(), computed });
        }
        if header.version != VERSION {
            return Err(Error::Version { what: WHAT, found: header.version.into(), known: VERSION.into() });
        }
        if header.compression > 1 {
            return Err(Error::Range {
                what: WHAT,
                field: "compression",
                value: header.compression.into(),
                allowed: "0 or 1",
            });
        }
        let plain = header.plain_len() as u64;
        if plain > plain_max as u64 {
            return Err(Error::TooLong { what: WHAT, value: plain, limit: plain_max as u64 });
        }
        let sealed = header.sealed_len() as u64;
        if sealed < TAG_BYTES as u64 || sealed > plain + TAG_BYTES as u64 {
            return Err(Error::Range {
                what: WHAT,
                field: "sealed length",
                value: sealed,
                allowed: "tag to plain + tag",
            });
        }
        Ok(header)
    }

    /// The frame's number within its batch; 0 is the record list.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number.get()
    }

    /// Which epoch's host key seals it.
    #[must_use]
    pub fn key_epoch(&self) -> KeyEpoch {
        KeyEpoch(self.key_epoch.get())
    }

    /// The salt from which its key is derived.
    #[must_use]
    pub fn salt(&self) -> &[u8; 32] {
        &self.salt
    }

    /// Bytes after opening.
    #[must_use]
    pub fn plain_len(&self) -> usize {
        self.plain_len.get() as usize
    }

    /// Bytes behind the header.
    #[must_use]
    pub fn sealed_len(&self) -> usize {
        self.sealed_len.get() as usize
    }

    /// Header and sealed bytes together.
    #[must_use]
    pub fn total_len(&self) -> usize {
        FRAME_HEADER_BYTES + self.sealed_len()
    }

    /// How the plain bytes were packed.
    #[must_use]
    pub fn compression(&self) -> Compression {
        if self.compression == 0 { Compression::None } else { Compression::Zstd }
    }

    /// Checks the sealed bytes' checksum: finds a flipped bit without the key.
    ///
    /// # Errors
    /// Truncation or checksum.
    pub fn check_sealed(&self, sealed: &[u8]) -> Result<()> {
        if sealed.len() != self.sealed_len() {
            return Err(Error::truncated(WHAT, self.sealed_len(), sealed.len()));
        }
        let computed = crc_fast::crc32_iscsi(sealed);
        let stored = self.sealed_crc.get();
        if computed == stored { Ok(()) } else { Err(Error::Checksum { what: WHAT, stored, computed }) }
    }
}

/// Splits `bytes` into a checked header and its sealed bytes (checksum verified).
///
/// # Errors
/// As [`FrameHeader::parse`] and [`FrameHeader::check_sealed`].
pub fn split(bytes: &[u8], plain_max: usize) -> Result<(FrameHeader, &[u8])> {
    let header = FrameHeader::parse(bytes, plain_max)?;
    let sealed = bytes
        .get(FRAME_HEADER_BYTES..header.total_len())
        .ok_or_else(|| Error::truncated(WHAT, header.total_len(), bytes.len()))?;
    header.check_sealed(sealed)?;
    Ok((header, sealed))
}

/// A compressor and its working memory, reused from frame to frame.
pub struct Compressor {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
    /// Where compressed bytes are made. Keeps its length, so that it is cleared once and not for every frame.
    packed: Vec<u8>,
}

impl Compressor {
    /// A compressor at `level` (zstd's, −7 to 19).
    ///
    /// # Errors
    /// [`Error::Compression`] when zstd cannot allocate.
    pub fn new(level: i32) -> Result<Self> {
        let context = zstd::bulk::Compressor::new(level).map_err(compression_error)?;
        Ok(Self { context, level, packed: Vec::new() })
    }

    /// Changes the level from the next frame on.
    ///
    /// # Errors
    /// [`Error::Compression`] for a level that zstd does not have.
    pub fn set_level(&mut self, level: i32) -> Result<()> {
        if level != self.level {
            self.context.set_compression_level(level).map_err(compression_error)?;
            self.level = level;
        }
        Ok(())
    }

    /// Replaces what lies in `bytes` from `start` by its compressed form if that is shorter by at least a sixteenth.
    fn compress(&mut self, bytes: &mut Vec<u8>, start: usize) -> bool {
        let plain = &bytes[start..];
        let room = plain.len() - plain.len() / 16;
        if self.packed.len() < room {
            self.packed.resize(room, 0);
        }
        // An error says that it does not fit the room: not worth it.
        let Ok(len) = self.context.compress_to_buffer(plain, &mut self.packed[..room]) else { return false };
        bytes.truncate(start);
        bytes.extend_from_slice(&self.packed[..len]);
        true
    }
}

fn compression_error(error: std::io::Error) -> Error {
    Error::Compression { what: WHAT, reason: error.to_string() }
}

/// The key of one batch's frames (one salt).
pub struct FrameKey {
    cipher: cipher::Cipher,
    epoch: KeyEpoch,
    salt: [u8; 32],
}

impl FrameKey {
    pub(crate) fn new(key: &[u8; 32], epoch: KeyEpoch, salt: [u8; 32]) -> Self {
        Self { cipher: cipher::Cipher::new(key), epoch, salt }
    }

    /// Appends frame `number` with content `plain` to `out`: header, then compressed (where a compressor is given and it
    /// gains) and sealed bytes. `bind` builds further associated data once the sealed length is known (the record list is
    /// bound to its batch header by it; data frames pass a closure that returns nothing).
    ///
    /// # Errors
    /// [`Error::TooLong`] when the content exceeds what a header can say.
    pub fn seal<'a>(
        &self,
        number: u32,
        plain: &[u8],
        compressor: Option<&mut Compressor>,
        bind: impl FnOnce(usize) -> &'a [u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let start = begin(out);
        out.extend_from_slice(plain);
        self.seal_begun(number, start, compressor, bind, out)
    }

    /// As [`Self::seal`], for content that was appended to `out` in pieces after [`begin`], which returned `start`: each byte is
    /// copied once.
    ///
    /// # Errors
    /// [`Error::TooLong`] when the content exceeds what a header can say.
    pub fn seal_begun<'a>(
        &self,
        number: u32,
        start: usize,
        compressor: Option<&mut Compressor>,
        bind: impl FnOnce(usize) -> &'a [u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let limit = LIST_PLAIN_MAX as u64;
        let body = start + FRAME_HEADER_BYTES;
        let plain_bytes = out.len() - body;
        let plain_len = u32::try_from(plain_bytes)
            .ok()
            .filter(|len| u64::from(*len) <= limit)
            .ok_or(Error::TooLong { what: WHAT, value: plain_bytes as u64, limit })?;
        let compressed = compressor.is_some_and(|compressor| compressor.compress(out, body));
        let sealed_len = u32::try_from(out.len() - body + TAG_BYTES).map_err(|_| Error::TooLong {
            what: WHAT,
            value: plain_bytes as u64,
            limit,
        })?;
        let mut header = FrameHeader {
            magic: MAGIC,
            version: VERSION,
            compression: u8::from(compressed),
            reserved: U16::ZERO,
            number: number.into(),
            key_epoch: self.epoch.0.into(),
            salt: self.salt,
            plain_len: plain_len.into(),
            sealed_len: sealed_len.into(),
            sealed_crc: U32::ZERO,
            header_crc: U32::ZERO,
        };
        let bound = bind(FRAME_HEADER_BYTES + sealed_len as usize);
        let tag = self.cipher.seal(number, &associated(&header, bound), &mut out[body..]);
        out.extend_from_slice(&tag);
        header.sealed_crc = crc_fast::crc32_iscsi(&out[body..]).into();
        header.header_crc = crc_fast::crc32_iscsi(&header.as_bytes()[..FRAME_HEADER_BYTES - 4]).into();
        out[start..body].copy_from_slice(header.as_bytes());
        Ok(())
    }

    /// Opens a frame into `out` (cleared first). `scratch` is working memory.
    ///
    /// # Errors
    /// [`Error::Forged`] for changed bytes or another key or batch, [`Error::Compression`] when the content is not what
    /// the header says.
    pub fn open(
        &self,
        header: &FrameHeader,
        sealed: &[u8],
        bound: &[u8],
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if sealed.len() != header.sealed_len() || sealed.len() < TAG_BYTES {
            return Err(Error::truncated(WHAT, header.sealed_len(), sealed.len()));
        }
        let (body, tag) = sealed.split_at(sealed.len() - TAG_BYTES);
        let plain_here = header.compression() == Compression::None;
        let opened = if plain_here { &mut *out } else { &mut *scratch };
        opened.clear();
        opened.extend_from_slice(body);
        self.cipher
            .open(header.number(), &associated(header, bound), opened, tag)
            .map_err(|()| Error::Forged { what: WHAT })?;
        if plain_here {
            return if out.len() == header.plain_len() {
                Ok(())
            } else {
                Err(Error::Compression { what: WHAT, reason: "length differs from the header's".into() })
            };
        }
        out.clear();
        out.resize(header.plain_len(), 0);
        let len = decompress(scratch, &mut out[..]).map_err(compression_error)?;
        if len == header.plain_len() {
            Ok(())
        } else {
            Err(Error::Compression {
                what: WHAT,
                reason: format!("{len} bytes, the header says {}", header.plain_len()),
            })
        }
    }
}

/// Decompresses one frame; gives its length. With a context that the thread keeps: making one takes about as long as a small frame.
fn decompress(from: &[u8], to: &mut [u8]) -> std::io::Result<usize> {
    thread_local! {
        static CONTEXT: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|kept| {
        let context = match kept {
            Some(context) => context,
            None => kept.insert(zstd::bulk::Decompressor::new()?),
        };
        context.decompress_to_buffer(from, to)
    })
}

/// Makes room for a frame's header at the end of `out`; the content is appended behind it, then
/// [`FrameKey::seal_begun`]. Returns where the frame starts.
pub fn begin(out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.resize(start + FRAME_HEADER_BYTES, 0);
    start
}

fn associated(header: &FrameHeader, bound: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(AUTHENTICATED + bound.len());
    data.extend_from_slice(&header.as_bytes()[..AUTHENTICATED]);
    data.extend_from_slice(bound);
    data
}

fn nonce(number: u32) -> [u8; 12] {
    // The key is fresh for every batch, so the frame's number alone makes the nonce unique.
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&number.to_le_bytes());
    nonce
}

/// AES-256-GCM by the crate that is built in; both give the same bytes.
mod cipher {
    use super::{TAG_BYTES, nonce};

    #[cfg(any(not(feature = "aws-lc"), test))]
    pub(super) mod portable {
        use aes_gcm::aead::{AeadInOut, KeyInit, inout::InOutBuf};

        use super::{TAG_BYTES, nonce};

        pub(crate) struct Cipher(aes_gcm::Aes256Gcm);

        impl Cipher {
            pub(crate) fn new(key: &[u8; 32]) -> Self {
                Self(aes_gcm::Aes256Gcm::new(key.into()))
            }

            pub(crate) fn seal(&self, number: u32, associated: &[u8], bytes: &mut [u8]) -> [u8; TAG_BYTES] {
                self.0
                    .encrypt_inout_detached(&nonce(number).into(), associated, InOutBuf::from(bytes))
                    .expect("frames are far below GCM's length limit")
                    .into()
            }

            pub(crate) fn open(&self, number: u32, associated: &[u8], bytes: &mut [u8], tag: &[u8]) -> Result<(), ()> {
                let tag: [u8; TAG_BYTES] = tag.try_into().map_err(|_| ())?;
                self.0
                    .decrypt_inout_detached(&nonce(number).into(), associated, InOutBuf::from(bytes), &tag.into())
                    .map_err(|_| ())
            }
        }
    }

    #[cfg(feature = "aws-lc")]
    pub(super) mod fast {
        use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

        use super::{TAG_BYTES, nonce};

        pub(crate) struct Cipher(LessSafeKey);

        impl Cipher {
            pub(crate) fn new(key: &[u8; 32]) -> Self {
                Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("the key has AES-256's length")))
            }

            pub(crate) fn seal(&self, number: u32, associated: &[u8], bytes: &mut [u8]) -> [u8; TAG_BYTES] {
                let tag = self
                    .0
                    .seal_in_place_separate_tag(
                        Nonce::assume_unique_for_key(nonce(number)),
                        Aad::from(associated),
                        bytes,
                    )
                    .expect("frames are far below GCM's length limit");
                tag.as_ref().try_into().expect("GCM's tag has 16 bytes")
            }

            pub(crate) fn open(
                &self,
                number: u32,
                associated: &[u8],
                bytes: &mut Vec<u8>,
                tag: &[u8],
            ) -> Result<(), ()> {
                bytes.extend_from_slice(tag);
                let nonce = Nonce::assume_unique_for_key(nonce(number));
                let len = self.0.open_in_place(nonce, Aad::from(associated), bytes).map_err(|_| ())?.len();
                bytes.truncate(len);
                Ok(())
            }
        }
    }

    #[cfg(feature = "aws-lc")]
    pub(super) use fast::Cipher;
    #[cfg(not(feature = "aws-lc"))]
    pub(super) use portable::Cipher;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostId;
    use crate::keys::{HostKey, VaultKey};

    fn key() -> FrameKey {
        HostKey::derive(&VaultKey::new([7; 32]), HostId([1; 16]), KeyEpoch(1)).frame_key(&[9; 32])
    }

    fn sealed(plain: &[u8], level: Option<i32>) -> Vec<u8> {
        let mut out = Vec::new();
        let mut compressor = level.map(|level| Compressor::new(level).expect("zstd"));
        key().seal(3, plain, compressor.as_mut(), |_| b"bound", &mut out).expect("seal");
        out
    }

    fn open(bytes: &[u8], bound: &[u8]) -> Result<Vec<u8>> {
        let (header, sealed) = split(bytes, FRAME_PLAIN_MAX)?;
        let (mut scratch, mut out) = (Vec::new(), Vec::new());
        key().open(&header, sealed, bound, &mut scratch, &mut out)?;
        Ok(out)
    }

    #[test]
    fn frames_come_back_and_shrink_only_when_that_gains() {
        let text = b"the quick brown fox ".repeat(500);
        let noise: Vec<u8> = (0..4096u32).map(|i| blake3::hash(&i.to_le_bytes()).as_bytes()[0]).collect();
        for (plain, shrinks) in [(text, true), (noise, false), (Vec::new(), false)] {
            for level in [None, Some(1), Some(-5)] {
                let bytes = sealed(&plain, level);
                assert_eq!(open(&bytes, b"bound").expect("open"), plain);
                let shrank = bytes.len() < plain.len() + FRAME_HEADER_BYTES + TAG_BYTES;
                assert_eq!(shrank, shrinks && level.is_some());
            }
        }
    }

    #[test]
    fn every_flipped_bit_and_other_batch_is_refused() {
        let bytes = sealed(&b"some content that compresses ".repeat(10), Some(3));
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[position] ^= 1 << bit;
                assert!(open(&bad, b"bound").is_err(), "byte {position} bit {bit}");
            }
        }
        for cut in 0..bytes.len() {
            assert!(open(&bytes[..cut], b"bound").is_err(), "cut at {cut}");
        }
        assert_eq!(open(&bytes, b"other"), Err(Error::Forged { what: WHAT }));
    }

    #[cfg(feature = "aws-lc")]
    #[test]
    fn both_ciphers_give_the_same_bytes() {
        let (mut a, mut b) = (vec![5u8; 1000], vec![5u8; 1000]);
        let tag_a = cipher::fast::Cipher::new(&[3; 32]).seal(9, b"ad", &mut a);
        let tag_b = cipher::portable::Cipher::new(&[3; 32]).seal(9, b"ad", &mut b);
        assert_eq!((&a, tag_a), (&b, tag_b));
        cipher::fast::Cipher::new(&[3; 32]).open(9, b"ad", &mut a, &tag_b).expect("the other's bytes");
        cipher::portable::Cipher::new(&[3; 32]).open(9, b"ad", &mut b, &tag_a).expect("the other's bytes");
        assert_eq!((&a, &b), (&vec![5u8; 1000], &vec![5u8; 1000]));
    }
}
