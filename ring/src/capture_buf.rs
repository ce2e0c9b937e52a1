//! A request's buffer: a cell where there was room, ordinary memory where there was not.

use std::ops::{Deref, DerefMut};

use stable_deref_trait::StableDeref;

use crate::Reservation;

/// A buffer for a request of a captured device. Lent to the kernel like either of the two.
#[derive(Debug)]
pub enum CaptureBuf<F> {
    /// A cell of the ring, with its descriptor's credit: what is written from it can be published.
    Cell(Reservation),
    /// Anything else: reads, and writes for which the ring had no room.
    Other(F),
}

// SAFETY: both variants are `StableDeref`, and moving the enum moves the variant's handle, not the bytes that it dereferences to;
// which variant it is does not change while it is borrowed.
unsafe impl<F: StableDeref<Target = [u8]>> StableDeref for CaptureBuf<F> {}

impl<F: Deref<Target = [u8]>> Deref for CaptureBuf<F> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Cell(cell) => cell,
            Self::Other(other) => other,
        }
    }
}

impl<F: DerefMut<Target = [u8]>> DerefMut for CaptureBuf<F> {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Cell(cell) => cell,
            Self::Other(other) => other,
        }
    }
}
