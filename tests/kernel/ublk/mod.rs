//! ublk devices under what hosts do to block devices.

mod io;
mod life;
mod recovery;
