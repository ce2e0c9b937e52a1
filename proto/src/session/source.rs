use std::collections::VecDeque;
use std::time::Duration;

use crate::batch::VolumeDecl;
use crate::keys::{AnswerKey, HostKey};
use crate::message::{Answers, Hello, Lease, RefuseCode, SourceMessage, TargetMessage, Welcome};
use crate::states::{Limit, MachineDoc, StateDoc};
use crate::{BatchNo, ChainHash, Error, Generation, GroupId, Incarnation, Name, Now, Result, VaultId, WallTime};

/// How long an answer to [`Hello`] may take before the connection is given up: a live target answers within a round trip;
/// one that first has to replay its journal keeps the connection waiting, so this is generous.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the round trip is measured.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// How long a live target may leave that question unanswered. The connection may stand all the while (other threads of the target keep
/// it), so this ends the case in which the thread of this stream does not come back, from a disk for instance: a person hears of
/// it. As long as for the greeting, which the same thread answers.
const PONG_TIMEOUT: Duration = WELCOME_TIMEOUT;

/// Who the source is.
#[derive(Clone)]
pub struct SourceConfig {
    /// Trust domain.
    pub vault: VaultId,
    /// Group's name; its id is derived.
    pub group: Name,
    /// This host's name.
    pub host: Name,
    /// This host's key.
    pub host_key: HostKey,
}

/// Source half of one replication session. Performs no I/O.
///
/// Inputs: [`Self::handle_up`] → [`Self::handle_control`]* → [`Self::handle_down`], and [`Self::handle_timeout`] at
/// [`Self::poll_deadline`]. Outputs, to be drained after each input: [`Self::poll_control`], [`Self::poll_event`].
/// The object outlives connections; each `handle_up` starts a new session.
pub struct SourceSession {
    config: SourceConfig,
    answer_key: AnswerKey,
    state: State,
    nonce: [u8; 32],
    counter: u64,
    outbox: VecDeque<Vec<u8>>,
    events: VecDeque<SourceEvent>,
    deadline: Option<Now>,
    ping_sent: Option<(u64, Now)>,
    pings: u64,
    rtt: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Down,
    Greeting,
    Live,
    Refused,
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "session, source's end",
    file: file!(),
    owner: "`SourceSession`, the stream's thread",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "down",
        limit: Limit::None("the link connects again by itself; alarm `link.down`"),
        exit: "a link session is up",
    },
    StateDoc {
        state: "greeting",
        limit: Limit::Time(WELCOME_TIMEOUT),
        exit: "welcome or refusal; at the limit the link's session is dropped",
    },
    StateDoc {
        state: "live",
        limit: Limit::Time(PONG_TIMEOUT),
        exit: "the connection is gone, or a refusal; the limit is for an unanswered ping (one a second), then the link's session is dropped",
    },
    StateDoc {
        state: "refused",
        limit: Limit::Setting("1 s, doubling to 60 s"),
        exit: "the streamer greets anew; alarm `target.refused`",
    },
];
const _: fn(&State) -> &StateDoc = |state| match state {
    State::Down => &STATES[0],
    State::Greeting => &STATES[1],
    State::Live => &STATES[2],
    State::Refused => &STATES[3],
};

/// What the session tells the streamer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceEvent {
    /// The target answered: decide with [`super::resume`] how to go on, then send batches.
    Live(Welcome),
    /// Batches up to this one are journaled.
    Durable {
        /// Life of the ring they came from.
        incarnation: Incarnation,
        /// The last of them.
        number: BatchNo,
        /// Its chain hash.
        chain: ChainHash,
        /// Target's clock.
        received: WallTime,
    },
    /// Results of probes.
    Answers(Answers),
    /// Contents that may be sent by reference from now on.
    Lease(Lease),
    /// Stop sending until [`SourceEvent::Resumed`].
    Paused {
        /// As the target says it.
        reason: String,
    },
    /// Send again, from behind the last durable batch.
    Resumed,
    /// The target refuses the stream. Reconnecting does not help before somebody acts, except for
    /// [`RefuseCode::Unavailable`] and [`RefuseCode::Replaced`].
    Refused {
        /// Why.
        code: RefuseCode,
        /// Particulars.
        detail: String,
    },
    /// The connection is no use any more: drop it and connect again.
    Broken {
        /// Why.
        reason: String,
    },
}

impl SourceSession {
    /// A session that is down.
    #[must_use]
    pub fn new(config: SourceConfig) -> Self {
        let answer_key = config.host_key.answer_key();
        Self {
            config,
            answer_key,
            state: State::Down,
            nonce: [0; 32],
            counter: 0,
            outbox: VecDeque::new(),
            events: VecDeque::new(),
            deadline: None,
            ping_sent: None,
            pings: 0,
            rtt: None,
        }
    }

