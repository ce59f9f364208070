//! The wait between attempts: bounded, growing and jittered.
//!
//! Why ours: a retry also asks the error whether it is transient, and logs at intervals. The
//! backoff crates would replace the five lines of [`delay`].

use std::fmt::Display;
use std::future::Future;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::model::wait_log::Reminder;

const FIRST_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_secs(5);

/// An error that may be transient.
pub(crate) trait Transient {
    /// Whether a retry of the same operation may succeed.
    fn is_transient(&self) -> bool;
}

/// The pause before attempt `attempt`. The first retry is attempt 2. The jitter keeps workers that
/// failed together from retrying together.
pub(crate) fn delay(attempt: u32) -> Duration {
    let ceiling = FIRST_DELAY.saturating_mul(1 << attempt.min(16)).min(MAX_DELAY);
    ceiling.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// A duration for the log: in seconds, rounded down to the millisecond.
pub(crate) fn seconds(duration: Duration) -> f64 {
    duration.as_millis() as f64 / 1000.0
}

/// Runs `attempt` until it succeeds, fails with a permanent error, or fails after `retry_timeout`
/// is over. `None` means no limit. `attempt` must be harmless to repeat, also when an earlier run
/// succeeded and its answer was lost.
pub(crate) async fn retry_transient<T, E, F>(
    retry_timeout: Option<Duration>,
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> Result<T, E>
where
    E: Transient + Display,
    F: Future<Output = Result<T, E>>,
{
    let began = Instant::now();
    let mut reminder = Reminder::new(began);
    let mut number = 1;
    loop {
        match attempt().await {
            Err(error)
                if error.is_transient()
                    && retry_timeout
                        .is_none_or(|retry_timeout| began.elapsed() < retry_timeout) =>
            {
                number += 1;
                if reminder.is_due(Instant::now()) {
                    let seconds = began.elapsed().as_secs();
                    warn!(attempt = number, seconds, %error, "cannot {what} now, trying again");
                }
                tokio::time::sleep(delay(number)).await;
            }
            ended => {
                if ended.is_ok() && reminder.has_reminded() {
                    let seconds = began.elapsed().as_secs();
                    info!(attempts = number, seconds, "can {what} again");
                }
                return ended;
            }
        }
    }
}
