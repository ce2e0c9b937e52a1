//! What only a real kernel can show: ublk devices, their recovery, their misuse. Runs inside the test machine, as root:
//! `cargo xtask test kernel`; elsewhere every test fails and says so.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "tests say what they measured; `--nocapture` shows it")]

mod agent;
mod agent_dm;
mod capture;
mod child;
mod dm;
mod guests;
mod host;
mod kills;
mod log_writes;
mod power_cut;
mod rig;
mod supervisor;
mod ublk;
