//! For `docs/states.md`: the machines of this crate.

use farshore_proto::states::{Limit, MachineDoc, StateDoc};

use crate::{activity, group, supervisor, sync_thread};

/// All of them.
pub const MACHINES: &[MachineDoc] = &[supervisor::MACHINE, group::mapped::MACHINE, SYNC, LOG, COVER];

const SYNC: MachineDoc = MachineDoc {
    machine: "a group's sync thread",
    file: "agent/src/sync_thread.rs",
    owner: "`Health`, the thread itself",
    states: &[
        StateDoc { state: "sound", limit: Limit::Rest, exit: "sync dies of a bug or with its io_uring" },
        StateDoc {
            state: "pausing",
            limit: Limit::Time(sync_thread::PAUSE_MAX),
            exit: "begins anew, after 1 s at first and twice as long each time; sound when it has run for as long; alarm `sync.failed`",
        },
    ],
};

const LOG: MachineDoc = MachineDoc {
    machine: "the activity log's file",
    file: "agent/src/activity.rs",
    owner: "the thread `farshore-log`",
    states: &[
        StateDoc {
            state: "opening",
            limit: Limit::Setting("2 s where guests of an earlier agent wait, else 60 s"),
            exit: "opened; at the limit there is no log in this life: alarm `activity-log.failed`",
        },
        StateDoc { state: "kept", limit: Limit::Rest, exit: "a write fails" },
        StateDoc {
            state: "failing",
            limit: Limit::Time(activity::RETRY),
            exit: "all of it is written anew, tried at the limit; alarm `activity-log.failed`; guests wait for it no longer than `stall_max`",
        },
    ],
};

const COVER: MachineDoc = MachineDoc {
    machine: "whether the activity log covers every write",
    file: "agent/src/activity.rs",
    owner: "the threads `farshore-stall` (says no) and `farshore-cover` (says yes)",
    states: &[
        StateDoc {
            state: "covers",
            limit: Limit::Rest,
            exit: "a write has waited for half of `stall_max`, a flush failed, a volume is not in the path",
        },
        StateDoc {
            state: "does not cover",
            limit: Limit::None(
                "until the log has caught up and 10 s have gone by; after a failed flush the host's next boot; alarm `activity-log.uncovered`",
            ),
            exit: "recorded in the state directory, tried every second",
        },
    ],
};
const _: () = assert!(activity::CALM.as_secs() == 10);
