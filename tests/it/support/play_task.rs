//! A worker in this process that plays beside the test, until the test stops it.

use std::sync::Arc;
use std::time::Duration;

use projectionist::{Error, PlayReport, PlaySettings, Queue, Registry, play};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{TIMEOUT, World};

/// A worker that plays. Dropped, it stops, too.
pub struct PlayTask {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<PlayReport, Error>>,
}

impl World {
    /// Plays beside the test, from the real queue.
    pub fn start_play(&self, registry: &Registry) -> PlayTask {
        self.start_play_from(
            Arc::clone(&self.queue) as Arc<dyn Queue>,
            registry,
            Self::continuous_play_settings(),
        )
    }

    /// Plays beside the test, from the given queue.
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

    /// Settings of a worker that looks again and again, and never becomes idle.
    pub fn continuous_play_settings() -> PlaySettings {
        PlaySettings {
            until_idle: false,
            receive_wait: Duration::ZERO,
            reconcile_after: Duration::from_millis(500),
            ..Self::play_settings()
        }
    }
}

impl PlayTask {
    /// Whether it plays still: no test stops it by this.
    pub fn is_running(&self) -> bool {
        !self.task.is_finished()
    }

    /// Stops it, as SIGTERM would.
    pub async fn stop(self) -> PlayReport {
        let _ = self.stop.send(());
        let ended = timeout(TIMEOUT, self.task).await.expect("play ends in time");
        ended.expect("play does not panic").expect("play comes to an end")
    }
}
