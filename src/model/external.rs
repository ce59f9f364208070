//! A handler outside this process: how the engine calls it, and which answers it can give.

use std::time::Duration;

use anyhow::anyhow;
use async_trait::async_trait;

use crate::model::event::{Event, Position};
use crate::model::retry_later::RetryLater;

/// The most bytes of payload and metadata that are sent in one batch, unless one event has more.
pub(crate) const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;

/// How often a handler applies an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The handler's own transaction moves the projector's position.
    ExactlyOnce,
    /// We move the position after the handler has answered. The event's id is the idempotency key.
    AtLeastOnce,
}

impl Delivery {
    pub(crate) const ALL: [Delivery; 2] = [Delivery::ExactlyOnce, Delivery::AtLeastOnce];

    /// The delivery as projector files and the protocol have it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Delivery::ExactlyOnce => "exactly_once",
            Delivery::AtLeastOnce => "at_least_once",
        }
    }
}

/// The events that move a projector from one position to another, with the statement that moves it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExternalBatch<'a> {
    pub(crate) after: Position,
    pub(crate) through: Position,
    /// The first statement of the handler's transaction. `None` if we move the position ourselves.
    pub(crate) fence: Option<&'a str>,
    pub(crate) events: &'a [&'a Event],
}

/// The answer of a handler to a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The batch is committed.
    Done,
    /// The fence matched no row, and nothing was committed.
    NotMine,
    /// The handler failed, and nothing was committed.
    Failed(HandlerFailure),
}

/// An error that a handler reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HandlerFailure {
    pub(crate) message: String,
    /// The position of the failing event, if the handler knows it.
    pub(crate) event: Option<Position>,
    /// Set if the error is transient: the pause that the handler asks for.
    pub(crate) retry_after: Option<Duration>,
}

impl HandlerFailure {
    /// The handler's error. A transient one asks for a later retry.
    pub(crate) fn into_error(self) -> anyhow::Error {
        let text = match self.event {
            Some(event) => format!("the handler failed at event {event}: {}", self.message),
            None => format!("the handler failed: {}", self.message),
        };
        match self.retry_after {
            Some(pause) => RetryLater::new(text).after(pause).into(),
            None => anyhow!(text),
        }
    }
}

/// Why a handler did not answer.
#[derive(Debug)]
pub(crate) enum NoAnswer {
    /// An event cannot be sent, for instance because it cannot be decoded.
    Unsendable(anyhow::Error),
    /// The process cannot be started.
    NotStarted(anyhow::Error),
    /// The process ended, or wrote something that is not an answer. It does not run any more.
    Ended(anyhow::Error),
    /// The process took longer than its time limit. It was killed.
    TimedOut(Duration),
}

impl NoAnswer {
    /// The error. If the process cannot be started, it asks for a later retry: no event is the
    /// cause.
    pub(crate) fn into_error(self) -> anyhow::Error {
        match self {
            NoAnswer::NotStarted(error) => RetryLater::new(format!("{error:#}")).into(),
            NoAnswer::Unsendable(error) | NoAnswer::Ended(error) => error,
            NoAnswer::TimedOut(limit) => {
                anyhow!("the handler took longer than {} s", limit.as_secs_f32())
            }
        }
    }
}

/// A handler outside this process.
#[async_trait]
pub(crate) trait ExternalHandler: Send + Sync {
    fn delivery(&self) -> Delivery;

    /// Sends a batch and waits for the answer. The time limit does not include the wait for a
    /// process that is busy or is being started.
    async fn apply(
        &self,
        batch: ExternalBatch<'_>,
        time_limit: Duration,
    ) -> Result<Answer, NoAnswer>;

    /// Stops the process, if it runs. The next batch starts it again.
    async fn stop(&self);
}
