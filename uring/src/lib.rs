//! io_uring with owned buffers, its simulated twin, and the block-device trait that front ends serve.

mod backing;
mod buffer;
mod clock;
mod device;
mod dir_storage;
mod file_device;
mod io;
mod net;
mod reactor;
pub mod sim;
mod storage;
mod waker;

pub use backing::{Backing, BackingId, BackingOptions, Direct, open_backing};
pub use buffer::{AlignedBuf, BufPool, IoBuf};
pub use device::{BlockDevice, BlockQueue, Done, Errno, Extent, Geometry, Purpose, Request};
pub use dir_storage::{DirFile, DirStorage};
pub use file_device::{FileDevice, FileQueue};
pub use io::{Allocate, Completion, FileSlot, Io, Op, Token};
pub use net::{NetCompletion, NetEvent, SEND_PIECES_MAX, SendBuf, SendList};
pub use reactor::{Reactor, Wait};
pub use storage::{OpenMode, Storage, StorageFile, replace_file};
pub use waker::Waker;
