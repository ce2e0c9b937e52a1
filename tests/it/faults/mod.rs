//! What goes wrong, and bad input: every fault ends in a clear message or an alarm, and never in a wrong byte.

mod config;
mod damage;
pub(crate) mod disk;
mod identity;
mod kill;
mod link;
mod loops;
mod source;
mod target;
