//! The worker: the engine, the fan-out group and the reconciliation. Play and Lambda feed the
//! worker with messages from the queue.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::background::{BackgroundLimits, Stragglers};
use super::foreign::ForeignWatch;
use super::reconcile::{Reconciler, Undelivered};
use crate::database::Database;
use crate::engine::error::Error;
use crate::engine::retry::{Engine, Limits};
use crate::engine::stall_watch::StallWatch;
use crate::ledger::{Entry, LiveProjector};
use crate::model::backoff;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status};
use crate::model::metrics;
use crate::model::projector::ProjectorId;
use crate::model::registry::Registry;
use crate::model::wait_log::OutageLog;
use crate::queue::ForeignReason;

/// A receive that takes at least this long to commit is logged.
const SLOW_RECEIVE: Duration = Duration::from_secs(1);

/// Passes messages to the live projectors of a set, and repairs losses of the queue.
pub(crate) struct Worker {
    pub(crate) engine: Engine,
    pub(super) registry: Registry,
    /// The log's id at the last fan-out, to notice a change.
    pub(super) log_id: String,
    pub(super) foreign: ForeignWatch,
    pub(super) background_after: BackgroundLimits,
    /// How long a projector may stay at the same position below the mark. After that its messages
    /// count as lost.
    pub(super) reconcile_after: Duration,
    pub(super) reconciler: Reconciler,
    pub(super) stragglers: Stragglers,
    /// Shared with the relay of this process.
    pub(crate) watch: StallWatch,
    /// The projector of the fan-out group that is being processed.
    pub(super) in_progress: Option<ProjectorId>,
    /// Projectors that broke since the worker began.
    pub(super) broken: u64,
    /// Live projectors that were booted with a definition that differs from this worker's, as last
    /// logged.
    outdated: BTreeSet<ProjectorId>,
    outage_log: OutageLog,
    pub(super) reconcile_outage: OutageLog,
    pub(super) undelivered: Undelivered,
}

impl Worker {
    /// Reads the log's identity, and logs which projectors this worker plays.
    ///
    /// # Errors
    /// If the log or the ledger cannot be read. Transient errors are retried without limit.
    pub(crate) async fn new(
        database: &Database,
        registry: &Registry,
        limits: Limits,
        background_after: BackgroundLimits,
        reconcile_after: Duration,
    ) -> Result<Self, Error> {
        // Play must not give up on a projector, because it would delete messages that the projector
        // has not processed.
        let limits = Limits { retry_timeout: None, ..limits };
        let engine = Engine::new(database, limits, registry);
        let log_id = engine
            .retry_transient("read the marks of the log", || engine.store.marks())
            .await?
            .log
            .id;
        let worker = Worker {
            engine,
            registry: registry.clone(),
            log_id,
            foreign: ForeignWatch::default(),
            background_after,
            reconcile_after,
            reconciler: Reconciler::default(),
            stragglers: Stragglers::new(database),
            watch: StallWatch::default(),
            in_progress: None,
            broken: 0,
            outdated: BTreeSet::new(),
            outage_log: OutageLog::default(),
            reconcile_outage: OutageLog::default(),
            undelivered: Undelivered::default(),
        };
        worker.log_projectors().await?;
        Ok(worker)
    }

    /// Logs which projectors this worker plays and which it does not.
    async fn log_projectors(&self) -> Result<(), Error> {
        let (sessions, projectors) = (
            self.engine.database.max_handler_connections(),
            self.registry.dedicated_session_count(),
        );
        if projectors > sessions {
            warn!(
                projectors,
                sessions,
                "more projectors keep their own database session than there are connections for \
                 handlers: the rest open a new session for each batch. Raise --connections, or use \
                 SessionUse::Shared for projectors that leave nothing in a session"
            );
        }
        let entries =
            self.engine.retry_transient("read the ledger", || self.engine.ledger.entries()).await?;
        for projector in self.registry.iter() {
            match entries.iter().find(|entry| entry.id == projector.id) {
                None => {
                    warn!(
                        projector = %projector.id, status = "new",
                        "not booted, so it is not played: run boot"
                    )
                }
                // Logged when the live projectors are read.
                Some(entry)
                    if entry.status == Status::Live && !entry.matches_digest(&projector.digest) => {
                }
                Some(entry) if entry.status == Status::Live => {
                    if let Some(retrying) = &entry.retrying {
                        warn!(
                            projector = %entry.id, position = entry.position.next().get(),
                            attempts = retrying.attempts, error = retrying.reason,
                            "an earlier worker could not apply an event: the projector waits and \
                             tries again, and all others go on"
                        );
                    }
                    info!(
                        projector = %entry.id, status = %entry.status,
                        position = entry.position.get(), release = self.engine.release,
                        "playing"
                    );
                }
                Some(entry) if Stage::Boot.can_apply(&entry.status) => {
                    warn!(
                        projector = %entry.id, status = %entry.status,
                        "not live, so it is not played: run boot"
                    );
                }
                Some(entry) => info!(projector = %entry.id, status = %entry.status, "not played"),
            }
        }
        Ok(())
    }

