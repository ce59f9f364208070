//! A transaction as its client sees it. If it is dropped, the server rolls it back as soon as it
//! notices.

use super::database::{OpenTransaction, Row, TransactionId};
use super::invariants::{self, Claim};
use super::occurrence::Occurrence;
use super::projectors;
use super::projectors::Release;
use super::statements::{DatabaseError, LOCK_WAIT_TIMEOUT};
use super::world::{FailureKind, Sim, Tick};
use crate::ledger::Entry;
use crate::model::event::{Event, Position};
use crate::model::projector::ProjectorId;

pub(super) struct Transaction {
    sim: Sim,
    id: TransactionId,
}

/// Why a handler failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HandlerError {
    Own(String),
    Panic,
    Transient,
    /// The handler has committed a part of the batch.
    PartiallyCommitted,
}

impl Drop for Transaction {
    fn drop(&mut self) {
        self.sim.world().orphan(self.id);
    }
}

impl Transaction {
    pub(super) fn begin(sim: &Sim) -> Self {
        let mut world = sim.world();
        world.database.last_transaction += 1;
        let id = world.database.last_transaction;
        world.database.open.insert(id, OpenTransaction::default());
        drop(world);
        Transaction { sim: sim.clone(), id }
    }

    /// Reserves consecutive positions and returns the first. The positions stay reserved even if no
    /// row is inserted.
    pub(super) async fn reserve(&self, positions: u64) -> Result<u64, DatabaseError> {
        self.sim.statement(Some(self.id)).await?;
        let mut world = self.sim.world();
        let first = world.database.counter + 1;
        world.database.counter += positions;
        world.trace(|| format!("reserves {first}..={}", first + positions - 1));
        Ok(first)
    }

    /// Inserts a row. Waits if another transaction holds a row at this position, and fails if a
    /// committed row is there.
    pub(super) async fn insert(
        &mut self,
        event: Event,
        timeout: Tick,
    ) -> Result<(), DatabaseError> {
        self.sim.statement(Some(self.id)).await?;
        let (own, position) = (self.id, event.position().get());
        let holder = |world: &super::world::World| {
            world.database.row(position)?.owner.filter(|&owner| owner != own)
        };
        self.sim.wait_until_unlocked(timeout, holder).await?;
        let mut world = self.sim.world();
        if world.database.committed(position).is_some() {
            world.trace(|| format!("cannot insert {position}: 1062"));
            return Err(DatabaseError::PositionTaken);
        }
        let Some(open) =
            world.database.open.get_mut(&own).filter(|open| open.orphaned_until.is_none())
        else {
            return Err(DatabaseError::ConnectionLost);
        };
        open.inserted.push(position);
        world.trace(|| format!("inserts {position} ({})", event.event_type()));
        // After a restart, a server sets the counter to the last position in the table.
        world.database.counter = world.database.counter.max(position);
        world.database.insert_row(position, Row { event, owner: Some(own) });
        Ok(())
    }

    /// Fails if the log has this event id already. Waits for a transaction that has inserted it and
    /// is still open.
    pub(super) async fn check_event_id(&self, event_id: &str) -> Result<(), DatabaseError> {
        let own = self.id;
        let find_owner = |world: &super::world::World| {
            let rows = world.database.events.iter().flatten();
            rows.filter(|row| row.owner != Some(own))
                .find(|row| row.event.event_id() == event_id)
                .map(|row| row.owner)
        };
        self.sim
            .wait_until_unlocked(LOCK_WAIT_TIMEOUT, |world| find_owner(world).flatten())
            .await?;
        match find_owner(&self.sim.world()) {
            Some(_) => Err(DatabaseError::EventIdTaken),
            None => Ok(()),
        }
    }

    /// `select … for update` on the ledger row.
    pub(super) async fn lock(&mut self, id: &ProjectorId) -> Result<Option<Entry>, DatabaseError> {
        self.sim.statement(Some(self.id)).await?;
        let (own, projector_index) = (self.id, projectors::index_of(id));
        let holder = |world: &super::world::World| {
            world.database.ledger_row(projector_index)?.lock.filter(|&by| by != own)
        };
        self.sim.wait_until_unlocked(LOCK_WAIT_TIMEOUT, holder).await?;
        let mut world = self.sim.world();
        if world.database.open.get(&own).is_none_or(|open| open.orphaned_until.is_some()) {
            return Err(DatabaseError::ConnectionLost);
        }
        let Some(row) = world.database.ledger_row_mut(projector_index) else { return Ok(None) };
        row.lock = Some(own);
        let entry = row.read();
        let suffix = if entry.rebuild_reason.is_some() { ", must be rebuilt" } else { "" };
        world.trace(|| format!("locks {id}: {} at {}{suffix}", entry.status, entry.position));
        if let Some(open) = world.database.open.get_mut(&own) {
            open.locked = Some(projector_index);
        }
        Ok(Some(entry))
    }

