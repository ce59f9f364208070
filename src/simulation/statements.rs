//! The statements of the engine. Each one is atomic and takes one step. They mirror the SQL of
//! `store/` and `ledger/`.

use std::ops::RangeInclusive;

use super::database::{LedgerRow, TransactionId};
use super::invariants;
use super::occurrence::Occurrence;
use super::projectors;
use super::transaction::Transaction;
use super::world::{Sim, Tick};
use crate::ledger::Entry;
use crate::model::event::{Event, FILLER, Position, RecordedEvent};
use crate::model::lifecycle::{self, Status, Transition};
use crate::model::projector::ProjectorId;
use crate::model::registry::RegisteredProjector;
use crate::model::signature::{LogIdentity, SigningKey};
use crate::store::{Blocker, LogSnapshot, Marks, Page};

pub(super) const LOG_ID: &str = "log-1";

/// The identity of the simulated log, with its signing key.
pub(super) fn log() -> LogIdentity {
    LogIdentity { id: LOG_ID.into(), key: SigningKey::new(b"the log's own key") }
}

/// How long a statement waits for a lock (`innodb_lock_wait_timeout`).
pub(super) const LOCK_WAIT_TIMEOUT: Tick = 50;

/// How long a fill waits for a lock.
pub(super) const FILL_LOCK_WAIT_TIMEOUT: Tick = 1;

/// Why a statement failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DatabaseError {
    /// The connection is gone, and its transaction with it. If it was committing, the commit may
    /// have happened.
    ConnectionLost,
    /// Error 1205.
    LockWaitTimeout,
    /// Error 1062 on the primary key.
    PositionTaken,
    /// Error 1062 on `event_id`.
    EventIdTaken,
}

impl Sim {
    /// Takes the step before a statement, in a transaction or in autocommit mode. Fails if the
    /// database is down or the connection is lost.
    pub(super) async fn statement(
        &self,
        transaction: Option<TransactionId>,
    ) -> Result<(), DatabaseError> {
        self.step().await;
        let mut world = self.world();
        let is_down = world.clock < world.database.down_until;
        let is_gone = transaction.is_some_and(|id| {
            world.database.open.get(&id).is_none_or(|open| open.orphaned_until.is_some())
        });
        let chance = world.chances.connection_cut;
        if is_down || is_gone || world.roll(chance) {
            world.record(Occurrence::ConnectionCut);
            world.trace(|| "loses its connection".into());
            if let Some(id) = transaction {
                world.orphan(id);
            }
            return Err(DatabaseError::ConnectionLost);
        }
        Ok(())
    }

    /// Waits until no other transaction holds the lock of a row. `holder` returns the transaction
    /// that holds it.
    pub(super) async fn wait_until_unlocked(
        &self,
        timeout: Tick,
        holder: impl Fn(&super::world::World) -> Option<TransactionId>,
    ) -> Result<(), DatabaseError> {
        let until = self.now() + timeout;
        loop {
            {
                let mut world = self.world();
                let Some(holder) = holder(&world) else { return Ok(()) };
                world.record(Occurrence::LockWait);
                if world
                    .database
                    .open
                    .get(&holder)
                    .is_some_and(|open| open.orphaned_until.is_some())
                {
                    world.record(Occurrence::OrphanHeldLock);
                }
                if world.clock >= until {
                    world.record(Occurrence::LockWaitTimeout);
                    world.trace(|| "times out waiting for a lock: 1205".into());
                    return Err(DatabaseError::LockWaitTimeout);
                }
                world.trace(|| format!("waits for a lock of transaction {holder}"));
            }
            self.wait_for_release(until).await;
        }
    }

    pub(super) async fn marks(&self) -> Result<Marks, DatabaseError> {
        self.statement(None).await?;
        let world = self.world();
        let database = &world.database;
        Ok(Marks {
            high_water: database.high_water,
            published: database.published,
            log: log(),
            blocked: None,
        })
    }

    /// The marks, and the event ids at these positions.
    pub(super) async fn view(&self, positions: &[Position]) -> Result<LogSnapshot, DatabaseError> {
        let marks = self.marks().await?;
        let world = self.world();
        let id = |position: &Position| {
            Some((*position, world.database.committed(position.get())?.event_id().to_owned()))
        };
        Ok(LogSnapshot { marks, event_ids: positions.iter().filter_map(id).collect() })
    }

