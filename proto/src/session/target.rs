use std::collections::VecDeque;

use crate::batch::VolumeDecl;
use crate::keys::AnswerKey;
use crate::message::{Answers, Hello, Lease, RefuseCode, SourceMessage, TargetMessage, Welcome};
use crate::states::{Limit, MachineDoc, StateDoc};
use crate::{BatchNo, ChainHash, Error, Incarnation, KeyEpoch, Result, VaultId, WallTime};

/// Target half of one replication session. Performs no I/O.
///
/// Order: [`Self::handle_control`] yields [`TargetEvent::Hello`]; the target checks it and calls [`Self::welcome`] or
/// [`Self::refuse`]; then batches may come. [`Self::poll_control`] is drained after every call.
pub struct TargetSession {
    vault: VaultId,
    state: State,
    nonce: [u8; 32],
    counter: u64,
    answer_key: Option<AnswerKey>,
    outbox: VecDeque<Vec<u8>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Fresh,
    Greeted,
    Live,
    Ended,
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "session, target's end",
    file: file!(),
    owner: "`TargetSession`, the target's front thread until it is greeted, then the stream's lane",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "fresh",
        limit: Limit::Setting("30 s (`GREETING_MAX` of the target)"),
        exit: "the greeting; at the limit the target closes the session",
    },
    StateDoc {
        state: "greeted",
        limit: Limit::None("the lane's next turn, which may wait for its disk; the source gives up after 30 s"),
        exit: "welcome or refusal",
    },
    StateDoc {
        state: "live",
        limit: Limit::None("the link ends it after 15 s of silence"),
        exit: "the connection is gone, a newer session of the host, a refusal",
    },
    StateDoc {
        state: "ended",
        limit: Limit::Setting("1 s (`CLOSE_GRACE` of the target)"),
        exit: "the session is closed",
    },
];
const _: fn(&State) -> &StateDoc = |state| match state {
    State::Fresh => &STATES[0],
    State::Greeted => &STATES[1],
    State::Live => &STATES[2],
    State::Ended => &STATES[3],
};

/// What the source said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetEvent {
    /// Who it is and which stream it brings.
    Hello(Box<Hello>),
    /// Its volumes changed.
    Volumes(Vec<VolumeDecl>),
    /// It stops on purpose.
    Bye,
}

impl TargetSession {
    /// A session of a connection that has just come up.
    #[must_use]
    pub fn new(vault: VaultId) -> Self {
        Self { vault, state: State::Fresh, nonce: [0; 32], counter: 0, answer_key: None, outbox: VecDeque::new() }
    }

    /// A message arrived. `answer_key` gives the answer key of a host for the greeting: that of the epoch named, or of the
    /// newest; `None` where there is no such key.
    ///
    /// # Errors
    /// Malformed bytes, a message that does not fit the state, or [`Error::UnknownKey`]. The caller refuses and closes; in the
    /// last case nothing can be said to the source that it would believe.
    pub fn handle_control(
        &mut self,
        bytes: &[u8],
        answer_key: impl FnOnce(&Hello, Option<KeyEpoch>) -> Option<AnswerKey>,
    ) -> Result<Option<TargetEvent>> {
        match (self.state, SourceMessage::decode(bytes)?) {
            (State::Fresh, SourceMessage::Hello(hello)) => self.greet(hello, None, answer_key),
            (State::Fresh, SourceMessage::KeyedHello { epoch, hello }) => self.greet(hello, Some(epoch), answer_key),
            (State::Greeted | State::Live, SourceMessage::Volumes(volumes)) => Ok(Some(TargetEvent::Volumes(volumes))),
            (State::Live, SourceMessage::Ping(ping)) => {
                self.say(&TargetMessage::Pong(ping));
                Ok(None)
            }
            (State::Greeted | State::Live, SourceMessage::Bye) => Ok(Some(TargetEvent::Bye)),
            (State::Ended, _) => Ok(None),
            (state, message) => Err(Error::Unexpected {
                got: match message {
                    SourceMessage::Hello(_) | SourceMessage::KeyedHello { .. } => "hello",
                    SourceMessage::Volumes(_) => "volumes",
                    SourceMessage::Ping(_) => "ping",
                    SourceMessage::Bye => "bye",
                },
                state: match state {
                    State::Fresh => "waiting for the greeting",
                    State::Greeted => "checking the greeting",
                    State::Live => "live",
                    State::Ended => "ended",
                },
            }),
        }
    }

    fn greet(
        &mut self,
        hello: Hello,
        epoch: Option<KeyEpoch>,
        answer_key: impl FnOnce(&Hello, Option<KeyEpoch>) -> Option<AnswerKey>,
    ) -> Result<Option<TargetEvent>> {
        self.nonce = hello.nonce;
        self.answer_key = answer_key(&hello, epoch);
        if self.answer_key.is_none() {
            return Err(Error::UnknownKey { epoch: epoch.unwrap_or_default() });
        }
        self.state = State::Greeted;
        if hello.vault != self.vault {
            self.refuse(RefuseCode::Vault, format!("this target serves vault {}, not {}", self.vault, hello.vault));
            return Ok(None);
        }
        Ok(Some(TargetEvent::Hello(Box::new(hello))))
    }

    /// Accepts the stream.
    pub fn welcome(&mut self, welcome: Welcome) {
        if self.state == State::Greeted {
            self.state = State::Live;
            self.say(&TargetMessage::Welcome(welcome));
        }
    }

    /// Refuses the stream; nothing more will be said.
    pub fn refuse(&mut self, code: RefuseCode, detail: String) {
        if self.state != State::Ended {
            self.say(&TargetMessage::Refused { code, detail });
            self.state = State::Ended;
        }
    }

    /// Batches up to this one are journaled.
    pub fn durable(&mut self, incarnation: Incarnation, number: BatchNo, chain: ChainHash, received: WallTime) {
        self.say_live(&TargetMessage::Durable { incarnation, number, chain, received });
    }

    /// Results of one batch's probes.
    pub fn answer(&mut self, answers: Answers) {
        self.say_live(&TargetMessage::Answers(answers));
    }

    /// Grants a lease.
    pub fn lease(&mut self, lease: Lease) {
        self.say_live(&TargetMessage::Lease(lease));
    }

    /// Takes no batches for now.
    pub fn pause(&mut self, reason: String) {
        self.say_live(&TargetMessage::Paused { reason });
    }

    /// Takes batches again.
    pub fn resume(&mut self) {
        self.say_live(&TargetMessage::Resumed);
    }

    /// Whether batches may come.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.state == State::Live
    }

    /// Whether the session was refused.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// The next message to send.
    #[must_use]
    pub fn poll_control(&mut self) -> Option<Vec<u8>> {
        self.outbox.pop_front()
    }

    fn say_live(&mut self, message: &TargetMessage) {
        if self.state == State::Live {
            self.say(message);
        }
    }

    fn say(&mut self, message: &TargetMessage) {
        let Some(key) = &self.answer_key else { return };
        match message.seal(key, &self.nonce, self.counter) {
            Ok(bytes) => {
                self.counter += 1;
                self.outbox.push_back(bytes);
            }
            // Every message has a bound on its parts that keeps it below the limit; were one longer, ending the session is
            // safe: the source connects again and nothing was promised.
            Err(_) => self.state = State::Ended,
        }
    }
}
