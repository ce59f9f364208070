//! What is away is logged once and then at intervals.

use std::time::Duration;

use tracing::{info, warn};

use crate::model::retry;

/// Something that is away: told once and then at intervals, not with every attempt.
#[derive(Debug, Default)]
pub(crate) struct Quarrel {
    attempts: u32,
}

impl Quarrel {
    /// Notes another failure, and says how long to wait.
    pub(crate) fn again(&mut self, what: &str, error: &dyn std::fmt::Display) -> Duration {
        self.attempts += 1;
        if retry::worth_telling(self.attempts) {
            warn!(attempt = self.attempts, %error, "{what}");
        }
        retry::delay(self.attempts + 4)
    }

    pub(crate) fn over(&mut self, what: &str) {
        if std::mem::take(&mut self.attempts) > 0 {
            info!("{what}");
        }
    }
}
