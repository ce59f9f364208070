//! The live queue, as a trait, so that tests can inject faults between this program and SQS.

mod inspect;
mod message;
mod sqs;

use std::time::Duration;

use async_trait::async_trait;

use crate::aws::AwsError;
use crate::model::backoff::Transient;
pub(crate) use inspect::{Action, Permission};
pub(crate) use message::{ForeignReason, Message, pack, parse, unverified_last};
pub use sqs::SqsQueue;

/// The handle with which a received message is deleted or returned.
pub type Receipt = String;

/// A message that was received from the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedMessage {
    /// The handle for deleting or returning the message. Valid until the message becomes visible
    /// again.
    pub receipt: Receipt,
    /// The message id under which operators find it in the queue's own tools. Empty if the queue
    /// has no such id.
    pub id: String,
    /// The text of the message.
    pub body: String,
}

/// The live queue. An implementation may lose, repeat and reorder messages; the projections come
/// out the same.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Sends a message. The queue may drop a message whose `deduplication_id` it has seen before.
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError>;

    /// Receives up to ten messages, and waits up to `wait` (at most 20 s) for the first one.
    /// Received messages are hidden from other receivers for [`Queue::visibility_timeout`].
    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError>;

    /// Deletes messages. An expired receipt is not an error: its message is delivered again.
    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError>;

    /// Hides messages for `duration` from now on. Zero returns them to the queue. An expired
    /// receipt is not an error.
    async fn change_visibility(
        &self,
        receipts: &[Receipt],
        duration: Duration,
    ) -> Result<(), QueueError>;

    /// The approximate number of messages in the queue, including hidden ones.
    async fn depth(&self) -> Result<u64, QueueError>;

    /// Whether the queue delivers in order, as a FIFO queue does within a message group: it
    /// delivers nothing more until the received messages are deleted or visible again. If this is
    /// false, play receives the next messages while it applies the last ones.
    fn is_ordered(&self) -> bool {
        true
    }

    /// A unique name of the queue, such as its ARN. `None` if it has no unique name. The log
    /// records it, so that a worker on another queue is noticed.
    fn identity(&self) -> Option<String> {
        None
    }

    /// How long a received message is hidden.
    fn visibility_timeout(&self) -> Duration;

    /// The largest message that the queue accepts, in bytes.
    fn max_message_bytes(&self) -> usize;
}

/// Why the queue cannot be used, or did not carry out a call.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The URL of the queue is wrong. A retry fails in the same way.
    #[error("{0}")]
    Settings(String),
    /// An AWS setting is wrong.
    #[error(transparent)]
    Aws(#[from] AwsError),
    /// The queue did not carry out a call. Every call may be retried; a failure loses no event.
    #[error("{0}")]
    Unavailable(String),
}

impl Transient for QueueError {
    fn is_transient(&self) -> bool {
        match self {
            QueueError::Settings(_) => false,
            QueueError::Aws(error) => error.is_transient(),
            QueueError::Unavailable(_) => true,
        }
    }
}
