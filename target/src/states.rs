//! For `docs/states.md`: the machines of this crate.

use farshore_proto::states::{Limit, MachineDoc, StateDoc};

use crate::lane::{GAP_TIMEOUT, PAUSE_RETRY};
use crate::retention::Step;
use crate::server::GREETING_MAX;

/// All of them.
pub const MACHINES: &[MachineDoc] = &[SESSION, LANE, STREAM, RETENTION, VIEW];

const SESSION: MachineDoc = MachineDoc {
    machine: "a session at the target's door",
    file: "target/src/target.rs",
    owner: "`Target`, the front thread",
    states: &[
        StateDoc { state: "fresh", limit: Limit::Time(GREETING_MAX), exit: "the greeting; at the limit it is closed" },
        StateDoc {
            state: "attached",
            limit: Limit::None("the lane's and the link's, below"),
            exit: "the session is gone",
        },
    ],
};

/// Its states are fields of the lane that exclude each other in this order: stopped, paused, a gap, a session, none.
const LANE: MachineDoc = MachineDoc {
    machine: "a stream's lane",
    file: "target/src/lane.rs",
    owner: "`Lane`, the thread `lane-GROUP`",
    states: &[
        StateDoc {
            state: "waiting",
            limit: Limit::None("the source comes by itself; the age of the newest point tells"),
            exit: "its source greets",
        },
        StateDoc { state: "live", limit: Limit::Rest, exit: "the session is gone; a gap; paused; stopped" },
        StateDoc {
            state: "gap (a batch is missing while later ones are here)",
            limit: Limit::Time(GAP_TIMEOUT),
            exit: "it comes; at the limit the session is ended; the same gap again: refused, alarm `stream.batch_refused`",
        },
        StateDoc {
            state: "paused (no space, or none of what the system lends)",
            limit: Limit::None("looked at every second; alarm `target.disk_full` or `target.no_resources`"),
            exit: "there is some again",
        },
        StateDoc {
            state: "stopped (the journal failed)",
            limit: Limit::None(
                "a person: what a disk has lost does not come back by waiting; alarm `journal.sync_failed`",
            ),
            exit: "the target is started again",
        },
    ],
};
/// How often a pause is looked at is said above.
const _: () = assert!(PAUSE_RETRY.as_secs() == 1);

/// Its states are where the stream stands in `Streams`: among the lanes, or among the broken.
const STREAM: MachineDoc = MachineDoc {
    machine: "a stream at the target",
    file: "target/src/target.rs",
    owner: "`Target`, the thread that opens it",
    states: &[
        StateDoc { state: "open", limit: Limit::Rest, exit: "the target ends, or a base is attached" },
        StateDoc {
            state: "broken (cannot be opened)",
            limit: Limit::None("tried again when its source greets, ever more rarely; alarm `stream.unavailable`"),
            exit: "it can be opened",
        },
    ],
};

const RETENTION: MachineDoc = MachineDoc {
    machine: "retention of a stream, what its last step did",
    file: "target/src/retention.rs",
    owner: "`Mover`, the background thread",
    states: STEPS,
};
const STEPS: &[StateDoc] = &[
    StateDoc { state: "idle", limit: Limit::Rest, exit: "looked at every second" },
    StateDoc {
        state: "a new horizon is durable",
        limit: Limit::None(
            "an error is tried again every second; alarm `retention.stopped`; nothing of the history is lost meanwhile, the disk fills",
        ),
        exit: "the base is moved",
    },
    StateDoc {
        state: "a piece of the base was moved",
        limit: Limit::None("as above"),
        exit: "the next piece, or finished",
    },
    StateDoc { state: "the base is at the horizon", limit: Limit::None("as above"), exit: "segments are dropped" },
    StateDoc { state: "segments were dropped", limit: Limit::None("as above"), exit: "idle" },
];
const _: fn(&Step) -> &StateDoc = |step| match step {
    Step::Idle => &STEPS[0],
    Step::Horizon(_) => &STEPS[1],
    Step::Moved { .. } => &STEPS[2],
    Step::Finished(_) => &STEPS[3],
    Step::Dropped { .. } => &STEPS[4],
};

/// Its states are whether the catalog has a note of it, and whether somebody serves it.
const VIEW: MachineDoc = MachineDoc {
    machine: "a view",
    file: "target/src/views.rs",
    owner: "the target's admin threads, one at a time",
    states: &[
        StateDoc {
            state: "open, served",
            limit: Limit::None("a person's; its hold keeps the point, alarm `hold.old` when that holds history back"),
            exit: "closed; the target ends",
        },
        StateDoc {
            state: "open, not served",
            limit: Limit::None("the target's next start serves it again, as it was left; its hold stays"),
            exit: "served; closed",
        },
        StateDoc { state: "closed", limit: Limit::Rest, exit: "the last: hold and scratch layer are gone" },
    ],
};
