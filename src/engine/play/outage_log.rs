//! Logs outages at a limited rate.

use std::time::Duration;

use tracing::{info, warn};

use crate::model::backoff;

/// The failures of one service in a row. They are logged at growing intervals, not with every
/// attempt.
#[derive(Debug, Default)]
pub(crate) struct OutageLog {
    attempts: u32,
}

impl OutageLog {
    /// Records a failure. Returns the delay before the next attempt.
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
