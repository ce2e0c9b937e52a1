//! io_uring with owned buffers, its simulated twin, and the block-device trait that front ends serve.

mod backing;
mod buffer;
mod clock;
mod device;
mod device_file;
mod dir_storage;
mod file_device;
mod io;
mod net;
mod null_device;
mod priority;
mod reactor;
pub mod sim;
mod storage;
mod trouble;
mod waker;

pub use backing::{Backing, BackingId, BackingOptions, Direct, open_backing};
pub use buffer::{AlignedBuf, BufPool, IoBuf};
pub use clock::is_clock_synchronised;
pub use device::{BlockDevice, BlockQueue, Done, Errno, Extent, Geometry, Purpose, Request};
pub use dir_storage::{DirFile, DirStorage};
pub use file_device::{FileDevice, FileQueue};
pub use io::{Allocate, CommandCompletion, Completion, FileSlot, Io, Op, Token};
pub use net::{NetCompletion, NetEvent, SEND_PIECES_MAX, SendBuf, SendList};
pub use null_device::{NullDevice, NullQueue};
pub use priority::{Haste, StandsBack, work_in_background};
pub use reactor::{Reactor, Wait};
pub use storage::{Device, OpenMode, Storage, StorageFile, replace_file, replace_files};
pub use trouble::{TROUBLES, Trouble, guest_errno};
pub use waker::Waker;
