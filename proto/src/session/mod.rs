//! The two ends of one replication session, free of I/O: [`SourceSession`] at the agent, [`TargetSession`] at the target.
//! Drivers carry their bytes; the simulation carries them too.

mod chain;
mod source;
mod target;

pub use chain::{ChainCheck, Resume, SourceTail, Verdict, resume};
pub use source::{SourceConfig, SourceEvent, SourceSession};
pub use target::{TargetEvent, TargetSession};

/// For `docs/states.md`.
pub const MACHINES: &[crate::states::MachineDoc] = &[source::MACHINE, target::MACHINE];
