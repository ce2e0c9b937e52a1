//! End to end: agent and target as processes of the real binary (`FARSHORE_BIN`), real sockets, real files.
//!
//! Nothing here depends on how fast the machine is: steps wait for what they need to see, with a generous limit, and no
//! check compares times. Tests under `clients` need programs that are not ours (`cargo xtask test clients`).
#![forbid(unsafe_code)]

mod activity;
mod cli;
mod clients;
mod disk_log;
mod faults;
mod order;
mod service;
mod supervisor;
mod support;
mod verify;
