//! Device-mapper interposer: puts a block device of ours below a device-mapper device while that is in use, and takes it out.
//!
//! ```text
//! before:   file system ── upper ── (linear, striped, crypt) ── disks
//! after:    file system ── upper ── linear ── /dev/ublkbN ── server ── lower ── (linear, striped, crypt) ── disks
//! ```
//!
//! [`Interposer::attach`] copies the upper's table to a new device, the *lower*; has the caller serve a device over it
//! ([`Serve`]); and puts that below the upper. [`Interposer::detach`] is the reverse. Neither unmounts anything, and the guest
//! sees a pause, no error. [`Stub`] makes a device-mapper device of a bare disk, for users to mount instead.
//!
//! # How a table changes under a mounted file system
//!
//! The new table is loaded first, beside the one in place: what can be refused is refused then. One further command
//! (`DM_DEV_SUSPEND` without the suspend flag) holds back new requests, waits until those under way have ended, puts the table in
//! place and lets requests go on. So
//!
//! 1. requests that went by the old table have ended on the disks when the first goes by the new one: no stale write;
//! 2. there is no moment at which the death of this process leaves the upper suspended;
//! 3. nothing of this process needs to run during the pause, so it does not matter what it has in files on the upper.
//!
//! *Without* `lockfs`: freezing the file system writes all its dirty pages out first, a pause of seconds, and buys consistency of
//! a copy at that moment. Here nothing is copied: the same sectors stay reachable by another way. *With* `noflush`: requests that a
//! target wants to have put back wait for the new table instead of failing. Requests under way are waited for in both modes.
//!
//! # Invariants
//!
//! 1. What it would take to undo an attach stands in the kernel alone: the lower's table is the upper's original one, its uuid says
//!    which upper, its name which ublk device. A crash loses nothing; [`Interposer::leftovers`] reads it.
//! 2. A failed step leaves the table in place that was there before, and no device of ours ([`Step`]: tests make each fail).
//! 3. Two interposers do not work at once (a lock on the control device).
//! 4. Keys of dm-crypt are wiped from memory and never printed.
//!
//! # Tools that reload the upper's table
//!
//! `lvextend`, `lvchange --refresh`, `pvmove` and others load the table that *they* know into the upper. That is safe for the data
//! (they too wait for what is under way) but it bypasses the device below: its server sees no write any more.
//! [`Interposer::change`] compares the table in place with ours and says so; [`Interposer::reattach`] takes the new table for the
//! original and attaches again, with the new size. What was written in between has to be taken as unknown.

mod attach;
mod leftovers;
mod lower;
mod mapper;
mod node;
mod serve;
mod stub;
mod sys;
mod table;

pub use attach::{Change, Interposed, Interposer, STEPS, Step};
pub use leftovers::{Leftover, LeftoverKind, Repaired};
pub use node::DevNo;
pub use serve::{Lower, PassThrough, Serve};
pub use stub::Stub;
