//! The fixed pool of threads for what blocks: database work and expensive computation.
//!
//! Each thread owns one database connection, made when it is first needed and made anew when it is
//! lost. Jobs wait in one bounded queue; each sends at most one result to the event loop's mailbox.
//!
//! A database that takes connections and says nothing (a frozen process, a stalled disk) is beyond the
//! time limits of the driver, the server and the kernel. So the event loop gives up on a job after
//! [`WORK_TIMEOUT`] and answers without it; a thread that does not come back is replaced, within a bound,
//! and ends when it does. Until the database has answered again, and while every thread is held up, new
//! jobs are refused at once but for one that finds out.

use crate::db::Database;
use crate::http::handler::{ComputeWork, DatabaseWork, Flow, Response};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use wire::reactor::mailbox::Sender;

/// The most jobs that wait for a thread before new requests are refused.
pub const MAX_QUEUED_NEW: usize = 256;
/// The most jobs that wait in all. Requests that have begun get further than new ones, so that work
/// done is not thrown away.
pub const MAX_QUEUED: usize = 4096;
/// How long a failed connection attempt stands for the next jobs: they fail at once instead of each
/// waiting for the connect timeout.
pub const CONNECT_PAUSE: Duration = Duration::from_millis(500);
/// How long a job may take, its waiting included. More than what a statement may take by itself
/// ([`STATEMENT_TIMEOUT_MS`](crate::db::STATEMENT_TIMEOUT_MS)), so that the database's own word comes first.
pub const WORK_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a thread may be at one job before it no longer counts as one that will take the next.
const STUCK_AFTER: Duration = Duration::from_secs(11);

/// What a thread does.
pub enum Work {
    /// With its database connection.
    Database(DatabaseWork),
    /// Without.
    Compute(ComputeWork),
}

/// A job's result.
pub struct Done {
    /// The task that it was for.
    pub task: u64,
    /// Its next step.
    pub flow: Flow,
}

struct Job {
    task: u64,
    work: Work,
    since: Instant,
}

/// What the pool knows of a thread.
#[derive(Default)]
struct Slot {
    /// When its present job began, in milliseconds of the pool's time, and one more; 0 without a job.
    began: AtomicU64,
    /// Whether another thread has its place; it ends when it comes back.
    is_replaced: AtomicBool,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    is_closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
    database_url: String,
    epoch: Instant,
    /// Threads that were replaced and have not come back.
    lost: AtomicUsize,
    /// A thread was lost, and no work with the database has been done since.
    is_suspect: AtomicBool,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Jobs run outside the lock, so a panic cannot leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether a thread has been at its job for so long.
    fn is_held_up(&self, slot: &Slot, time: Duration) -> bool {
        let began = slot.began.load(Ordering::Acquire);
        let limit = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        began > 0 && self.now_ms().saturating_sub(began - 1) >= limit
    }

    /// The next job; `None` once the pool is closed and the queue empty.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                // It was answered without: nobody would see what it does.
                if job.since.elapsed() >= WORK_TIMEOUT {
                    continue;
                }
                return Some(job);
            }
            if queue.is_closed {
                return None;
            }
            queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The pool.
