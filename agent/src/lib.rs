//! The daemon on a protected host: puts front end, filter, sync and streamer together, keeps their state, and answers on
//! its admin socket.
//!
//! What it keeps, and when that becomes durable, is in [`state`]; the rules by which a start finds its ring again in
//! `attach.rs`.
#![forbid(unsafe_code)]

mod activity;
pub mod agent;
mod alarms;
pub mod api;
mod attach;
mod clock;
pub mod config;
mod devices;
mod disk_log;
mod error;
pub mod evidence;
mod frontend;
mod gate;
mod group;
mod hooks;
mod interpose;
mod limits;
mod own_file;
mod points;
mod shared;
mod source;
pub mod state;
mod states;
pub mod supervisor;
mod sync_thread;
#[cfg(test)]
mod tests;
mod verify;
mod watch;

pub use activity::activity_log_place;
pub use agent::Agent;
pub use alarms::Alarm;
pub use attach::ring_folder;
pub use disk_log::{DiskLogConfig, disk_log_place};
pub use error::{Error, Result, chain};
pub use states::MACHINES;
