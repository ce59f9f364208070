//! What is away is logged once and then at intervals.

use std::time::Duration;

use tracing::{info, warn};

use crate::model::backoff;

/// Something that is away: told once and then at intervals, not with every attempt.
#[derive(Debug, Default)]
pub(crate) struct OutageLog {
    attempts: u32,
}

impl OutageLog {
    /// Notes another failure, and says how long to wait.
    pub(crate) fn record_failure(&mut self, what: &str, error: &dyn std::fmt::Display) -> Duration {
        self.attempts += 1;
        if backoff::should_log(self.attempts) {
            warn!(attempt = self.attempts, %error, "{what}");
        }
        backoff::delay(self.attempts + 4)
    }

    pub(crate) fn record_recovery(&mut self, what: &str) {
        if std::mem::take(&mut self.attempts) > 0 {
            info!("{what}");
        }
    }
}