    pub(super) async fn visible_above(
        &self,
        mark: Position,
        limit: usize,
    ) -> Result<Vec<u64>, DatabaseError> {
        self.statement(None).await?;
        let world = self.world();
        let database = &world.database;
        let above = mark.get() + 1..=database.events.len() as u64;
        Ok(above.filter(|&position| database.committed(position).is_some()).take(limit).collect())
    }

    pub(super) async fn last_visible(&self) -> Result<Position, DatabaseError> {
        self.statement(None).await?;
        Ok(Position::new(self.world().database.last_visible()))
    }

    pub(super) async fn raise_mark(&self, mark: Position) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        world.trace(|| format!("raises the mark to {mark}"));
        world.database.high_water = world.database.high_water.max(mark);
        Ok(())
    }

    /// `for share nowait` over a run of positions.
    pub(super) async fn is_locked(&self, run: &RangeInclusive<u64>) -> Result<bool, DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        let is_locked = run
            .clone()
            .any(|position| world.database.row(position).is_some_and(|row| row.owner.is_some()));
        world.trace(|| format!("probes {run:?}: {}", if is_locked { "locked" } else { "absent" }));
        Ok(is_locked)
    }

    /// `insert ignore` of fillers, row by row as the server executes it.
    pub(super) async fn fill(&self, positions: &[u64]) -> Result<Option<Blocker>, DatabaseError> {
        let Some(&first) = positions.first() else { return Ok(None) };
        let mut transaction = self.begin();
        for &position in positions {
            match transaction.insert(filler(position), FILL_LOCK_WAIT_TIMEOUT).await {
                Ok(()) => self.record(Occurrence::FillerInserted),
                Err(DatabaseError::PositionTaken) => self.record(Occurrence::FillMetCommitted),
                Err(DatabaseError::LockWaitTimeout) => {
                    self.record(Occurrence::FillMetWriter);
                    transaction.roll_back();
                    return Ok(Some(Blocker::InFlight(Position::new(first))));
                }
                Err(error) => return Err(error),
            }
        }
        transaction.commit().await?;
        Ok(None)
    }

    /// Reads a page of events. `through` must be at or below the mark.
    pub(super) async fn read_after(
        &self,
        after: Position,
        through: Position,
        limit: u64,
    ) -> Result<Page, DatabaseError> {
        self.statement(None).await?;
        let end = through.min(Position::new(after.get() + limit));
        let world = self.world();
        let database = &world.database;
        let events = (after.get() + 1..=end.get())
            .filter_map(|position| database.committed(position).cloned());
        Ok(Page { events: events.collect(), after, through: end })
    }

    pub(super) async fn lease_relay(
        &self,
        holder: u64,
        ticks: Tick,
    ) -> Result<bool, DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        let clock = world.clock;
        let is_free = world.database.lease.is_none_or(|(by, until)| by == holder || until < clock);
        world.record(if is_free { Occurrence::LeaseTaken } else { Occurrence::LeaseHeldElsewhere });
        if is_free {
            world.database.lease = Some((holder, clock + ticks));
        }
        Ok(is_free)
    }

    pub(super) async fn set_published(&self, position: Position) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        world.database.published = world.database.published.max(position);
        Ok(())
    }

    pub(super) async fn entries(&self) -> Result<Vec<Entry>, DatabaseError> {
        self.statement(None).await?;
        Ok(self.world().database.ledger.iter().map(LedgerRow::read).collect())
    }

    /// `insert … on duplicate key update name = name`.
    ///
    /// `mark` is the high-water mark when this boot began, for the invariants.
    pub(super) async fn register(
        &self,
        projector: &RegisteredProjector,
        position: Position,
        mark: Position,
    ) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        let projector_index = projectors::index_of(&projector.id);
        if world.database.ledger_row(projector_index).is_some() {
            return Ok(());
        }
        if world.forgotten[projector_index] {
            world.record(Occurrence::BootedAgain);
        }
        world.trace(|| format!("registers {} at {position}", projector.id));
        let entry = Entry {
            id: projector.id.clone(),
            mode: projector.mode,
            status: Status::Booting,
            status_since: time::OffsetDateTime::UNIX_EPOCH,
            position,
            has_side_effects: projector.has_side_effects,
            start_position: Some(position),
            digest: Some(projector.digest.clone()),
            event_types: None,
            owned_tables: None,
            rebuild_reason: None,
            retrying: None,
        };
        world.database.ledger.push(LedgerRow {
            projector_index,
            entry,
            lock: None,
            start: position,
            live_since: 0,
            defined_at: 0,
            applied_count: 0,
            partially_applied: false,
        });
        invariants::after_register(&mut world, projector_index, mark);
        Ok(())
    }

    /// Records the definition with which a projector is booted, if the recorded digest is still
    /// `before`.
    pub(super) async fn set_definition(
        &self,
        projector: &RegisteredProjector,
        before: Option<&str>,
    ) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let projector_index = projectors::index_of(&projector.id);
        self.wait_until_unlocked(LOCK_WAIT_TIMEOUT, |world| {
            world.database.ledger_row(projector_index)?.lock
        })
        .await?;
        let mut world = self.world();
        let clock = world.clock;
        if let Some(row) = world.database.ledger_row_mut(projector_index)
            && row.entry.digest.as_deref() == before
        {
            row.entry.digest = Some(projector.digest.clone());
            row.defined_at = clock;
            world.record(Occurrence::Redefined);
            world.trace(|| format!("records the definition of {}", projector.id));
        }
        Ok(())
    }

    /// Applies a transition of the lifecycle under the row's lock, if `still` accepts the locked
    /// row. Returns `Err(None)` if the lifecycle has no such transition.
    pub(super) async fn ledger_transition(
        &self,
        id: &ProjectorId,
        transition: Transition,
        still: impl Fn(&Entry) -> bool,
    ) -> Result<Option<Entry>, Option<DatabaseError>> {
        let mut transaction = self.begin();
        let Some(mut entry) = transaction.lock(id).await.map_err(Some)? else { return Ok(None) };
        if still(&entry) {
            entry.status = lifecycle::apply_transition(&entry.status, entry.mode, transition)
                .map_err(|_| None)?;
            if let Some(reason) =
                entry.status.failure().and_then(|failure| failure.rebuild_reason.clone())
            {
                entry.rebuild_reason = Some(reason);
            }
            transaction.write(entry.clone()).await.map_err(Some)?;
            transaction.commit().await.map_err(Some)?;
        }
        Ok(Some(entry))
    }

    /// Clears the reason for a rebuild, as an operator may do after repairing the read model. Only
    /// a deliberate bug calls this.
    pub(super) async fn accept(&self, id: &ProjectorId) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let projector_index = projectors::index_of(id);
        self.wait_until_unlocked(LOCK_WAIT_TIMEOUT, |world| {
            world.database.ledger_row(projector_index)?.lock
        })
        .await?;
        if let Some(row) = self.world().database.ledger_row_mut(projector_index) {
            (row.entry.rebuild_reason, row.partially_applied) = (None, false);
        }
        Ok(())
    }

    /// Removes the ledger row of a retired projector. A projector that was booted anew meanwhile
    /// stays.
    pub(super) async fn remove(&self, id: &ProjectorId) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let projector_index = projectors::index_of(id);
        self.wait_until_unlocked(LOCK_WAIT_TIMEOUT, |world| {
            world.database.ledger_row(projector_index)?.lock
        })
        .await?;
        let mut world = self.world();
        world.trace(|| format!("removes {id} from the ledger"));
        world.database.ledger.retain(|row| {
            row.projector_index != projector_index || row.entry.status != Status::Retired
        });
        Ok(())
    }

    /// Drops a projector's tables.
    pub(super) async fn tear_down(&self, id: &ProjectorId) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        world.trace(|| format!("drops the tables of {id}"));
        world.database.read_models[projectors::index_of(id)].clear();
        Ok(())
    }

    pub(super) fn begin(&self) -> Transaction {
        Transaction::begin(self)
    }
}

fn filler(position: u64) -> Event {
    Event::from(RecordedEvent {
        position: Position::new(position),
        event_id: format!("filler-{position}"),
        stream_id: format!("{FILLER}-{position}"),
        stream_version: position,
        event_type: FILLER.into(),
        recorded_at: time::OffsetDateTime::UNIX_EPOCH,
        payload: "{}".into(),
        metadata: None,
    })
}
