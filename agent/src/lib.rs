//! The daemon on a protected host: puts front end, filter, sync and streamer together, keeps their state, and answers on
//! its admin socket.
//!
//! What it keeps, and when that becomes durable, is in [`state`]; the rules by which a start finds its ring again in
//! `attach.rs`.
#![forbid(unsafe_code)]

pub mod agent;
mod alarms;
pub mod api;
mod attach;
mod clock;
pub mod config;
mod error;
mod group;
mod hooks;
mod points;
pub mod state;
mod sync_thread;

pub use agent::Agent;
pub use alarms::Alarm;
pub use error::{Error, Result, chain};
