//! The statements of the engine, each atomic, each a step. They mirror the SQL of `store/` and `ledger.rs`.

use std::ops::RangeInclusive;

use super::cast;
use super::database::{LedgerRow, TransactionId};
use super::invariants;
use super::seen::Seen;
use super::transaction::Transaction;
use super::world::{Sim, Tick};
use crate::ledger::Entry;
use crate::model::event::{Event, Position, Recorded, TOMBSTONE};
use crate::model::lifecycle::{self, Status, Step};
use crate::model::projector::ProjectorId;
use crate::model::registry::Registered;
use crate::model::signature::{LogIdentity, SigningKey};
use crate::store::{Held, LogView, Marks, Page};

pub(super) const LOG_ID: &str = "log-1";

/// Which log it is, and its key.
pub(super) fn log() -> LogIdentity {
    LogIdentity { id: LOG_ID.into(), key: SigningKey::new(b"the log's own key") }
}

/// How long a statement waits for a lock (`innodb_lock_wait_timeout`); the fill waits for a second.
const LOCK_WAIT: Tick = 50;
pub(super) const IMPATIENT_LOCK_WAIT: Tick = 1;

/// Why a statement failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DatabaseError {
    /// The connection is gone, and the transaction with it, unless it was just committing.
    Lost,
    /// Error 1205.
    LockWait,
    /// Error 1062, on the primary key.
    PositionTaken,
    /// Error 1062, on `event_id`.
    EventIdTaken,
}

impl Sim {
    /// A statement is about to be carried out, in a transaction or by itself.
    pub(super) async fn statement(&self, transaction: Option<TransactionId>) -> Result<(), DatabaseError> {
        self.step().await;
        let mut world = self.world();
        let is_down = world.clock < world.database.down_until;
        let is_gone =
            transaction.is_some_and(|id| world.database.open.get(&id).is_none_or(|open| open.orphaned_until.is_some()));
        let chance = world.chances.cut;
        if is_down || is_gone || world.roll(chance) {
            world.saw(Seen::ConnectionCut);
            world.note(|| "loses its connection".into());
            if let Some(id) = transaction {
                world.orphan(id);
            }
            return Err(DatabaseError::Lost);
        }
        Ok(())
    }

    /// Waits until a row is not locked by others.
    pub(super) async fn until_free(
        &self,
        patience: Tick,
        holder: impl Fn(&super::world::World) -> Option<TransactionId>,
    ) -> Result<(), DatabaseError> {
        let until = self.now() + patience;
        loop {
            {
                let mut world = self.world();
                let Some(holder) = holder(&world) else { return Ok(()) };
                world.saw(Seen::LockWait);
                if world.database.open.get(&holder).is_some_and(|open| open.orphaned_until.is_some()) {
                    world.saw(Seen::OrphanHeldLock);
                }
                if world.clock >= until {
                    world.saw(Seen::LockWaitTimeout);
                    world.note(|| "waits for a lock for too long: 1205".into());
                    return Err(DatabaseError::LockWait);
                }
                world.note(|| format!("waits for a lock of transaction {holder}"));
            }
            self.release(until).await;
        }
    }

    pub(super) async fn marks(&self) -> Result<Marks, DatabaseError> {
        self.statement(None).await?;
        let world = self.world();
        let database = &world.database;
        Ok(Marks { high_water: database.high_water, published: database.published, log: log(), held: None })
    }

    /// The marks, and which events stand at these positions.
    pub(super) async fn view(&self, positions: &[Position]) -> Result<LogView, DatabaseError> {
        let marks = self.marks().await?;
        let world = self.world();
        let id =
            |position: &Position| Some((*position, world.database.committed(position.get())?.event_id().to_owned()));
        Ok(LogView { marks, event_ids: positions.iter().filter_map(id).collect() })
    }

    pub(super) async fn visible_above(&self, mark: Position, limit: usize) -> Result<Vec<u64>, DatabaseError> {
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

    pub(super) async fn raise(&self, mark: Position) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        world.note(|| format!("raises the mark to {mark}"));
        world.database.high_water = world.database.high_water.max(mark);
        Ok(())
    }

