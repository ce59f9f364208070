//! The error with which a handler asks for a later retry.

use std::time::Duration;

/// The error with which a handler says that it cannot apply its event now, and that this is not the
/// event's fault: a service that it calls does not answer, or refuses work for the moment.
///
/// The transaction is rolled back, and the event is tried again later. Until then the projector
/// stays at its position, and all other projectors continue. If the handler asks for retries of the
/// same event for longer than [`Limits::retry_later_limit`](crate::Limits::retry_later_limit), the
/// projector breaks.
///
/// The engine finds the error also as a cause of another error, for instance under
/// [`anyhow::Context`].
///
/// ```
/// use std::time::Duration;
///
/// use projectionist::{RetryLater, anyhow};
///
/// fn check_answer(status: u16) -> anyhow::Result<()> {
///     if status == 503 {
///         let later = RetryLater::new("the mail gateway answered 503");
///         return Err(later.after(Duration::from_secs(30)).into());
///     }
///     Ok(())
/// }
/// # assert!(check_answer(503).unwrap_err().is::<RetryLater>());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct RetryLater {
    reason: String,
    delay: Option<Duration>,
}

impl RetryLater {
    /// The longest delay that is respected. A longer one counts as this one.
    pub const MAX_DELAY: Duration = Duration::from_secs(3_600);

    /// Creates the error with a reason, which `status`, alerts and the log show.
    pub fn new(reason: impl Into<String>) -> Self {
        RetryLater { reason: reason.into(), delay: None }
    }

    /// Sets the delay before the next attempt, up to [`RetryLater::MAX_DELAY`]. Without this, the
    /// delay grows from attempt to attempt, from a second to half a minute.
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = Some(delay.min(Self::MAX_DELAY));
        self
    }

    /// The request for a retry in a handler's error: the error itself, its context or its cause.
    pub(crate) fn find(error: &anyhow::Error) -> Option<&RetryLater> {
        error.downcast_ref().or_else(|| error.chain().find_map(|cause| cause.downcast_ref()))
    }

    /// The reason.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The delay before the next attempt, if the handler named one.
    pub fn delay(&self) -> Option<Duration> {
        self.delay
    }
}
