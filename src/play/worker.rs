//! The worker: the engine, the convoy, and what is known of who stands still. Play feeds it from the queue, and so does Lambda.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::Quarrel;
use super::convoy::{ConvoyBudget, Stragglers};
use super::reconcile::Reconcile;
use crate::database::Database;
use crate::deliver::{Engine, Limits};
use crate::error::Error;
use crate::event::Position;
use crate::ledger::Entry;
use crate::lifecycle::{Stage, Status};
use crate::metrics;
use crate::projector::ProjectorId;
use crate::registry::Registry;
use crate::retry;

/// A receive that takes so long is worth a line in the log.
const SLOW: Duration = Duration::from_secs(1);

/// What passes messages to the live projectors of a set, and repairs what the queue loses.
pub(crate) struct Worker {
    pub(crate) engine: Engine,
    pub(super) registry: Registry,
    pub(super) log_id: String,
    pub(super) budget: ConvoyBudget,
    /// How long a projector may stand still below the mark before the queue has lost what it waits for.
    pub(super) reconcile_after: Duration,
    pub(super) reconcile: Reconcile,
    pub(super) stragglers: Stragglers,
    /// Whom the others in the convoy wait for.
    pub(super) led: Option<ProjectorId>,
    /// Projectors that broke since it began.
    pub(super) broken: u64,
    quarrel: Quarrel,
}

impl Worker {
    /// Reads which log it is, and says whom it plays, and whom not.
    ///
    /// # Errors
    /// If the log or the ledger cannot be read, for another reason than that the database is away: that is waited for.
    pub(crate) async fn new(
        database: &Database,
        registry: &Registry,
        limits: Limits,
        budget: ConvoyBudget,
        reconcile_after: Duration,
    ) -> Result<Self, Error> {
        // A worker that gave up on one projector would delete messages that it has not passed.
        let limits = Limits { patience: None, ..limits };
        let engine = Engine::new(database, limits, registry);
        let log_id = engine.persist("read the marks of the log", || engine.store.marks()).await?.log_id;
        let worker = Worker {
            engine,
            registry: registry.clone(),
            log_id,
            budget,
            reconcile_after,
            reconcile: Reconcile::default(),
            stragglers: Stragglers::new(database.handler_connections()),
            led: None,
            broken: 0,
            quarrel: Quarrel::default(),
        };
        worker.introduce().await?;
        Ok(worker)
    }

    /// Says whom it plays, and whom not.
    async fn introduce(&self) -> Result<(), Error> {
        let entries = self.engine.persist("read the ledger", || self.engine.ledger.entries()).await?;
        for projector in self.registry.iter() {
            match entries.iter().find(|entry| entry.id == projector.id) {
                None => warn!(projector = %projector.id, status = "new", "not booted, and so not played: run boot"),
                Some(entry) if entry.status == Status::Live => {
                    info!(
                        projector = %entry.id, status = %entry.status, position = entry.position.get(),
                        release = self.engine.release, "playing"
                    );
                }
                Some(entry) if Stage::Boot.plays(&entry.status) => {
                    warn!(projector = %entry.id, status = %entry.status, "not live, and so not played: run boot");
                }
                Some(entry) => info!(projector = %entry.id, status = %entry.status, "not played"),
            }
        }
        Ok(())
    }

    /// Fans messages out, again and again if the database is away, until each live projector is past them.
    pub(crate) async fn pass(&mut self, bodies: &[String]) {
        let began = Instant::now();
        loop {
            match self.fan_out(bodies).await {
                Ok(()) => {
                    self.quarrel.over("the database works again");
                    return note_committed(bodies.len(), began.elapsed());
                }
                Err(error) => {
                    let pause = self.quarrel.again("cannot fan out, trying again", &error);
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// What the ledger has of the projectors of the set.
    pub(crate) async fn entries(&self) -> Result<Vec<Entry>, sqlx::Error> {
        let mut entries = self.engine.ledger.entries().await?;
        entries.retain(|entry| self.registry.get(&entry.id).is_some());
        Ok(entries)
    }

    /// The live projectors of the set, and where they stand.
    pub(super) async fn live(&self) -> Result<Vec<(ProjectorId, Position)>, sqlx::Error> {
        let mut live = self.engine.ledger.live().await?;
        live.retain(|(id, _)| self.registry.get(id).is_some());
        Ok(live)
    }

    /// How many projectors broke since it began, outside the convoy as well.
    pub(crate) fn broken_so_far(&mut self) -> u64 {
        self.broken += self.stragglers.rejoin();
        self.broken
    }
}

/// Takes note of a receive that every live projector is past, and tells of one that was slow.
fn note_committed(messages: usize, took: Duration) {
    metrics::committed(took);
    if took >= SLOW {
        info!(messages, seconds = retry::seconds(took), "a slow receive");
    }
}
