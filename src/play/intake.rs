//! Where messages come in. The next receive is under way as early as the queue's order allows: while messages are in work
//! where there is none, and while they are deleted where there is one, for then it is answered as soon as they are gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::debug;

use crate::queue::{Queue, QueueError, Receipt, Received};

/// What a queue takes to answer that has messages. One that has none waits for some.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// The receiving end of the queue.
pub(super) struct Intake {
    queue: Arc<dyn Queue>,
    ahead: Option<JoinHandle<Result<Vec<Received>, QueueError>>>,
}

impl Intake {
    pub(super) fn new(queue: &Arc<dyn Queue>) -> Self {
        Intake { queue: Arc::clone(queue), ahead: None }
    }

    /// The next messages: those of the receive that is under way, or of another one. Nothing is lost where it is dropped.
    pub(super) async fn receive(&mut self, wait: Duration) -> Result<Vec<Received>, QueueError> {
        let Some(ahead) = &mut self.ahead else { return self.queue.receive(wait).await };
        let received = ahead.await;
        self.ahead = None;
        received.unwrap_or_else(|error| Err(QueueError(error.to_string())))
    }

    /// Begins the next receive, unless it is under way.
    pub(super) fn receive_ahead(&mut self, wait: Duration) {
        if self.ahead.is_none() {
            let queue = Arc::clone(&self.queue);
            self.ahead = Some(tokio::spawn(async move { queue.receive(wait).await }));
        }
    }

    /// Gives back what was received and is not in work. Messages that a receive under way takes after this come back by
    /// themselves.
    pub(super) async fn close(mut self) {
        let Some(mut ahead) = self.ahead.take() else { return };
        let Ok(received) = timeout(ANSWERS_WITHIN, &mut ahead).await else { return ahead.abort() };
        let Ok(Ok(received)) = received else { return };
        let receipts: Vec<Receipt> = received.into_iter().map(|message| message.receipt).collect();
        if let Err(error) = self.queue.hide(&receipts, Duration::ZERO).await {
            debug!(%error, "messages were not returned, and come back by themselves");
        }
    }
}