    /// A connection is up: greets. `nonce` must be fresh randomness.
    ///
    /// # Errors
    /// When the list of volumes is too long to be said.
    pub fn handle_up(
        &mut self,
        now: Now,
        nonce: [u8; 32],
        generation: Generation,
        incarnation: Incarnation,
        volumes: Vec<VolumeDecl>,
    ) -> Result<()> {
        self.handle_down();
        let hello = Hello {
            vault: self.config.vault,
            group: GroupId::derive(self.config.vault, &self.config.group),
            group_name: self.config.group.clone(),
            host_name: self.config.host.clone(),
            generation,
            incarnation,
            nonce,
            volumes,
        };
        let epoch = self.config.host_key.epoch();
        self.outbox.push_back(SourceMessage::KeyedHello { epoch, hello }.encode()?);
        self.nonce = nonce;
        self.counter = 0;
        self.state = State::Greeting;
        self.deadline = Some(now.plus(WELCOME_TIMEOUT));
        Ok(())
    }

    /// The connection is gone. Undelivered output is dropped.
    pub fn handle_down(&mut self) {
        self.state = State::Down;
        self.outbox.clear();
        self.deadline = None;
        self.ping_sent = None;
        self.rtt = None;
    }

    /// A message arrived.
    ///
    /// # Errors
    /// A message that this session's target did not make here and now. The caller drops the connection.
    pub fn handle_control(&mut self, now: Now, bytes: &[u8]) -> Result<()> {
        let message = TargetMessage::open(bytes, &self.answer_key, &self.nonce, self.counter)?;
        self.counter += 1;
        match (self.state, message) {
            (State::Greeting, TargetMessage::Welcome(welcome)) => {
                self.state = State::Live;
                self.deadline = Some(now);
                self.events.push_back(SourceEvent::Live(welcome));
            }
            (State::Greeting | State::Live, TargetMessage::Refused { code, detail }) => {
                self.state = State::Refused;
                self.deadline = None;
                self.events.push_back(SourceEvent::Refused { code, detail });
            }
            (State::Live, TargetMessage::Durable { incarnation, number, chain, received }) => {
                self.events.push_back(SourceEvent::Durable { incarnation, number, chain, received });
            }
            (State::Live, TargetMessage::Answers(answers)) => self.events.push_back(SourceEvent::Answers(answers)),
            (State::Live, TargetMessage::Lease(lease)) => self.events.push_back(SourceEvent::Lease(lease)),
            (State::Live, TargetMessage::Paused { reason }) => self.events.push_back(SourceEvent::Paused { reason }),
            (State::Live, TargetMessage::Resumed) => self.events.push_back(SourceEvent::Resumed),
            (State::Live, TargetMessage::Pong(ping)) => self.handle_pong(now, ping),
            (state, message) => return Err(Error::Unexpected { got: name_of(&message), state: state.name() }),
        }
        Ok(())
    }

    fn handle_pong(&mut self, now: Now, ping: u64) {
        if let Some((number, sent)) = self.ping_sent.filter(|(number, _)| *number == ping) {
            let _ = number;
            self.rtt = Some(now.since(sent));
            self.ping_sent = None;
        }
    }

    /// The deadline passed.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        match self.state {
            State::Greeting => {
                self.deadline = None;
                self.events.push_back(SourceEvent::Broken { reason: "the target did not answer the greeting".into() });
            }
            State::Live if self.ping_sent.is_some_and(|(_, sent)| now.since(sent) >= PONG_TIMEOUT) => {
                self.deadline = None;
                self.events.push_back(SourceEvent::Broken {
                    reason: format!("the target has not answered for {PONG_TIMEOUT:?}"),
                });
            }
            State::Live => {
                self.deadline = Some(now.plus(PING_INTERVAL));
                if self.ping_sent.is_none() {
                    self.pings += 1;
                    self.ping_sent = Some((self.pings, now));
                    if let Ok(bytes) = SourceMessage::Ping(self.pings).encode() {
                        self.outbox.push_back(bytes);
                    }
                }
            }
            State::Down | State::Refused => self.deadline = None,
        }
    }

    /// Tells the target the volumes as they are now (ignored while down: the next greeting says them).
    ///
    /// # Errors
    /// When the list is too long to be said.
    pub fn announce(&mut self, volumes: Vec<VolumeDecl>) -> Result<()> {
        if matches!(self.state, State::Greeting | State::Live) {
            self.outbox.push_back(SourceMessage::Volumes(volumes).encode()?);
        }
        Ok(())
    }

    /// Says that the source stops on purpose.
    pub fn say_bye(&mut self) {
        if self.state == State::Live
            && let Ok(bytes) = SourceMessage::Bye.encode()
        {
            self.outbox.push_back(bytes);
        }
    }

    /// The next message to send.
    #[must_use]
    pub fn poll_control(&mut self) -> Option<Vec<u8>> {
        self.outbox.pop_front()
    }

    /// The next event.
    #[must_use]
    pub fn poll_event(&mut self) -> Option<SourceEvent> {
        self.events.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_deadline(&self) -> Option<Now> {
        self.deadline
    }

    /// Batches may be sent.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.state == State::Live
    }

    /// Round trip as last measured, target's thread included.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Who the source is.
    #[must_use]
    pub fn config(&self) -> &SourceConfig {
        &self.config
    }
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Greeting => "greeting",
            Self::Live => "live",
            Self::Refused => "refused",
        }
    }
}

