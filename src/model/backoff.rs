//! The wait between attempts: bounded, growing and jittered.
//!
//! Why ours: a retry also asks the error whether it is transient, and logs at intervals. The
//! backoff crates would replace the five lines of [`delay`].

use std::fmt::Display;
use std::future::Future;
use std::time::{Duration, Instant};

use tracing::warn;

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

/// Whether to log this attempt: the first three, then every 60th, which is about once in five
/// minutes.
pub(crate) fn should_log(attempt: u32) -> bool {
    attempt <= 3 || attempt.is_multiple_of(60)
}

/// When to log a condition that lasts: at once, and then at intervals that double, from five seconds
/// to five minutes.
#[derive(Debug, Clone)]
pub(crate) struct Reminder {
    next: Instant,
    interval: Duration,
}

impl Reminder {
    const FIRST_INTERVAL: Duration = Duration::from_secs(5);
    const MAX_INTERVAL: Duration = Duration::from_secs(300);

    /// The condition has begun now.
    pub(crate) fn new(now: Instant) -> Self {
        Reminder { next: now, interval: Self::FIRST_INTERVAL }
    }

    /// The condition has begun at `since`, and earlier processes have logged it.
    pub(crate) fn resumed(since: Instant, now: Instant) -> Self {
        let mut reminder = Reminder::new(since);
        while reminder.next <= now {
            reminder.is_due(reminder.next);
        }
        reminder
    }

    /// When the condition has to be logged next.
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// Whether the condition has to be logged now. If so, sets the time of the next line.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        if now < self.next {
            return false;
        }
        self.next = now + self.interval;
        self.interval = (self.interval * 2).min(Self::MAX_INTERVAL);
        true
    }
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
