//! The target: takes batches into journals, keeps replica volumes and their history, and serves any recovery point.
//!
//! The way of a batch: [`server`] (threads and sockets) → [`target`] (who may write what) → [`lane`] (order, group
//! commits) → [`ingest`] (judge, open, resolve) → [`journal`] ([`segment`]s on disk) → [`index`] and [`points`].
//! What reads: [`view`], [`restore`], [`retention`], [`check`], [`verify`].
//!
//! Formats: `docs/formats/segment.md`, `docs/formats/catalog.md`, `docs/formats/index.md`.
#![forbid(unsafe_code)]

pub mod alarm;
pub mod catalog;
pub mod check;
mod compare;
pub mod counters;
pub mod damage;
mod entries;
mod errno;
mod error;
pub mod group;
mod growth;
pub mod ingest;
pub mod journal;
pub mod keys;
pub mod lane;
pub mod lease;
mod pace;
pub mod points;
mod scan;
pub mod segment;
pub mod segments;
pub mod server;
mod states;
pub mod status;
pub mod target;
pub mod verify;

pub mod base;
pub mod bases;
pub mod history;
pub mod index;
mod keeper;
pub mod reader;
pub mod restore;
pub mod retention;
pub mod scratch;
pub mod synthetic;
pub mod view;
pub mod views;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;

pub use errno::DISK_ERRORS;
pub use error::{Error, IoContext, Kind, Result};
pub use states::MACHINES;
