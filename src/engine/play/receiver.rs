//! Receives from the queue. The next receive starts as early as the queue's order allows. For an
//! unordered queue, it runs while the current messages are processed. For an ordered queue, it runs
//! while they are deleted, and is answered as soon as they are gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use crate::queue::{Queue, QueueError, Receipt, ReceivedMessage};

/// How long `close` waits for a pending receive. A queue that has messages answers within this
/// time. A receive that waits for new messages is abandoned.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(1_500);

/// The receiving end of the queue.
pub(super) struct QueueReceiver {
    queue: Arc<dyn Queue>,
    /// The pending receive, if any. It is a task, so that its messages are not lost when the caller
    /// stops waiting for it.
    pending: JoinSet<Result<Vec<ReceivedMessage>, QueueError>>,
}

impl QueueReceiver {
    pub(super) fn new(queue: &Arc<dyn Queue>) -> Self {
        QueueReceiver { queue: Arc::clone(queue), pending: JoinSet::new() }
    }

    /// Returns the messages of the pending receive, or of a new one. If this future is dropped, the
    /// receive continues.
    pub(super) async fn receive(
        &mut self,
        wait: Duration,
    ) -> Result<Vec<ReceivedMessage>, QueueError> {
        self.prefetch(wait);
        match self.pending.join_next().await {
            Some(Ok(received)) => received,
            Some(Err(error)) => Err(QueueError::Unavailable(error.to_string())),
            None => Ok(Vec::new()),
        }
    }

    /// Starts the next receive, unless one is pending.
    pub(super) fn prefetch(&mut self, wait: Duration) {
        if self.pending.is_empty() {
            let queue = Arc::clone(&self.queue);
            self.pending.spawn(async move { queue.receive(wait).await });
        }
    }

    /// Returns the messages of the pending receive to the queue. Messages that arrive after
    /// [`CLOSE_TIMEOUT`] reappear when their visibility timeout ends.
    pub(super) async fn close(mut self) {
        let Ok(Some(Ok(Ok(received)))) = timeout(CLOSE_TIMEOUT, self.pending.join_next()).await
        else {
            return;
        };
        let receipts: Vec<Receipt> = received.into_iter().map(|message| message.receipt).collect();
        let hidden =
            timeout(CLOSE_TIMEOUT, self.queue.change_visibility(&receipts, Duration::ZERO)).await;
        let hidden = hidden.unwrap_or_else(|late| Err(QueueError::Unavailable(late.to_string())));
        if let Err(error) = hidden {
            debug!(%error, "cannot return messages: they reappear after their visibility timeout");
        }
    }
}