pub struct Workers {
    shared: Arc<Shared>,
    results: Sender<Done>,
    slots: Vec<Arc<Slot>>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(count: usize, database_url: &str, results: &Sender<Done>) -> io::Result<Workers> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            more: Condvar::new(),
            database_url: database_url.to_string(),
            epoch: Instant::now(),
            lost: AtomicUsize::new(0),
            is_suspect: AtomicBool::new(false),
        });
        let mut workers =
            Workers { shared, results: results.clone(), slots: Vec::new(), threads: Vec::new() };
        for number in 0..count {
            let (slot, thread) = workers.start_thread(number)?;
            workers.slots.push(slot);
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    fn start_thread(&self, number: usize) -> io::Result<(Arc<Slot>, JoinHandle<()>)> {
        let slot = Arc::new(Slot::default());
        let (shared, results, own) = (Arc::clone(&self.shared), self.results.clone(), Arc::clone(&slot));
        let thread = thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || Worker::default().run(&shared, &own, &results))?;
        Ok((slot, thread))
    }

    /// Gives the places of threads that have been at one job for [`WORK_TIMEOUT`] to new ones. No more
    /// threads are lost at once than there are places: those that come after would only be held up too.
    pub fn replace_lost(&mut self) {
        for number in 0..self.slots.len() {
            let slot = &self.slots[number];
            if !self.shared.is_held_up(slot, WORK_TIMEOUT)
                || self.shared.lost.load(Ordering::Acquire) >= self.slots.len()
            {
                continue;
            }
            match self.start_thread(number) {
                Ok((fresh, thread)) => {
                    let seconds = WORK_TIMEOUT.as_secs();
                    log::warn!("worker-{number} has been at one job for over {seconds} s; it is replaced");
                    self.shared.lost.fetch_add(1, Ordering::AcqRel);
                    self.shared.is_suspect.store(true, Ordering::Release);
                    slot.is_replaced.store(true, Ordering::Release);
                    self.slots[number] = fresh;
                    self.threads[number] = thread;
                }
                Err(error) => log::error!("worker-{number} cannot be replaced: {error}"),
            }
        }
    }

    /// Jobs that wait, and threads that are at one.
    pub fn load(&self) -> (usize, usize) {
        let busy = self.slots.iter().filter(|s| s.began.load(Ordering::Relaxed) > 0).count();
        (self.shared.queue().jobs.len(), busy)
    }

    /// Gives the pool a job for a task. `is_new` is said of a request's first job.
    ///
    /// # Errors
    /// The 503 that the request is to be answered with, when the queue is full.
    pub fn submit(&self, task: u64, work: Work, is_new: bool) -> Result<(), Response> {
        let is_held_up = |slot: &Arc<Slot>| self.shared.is_held_up(slot, STUCK_AFTER);
        if !self.slots.is_empty() && self.slots.iter().all(is_held_up) {
            return Err(database_unavailable("no thread comes back from it"));
        }
        // One at a time finds out whether the database answers again.
        if is_new && self.shared.is_suspect.load(Ordering::Acquire) && self.load() != (0, 0) {
            return Err(database_unavailable("it did not answer lately"));
        }
        let mut queue = self.shared.queue();
        if queue.jobs.len() >= if is_new { MAX_QUEUED_NEW } else { MAX_QUEUED } {
            return Err(Response::error(
                503,
                "database_unavailable",
                "too many requests wait for the database; try again in a moment",
            )
            .with_header("retry-after", "1"));
        }
        queue.jobs.push_back(Job { task, work, since: Instant::now() });
        drop(queue);
        self.shared.more.notify_one();
        Ok(())
    }

    /// Lets the threads end once the queue is empty. A thread that is within a job is not waited for:
    /// the database's own timeouts end it.
    pub fn close(&self) {
        self.shared.queue().is_closed = true;
        self.shared.more.notify_all();
    }
}

/// One thread's state.
#[derive(Default)]
struct Worker {
    database: Option<Database>,
    failed: Option<(Instant, String)>,
}

impl Worker {
    fn run(&mut self, shared: &Shared, slot: &Slot, results: &Sender<Done>) {
        while let Some(Job { task, work, .. }) = shared.next() {
            slot.began.store(shared.now_ms() + 1, Ordering::Release);
            let is_database = matches!(work, Work::Database(_));
            let flow = match catch_unwind(AssertUnwindSafe(|| self.perform(work, &shared.database_url))) {
                Ok(flow) => flow,
                Err(_) => {
                    // Where a panic ends the program (release builds do so) it is started anew by its
                    // supervisor; elsewhere the request fails. The connection may be in a transaction.
                    self.database = None;
                    Err(Response::error(500, "internal_error", "the request failed inside; see the log"))
                }
            };
            results.send(Done { task, flow });
            slot.began.store(0, Ordering::Release);
            if is_database {
                shared.is_suspect.store(false, Ordering::Release);
            }
            if slot.is_replaced.load(Ordering::Acquire) {
                log::info!("a replaced worker has come back from its job and ends");
                shared.lost.fetch_sub(1, Ordering::AcqRel);
                return;
            }
        }
    }

    fn perform(&mut self, work: Work, url: &str) -> Flow {
        match work {
            Work::Compute(work) => work(),
            Work::Database(work) => match self.database(url) {
                Ok(database) => work(database),
                Err(reason) => Err(database_unavailable(&reason)),
            },
        }
    }

