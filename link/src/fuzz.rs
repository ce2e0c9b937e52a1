//! The decoders of what others write, for `fuzz/`. Each may refuse its input and must not do anything else.

use farshore_proto::WallTime;

use crate::identity::{Certified, Identity};
use crate::quic::wire::{Hello, Welcome};

/// Introductions of both ends.
pub fn introductions(data: &[u8]) {
    // What is taken must be written back as it was read.
    if let Some(hello) = Hello::decode(data).filter(|hello| hello.version == crate::quic::wire::VERSION) {
        assert_eq!(hello.encode(), data[..32]);
    }
    if let Some(welcome) = Welcome::decode(data) {
        assert_eq!(welcome.encode(), data[..32]);
    }
}

/// A peer's certificate.
pub fn certificate(data: &[u8]) {
    let _read_or_refused = Certified::read(data);
}

/// A bundle.
pub fn bundle(text: &str) {
    let _read_or_refused = Identity::from_text(text, WallTime(0));
}
