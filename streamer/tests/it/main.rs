//! The streamer against naive models.
#![expect(unreachable_pub, reason = "modules of one test binary")]

mod common;
mod driver;
mod machine;
mod stages;
mod target;
