//! Play: receives messages, fans them out and deletes them, until shutdown.

mod background;
mod deadline;
pub(crate) mod fan_out;
pub(crate) mod foreign;
mod foreign_receipts;
mod player;
mod receiver;
pub(crate) mod reconcile;
pub(crate) mod worker;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::debug;

use crate::database::Database;
use crate::engine::error::Error;
use crate::engine::relay::{Relay, RelaySettings};
use crate::engine::retry::Limits;
use crate::model::registry::Registry;
use crate::queue::Queue;
pub use background::BackgroundLimits;
pub(crate) use deadline::Deadline;
pub(crate) use foreign::check_queue;
use player::Player;
use receiver::QueueReceiver;
pub(crate) use worker::Worker;

/// How play works.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PlaySettings {
    /// The limits of the engine.
    pub limits: Limits,
    /// How the relay in this process works. `None`: the relay runs elsewhere.
    pub relay: Option<RelaySettings>,
    /// How long one receive waits for a message (at most 20 s).
    pub receive_wait: Duration,
    /// How long a projector may stay at the same position below the high-water mark while the queue
    /// is silent. After that its messages count as lost, and it is caught up from the store.
    pub reconcile_after: Duration,
    /// How long one projector may delay the others.
    pub background_after: BackgroundLimits,
    /// Whether to end once the queue and the log are idle and every live projector is at the
    /// high-water mark. A queue with only foreign messages counts as idle.
    pub until_idle: bool,
    /// How long the current batch may run after the shutdown. After that it is rolled back.
    pub grace_period: Duration,
}

impl PlaySettings {
    /// The defaults.
    pub fn new() -> Self {
        PlaySettings {
            limits: Limits::new(),
            relay: Some(RelaySettings::new()),
            receive_wait: Duration::from_secs(5),
            reconcile_after: Duration::from_secs(2),
            background_after: BackgroundLimits::new(),
            until_idle: false,
            grace_period: Duration::from_secs(10),
        }
    }

    /// Sets [`PlaySettings::limits`].
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets [`PlaySettings::relay`].
    pub fn with_relay(mut self, relay: Option<RelaySettings>) -> Self {
        self.relay = relay;
        self
    }

    /// Sets [`PlaySettings::receive_wait`].
    pub fn with_receive_wait(mut self, receive_wait: Duration) -> Self {
        self.receive_wait = receive_wait;
        self
    }

    /// Sets [`PlaySettings::reconcile_after`].
    pub fn with_reconcile_after(mut self, reconcile_after: Duration) -> Self {
        self.reconcile_after = reconcile_after;
        self
    }

    /// Sets [`PlaySettings::background_after`].
    pub fn with_background_after(mut self, background_after: BackgroundLimits) -> Self {
        self.background_after = background_after;
        self
    }

    /// Sets [`PlaySettings::until_idle`].
    pub fn with_until_idle(mut self, until_idle: bool) -> Self {
        self.until_idle = until_idle;
        self
    }

    /// Sets [`PlaySettings::grace_period`].
    pub fn with_grace_period(mut self, grace_period: Duration) -> Self {
        self.grace_period = grace_period;
        self
    }
}

impl Default for PlaySettings {
    fn default() -> Self {
        Self::new()
    }
}

/// The result of play.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlayReport {
    /// Messages that were received and deleted.
    pub messages: u64,
    /// Projectors that broke.
    pub broken: u64,
    /// Live projectors that were not played at the end, because they were booted with a definition
    /// that differs from this worker's.
    pub outdated: u64,
    /// Foreign messages: they do not belong to this log, and were neither applied nor deleted.
    pub foreign: u64,
}

/// Plays every live projector of a set until `shutdown`. Projectors that are booted, broken or
/// retired while it runs join or leave without a restart. A projector that was not booted is never
/// played.
///
/// While the database or the queue is unavailable, play waits and retries.
///
/// # Errors
/// If the log cannot be read at the start. With `until_idle`, also if the end of the log was lost.
pub async fn play(
    database: &Database,
    queue: Arc<dyn Queue>,
    registry: &Registry,
    settings: PlaySettings,
    shutdown: impl Future<Output = ()>,
) -> Result<PlayReport, Error> {
    let played = play_until(database, queue, registry, settings, shutdown).await;
    registry.stop_processes().await;
    played
}

async fn play_until(
    database: &Database,
    queue: Arc<dyn Queue>,
    registry: &Registry,
    settings: PlaySettings,
    shutdown: impl Future<Output = ()>,
) -> Result<PlayReport, Error> {
    let mut shutdown = pin!(shutdown);
    let worker = tokio::select! {
        biased;
        // Checked first, because the start waits while the database is unavailable.
        () = &mut shutdown => return Ok(PlayReport::default()),
        worker = start_worker(database, registry, &settings, queue.as_ref()) => worker?,
    };
    let mut player = Player::new(worker, queue, settings);

    let relay = player.settings.relay.map(|settings| {
        let (store, watch) = (player.worker.engine.store.clone(), player.worker.watch.clone());
        let mut relay = Relay::new(store, Arc::clone(&player.queue), settings, watch);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = relay.run() => {}
                _ = stopped => relay.release_lease().await,
            }
        });
        (stop, task)
    });
    let mut receiver = QueueReceiver::new(&player.queue);
    player.run(&mut receiver, shutdown).await;
    // The relay is stopped before messages are returned, so that another relay can take over early.
    let relay = relay.map(|(stop, task)| {
        let _ = stop.send(());
        task
    });
    receiver.close().await;
    player.return_all_foreign().await;
    let broken = player.worker.broken_count();
    let outdated = player.worker.outdated().len() as u64;
    if let Some(task) = relay {
        let _ = timeout(player.settings.grace_period, task).await;
    }
    match player.fault {
        Some(fault) => Err(Error::LogFault(fault.to_string())),
        None => Ok(PlayReport {
            messages: player.messages,
            broken,
            outdated,
            foreign: player.foreign_receipts.count(),
        }),
    }
}

async fn start_worker(
    database: &Database,
    registry: &Registry,
    settings: &PlaySettings,
    queue: &dyn Queue,
) -> Result<Worker, Error> {
    let background_after = settings.background_after;
    let mut worker = Worker::new(
        database,
        registry,
        settings.limits,
        background_after,
        settings.reconcile_after,
    )
    .await?;
    // Not retried: the log was just read, and this check only logs a warning.
    if let Err(error) = worker.check_queue(queue.identity()).await {
        debug!(%error, "cannot check whether the queue has changed");
    }
    Ok(worker)
}
