//! What the tests that run more than one crate share: harness and fuzz targets.
#![forbid(unsafe_code)]

pub mod fuzz;