    /// Runs the handler of a projector, as this release defines it, on the events that the
    /// projector subscribes to. This takes one step. If the handler commits, other processes run a
    /// step before the engine can notice the commit.
    pub(super) async fn handle(
        &mut self,
        id: &ProjectorId,
        release: Release,
        wanted: &[&Event],
    ) -> Result<(), HandlerError> {
        self.sim.statement(Some(self.id)).await.map_err(|_| HandlerError::Transient)?;
        if !self.run_handler(id, release, wanted)? {
            return Ok(());
        }
        self.sim.step().await;
        let mut world = self.sim.world();
        // After its commit, the rest of the handler runs in another transaction. Either the handler
        // fails or its savepoint is missing, or the connection is lost before that.
        if world.rng.bool() {
            world.record(Occurrence::ConnectionCut);
            world.trace(|| "loses its connection".into());
            return Err(HandlerError::Transient);
        }
        Err(HandlerError::PartiallyCommitted)
    }

    /// Applies the events. Returns `true` if the handler committed a part of the batch.
    fn run_handler(
        &mut self,
        id: &ProjectorId,
        release: Release,
        wanted: &[&Event],
    ) -> Result<bool, HandlerError> {
        let mut world = self.sim.world();
        let projector_index = projectors::index_of(id);
        let chance = world.chances.deadlock;
        if world.roll(chance) {
            world.record(Occurrence::Deadlock);
            return Err(HandlerError::Transient);
        }
        let chance = world.chances.handler_commits;
        let commits_after =
            if world.roll(chance) { Some(world.rng.usize(1..=wanted.len())) } else { None };
        let handled = &wanted[..commits_after.unwrap_or(wanted.len())];
        for event in handled {
            let position = event.position().get();
            invariants::before_handle(&mut world, event);
            if let Some(kind) = take_poison(&mut world, projector_index, position, release) {
                world.trace(|| format!("the handler of {id} fails at {position}: {kind:?}"));
                return Err(match kind {
                    FailureKind::Panic => HandlerError::Panic,
                    _ => HandlerError::Own(format!("cannot apply {position}")),
                });
            }
        }
        if let Some(open) = world.database.open.get_mut(&self.id) {
            open.applied.extend(handled.iter().map(|event| event.position().get()));
        }
        if commits_after.is_none() {
            return Ok(false);
        }
        world.record(Occurrence::HandlerCommitted);
        world.trace(|| {
            format!(
                "the handler of {id} commits after {} of {} events",
                handled.len(),
                wanted.len()
            )
        });
        world.commit_partially(self.id);
        Ok(true)
    }

    /// Writes back the locked row.
    pub(super) async fn write(&mut self, entry: Entry) -> Result<(), DatabaseError> {
        self.sim.statement(Some(self.id)).await?;
        if let Some(open) = self.sim.world().database.open.get_mut(&self.id) {
            open.written = Some(entry);
        }
        Ok(())
    }

    /// Moves the position of the locked row to `to`.
    pub(super) async fn advance(
        &mut self,
        entry: Entry,
        claim: Claim,
        to: Position,
    ) -> Result<(), DatabaseError> {
        self.write(Entry { position: to, ..entry }).await?;
        self.claim(claim);
        Ok(())
    }

    /// Records under which claim events are applied. Only the invariants use this, and they check
    /// it themselves.
    pub(super) fn claim(&self, claim: Claim) {
        if let Some(open) = self.sim.world().database.open.get_mut(&self.id) {
            open.claim = Some(claim);
        }
    }

    /// Commits. The acknowledgement may be lost, with or without the commit.
    pub(super) async fn commit(self) -> Result<(), DatabaseError> {
        self.sim.statement(Some(self.id)).await?;
        let mut world = self.sim.world();
        let chance = world.chances.lost_ack;
        if !world.roll(chance) {
            world.trace(|| "commits".into());
            world.commit(self.id);
            return Ok(());
        }
        if world.rng.bool() {
            world.record(Occurrence::AckLost);
            world.trace(|| "commits, but the acknowledgement is lost".into());
            world.commit(self.id);
        } else {
            world.record(Occurrence::CommitLost);
            world.trace(|| "sends a commit that is lost".into());
            world.orphan(self.id);
        }
        Err(DatabaseError::ConnectionLost)
    }

    /// Rolls back at once. A dropped transaction is rolled back later.
    pub(super) fn roll_back(self) {
        self.sim.world().roll_back(self.id);
    }
}

/// Returns how the handler of a projector fails at an event, if it fails there. Position 0 means
/// its setup. A failure that does not repeat is removed.
pub(super) fn take_poison(
    world: &mut super::world::World,
    projector_index: usize,
    position: u64,
    release: Release,
) -> Option<FailureKind> {
    let matches = |poison: &super::world::Poison| {
        poison.projector_index == projector_index
            && poison.position == position
            && poison.release.is_none_or(|only| only == release)
    };
    let index = world.poison.iter().position(matches)?;
    let kind = world.poison[index].kind;
    if kind == FailureKind::Flaky {
        world.poison.remove(index);
    }
    Some(kind)
}
