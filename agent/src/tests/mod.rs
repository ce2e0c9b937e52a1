//! The agent from inside: real rings, threads and files, and no target.

mod greeting;
mod joining;
mod rig;
mod stopping;
mod sync;
mod volumes;
