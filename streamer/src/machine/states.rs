//! For `docs/states.md`: the machines of this crate.

use farshore_proto::states::{Limit, MachineDoc, StateDoc};

use super::backlog::Line;
use super::status::Phase;
use super::window::Stage;

/// All of them.
pub const MACHINES: &[MachineDoc] = &[
    MachineDoc {
        machine: "a group's stream",
        file: "streamer/src/machine/status.rs",
        owner: "`Streamer`, the thread `stream-GROUP`",
        states: PHASES,
    },
    MachineDoc {
        machine: "a batch on its way",
        file: "streamer/src/machine/window.rs",
        owner: "`Streamer`, the thread `stream-GROUP`",
        states: STAGES,
    },
    MachineDoc {
        machine: "the disk log's line",
        file: "streamer/src/machine/backlog.rs",
        owner: "`Backlog`, the thread `stream-GROUP`",
        states: LINES,
    },
];

const PHASES: &[StateDoc] = &[
    StateDoc {
        state: "connecting",
        limit: Limit::None("the link tries again by itself; alarm `link.down`; the ring takes what is written"),
        exit: "a link session is up",
    },
    StateDoc {
        state: "greeting",
        limit: Limit::Setting("30 s"),
        exit: "the target's answer; at the limit the session is dropped",
    },
    StateDoc {
        state: "catching-up",
        limit: Limit::None("what lies in the ring, formed again at the pace of the workers"),
        exit: "the chain hash is the target's: live; another: starting over; the session is lost: connecting",
    },
    StateDoc { state: "live", limit: Limit::Rest, exit: "the session is lost; paused; refused" },
    StateDoc {
        state: "paused",
        limit: Limit::None(
            "the target looks for space every second; alarm `target.paused`; the ring takes what is written",
        ),
        exit: "the target goes on; the session is lost",
    },
    StateDoc {
        state: "comparing",
        limit: Limit::None("the record is tried every second; alarm `state.failed`"),
        exit: "\"compare everything\" is recorded",
    },
    StateDoc {
        state: "starting-over",
        limit: Limit::None("the record is tried every second; alarm `state.failed`"),
        exit: "incarnation and \"compare everything\" are recorded",
    },
    StateDoc {
        state: "refused",
        limit: Limit::Setting("1 s, doubling to 60 s; alarm `target.refused`"),
        exit: "greets anew",
    },
];
const _: fn(&Phase) -> &StateDoc = |phase| match phase {
    Phase::Connecting => &PHASES[0],
    Phase::Greeting => &PHASES[1],
    Phase::CatchingUp => &PHASES[2],
    Phase::Live => &PHASES[3],
    Phase::Paused => &PHASES[4],
    Phase::Comparing => &PHASES[5],
    Phase::StartingOver => &PHASES[6],
    Phase::Refused => &PHASES[7],
};

const STAGES: &[StateDoc] = &[
    StateDoc { state: "listing", limit: Limit::None("a worker's time for at most 64 MiB"), exit: "its list is made" },
    StateDoc {
        state: "listed",
        limit: Limit::None("until its predecessor's chain hash is known and a worker is free"),
        exit: "a worker seals it",
    },
    StateDoc { state: "sealing", limit: Limit::None("a worker's time for at most 64 MiB"), exit: "its bytes are made" },
    StateDoc {
        state: "ready",
        limit: Limit::Setting(
            "to be sent: none, without a session it waits, and the ring or the disk log keeps it; sent: the session's, 30 s without an answer to a ping, 15 s of silence",
        ),
        exit: "acknowledged; formed again where its references are of a lost session",
    },
    StateDoc { state: "verified", limit: Limit::None("as catching-up"), exit: "catching-up ends" },
];
/// The match over a stage of any payload.
const _: fn(&Stage<()>) -> &StateDoc = |stage| match stage {
    Stage::Listing => &STAGES[0],
    Stage::Listed(..) => &STAGES[1],
    Stage::Sealing => &STAGES[2],
    Stage::Ready(_) => &STAGES[3],
    Stage::Verified => &STAGES[4],
};

const LINES: &[StateDoc] = &[
    StateDoc { state: "none", limit: Limit::Rest, exit: "the ring fills up: batches go to the log" },
    StateDoc {
        state: "asked",
        limit: Limit::None("the record is tried every second; alarm `state.failed`; the ring takes what is written"),
        exit: "it is recorded that there is a line, or that there is none any more",
    },
    StateDoc {
        state: "begun",
        limit: Limit::None(
            "until the link has drained it; alarms `disk-log.in-use`, `disk-log.full`, `disk-log.failed` (tried again every 5 s)",
        ),
        exit: "all that was in it is at the target",
    },
];
const _: fn(&Line) -> &StateDoc = |line| match line {
    Line::None => &LINES[0],
    Line::Asked => &LINES[1],
    Line::Begun => &LINES[2],
};
