//! Looks every second whether volumes behind the device mapper are still in the path of their users' requests: other tools
//! (`lvextend`, `lvchange`) change tables, and nothing tells. And whether all block devices are still served, and by us
//! alone.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use farshore_proto::Name;

use crate::group::Group;
use crate::{Error, Result, clock};

/// Writes of this long may go past us unseen until the compare begins. A look costs a volume one command of the device mapper.
const PERIOD: Duration = Duration::from_secs(1);

/// Looks in a row that find a queue at the same turn before it counts as hanging: five seconds, as long as guests may wait for a dead
/// agent (I1). A process that was held up itself, and all its threads with it, has looked once.
const LOOKS_MAX: u32 = 6;

/// Time that a process which ends itself has to say why. What it says it to may stand on what hangs.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Between two looks at what processes have open, which costs a look at each of their files.
const WRITERS_PERIOD: Duration = Duration::from_secs(60);

/// The threads. End when dropped.
pub(crate) struct Watch {
    stop: Vec<SyncSender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Watches `groups`; what others may have changed, not while somebody holds `changes`. `report` is told when a device has come
    /// or gone; `also` is called every second.
    ///
    /// Where the service of a block device has ended by itself (its queue panicked, its ring failed), or one of its queues hangs,
    /// this process ends as by a crash: the kernel keeps the requests of all its devices for the next one. *(It could not serve that
    /// device again itself: what it holds of the source, and of the ring, is in an unknown state. An orderly stop would take the
    /// other devices from their users.)*
    pub(crate) fn start(
        groups: Arc<RwLock<BTreeMap<Name, Arc<Group>>>>,
        changes: Arc<Mutex<()>>,
        report: impl Fn(&[Arc<Group>]) + Send + 'static,
        also: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let (mut stop, mut threads) = (Vec::new(), Vec::new());
        let mut every_second = |name: &str, mut look: Box<dyn FnMut() + Send>| {
            let (sender, stopped) = sync_channel(0);
            let run = move || {
                while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                    look();
                }
            };
            let thread = std::thread::Builder::new().name(name.into()).spawn(run);
            stop.push(sender);
            threads.push(thread.map_err(|error| Error::failed("watch thread", error))?);
            Ok::<(), Error>(())
        };
        let list = |groups: &RwLock<BTreeMap<Name, Arc<Group>>>| -> Vec<_> {
            groups.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
        };
        // A thread of its own, which waits for no disk and no lock that is held while somebody waits for one.
        let (of, mut turns) = (Arc::clone(&groups), Turns::default());
        every_second("farshore-alive", Box::new(move || end_if_not_serving(&list(&of), &mut turns)))?;
        let mut writers_due = clock::now();
        let look = move || {
            also();
            let all = list(&groups);
            // Whoever holds it looks himself, or makes what is to be looked at later.
            let Ok(_changes) = changes.try_lock() else { return };
            if writers_due <= clock::now() {
                all.iter().for_each(|group| group.watch_writers());
                writers_due = clock::now().plus(WRITERS_PERIOD);
            }
            all.iter().for_each(|group| group.watch_verify());
            let changed = all.iter().filter(|group| group.watch_mapped()).count();
            if changed > 0 {
                report(&all);
            }
        };
        every_second("farshore-watch", Box::new(look))?;
        Ok(Self { stop, threads })
    }
}

/// Ends this process if a block device is served no longer, or a queue of one hangs.
fn end_if_not_serving(groups: &[Arc<Group>], turns: &mut Turns) {
    let servers: Vec<_> = groups.iter().flat_map(|group| group.servers()).collect();
    let lost = servers.iter().find(|(_, server)| server.has_failed()).map(|(volume, _)| volume.clone());
    let hangs = turns.handle_look(
        servers.iter().flat_map(|(volume, server)| (0_u16..).zip(server.turns_under_way()).map(move |at| (volume, at))),
    );
    let reason = match (lost, hangs) {
        (Some(volume), _) => format!("the block device of {volume} is served no longer"),
        (None, Some((volume, queue))) => format!("queue {queue} of the block device of {volume} hangs"),
        (None, None) => return,
    };
    let (said, wait) = sync_channel::<()>(0);
    let words = std::thread::Builder::new().name("farshore-last-words".into()).spawn(move || {
        tracing::error!("{reason}: this process makes room for another");
        drop(said);
    });
    if words.is_ok() {
        // Disconnected once it is said.
        let _ = wait.recv_timeout(LAST_WORDS);
    }
    std::process::abort();
}

/// The turns at which queues were found. Which of several queues hangs cannot be seen from outside, where the others' traffic hides
/// it.
#[derive(Debug, Default)]
struct Turns(BTreeMap<(String, u16), (u64, u32)>);

impl Turns {
    /// Notes for each queue the turn that it is at, or that it waits; the first one that hangs.
    fn handle_look<'a>(
        &mut self,
        queues: impl Iterator<Item = (&'a String, (u16, Option<u64>))>,
    ) -> Option<(String, u16)> {
        let before = std::mem::take(&mut self.0);
        for (volume, (queue, turn)) in queues {
            let Some(turn) = turn else { continue };
            let place = (volume.clone(), queue);
            let looks = before.get(&place).filter(|seen| seen.0 == turn).map_or(0, |seen| seen.1) + 1;
            self.0.insert(place, (turn, looks));
        }
        self.0.iter().find(|(_, seen)| seen.1 >= LOOKS_MAX).map(|(place, _)| place.clone())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.clear();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(
                    "a watch thread panicked: nobody noticed growth, other tools' tables, or hanging queues"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: only a queue that stays in one turn hangs, whatever the others do, and only after the looks. Method: a queue that waits,
    /// one that works, one that comes back in the last moment and is then lost.
    #[test]
    fn a_queue_hangs_that_stays_in_one_turn() {
        let volume = String::from("db/disk");
        let mut turns = Turns::default();
        let mut look = |second: u64, third: Option<u64>| {
            let queues = [(0, None), (1, Some(second)), (2, third)];
            turns.handle_look(queues.into_iter().map(|queue| (&volume, queue)))
        };
        let steps = [5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 0, 6, 6, 6, 6, 6].map(|turn| (turn > 0).then_some(turn));
        for (at, third) in (0..).zip(steps) {
            assert_eq!(look(at, third), None, "look {at}");
        }
        assert_eq!(look(99, Some(6)), Some((volume.clone(), 2)));
    }
}
