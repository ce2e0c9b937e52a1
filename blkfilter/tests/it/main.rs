//! The filter under simulation: see `rig.rs` for the machine and `oracle.rs` for what must hold.

mod activity;
mod locks;
mod oracle;
mod random;
mod rig;
mod rules;
mod syncing;
mod threads;
mod verifying;