    /// Fans messages out, and retries while the database is unavailable. Returns for each message
    /// why it is foreign. `None`: it belongs to this log, is processed, and may be deleted.
    pub(crate) async fn fan_out_with_retry(
        &mut self,
        bodies: &[String],
    ) -> Vec<Option<ForeignReason>> {
        let began = Instant::now();
        loop {
            match self.fan_out(bodies).await {
                Ok(verdicts) => {
                    self.outage_log.record_recovery("the database works again");
                    if verdicts.iter().any(Option::is_none) {
                        record_committed(bodies.len(), began.elapsed());
                    }
                    return verdicts;
                }
                Err(error) => {
                    let pause =
                        self.outage_log.record_failure("cannot fan out, trying again", &error);
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// The ledger rows of the projectors in the set.
    pub(crate) async fn entries(&self) -> Result<Vec<Entry>, sqlx::Error> {
        let mut entries = self.engine.ledger.entries().await?;
        entries.retain(|entry| self.registry.get(&entry.id).is_some());
        Ok(entries)
    }

    /// The live projectors that this worker plays, with their positions.
    pub(super) async fn live_positions(&self) -> Result<Vec<(ProjectorId, Position)>, sqlx::Error> {
        let live = self.engine.ledger.live_projectors().await?;
        Ok(live
            .into_iter()
            .filter(|live| self.plays(live))
            .map(|live| (live.id, live.position))
            .collect())
    }

    /// [`Worker::live_positions`]. Logs changes in which projectors are outdated.
    pub(super) async fn refresh_live(
        &mut self,
    ) -> Result<Vec<(ProjectorId, Position)>, sqlx::Error> {
        let live = self.engine.ledger.live_projectors().await?;
        self.select_played(live).await
    }

    /// Selects the live projectors that this worker plays. See [`Worker::refresh_live`]. Takes over
    /// the waits for later retries that the ledger shows.
    pub(super) async fn select_played(
        &mut self,
        live: Vec<LiveProjector>,
    ) -> Result<Vec<(ProjectorId, Position)>, sqlx::Error> {
        let (played, others): (Vec<LiveProjector>, Vec<LiveProjector>) =
            live.into_iter().partition(|live| self.plays(live));
        let is_known = |live: &LiveProjector| self.registry.get(&live.id).is_some();
        let outdated: BTreeSet<ProjectorId> =
            others.into_iter().filter(is_known).map(|live| live.id).collect();
        for id in outdated.difference(&self.outdated) {
            warn!(
                projector = %id, release = self.engine.release,
                "outdated: it was booted with a definition that differs from this worker's, so \
                 this worker does not play it. Deploy the release that was booted last, or boot \
                 this one"
            );
        }
        for id in self.outdated.difference(&outdated) {
            info!(projector = %id, release = self.engine.release, "no longer outdated");
        }
        self.outdated = outdated;
        Box::pin(self.engine.sync_retries(&played)).await?;
        Ok(played.into_iter().map(|live| (live.id, live.position)).collect())
    }

    /// Whether a live projector was booted with the definition that this worker has.
    fn plays(&self, live: &LiveProjector) -> bool {
        let projector = self.registry.get(&live.id);
        projector.is_some_and(|projector| {
            live.digest.as_ref().is_none_or(|booted| *booted == projector.digest)
        })
    }

    /// The live projectors that were booted with a definition that differs from this worker's. They
    /// are not played.
    pub(crate) fn outdated(&self) -> &BTreeSet<ProjectorId> {
        &self.outdated
    }

    /// The number of projectors that broke since the worker began, including those in the
    /// background.
    pub(crate) fn broken_count(&mut self) -> u64 {
        self.broken += self.stragglers.readmit();
        self.broken
    }
}

/// Records a receive that every live projector has processed, and logs it if it was slow.
fn record_committed(messages: usize, took: Duration) {
    metrics::record_receive_to_commit(took);
    if took >= SLOW_RECEIVE {
        info!(messages, seconds = backoff::seconds(took), "a slow receive");
    }
}
