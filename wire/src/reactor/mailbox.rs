//! A queue into an event loop from other threads: what is sent wakes the loop's poll.

use mio::Waker;
use std::sync::Arc;
use std::sync::mpsc;

/// The sending end; one for every thread.
#[derive(Debug)]
pub struct Sender<T> {
    queue: mpsc::Sender<T>,
    waker: Arc<Waker>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        Sender { queue: self.queue.clone(), waker: Arc::clone(&self.waker) }
    }
}

impl<T> Sender<T> {
    /// Sends to the loop. When that has ended the item is dropped. The sender bounds how many are under
    /// way: a thread that sends one result for each job it was given sends no more than there are jobs.
    pub fn send(&self, item: T) {
        if self.queue.send(item).is_ok()
            && let Err(error) = self.waker.wake()
        {
            // The item waits in the queue until the loop wakes for something else.
            log::error!("the event loop cannot be woken: {error}");
        }
    }
}

/// The loop's end.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: mpsc::Receiver<T>,
    /// A waker's last wake is lost with it, so it lives as long as there is somebody to wake.
    _waker: Arc<Waker>,
}

impl<T> Receiver<T> {
    /// The next item, if one is there.
    pub fn try_receive(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }
}

/// A mailbox whose sender wakes the poll that `waker` belongs to.
pub fn mailbox<T>(waker: Arc<Waker>) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = mpsc::channel();
    (Sender { queue: sender, waker: Arc::clone(&waker) }, Receiver { queue: receiver, _waker: waker })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mio::{Events, Poll, Token};
    use std::time::Duration;

    #[test]
    fn what_is_sent_wakes_the_poll() -> std::io::Result<()> {
        let mut poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), Token(7))?);
        let (sender, receiver) = mailbox(waker);
        let thread = std::thread::spawn(move || sender.clone().send(42));
        let mut events = Events::with_capacity(4);
        poll.poll(&mut events, Some(Duration::from_secs(5)))?;
        assert_eq!(events.iter().map(|e| e.token()).next(), Some(Token(7)));
        assert!(thread.join().is_ok());
        assert_eq!(receiver.try_receive(), Some(42));
        assert_eq!(receiver.try_receive(), None);
        Ok(())
    }
}
