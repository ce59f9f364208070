//! How long to wait before trying again: bounded, growing, jittered.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_secs(5);

/// The pause before attempt number `attempt` (the first retry is attempt 2). Full jitter: workers that failed
/// together do not come back together.
pub(crate) fn delay(attempt: u32) -> Duration {
    let ceiling = FIRST.saturating_mul(1 << attempt.min(16)).min(LONGEST);
    ceiling.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Whether a retry is worth a line in the log: the first few, and then about once in five minutes.
pub(crate) fn worth_telling(attempt: u32) -> bool {
    attempt <= 3 || attempt.is_multiple_of(60)
}