    /// `for share nowait` over a run of positions.
    pub(super) async fn is_locked(&self, run: &RangeInclusive<u64>) -> Result<bool, DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        let is_locked = run.clone().any(|position| world.database.row(position).is_some_and(|row| row.owner.is_some()));
        world.note(|| format!("probes {run:?}: {}", if is_locked { "locked" } else { "absent" }));
        Ok(is_locked)
    }

    /// `insert ignore` of tombstones, row by row, as the server does it.
    pub(super) async fn fill(&self, positions: &[u64]) -> Result<Option<Held>, DatabaseError> {
        let Some(&first) = positions.first() else { return Ok(None) };
        let mut transaction = self.begin();
        for &position in positions {
            match transaction.insert(tombstone(position), IMPATIENT_LOCK_WAIT).await {
                Ok(()) => self.saw(Seen::TombstoneFilled),
                Err(DatabaseError::PositionTaken) => self.saw(Seen::FillMetCommitted),
                Err(DatabaseError::LockWait) => {
                    self.saw(Seen::FillMetWriter);
                    transaction.roll_back();
                    return Ok(Some(Held::InFlight(Position::new(first))));
                }
                Err(error) => return Err(error),
            }
        }
        transaction.commit().await?;
        Ok(None)
    }

    /// The events of a page; `through` must not lie above the mark.
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
        let events = (after.get() + 1..=end.get()).filter_map(|position| database.committed(position).cloned());
        Ok(Page { events: events.collect(), after, through: end })
    }

    pub(super) async fn lease_relay(&self, holder: u64, ticks: Tick) -> Result<bool, DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        let clock = world.clock;
        let is_free = world.database.lease.is_none_or(|(by, until)| by == holder || until < clock);
        world.saw(if is_free { Seen::LeaseTaken } else { Seen::LeaseHeldElsewhere });
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
    /// `mark`: where the mark stood when this boot began; for the invariants.
    pub(super) async fn enter(
        &self,
        projector: &Registered,
        position: Position,
        mark: Position,
    ) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        let actor = cast::number(&projector.id);
        if world.database.ledger_row(actor).is_some() {
            return Ok(());
        }
        if world.forgotten[actor] {
            world.saw(Seen::BootedAnew);
        }
        world.note(|| format!("enters {} at {position}", projector.id));
        let (id, mode, side_effects) = (projector.id.clone(), projector.mode, projector.has_side_effects);
        let entry = Entry {
            id,
            mode,
            status: Status::Booting,
            position,
            side_effects,
            start_position: Some(position),
            digest: Some(projector.digest.clone()),
            event_types: None,
            owned_tables: None,
            rebuild_reason: None,
        };
        world.database.ledger.push(LedgerRow {
            actor,
            entry,
            lock: None,
            start: position,
            live_since: 0,
            defined_at: 0,
            folded: 0,
            half_applied: false,
        });
        invariants::after_enter(&mut world, actor, mark);
        Ok(())
    }

    /// Records the definition with which a projector is booted, over the one that was compared with.
    pub(super) async fn set_definition(
        &self,
        projector: &Registered,
        before: Option<&str>,
    ) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let actor = cast::number(&projector.id);
        self.until_free(LOCK_WAIT, |world| world.database.ledger_row(actor)?.lock).await?;
        let mut world = self.world();
        let clock = world.clock;
        if let Some(row) = world.database.ledger_row_mut(actor)
            && row.entry.digest.as_deref() == before
        {
            row.entry.digest = Some(projector.digest.clone());
            row.defined_at = clock;
            world.saw(Seen::Redefined);
            world.note(|| format!("records the definition of {}", projector.id));
        }
        Ok(())
    }

    /// A step of the lifecycle under the row's lock. `Err(None)`: there is no such step.
    pub(super) async fn ledger_step(
        &self,
        id: &ProjectorId,
        step: Step,
        still: impl Fn(&Entry) -> bool,
    ) -> Result<Option<Entry>, Option<DatabaseError>> {
        let mut transaction = self.begin();
        let Some(mut entry) = transaction.lock(id).await.map_err(Some)? else { return Ok(None) };
        if still(&entry) {
            entry.status = lifecycle::take(&entry.status, entry.mode, step).map_err(|_| None)?;
            if let Some(reason) = entry.status.failure().and_then(|failure| failure.rebuild.clone()) {
                entry.rebuild_reason = Some(reason);
            }
            transaction.write(entry.clone()).await.map_err(Some)?;
            transaction.commit().await.map_err(Some)?;
        }
        Ok(Some(entry))
    }

    /// Forgets why a read model must be rebuilt, as an operator may who has repaired it. Only a deliberate bug does this.
    pub(super) async fn accept(&self, id: &ProjectorId) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let actor = cast::number(id);
        self.until_free(LOCK_WAIT, |world| world.database.ledger_row(actor)?.lock).await?;
        if let Some(row) = self.world().database.ledger_row_mut(actor) {
            (row.entry.rebuild_reason, row.half_applied) = (None, false);
        }
        Ok(())
    }

    /// Forgets a projector that is retired; one that was booted anew meanwhile is left as it is.
    pub(super) async fn remove(&self, id: &ProjectorId) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let actor = cast::number(id);
        self.until_free(LOCK_WAIT, |world| world.database.ledger_row(actor)?.lock).await?;
        let mut world = self.world();
        world.note(|| format!("forgets {id}"));
        world.database.ledger.retain(|row| row.actor != actor || row.entry.status != Status::Retired);
        Ok(())
    }

    /// Drops a projector's tables.
    pub(super) async fn tear_down(&self, id: &ProjectorId) -> Result<(), DatabaseError> {
        self.statement(None).await?;
        let mut world = self.world();
        world.note(|| format!("tears down {id}"));
        world.database.read_models[cast::number(id)].clear();
        Ok(())
    }

    pub(super) fn begin(&self) -> Transaction {
        Transaction::begin(self)
    }
}

pub(super) const PATIENT_LOCK_WAIT: Tick = LOCK_WAIT;

fn tombstone(position: u64) -> Event {
    Event::from(Recorded {
        position: Position::new(position),
        event_id: format!("tombstone-{position}"),
        stream_id: format!("{TOMBSTONE}-{position}"),
        stream_version: position,
        event_type: TOMBSTONE.into(),
        recorded_at: time::OffsetDateTime::UNIX_EPOCH,
        payload: "{}".into(),
        metadata: None,
    })
}
