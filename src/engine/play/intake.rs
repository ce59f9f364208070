//! Where messages come in. The next receive is under way as early as the queue's order allows: while messages are in work
//! where there is none, and while they are deleted where there is one, for then it is answered as soon as they are gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use crate::queue::{Queue, QueueError, Receipt, Received};

/// How long the end waits for the receive that is under way. A queue that has messages answers within this time; a
/// receive that waits longer for messages is broken off.
const ANSWERS_WITHIN: Duration = Duration::from_millis(1_500);

/// The receiving end of the queue.
pub(super) struct Intake {
    queue: Arc<dyn Queue>,
    /// The receive that is under way, if any. It is a task, so that its messages are not lost when the caller stops waiting
    /// for it.
    ahead: JoinSet<Result<Vec<Received>, QueueError>>,
}

impl Intake {
    pub(super) fn new(queue: &Arc<dyn Queue>) -> Self {
        Intake { queue: Arc::clone(queue), ahead: JoinSet::new() }
    }

    /// The next messages: those of the receive that is under way, or of a new one. When this future is dropped, the receive
    /// goes on.
    pub(super) async fn receive(&mut self, wait: Duration) -> Result<Vec<Received>, QueueError> {
        self.receive_ahead(wait);
        match self.ahead.join_next().await {
            Some(Ok(received)) => received,
            Some(Err(error)) => Err(QueueError(error.to_string())),
            None => Ok(Vec::new()),
        }
    }

    /// Begins the next receive, unless it is under way.
    pub(super) fn receive_ahead(&mut self, wait: Duration) {
        if self.ahead.is_empty() {
            let queue = Arc::clone(&self.queue);
            self.ahead.spawn(async move { queue.receive(wait).await });
        }
    }

    /// Gives back the messages of the receive that is under way. Messages that the queue hands out after [`ANSWERS_WITHIN`]
    /// come back by themselves.
    pub(super) async fn close(mut self) {
        let Ok(Some(Ok(Ok(received)))) = timeout(ANSWERS_WITHIN, self.ahead.join_next()).await else { return };
        let receipts: Vec<Receipt> = received.into_iter().map(|message| message.receipt).collect();
        let hidden = timeout(ANSWERS_WITHIN, self.queue.hide(&receipts, Duration::ZERO)).await;
        let hidden = hidden.unwrap_or_else(|late| Err(QueueError(late.to_string())));
        if let Err(error) = hidden {
            debug!(%error, "messages were not returned, and come back by themselves");
        }
    }
}
