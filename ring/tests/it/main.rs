//! Tests of the ring through its public interface.
#![allow(missing_docs, reason = "a test binary")]
#![cfg(not(any(loom, miri)))]

mod bitmap;
mod kill;
mod model;
mod open;
mod stress;
mod support;
