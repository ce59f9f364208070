//! The real queue, with faults put between it and the worker: the same seed gives the same faults.

use std::sync::Mutex;
use std::time::Duration;

use projectionist::{Queue, QueueError, Receipt, Received, SqsQueue, async_trait};

/// How often each fault strikes, in percent of the messages received.
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
    /// Whether each receive comes shuffled.
    pub shuffled: bool,
}

/// The real queue, with faults.
pub struct FaultyQueue {
    queue: SqsQueue,
    faults: Faults,
    dice: Mutex<fastrand::Rng>,
}

impl FaultyQueue {
    pub fn new(queue: &SqsQueue, faults: Faults, seed: u64) -> Self {
        FaultyQueue { queue: queue.clone(), faults, dice: Mutex::new(fastrand::Rng::with_seed(seed)) }
    }

    fn strikes(&self, percent: u8) -> bool {
        self.dice.lock().expect("no panic while rolling").u8(0..100) < percent
    }
}

#[async_trait]
impl Queue for FaultyQueue {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        self.queue.send(body, deduplication_id).await
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<Received>, QueueError> {
        let mut received = Vec::new();
        for message in self.queue.receive(wait).await? {
            if self.strikes(self.faults.lost) {
                self.queue.delete(&[message.receipt]).await?;
                continue;
            }
            if self.strikes(self.faults.repeated) {
                received.push(message.clone());
            }
            let body = match self.strikes(self.faults.malformed) {
                true => message.body[..message.body.len() / 2].to_owned(),
                false => message.body,
            };
            received.push(Received { body, ..message });
        }
        if self.faults.shuffled {
            self.dice.lock().expect("no panic while rolling").shuffle(&mut received);
        }
        Ok(received)
    }

    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        let mut distinct = receipts.to_vec();
        distinct.sort();
        distinct.dedup();
        let (kept, deleted): (Vec<Receipt>, Vec<Receipt>) =
            distinct.into_iter().partition(|_| self.strikes(self.faults.undeleted));
        self.queue.delete(&deleted).await?;
        self.queue.hide(&kept, Duration::ZERO).await
    }

    async fn hide(&self, receipts: &[Receipt], duration: Duration) -> Result<(), QueueError> {
        self.queue.hide(receipts, duration).await
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        self.queue.depth().await
    }

    fn visibility(&self) -> Duration {
        self.queue.visibility()
    }

    fn max_message_bytes(&self) -> usize {
        self.queue.max_message_bytes()
    }
}
