//! What makes a host bring Farshore up before the file systems that it protects: units, udev rules, and the generator that systemd
//! runs at every boot. See `docs/operations/boot.md`; the files themselves stand in `dist/`.

mod generator;
mod install;
mod tables;

pub(crate) use generator::run as generate;
pub(crate) use install::run as install;
