//! Play: receive, fan out, delete, until shutdown.

mod background;
mod deadline;
pub(crate) mod fan_out;
pub(crate) mod foreign;
mod foreign_receipts;
mod outage_log;
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
use crate::engine::relay::{Relay, RelaySettings};
use crate::engine::retry::Limits;
use crate::model::error::Error;
use crate::model::registry::Registry;
use crate::queue::Queue;
pub use background::BackgroundLimits;
pub(crate) use deadline::Deadline;
pub(crate) use foreign::check_queue;
pub(crate) use outage_log::OutageLog;
use player::Player;
use receiver::QueueReceiver;
pub(crate) use worker::Worker;

/// How play works.
#[derive(Debug, Clone)]
pub struct PlaySettings {
    /// The bounds of the engine.
    pub limits: Limits,
    /// How the relay works in this process; `None`: it runs elsewhere.
    pub relay: Option<RelaySettings>,
    /// How long one receive waits for a message (at most 20 s).
    pub receive_wait: Duration,
    /// A projector that stands still below the high-water mark for so long, while the queue is
    /// silent, is caught up from the store: the queue has lost what it waits for.
    pub reconcile_after: Duration,
    /// How long one projector may hold up the others.
    pub background_after: BackgroundLimits,
    /// Whether to end once queue and log are quiet and every live projector is at the high-water
    /// mark. A queue that holds only messages of others counts as quiet.
    pub until_idle: bool,
    /// How long the batch in hand may take to end after the shutdown; then it is rolled back.
    pub grace: Duration,
}

impl Default for PlaySettings {
    fn default() -> Self {
        PlaySettings {
            limits: Limits::default(),
            relay: Some(RelaySettings::default()),
            receive_wait: Duration::from_secs(5),
            reconcile_after: Duration::from_secs(2),
            background_after: BackgroundLimits::default(),
            until_idle: false,
            grace: Duration::from_secs(10),
        }
    }
}

/// What play did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlayReport {
    /// Messages that were taken from the queue and deleted.
    pub messages: u64,
    /// Projectors that broke meanwhile.
    pub broken: u64,
    /// Live projectors that were not played at the end: they were booted with another definition
    /// than this worker has.
    pub outdated: u64,
    /// Messages that are not of this log. They were neither applied nor deleted.
    pub foreign: u64,
}

/// Plays every live projector of a set, until `shutdown`. Projectors that are booted, broken or
/// retired meanwhile join or leave without a restart; one that was not booted is never played.
///
/// While database or queue are away it waits, and goes on by itself.
///
/// # Errors
/// If the log cannot be read at the start; or, where it is to end when all is quiet, if the log has
/// lost its end.
pub async fn play(
    database: &Database,
    queue: Arc<dyn Queue>,
    registry: &Registry,
    settings: PlaySettings,
    shutdown: impl Future<Output = ()>,
) -> Result<PlayReport, Error> {
    let mut shutdown = pin!(shutdown);
    let worker = tokio::select! {
        biased;
        // The database may be away, and is waited for.
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
    // Stopped first, so that another relay need not wait for what is given back.
    let relay = relay.map(|(stop, task)| {
        let _ = stop.send(());
        task
    });
    receiver.close().await;
    player.return_all_foreign().await;
    let broken = player.worker.broken_count();
    let outdated = player.worker.outdated().len() as u64;
    if let Some(task) = relay {
        let _ = timeout(player.settings.grace, task).await;
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
    // Not waited for: the log was just read, and this only tells of something.
    if let Err(error) = worker.check_queue(queue.identity()).await {
        debug!(%error, "cannot tell whether the queue has changed");
    }
    Ok(worker)
}
