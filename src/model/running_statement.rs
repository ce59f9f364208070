//! The statement that a handler runs at the moment, for the error of a handler that is interrupted:
//! an interrupted handler cannot return where it was.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

tokio::task_local! {
    static RUNNING: RunningStatement;
}

/// The place of a statement: `FILE:LINE`. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct RunningStatement(Arc<Mutex<String>>);

impl RunningStatement {
    /// Runs a handler that records its statements here.
    pub(crate) fn observe<F: Future>(&self, handler: F) -> impl Future<Output = F::Output> {
        RUNNING.scope(self.clone(), handler)
    }

    /// The place of the statement that was begun last, if the handler recorded any.
    pub(crate) fn last(&self) -> Option<String> {
        let place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Some(place.clone()).filter(|place| !place.is_empty())
    }
}

/// Records that the handler of this task begins a statement. Does nothing outside
/// [`RunningStatement::observe`].
pub(crate) fn begin(place: &str) {
    let record = |running: &RunningStatement| {
        // Reuses the memory: this runs for each statement.
        place.clone_into(&mut running.0.lock().unwrap_or_else(PoisonError::into_inner));
    };
    let _ = RUNNING.try_with(record);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_last_statement_is_known_after_the_handler_was_interrupted() {
        let running = RunningStatement::default();
        let handler = async {
            begin("a.toml:5");
            begin("a.toml:8");
            std::future::pending::<()>().await;
        };
        let ended = tokio::time::timeout(Duration::from_secs(1), running.observe(handler)).await;
        assert!(ended.is_err());
        assert_eq!(running.last().as_deref(), Some("a.toml:8"));
        begin("outside");
        assert_eq!(running.last().as_deref(), Some("a.toml:8"));
    }
}
