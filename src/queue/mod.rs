//! The live queue: a seam, so that faults can be put between us and SQS.

mod inspect;
mod message;
mod sqs;

use std::time::Duration;

use async_trait::async_trait;

pub(crate) use inspect::Permission;
pub(crate) use message::{ForeignReason, Message, pack, parse, unverified_last};
pub use sqs::SqsQueue;

/// What a received message must be deleted or returned by.
pub type Receipt = String;

/// A message as it came from the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedMessage {
    /// What it must be deleted or returned by; valid until it becomes visible again.
    pub receipt: Receipt,
    /// By which people find it in the queue's own tools; empty where the queue has no such thing.
    pub id: String,
    /// Its text.
    pub body: String,
}

/// The one live queue. Its implementation may lose, repeat and reorder: the result is the same.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Sends a message. Two with the same `deduplication_id` may become one, if the queue knows
    /// how.
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError>;

    /// Receives up to ten messages, waiting up to `wait` (at most 20 s) for the first. They are
    /// hidden from other receivers for [`Queue::visibility_timeout`].
    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError>;

    /// Deletes messages. One whose receipt is no longer valid comes again: that is no error.
    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError>;

    /// Hides messages for so long from now on; with zero, returns them to the queue. A receipt that
    /// is no longer valid is no error.
    async fn change_visibility(
        &self,
        receipts: &[Receipt],
        duration: Duration,
    ) -> Result<(), QueueError>;

    /// About how many messages it holds, hidden ones included.
    async fn depth(&self) -> Result<u64, QueueError>;

    /// Whether it hands out nothing more while messages that were received are neither deleted nor
    /// visible again, as a FIFO queue does within a group. Of one that does not, play receives the
    /// next messages while it applies the last.
    fn is_ordered(&self) -> bool {
        true
    }

    /// What tells this queue from all others, such as its ARN; `None` where nothing does. It is
    /// kept with the log, so that a worker on another queue is noticed.
    fn identity(&self) -> Option<String> {
        None
    }

    /// For how long a received message is hidden.
    fn visibility_timeout(&self) -> Duration;

    /// The largest message that it takes, in bytes.
    fn max_message_bytes(&self) -> usize;
}

/// The queue could not be used. Everything of it may be tried again; nothing is lost by it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct QueueError(pub String);
