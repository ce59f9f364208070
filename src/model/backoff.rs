//! How long to wait before trying again: bounded, growing, jittered.

use std::fmt::Display;
use std::future::Future;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::model::error::Transient;

const FIRST_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_secs(5);

/// The pause before attempt number `attempt` (the first retry is attempt 2). Full jitter: workers
/// that failed together do not come back together.
pub(crate) fn delay(attempt: u32) -> Duration {
    let ceiling = FIRST_DELAY.saturating_mul(1 << attempt.min(16)).min(MAX_DELAY);
    ceiling.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Whether a retry is worth a line in the log: the first few, and then about once in five minutes.
pub(crate) fn should_log(attempt: u32) -> bool {
    attempt <= 3 || attempt.is_multiple_of(60)
}

/// A duration as the log has it: in seconds, to the millisecond.
pub(crate) fn seconds(duration: Duration) -> f64 {
    duration.as_millis() as f64 / 1000.0
}

/// Tries again what fails only for the moment, until `retry_timeout` is over; `None`: for as long
/// as it takes. It must be harmless to repeat, even where it succeeded and nobody was told.
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
    let mut number = 1;
    loop {
        match attempt().await {
            Err(error)
                if error.is_transient()
                    && retry_timeout
                        .is_none_or(|retry_timeout| began.elapsed() < retry_timeout) =>
            {
                number += 1;
                if should_log(number) {
                    warn!(attempt = number, %error, "cannot {what} now, trying again");
                }
                tokio::time::sleep(delay(number)).await;
            }
            ended => return ended,
        }
    }
}
