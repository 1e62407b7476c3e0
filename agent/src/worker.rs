//! A small fixed pool of threads for what blocks, each job reporting back to the event loop.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Threads. Jobs wait for the kernel (namespaces, fsync, process start), so more than the cores help.
pub const THREADS: usize = 4;
/// The most jobs that wait for a thread. Each capsule has at most two at a time, and the service takes
/// fewer capsules than half of this.
pub const MAX_QUEUED: usize = 16_384;

type Job<T> = Box<dyn FnOnce() -> T + Send>;

struct Shared<T> {
    queue: Mutex<VecDeque<Job<T>>>,
    more: Condvar,
}

impl<T> Shared<T> {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Job<T>>> {
        // A job runs outside the lock, so a panic cannot leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, job: impl FnOnce() -> T + Send + 'static) {
        let mut queue = self.queue();
        assert!(queue.len() < MAX_QUEUED, "more jobs than the admitted capsules can have");
        queue.push_back(Box::new(job));
        self.more.notify_one();
    }
}

impl<T> Default for Shared<T> {
    fn default() -> Shared<T> {
        Shared { queue: Mutex::new(VecDeque::new()), more: Condvar::new() }
    }
}

/// The pool. `T` is what jobs report.
pub struct Workers<T> {
    shared: Arc<Shared<T>>,
    /// What must not wait until the pool has a thread free.
    apart: Arc<Shared<T>>,
    results: Receiver<T>,
}

impl<T> fmt::Debug for Workers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("queued", &self.shared.queue().len()).finish()
    }
}

impl<T: Send + 'static> Workers<T> {
    /// Starts the threads. `wake` is called on them after each result.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(wake: impl Fn() + Send + Sync + 'static) -> io::Result<Workers<T>> {
        let (shared, apart) = (Arc::new(Shared::default()), Arc::new(Shared::default()));
        let (sender, results) = channel();
        let wake: Arc<dyn Fn() + Send + Sync> = Arc::new(wake);
        let pool = (0..THREADS).map(|number| (format!("worker-{number}"), &shared));
        for (name, queue) in pool.chain([("worker-apart".into(), &apart)]) {
            let (queue, sender, wake) = (Arc::clone(queue), sender.clone(), Arc::clone(&wake));
            thread::Builder::new().name(name).spawn(move || work(&queue, &sender, &*wake))?;
        }
        Ok(Workers { shared, apart, results })
    }

    /// Hands a job to the pool.
    ///
    /// # Panics
    /// When [`MAX_QUEUED`] jobs wait: the service admits too few capsules for that.
    pub fn submit(&self, job: impl FnOnce() -> T + Send + 'static) {
        self.shared.submit(job);
    }

    /// Hands a job to the one thread that the pool's jobs do not use: writing large memories may hold all of those
    /// for minutes. For what takes seconds, and of which there is one at a time of each kind.
    pub fn submit_apart(&self, job: impl FnOnce() -> T + Send + 'static) {
        self.apart.submit(job);
    }

    /// The next result, if there is one.
    pub fn next_result(&self) -> Option<T> {
        self.results.try_recv().ok()
    }
}

fn work<T>(shared: &Shared<T>, results: &Sender<T>, wake: &dyn Fn()) {
    loop {
        let mut queue = shared.queue();
        let job = loop {
            match queue.pop_front() {
                Some(job) => break job,
                None => queue = shared.more.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(queue);
        if results.send(job()).is_err() {
            return;
        }
        wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    #[test]
    fn every_job_reports_once() {
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&woken);
        let workers = Workers::start(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        })
        .expect("threads");
        for n in 0..100 {
            workers.submit(move || n);
        }
        let mut results = Vec::new();
        let end = Instant::now() + Duration::from_secs(10);
        while results.len() < 100 && Instant::now() < end {
            match workers.next_result() {
                Some(n) => results.push(n),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
        results.sort_unstable();
        assert_eq!(results, (0..100).collect::<Vec<i32>>());
    }

    #[test]
    fn what_must_not_wait_does_not() {
        let workers = Workers::start(|| {}).expect("threads");
        let (open, gate) = channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        // As capsules whose memory is written, one a thread and one more.
        for n in 0..=THREADS {
            let gate = Arc::clone(&gate);
            workers.submit(move || {
                let _ = gate.lock().unwrap_or_else(PoisonError::into_inner).recv();
                n
            });
        }
        workers.submit_apart(|| 99);
        let end = Instant::now() + Duration::from_secs(10);
        let mut first = None;
        while first.is_none() && Instant::now() < end {
            first = workers.next_result();
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(first, Some(99), "a heartbeat, say");
        drop(open);
    }
}
