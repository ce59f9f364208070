//! Queues that record what happens: the time at which play has processed a message, and the
//! messages that the relay sends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use projectionist::{Queue, QueueError, Receipt, ReceivedMessage, async_trait};
use serde::Deserialize;
use tokio::sync::watch;

/// The parts of a message that the probes need.
#[derive(Deserialize)]
struct Envelope {
    prev: u64,
    #[serde(default)]
    events: Vec<Wire>,
    last: Option<u64>,
}

#[derive(Deserialize)]
struct Wire {
    position: u64,
}

/// The first and the last position of a message that the relay made.
pub fn positions(body: &str) -> Option<(u64, u64)> {
    let Envelope { prev, events, last } = serde_json::from_str(body).ok()?;
    Some((prev + 1, events.last().map(|event| event.position).or(last)?))
}

/// Forwards every call to a queue, and records which positions play asks to delete. By then every
/// live projector has committed past them.
pub struct ObservedQueue {
    queue: Arc<dyn Queue>,
    /// The positions of messages that are received and not yet deleted.
    open: Mutex<HashMap<Receipt, (u64, u64)>>,
    /// The positions of each deletion, and the time at which play asked for it.
    applied: Mutex<Vec<(u64, u64, Instant)>>,
    /// The last deleted position, and the time at which the queue confirmed the deletion.
    deleted: watch::Sender<(u64, Instant)>,
}

impl ObservedQueue {
    pub fn new(queue: Arc<dyn Queue>) -> Arc<Self> {
        let deleted = watch::Sender::new((0, Instant::now()));
        Arc::new(ObservedQueue {
            queue,
            open: Mutex::default(),
            applied: Mutex::default(),
            deleted,
        })
    }

    /// Waits until everything through a position is deleted. Returns the time of that deletion.
    pub async fn deleted_through(&self, position: u64) -> Instant {
        let mut deleted = self.deleted.subscribe();
        let reached = deleted.wait_for(|(last, _)| *last >= position).await;
        reached.map_or_else(|_| Instant::now(), |reached| reached.1)
    }

    /// The time at which each position was applied.
    pub fn applied(&self) -> HashMap<u64, Instant> {
        let mut at = HashMap::new();
        for &(first, last, when) in lock(&self.applied).iter() {
            for position in first..=last {
                at.entry(position).or_insert(when);
            }
        }
        at
    }
}

#[async_trait]
impl Queue for ObservedQueue {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        self.queue.send(body, deduplication_id).await
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError> {
        let received = self.queue.receive(wait).await?;
        let known = received
            .iter()
            .filter_map(|message| Some((message.receipt.clone(), positions(&message.body)?)));
        lock(&self.open).extend(known);
        Ok(received)
    }

    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        let now = Instant::now();
        let through: Vec<(u64, u64)> = {
            let mut open = lock(&self.open);
            receipts.iter().filter_map(|receipt| open.remove(receipt)).collect()
        };
        lock(&self.applied).extend(through.iter().map(|&(first, last)| (first, last, now)));
        self.queue.delete(receipts).await?;
        if let Some(last) = through.iter().map(|(_, last)| *last).max() {
            self.deleted.send_modify(|deleted| {
                if last > deleted.0 {
                    *deleted = (last, Instant::now());
                }
            });
        }
        Ok(())
    }

    async fn change_visibility(
        &self,
        receipts: &[Receipt],
        duration: Duration,
    ) -> Result<(), QueueError> {
        self.queue.change_visibility(receipts, duration).await
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        self.queue.depth().await
    }

    fn is_ordered(&self) -> bool {
        self.queue.is_ordered()
    }

    fn visibility_timeout(&self) -> Duration {
        self.queue.visibility_timeout()
    }

    fn max_message_bytes(&self) -> usize {
        self.queue.max_message_bytes()
    }
}

/// Records the messages that the relay sends, with the time. Its receives return nothing.
pub struct SentRecorder {
    sent: Mutex<Vec<(String, Instant)>>,
    last: watch::Sender<u64>,
}

impl SentRecorder {
    pub fn new() -> Arc<Self> {
        Arc::new(SentRecorder { sent: Mutex::default(), last: watch::Sender::new(0) })
    }

    /// Waits until a message through this position was sent.
    pub async fn sent_through(&self, position: u64) {
        let _ = self.last.subscribe().wait_for(|last| *last >= position).await;
    }

    /// Takes all recorded messages, with the time at which each was sent.
    pub fn take(&self) -> Vec<(String, Instant)> {
        std::mem::take(&mut *lock(&self.sent))
    }
}

#[async_trait]
impl Queue for SentRecorder {
    async fn send(&self, body: &str, _: &str) -> Result<(), QueueError> {
        lock(&self.sent).push((body.to_owned(), Instant::now()));
        if let Some((_, last)) = positions(body) {
            self.last.send_replace(last);
        }
        Ok(())
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError> {
        tokio::time::sleep(wait).await;
        Ok(Vec::new())
    }

    async fn delete(&self, _: &[Receipt]) -> Result<(), QueueError> {
        Ok(())
    }

    async fn change_visibility(&self, _: &[Receipt], _: Duration) -> Result<(), QueueError> {
        Ok(())
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        Ok(0)
    }

    fn visibility_timeout(&self) -> Duration {
        Duration::from_secs(30)
    }

    /// The limit of SQS.
    fn max_message_bytes(&self) -> usize {
        1_048_576
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
