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

/// Between two looks at what processes have open, which costs a look at each of their files.
const WRITERS_PERIOD: Duration = Duration::from_secs(60);

/// The thread. Ends when dropped.
pub(crate) struct Watch {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches `groups`, but not while somebody holds `changes`. `report` is told when a device has come or gone.
    ///
    /// Where the service of a block device has ended by itself (its queue panicked, its ring failed) this process ends as by a crash: the
    /// kernel keeps the requests of all its devices for the next one. *(It could not serve that device again itself: what it holds of
    /// the source, and of the ring, is in an unknown state. An orderly stop would take the other devices from their users.)*
    pub(crate) fn start(
        groups: Arc<RwLock<BTreeMap<Name, Arc<Group>>>>,
        changes: Arc<Mutex<()>>,
        report: impl Fn(&[Arc<Group>]) + Send + 'static,
    ) -> Result<Self> {
        let (stop, stopped) = sync_channel(0);
        let thread = std::thread::Builder::new().name("farshore-watch".into()).spawn(move || {
            let mut writers_due = clock::now();
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                // Whoever holds it looks himself, or makes what is to be looked at later.
                let Ok(_changes) = changes.try_lock() else { continue };
                let all: Vec<_> = groups.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
                if let Some(volume) = all.iter().find_map(|group| group.lost_server()) {
                    tracing::error!(
                        volume,
                        "its block device is served no longer: this process makes room for another"
                    );
                    std::process::abort();
                }
                if writers_due <= clock::now() {
                    all.iter().for_each(|group| group.watch_writers());
                    writers_due = clock::now().plus(WRITERS_PERIOD);
                }
                let changed = all.iter().filter(|group| group.watch_mapped()).count();
                if changed > 0 {
                    report(&all);
                }
            }
        });
        let thread = thread.map_err(|error| Error::failed("watch thread", error))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watch thread panicked: nobody noticed growth and other tools' tables");
        }
    }
}
