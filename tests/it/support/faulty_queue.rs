//! The real queue, with faults put between it and the worker: the same seed gives the same faults.

use std::sync::Mutex;
use std::time::Duration;

use projectionist::{Queue, QueueError, Receipt, ReceivedMessage, SqsQueue, async_trait};

/// How often each fault strikes, in percent of the messages, and whether it does at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Deleted behind the worker's back.
    pub lost: u8,
    /// Handed over twice.
    pub repeated: u8,
    /// Replaced by something that is no message.
    pub malformed: u8,
    /// Handed over, but deletions of it get lost: it comes again.
    pub undeleted: u8,
    /// Sent, but the relay is told otherwise: as if it had crashed before it could note it.
    pub unacknowledged: u8,
    /// Not sent, and the relay is told so.
    pub refused: u8,
    /// Whether each receive comes shuffled.
    pub shuffled: bool,
    /// Whether messages cannot be kept hidden: their visibility expires in the middle of the work.
    pub unhidden: bool,
}

/// How often each fault struck, in messages, and what came through: a test that asserts nothing of
/// it may prove nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct FaultCounts {
    pub lost: u64,
    pub repeated: u64,
    pub malformed: u64,
    pub undeleted: u64,
    pub unacknowledged: u64,
    pub refused: u64,
    /// Receives whose order was changed.
    pub shuffled: u64,
    pub unhidden: u64,
    /// Receives, empty ones included.
    pub receives: u64,
    /// Messages handed over to the worker.
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
    fn should_strike(&mut self, percent: u8, count: impl Fn(&mut FaultCounts) -> &mut u64) -> bool {
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

    /// Without faults: only to count.
    pub fn without_faults(queue: &SqsQueue) -> Self {
        Self::new(queue, Faults::default(), 0)
    }

    pub fn fault_counts(&self) -> FaultCounts {
        self.with(|state| state.fault_counts)
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().expect("no panic while rolling"))
    }
}

#[async_trait]
impl Queue for FaultyQueue {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        if self.with(|state| {
            state.should_strike(self.faults.refused, |fault_counts| &mut fault_counts.refused)
        }) {
            return Err(QueueError("refused by the test".into()));
        }
        self.queue.send(body, deduplication_id).await?;
        match self.with(|state| {
            state.should_strike(self.faults.unacknowledged, |fault_counts| {
                &mut fault_counts.unacknowledged
            })
        }) {
            true => Err(QueueError("not acknowledged by the test".into())),
            false => Ok(()),
        }
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError> {
        let mut received = Vec::new();
        for message in self.queue.receive(wait).await? {
            if self.with(|state| {
                state.should_strike(self.faults.lost, |fault_counts| &mut fault_counts.lost)
            }) {
                self.queue.delete(&[message.receipt]).await?;
                continue;
            }
            if self.with(|state| {
                state.should_strike(self.faults.repeated, |fault_counts| &mut fault_counts.repeated)
            }) {
                received.push(message.clone());
            }
            let body = match self.with(|state| {
                state.should_strike(self.faults.malformed, |fault_counts| {
                    &mut fault_counts.malformed
                })
            }) {
                true => message.body[..message.body.len() / 2].to_owned(),
                false => message.body,
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
            distinct.into_iter().partition(|_| {
                state.should_strike(self.faults.undeleted, |fault_counts| {
                    &mut fault_counts.undeleted
                })
            })
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