    /// The connection, made if there is none.
    fn database(&mut self, url: &str) -> Result<&mut Database, String> {
        if self.database.as_ref().is_some_and(Database::is_closed) {
            log::warn!("the database connection was lost; connecting again");
            self.database = None;
        }
        if self.database.is_none() {
            if let Some((at, reason)) = &self.failed
                && at.elapsed() < CONNECT_PAUSE
            {
                return Err(reason.clone());
            }
            match Database::connect(url) {
                Ok(database) => {
                    self.failed = None;
                    self.database = Some(database);
                }
                Err(error) => {
                    let reason = error.to_string();
                    log::error!("PostgreSQL: {reason}");
                    self.failed = Some((Instant::now(), reason.clone()));
                    return Err(reason);
                }
            }
        }
        self.database.as_mut().ok_or_else(|| "there is no connection".to_string())
    }
}

/// The reason is logged, not told: it may name hosts and users.
pub fn database_unavailable(_reason: &str) -> Response {
    Response::error(503, "database_unavailable", "the database cannot be reached; try again in a moment")
        .with_header("retry-after", "1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::handler::Step;
    use mio::{Events, Poll, Token, Waker};
    use wire::reactor::mailbox::{Receiver, mailbox};

    fn pool(count: usize, url: &str) -> io::Result<(Workers, Receiver<Done>, Poll)> {
        let poll = Poll::new()?;
        let (sender, receiver) = mailbox(Arc::new(Waker::new(poll.registry(), Token(0))?));
        Ok((Workers::start(count, url, &sender)?, receiver, poll))
    }

    fn next(receiver: &Receiver<Done>, poll: &mut Poll) -> io::Result<Done> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut events = Events::with_capacity(4);
        loop {
            if let Some(done) = receiver.try_receive() {
                return Ok(done);
            }
            assert!(Instant::now() < deadline, "no result came");
            poll.poll(&mut events, Some(Duration::from_millis(100)))?;
        }
    }

    #[test]
    fn a_panic_is_a_500_and_the_thread_goes_on() -> io::Result<()> {
        let (workers, receiver, mut poll) = pool(1, "")?;
        assert!(workers.submit(1, Work::Compute(Box::new(|| panic!("on purpose"))), true).is_ok());
        assert!(
            workers
                .submit(2, Work::Compute(Box::new(|| Step::respond(Response::no_content()))), true)
                .is_ok()
        );
        let first = next(&receiver, &mut poll)?;
        assert_eq!((first.task, first.flow.err().map(|r| r.status)), (1, Some(500)));
        let second = next(&receiver, &mut poll)?;
        assert!(matches!(second.flow, Ok(Step::Respond(r)) if r.status == 204));
        workers.close();
        for thread in workers.threads {
            assert!(thread.join().is_ok());
        }
        Ok(())
    }

    #[test]
    fn without_postgresql_the_answer_is_503_at_once() -> io::Result<()> {
        let (workers, receiver, mut poll) = pool(1, "postgresql://nobody@%2Fnonexistent/none")?;
        for task in 0..3 {
            let work: DatabaseWork = Box::new(|_| Step::respond(Response::no_content()));
            assert!(workers.submit(task, Work::Database(work), true).is_ok());
        }
        let started = Instant::now();
        for _ in 0..3 {
            let response = next(&receiver, &mut poll)?.flow.err();
            assert_eq!(response.as_ref().map(|r| r.status), Some(503));
            let body = response.map(|r| String::from_utf8_lossy(&r.body).into_owned()).unwrap_or_default();
            assert!(body.contains("database_unavailable"), "{body}");
        }
        assert!(started.elapsed() < Duration::from_secs(3));
        Ok(())
    }

    #[test]
    fn a_full_queue_refuses_new_requests_and_takes_those_begun() -> io::Result<()> {
        let (workers, _receiver, _poll) = pool(0, "")?;
        let work = || Work::Compute(Box::new(|| Step::respond(Response::no_content())));
        for task in 0..MAX_QUEUED_NEW as u64 {
            assert!(workers.submit(task, work(), true).is_ok());
        }
        assert_eq!(workers.submit(9999, work(), true).err().map(|r| r.status), Some(503));
        assert!(workers.submit(9999, work(), false).is_ok());
        Ok(())
    }
}
