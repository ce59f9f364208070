//! The real queue with injected faults between it and the worker. The same seed gives the same
//! faults.

use std::sync::Mutex;
use std::time::Duration;

use projectionist::{Queue, QueueError, Receipt, ReceivedMessage, SqsQueue, async_trait};

/// How often each fault occurs, in percent of the messages. For the booleans, whether it occurs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// A message is deleted before the worker receives it.
    pub lost: u8,
    /// A message is received twice.
    pub repeated: u8,
    /// A message's body is cut to half its length.
    pub malformed: u8,
    /// A deletion is ignored, so the message is received again.
    pub undeleted: u8,
    /// A message is sent, but the relay gets an error. This is like a crash before the relay
    /// records it.
    pub unacknowledged: u8,
    /// A message is not sent, and the relay gets an error.
    pub refused: u8,
    /// The number of sends that panic, before all others.
    pub panics: u64,
    /// Whether the messages of each receive are shuffled.
    pub shuffled: bool,
    /// Whether changes of visibility are ignored, so that messages become visible while the worker
    /// works.
    pub unhidden: bool,
}

/// How often each fault occurred, in messages, and how many messages passed. A test asserts these
/// counts to prove that its faults occurred.
#[derive(Debug, Clone, Copy, Default)]
pub struct FaultCounts {
    pub lost: u64,
    pub repeated: u64,
    pub malformed: u64,
    pub undeleted: u64,
    pub unacknowledged: u64,
    pub refused: u64,
    pub panics: u64,
    /// Receives whose order was changed.
    pub shuffled: u64,
    pub unhidden: u64,
    /// Receives, empty ones included.
    pub receives: u64,
    /// Messages that the worker received.
    pub received: u64,
    /// Messages that the worker asked to delete.
    pub deleted: u64,
}

/// The real queue, with faults.
pub struct FaultyQueue {
    queue: SqsQueue,
    faults: Faults,
    state: Mutex<State>,
}

struct State {
    dice: fastrand::Rng,
    fault_counts: FaultCounts,
}

impl State {
    /// Decides whether a fault occurs now, and counts it.
    fn strikes(&mut self, percent: u8, count: impl Fn(&mut FaultCounts) -> &mut u64) -> bool {
        let strikes = self.dice.u8(0..100) < percent;
        *count(&mut self.fault_counts) += u64::from(strikes);
        strikes
    }
}

impl FaultyQueue {
    pub fn new(queue: &SqsQueue, faults: Faults, seed: u64) -> Self {
        let state =
            State { dice: fastrand::Rng::with_seed(seed), fault_counts: FaultCounts::default() };
        FaultyQueue { queue: queue.clone(), faults, state: Mutex::new(state) }
    }

    /// A queue without faults that only counts.
    pub fn without_faults(queue: &SqsQueue) -> Self {
        Self::new(queue, Faults::default(), 0)
    }

    pub fn fault_counts(&self) -> FaultCounts {
        self.with(|state| state.fault_counts)
    }

    fn strikes(&self, percent: u8, count: impl Fn(&mut FaultCounts) -> &mut u64) -> bool {
        self.with(|state| state.strikes(percent, count))
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().expect("the lock is not poisoned"))
    }
}

#[async_trait]
impl Queue for FaultyQueue {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        let panics = self.with(|state| {
            let panics = state.fault_counts.panics < self.faults.panics;
            state.fault_counts.panics += u64::from(panics);
            panics
        });
        assert!(!panics, "this panic is part of the test");
        if self.strikes(self.faults.refused, |counts| &mut counts.refused) {
            return Err(QueueError::Unavailable("refused by the test".into()));
        }
        self.queue.send(body, deduplication_id).await?;
        if self.strikes(self.faults.unacknowledged, |counts| &mut counts.unacknowledged) {
            return Err(QueueError::Unavailable("not acknowledged by the test".into()));
        }
        Ok(())
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError> {
        let mut received = Vec::new();
        for message in self.queue.receive(wait).await? {
            if self.strikes(self.faults.lost, |counts| &mut counts.lost) {
                self.queue.delete(&[message.receipt]).await?;
                continue;
            }
            if self.strikes(self.faults.repeated, |counts| &mut counts.repeated) {
                received.push(message.clone());
            }
            let body = if self.strikes(self.faults.malformed, |counts| &mut counts.malformed) {
                message.body[..message.body.len() / 2].to_owned()
            } else {
                message.body
            };
            received.push(ReceivedMessage { body, ..message });
        }
        self.with(|state| {
            state.fault_counts.receives += 1;
            state.fault_counts.received += received.len() as u64;
            if self.faults.shuffled {
                let before = received.clone();
                state.dice.shuffle(&mut received);
                state.fault_counts.shuffled += u64::from(before != received);
            }
        });
        Ok(received)
    }

    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        let mut distinct = receipts.to_vec();
        distinct.sort();
        distinct.dedup();
        let (kept, deleted): (Vec<Receipt>, Vec<Receipt>) = self.with(|state| {
            state.fault_counts.deleted += distinct.len() as u64;
            distinct
                .into_iter()
                .partition(|_| state.strikes(self.faults.undeleted, |counts| &mut counts.undeleted))
        });
        self.queue.delete(&deleted).await?;
        self.queue.change_visibility(&kept, Duration::ZERO).await
    }

    async fn change_visibility(
        &self,
        receipts: &[Receipt],
        duration: Duration,
    ) -> Result<(), QueueError> {
        if self.faults.unhidden {
            self.with(|state| state.fault_counts.unhidden += receipts.len() as u64);
            return Ok(());
        }
        self.queue.change_visibility(receipts, duration).await
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        self.queue.depth().await
    }

    fn identity(&self) -> Option<String> {
        self.queue.identity()
    }

    fn visibility_timeout(&self) -> Duration {
        self.queue.visibility_timeout()
    }

    fn max_message_bytes(&self) -> usize {
        self.queue.max_message_bytes()
    }
}