fn name_of(message: &TargetMessage) -> &'static str {
    match message {
        TargetMessage::Welcome(_) => "welcome",
        TargetMessage::Refused { .. } => "refused",
        TargetMessage::Durable { .. } => "durable",
        TargetMessage::Answers(_) => "answers",
        TargetMessage::Lease(_) => "lease",
        TargetMessage::Paused { .. } => "paused",
        TargetMessage::Resumed => "resumed",
        TargetMessage::Pong(_) => "pong",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::VaultKey;
    use crate::session::TargetSession;
    use crate::{HostId, KeyEpoch};

    const VAULT: VaultId = VaultId([1; 16]);
    const SECOND: Duration = Duration::from_secs(1);

    fn name(text: &str) -> Name {
        Name::new(text).expect("a name")
    }

    /// A session that has just been welcomed, at time 0, and its other end.
    fn live() -> (SourceSession, TargetSession) {
        let host_key = HostKey::derive(&VaultKey::new([7; 32]), HostId::derive(VAULT, &name("h")), KeyEpoch(1));
        let answer_key = host_key.answer_key();
        let mut source = SourceSession::new(SourceConfig { vault: VAULT, group: name("g"), host: name("h"), host_key });
        source.handle_up(Now(0), [3; 32], Generation(1), Incarnation(1), Vec::new()).expect("a short list");
        let mut target = TargetSession::new(VAULT);
        let hello = source.poll_control().expect("the greeting");
        target.handle_control(&hello, |_, _| Some(answer_key)).expect("a greeting");
        target.welcome(Welcome {
            generation: Generation(1),
            tail: None,
            empty: Vec::new(),
            joined: Vec::new(),
            event_open: false,
            log: None,
        });
        let welcome = target.poll_control().expect("the welcome");
        source.handle_control(Now(0), &welcome).expect("it is ours");
        assert!(matches!(source.poll_event(), Some(SourceEvent::Live(_))));
        (source, target)
    }

    /// Brings `now` on to the session's next deadline, with or without the target's answers.
    fn turn(source: &mut SourceSession, target: Option<&mut TargetSession>) -> Now {
        let now = source.poll_deadline().expect("a live session looks every second");
        source.handle_timeout(now);
        if let (Some(ping), Some(target)) = (source.poll_control(), target) {
            target.handle_control(&ping, |_, _| None).expect("a ping");
            let pong = target.poll_control().expect("the pong");
            source.handle_control(now.plus(SECOND / 2), &pong).expect("it is ours");
        }
        now
    }

    /// Goal: a target that answers is kept for good; one that does not answer any more is given up after `PONG_TIMEOUT`, with the
    /// reason, though its connection stands.
    #[test]
    fn a_live_target_that_does_not_answer_is_given_up() {
        let (mut source, mut target) = live();
        for _ in 0..100 {
            turn(&mut source, Some(&mut target));
            assert_eq!(source.poll_event(), None);
        }
        assert_eq!(source.rtt(), Some(SECOND / 2));
        let asked = turn(&mut source, None);
        let mut now = asked;
        while source.poll_deadline().is_some() {
            assert_eq!(source.poll_event(), None, "{:?} after the question", now.since(asked));
            now = turn(&mut source, None);
        }
        assert_eq!(now.since(asked), PONG_TIMEOUT);
        let SourceEvent::Broken { reason } = source.poll_event().expect("given up") else { panic!("not given up") };
        assert!(reason.contains("30s"), "{reason}");
    }
}
