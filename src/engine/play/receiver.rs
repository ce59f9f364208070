//! Where messages come in. The next receive is under way as early as the queue's order allows:
//! while messages are in work where there is none, and while they are deleted where there is one,
//! for then it is answered as soon as they are gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use crate::queue::{Queue, QueueError, Receipt, ReceivedMessage};

/// How long the end waits for the receive that is under way. A queue that has messages answers
/// within this time; a receive that waits longer for messages is broken off.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(1_500);

/// The receiving end of the queue.
pub(super) struct QueueReceiver {
    queue: Arc<dyn Queue>,
    /// The receive that is under way, if any. It is a task, so that its messages are not lost when
    /// the caller stops waiting for it.
    pending: JoinSet<Result<Vec<ReceivedMessage>, QueueError>>,
}

impl QueueReceiver {
    pub(super) fn new(queue: &Arc<dyn Queue>) -> Self {
        QueueReceiver { queue: Arc::clone(queue), pending: JoinSet::new() }
    }

    /// The next messages: those of the receive that is under way, or of a new one. When this future
    /// is dropped, the receive goes on.
    pub(super) async fn receive(
        &mut self,
        wait: Duration,
    ) -> Result<Vec<ReceivedMessage>, QueueError> {
        self.prefetch(wait);
        match self.pending.join_next().await {
            Some(Ok(received)) => received,
            Some(Err(error)) => Err(QueueError(error.to_string())),
            None => Ok(Vec::new()),
        }
    }

    /// Begins the next receive, unless it is under way.
    pub(super) fn prefetch(&mut self, wait: Duration) {
        if self.pending.is_empty() {
            let queue = Arc::clone(&self.queue);
            self.pending.spawn(async move { queue.receive(wait).await });
        }
    }

    /// Gives back the messages of the receive that is under way. Messages that the queue hands out
    /// after [`CLOSE_TIMEOUT`] come back by themselves.
    pub(super) async fn close(mut self) {
        let Ok(Some(Ok(Ok(received)))) = timeout(CLOSE_TIMEOUT, self.pending.join_next()).await
        else {
            return;
        };
        let receipts: Vec<Receipt> = received.into_iter().map(|message| message.receipt).collect();
        let hidden =
            timeout(CLOSE_TIMEOUT, self.queue.change_visibility(&receipts, Duration::ZERO)).await;
        let hidden = hidden.unwrap_or_else(|late| Err(QueueError(late.to_string())));
        if let Err(error) = hidden {
            debug!(%error, "messages were not returned, and come back by themselves");
        }
    }
}
