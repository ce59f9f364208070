//! A transaction, as its client sees it. Dropped, it is rolled back by the server when that
//! notices.

use super::database::{OpenTransaction, Row, TransactionId};
use super::invariants::{self, Claim};
use super::occurrence::Occurrence;
use super::projectors;
use super::projectors::Release;
use super::statements::{DEFAULT_LOCK_WAIT_TIMEOUT, DatabaseError};
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
    /// It has committed a part of the batch by itself.
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

    /// Hands out so many positions in a row. They are this writer's from now on, row or no row.
    pub(super) async fn reserve(&self, positions: u64) -> Result<u64, DatabaseError> {
        self.sim.statement(Some(self.id)).await?;
        let mut world = self.sim.world();
        let first = world.database.counter + 1;
        world.database.counter += positions;
        world.trace(|| format!("reserves {first}..={}", first + positions - 1));
        Ok(first)
    }

    /// Inserts a row. One that is locked by others is waited for; a committed one is a collision.
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
        // A server that starts reads the counter from the table.
        world.database.counter = world.database.counter.max(position);
        world.database.insert_row(position, Row { event, owner: Some(own) });
        Ok(())
    }

    /// Refuses an event id that the log has. A writer that is still undecided about it is waited
    /// for.
    pub(super) async fn check_event_id(&self, event_id: &str) -> Result<(), DatabaseError> {
        let own = self.id;
        let of = |world: &super::world::World| {
            let rows = world.database.events.iter().flatten();
            rows.filter(|row| row.owner != Some(own))
                .find(|row| row.event.event_id() == event_id)
                .map(|row| row.owner)
        };
        self.sim
            .wait_until_unlocked(DEFAULT_LOCK_WAIT_TIMEOUT, |world| of(world).flatten())
            .await?;
        match of(&self.sim.world()) {
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
        self.sim.wait_until_unlocked(DEFAULT_LOCK_WAIT_TIMEOUT, holder).await?;
        let mut world = self.sim.world();
        if world.database.open.get(&own).is_none_or(|open| open.orphaned_until.is_some()) {
            return Err(DatabaseError::ConnectionLost);
        }
        let Some(row) = world.database.ledger_row_mut(projector_index) else { return Ok(None) };
        row.lock = Some(own);
        let entry = row.read();
        let mark = if entry.rebuild_reason.is_some() { ", to be rebuilt" } else { "" };
        world.trace(|| format!("locks {id}: {} at {}{mark}", entry.status, entry.position));
        if let Some(open) = world.database.open.get_mut(&own) {
            open.locked = Some(projector_index);
        }
        Ok(Some(entry))
    }

    /// Runs the handler of a projector, as a release has it, on what it wants. All of it is one
    /// step, unless it commits by itself: then others go first before that is noticed, if it ever
    /// is.
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
        // The rest is in another transaction. It fails, or the savepoint is missed; or the
        // connection is lost before that.
        if world.rng.bool() {
            world.record(Occurrence::ConnectionCut);
            world.trace(|| "loses its connection".into());
            return Err(HandlerError::Transient);
        }
        Err(HandlerError::PartiallyCommitted)
    }

    /// Whether the handler has committed a part of the batch.
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
                    _ => HandlerError::Own(format!("cannot take {position}")),
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

    /// Writes the locked row back; where events were applied, by which right.
    pub(super) async fn write(&mut self, entry: Entry) -> Result<(), DatabaseError> {
        self.sim.statement(Some(self.id)).await?;
        if let Some(open) = self.sim.world().database.open.get_mut(&self.id) {
            open.written = Some(entry);
        }
        Ok(())
    }

    /// Moves the locked row on.
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

    /// By what right events are applied; for the invariants, which look for themselves.
    pub(super) fn claim(&self, claim: Claim) {
        if let Some(open) = self.sim.world().database.open.get_mut(&self.id) {
            open.claim = Some(claim);
        }
    }

    /// Commits. The answer may be lost on its way, after the commit or instead of it.
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
            world.trace(|| "commits, and does not learn of it".into());
            world.commit(self.id);
        } else {
            world.record(Occurrence::CommitLost);
            world.trace(|| "asks for a commit, and is not heard".into());
            world.orphan(self.id);
        }
        Err(DatabaseError::ConnectionLost)
    }

    /// Rolls back at once. Dropping it does so a moment later.
    pub(super) fn roll_back(self) {
        self.sim.world().roll_back(self.id);
    }
}

/// Whether the handler of a projector fails at an event (position 0: at its setup), and how.
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
