//! ublk front end: serves any [`farshore_uring::BlockDevice`] as `/dev/ublkbN` of the running kernel, from user space.
//!
//! [`Server::start`] makes a device and runs one thread with one ring per hardware queue. The requests of the kernel, the
//! answers to them and the I/O of the device below go through that one ring: one system call per turn, for all of them.
//! [`Server::recover`] takes over a device whose server died: requests that were under way come again. [`Control`] lists and
//! removes devices, those that a crash left behind too.
//!
//! ```text
//! guest ── /dev/ublkbN ── ublk_drv ── iod, commands ──▶ queue thread ──Request──▶ BlockQueue ──Op──▶ disk
//!                                  ◀── commit + fetch ──            ◀────Done────
//! ```
//!
//! # Invariants
//!
//! 1. *Two servers never write at once.* Every ring that carries the device's I/O holds `/dev/ublkcN` as a registered file. The
//!    kernel lets nobody recover the device before that file is closed, and a ring closes its files only when its last operation
//!    has ended. So a write of a killed server cannot land after the same request was issued again.
//! 2. *The kernel writes only into buffers that the ring owns* (see [`farshore_uring::Reactor::command`]).
//! 3. *One copy*: the bytes of a write are copied once, out of the guest's pages into the buffer that the device then writes.
//! 4. In the steady state a request costs no allocation, no lock, and no system call of its own.
//! 5. A tag is in one place: with the kernel (a command is pending) or here (a request is under way).
//!
//! [`dm`] puts such a device below a device-mapper device in use. Absences: no replication; nothing here loads a module.

mod control;
mod descriptors;
pub mod dm;
mod error;
mod info;
mod params;
mod queue;
mod recovery;
mod request;
mod server;
mod stats;
mod sys;
mod threads;

pub use control::Control;
pub use error::{Error, ErrorKind};
pub use info::{DEVICE_STATES, DataPath, DeviceInfo, DeviceState, Features};
pub use server::{Server, ServerConfig, ServerHandle, Stop};
pub use stats::Stats;
pub use threads::become_io_flusher;
