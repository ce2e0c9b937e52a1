//! Long work in the background, looked at by id.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use crate::failure::Failure;

/// Ended jobs that are remembered for whoever asks late.
const ENDED_MAX: usize = 100;

/// The jobs of a target.
#[derive(Default)]
pub(super) struct Jobs {
    next: AtomicU64,
    list: Mutex<BTreeMap<u64, Arc<Job>>>,
}

/// One job.
pub(super) struct Job {
    begin: Instant,
    facts: Mutex<Value>,
    done: AtomicU64,
    total: AtomicU64,
    end: Mutex<Option<(f64, Result<(), Failure>)>>,
}

impl Job {
    /// Tells how far it is.
    pub(super) fn progress(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Adds a fact to the job's document.
    pub(super) fn note(&self, key: &str, value: Value) {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)[key] = value;
    }

    fn document(&self, id: u64) -> Value {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let mut document = self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        document["job"] = json!(id.to_string());
        document["done_bytes"] = json!(self.done.load(Ordering::Relaxed));
        document["total_bytes"] = json!(self.total.load(Ordering::Relaxed));
        document["state"] = json!(match &*end {
            None => "running",
            Some((_, Ok(()))) => "done",
            Some((_, Err(_))) => "failed",
        });
        if let Some((seconds, result)) = &*end {
            document["seconds"] = json!(seconds);
            if let Err(failure) = result {
                document["error"] = failure.document()["error"].clone();
            }
        }
        document
    }
}

impl Jobs {
    /// Starts `work` on a thread of its own; gives the job's document.
    pub(super) fn start(
        &self,
        facts: Value,
        total: u64,
        work: impl FnOnce(&Job) -> Result<(), Failure> + Send + 'static,
    ) -> Result<Value, Failure> {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let job = Arc::new(Job {
            begin: Instant::now(),
            facts: Mutex::new(facts),
            done: AtomicU64::new(0),
            total: AtomicU64::new(total),
            end: Mutex::new(None),
        });
        let running = Arc::clone(&job);
        std::thread::Builder::new()
            .name("farshore-job".into())
            .spawn(move || {
                let result = work(&running);
                let seconds = running.begin.elapsed().as_secs_f64();
                *running.end.lock().unwrap_or_else(PoisonError::into_inner) = Some((seconds, result));
            })
            .map_err(|error| Failure::failed("job", error.to_string()))?;
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let document = job.document(id);
        list.insert(id, job);
        forget_old(&mut list);
        Ok(document)
    }

    /// A job's document.
    pub(super) fn get(&self, id: &str) -> Result<Value, Failure> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let found = id.parse::<u64>().ok().and_then(|id| Some((id, list.get(&id)?)));
        found.map(|(id, job)| job.document(id)).ok_or_else(|| Failure::not_found(format!("job {id}"), "no such job"))
    }
}

fn forget_old(list: &mut BTreeMap<u64, Arc<Job>>) {
    let ended = |job: &Job| job.end.lock().unwrap_or_else(PoisonError::into_inner).is_some();
    while list.len() > ENDED_MAX {
        let Some(id) = list.iter().find(|(_, job)| ended(job)).map(|(id, _)| *id) else { return };
        list.remove(&id);
    }
}
