//! A block device without a medium, for measuring what stands above it.

use std::collections::VecDeque;
use std::io;

use crate::{
    AlignedBuf, BlockDevice, BlockQueue, BufPool, Completion, Done, Errno, Extent, Geometry, Io, Purpose, Request,
};

/// Reads as zeroes and forgets what is written; every request ends at once.
#[derive(Clone, Copy, Debug)]
pub struct NullDevice {
    geometry: Geometry,
}

impl NullDevice {
    /// A device of this shape.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self { geometry }
    }
}

/// Free buffers kept per queue, by size.
const POOL: [(usize, usize); 3] = [(4 << 10, 256), (64 << 10, 64), (256 << 10, 256)];

impl BlockDevice for NullDevice {
    type Buf = AlignedBuf;
    type Queue = NullQueue;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue<I: Io<AlignedBuf>>(&self, _io: &mut I) -> io::Result<NullQueue> {
        Ok(NullQueue { pool: BufPool::new(&POOL), done: VecDeque::new(), read_only: self.geometry.read_only })
    }

    fn extents(&self, _offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        Ok(vec![Extent { len, hole: true, zero: true }])
    }
}

/// One thread's part of a [`NullDevice`].
pub struct NullQueue {
    pool: BufPool,
    done: VecDeque<Done<AlignedBuf>>,
    read_only: bool,
}

impl BlockQueue for NullQueue {
    type Buf = AlignedBuf;

    fn buffer(&mut self, _purpose: Purpose, len: u32) -> AlignedBuf {
        self.pool.take(len as usize)
    }

    fn submit<I: Io<AlignedBuf>>(&mut self, _io: &mut I, tag: u32, request: Request<AlignedBuf>) {
        let done = match request {
            Request::Read { len, mut buf, .. } => {
                // What a front end must not show: the buffer's last user.
                buf[..len as usize].fill(0);
                Done { tag, result: Ok(()), buf: Some(buf) }
            }
            Request::Flush => Done { tag, result: Ok(()), buf: None },
            Request::Write { .. } | Request::Discard { .. } | Request::WriteZeroes { .. } => {
                let result = if self.read_only { Err(Errno(libc::EROFS)) } else { Ok(()) };
                Done { tag, result, buf: None }
            }
        };
        self.done.push_back(done);
    }

    fn handle_completion<I: Io<AlignedBuf>>(&mut self, _io: &mut I, _completion: Completion<AlignedBuf>) {}

    fn handle_wake<I: Io<AlignedBuf>>(&mut self, _io: &mut I) {}

    fn poll_done(&mut self) -> Option<Done<AlignedBuf>> {
        self.done.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimIo;

    #[test]
    fn reads_are_zeroes_whatever_the_buffer_held() {
        let geometry = Geometry {
            size: 1 << 20,
            logical_block: 512,
            optimal_block: 4096,
            max_request: 1 << 16,
            max_discard: 1 << 20,
            read_only: true,
            discard: false,
        };
        let mut io = SimIo::<AlignedBuf>::new(crate::sim::SimRng::new(1));
        let mut queue = NullDevice::new(geometry).open_queue(&mut io).expect("nothing to open");
        let mut buf = queue.buffer(Purpose::Read, 4096);
        buf.fill(7);
        queue.submit(&mut io, 3, Request::Read { offset: 0, len: 512, buf });
        let done = queue.poll_done().expect("ends at once");
        assert_eq!((done.tag, done.result), (3, Ok(())));
        let bytes = done.buf.expect("a read's buffer");
        assert!(bytes[..512].iter().all(|&b| b == 0) && bytes[512] == 7);
        queue.submit(&mut io, 4, Request::Discard { offset: 0, len: 512 });
        assert_eq!(queue.poll_done().expect("ends at once").result, Err(Errno(libc::EROFS)));
    }
}
