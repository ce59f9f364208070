//! A worker in the test's process that plays in the background until the test stops it.

use std::sync::Arc;
use std::time::Duration;

use projectionist::{Error, PlayReport, PlaySettings, Queue, Registry, play};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{TIMEOUT, World};

/// A running worker. Dropping it stops it.
pub struct PlayTask {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<PlayReport, Error>>,
}

impl World {
    /// Plays in the background from the real queue.
    pub fn start_play(&self, registry: &Registry) -> PlayTask {
        self.start_play_from(
            Arc::clone(&self.queue) as Arc<dyn Queue>,
            registry,
            Self::continuous_play_settings(),
        )
    }

    /// Plays in the background from the given queue.
    pub fn start_play_from(
        &self,
        queue: Arc<dyn Queue>,
        registry: &Registry,
        settings: PlaySettings,
    ) -> PlayTask {
        let (stop, stopped) = oneshot::channel();
        let (database, registry) = (self.database.clone(), registry.clone());
        let task = tokio::spawn(async move {
            let stopped = async { _ = stopped.await };
            play(&database, queue, &registry, settings, stopped).await
        });
        PlayTask { stop, task }
    }

    /// Settings for a worker that polls often and never stops when idle.
    pub fn continuous_play_settings() -> PlaySettings {
        Self::play_settings()
            .with_until_idle(false)
            .with_receive_wait(Duration::ZERO)
            .with_reconcile_after(Duration::from_millis(500))
    }
}

impl PlayTask {
    /// Whether the worker is still running.
    pub fn is_running(&self) -> bool {
        !self.task.is_finished()
    }

    /// Stops the worker, as SIGTERM would.
    pub async fn stop(self) -> PlayReport {
        let _ = self.stop.send(());
        let ended = timeout(TIMEOUT, self.task).await.expect("play ends in time");
        ended.expect("play does not panic").expect("play succeeds")
    }
}
