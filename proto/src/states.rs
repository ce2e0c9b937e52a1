//! What `docs/states.md` says of the machines: each describes its states beside the type that holds them.
//!
//! A table beside an enum is pinned to it by a match, so that a state without a row does not compile:
//!
//! ```
//! use farshore_proto::states::{Limit, StateDoc};
//!
//! enum Door { Open, Shut }
//!
//! const STATES: &[StateDoc] = &[
//!     StateDoc { state: "open", limit: Limit::None("somebody goes through"), exit: "it falls shut" },
//!     StateDoc { state: "shut", limit: Limit::Rest, exit: "a key" },
//! ];
//! const _: fn(&Door) -> &StateDoc = |door| match door {
//!     Door::Open => &STATES[0],
//!     Door::Shut => &STATES[1],
//! };
//! ```

use std::fmt;
use std::time::Duration;

/// One machine.
#[derive(Clone, Copy, Debug)]
pub struct MachineDoc {
    /// What people call it.
    pub machine: &'static str,
    /// Source file (`file!()`).
    pub file: &'static str,
    /// Who alone changes its state: a type and the thread that calls it.
    pub owner: &'static str,
    /// Its states.
    pub states: &'static [StateDoc],
}

/// One state.
#[derive(Clone, Copy, Debug)]
pub struct StateDoc {
    /// Name.
    pub state: &'static str,
    /// Longest stay.
    pub limit: Limit,
    /// What ends it, and what happens at the limit.
    pub exit: &'static str,
}

/// Longest stay in a state.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// A constant of the code.
    Time(Duration),
    /// A setting, or what follows from one: its name and default.
    Setting(&'static str),
    /// A state of rest: nothing is under way, and nobody waits.
    Rest,
    /// None, and why that does no harm or who tells a person.
    None(&'static str),
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) => write!(f, "{time:?}"),
            Self::Setting(setting) => f.write_str(setting),
            Self::Rest => f.write_str("at rest"),
            Self::None(why) => write!(f, "none: {why}"),
        }
    }
}
