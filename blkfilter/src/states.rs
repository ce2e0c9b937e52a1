//! For `docs/states.md`: the machines of this crate.

use farshore_proto::states::{Limit, MachineDoc, StateDoc};

use crate::{activity, queue, sync};

/// All of them.
pub const MACHINES: &[MachineDoc] =
    &[queue::MACHINE, GROUP, sync::MACHINE, sync::SLOT_MACHINE, sync::VERIFY_MACHINE, activity::MACHINE];

/// CLOSED is a bit of the ring's head word, and an event is open or not: two bits, which need no type of their own.
const GROUP: MachineDoc = MachineDoc {
    machine: "a group's stream, at the ring",
    file: "blkfilter/src/group.rs",
    owner: "`CaptureGroup`: any queue closes, the stream's thread opens again, sync ends the event",
    states: &[
        StateDoc {
            state: "open",
            limit: Limit::Rest,
            exit: "a claim finds no room: closed; marks without a claim: event",
        },
        StateDoc {
            state: "closed",
            limit: Limit::None("the link drains the ring; guests go on, their writes are marked; alarm `ring.closed`"),
            exit: "enough of the ring is free: opened again, with an event",
        },
        StateDoc {
            state: "event",
            limit: Limit::None(
                "a resync of what is marked; no new points meanwhile; alarm `group.resync`, `status` tells the time left",
            ),
            exit: "nothing is missing",
        },
    ],
};
