//! The mirror of `boot.rs` and `handoff.rs`: enter, set up, rounds of catch-up, hand over.

use std::cell::Cell;

use super::Ended;
use super::engine::Engine;
use super::high_water::raise_high_water;
use crate::boot::{MOST_ROUNDS_FOR_FRESHNESS, first_position};
use crate::catch_up::{Cursor, CursorState};
use crate::deliver::Delivered;
use crate::event::Position;
use crate::handoff::{has_reached, oldest_queued};
use crate::ledger::Entry;
use crate::lifecycle::{Stage, Status, Step};
use crate::projector::{Mode, ProjectorId};
use crate::registry::{Registered, Registry};
use crate::simulation::bug::Bug;
use crate::simulation::cast;
use crate::simulation::cast::Release;
use crate::simulation::seen::Seen;
use crate::simulation::statements::DatabaseError;
use crate::simulation::transaction::failing;
use crate::simulation::world::{Sim, Tick};

const PATIENCE: Tick = 200;

struct Boot {
    engine: Engine,
    /// Where the mark stood when it began: no from_now projector begins below.
    began_at: Position,
}

/// Boots a release.
pub(in crate::simulation) async fn boot(sim: Sim, release: Release, registry: Registry) -> Ended {
    let (batch, began_at) = {
        let mut world = sim.world();
        (world.rng.u64(1..=5), world.database.high_water)
    };
    let boot =
        Boot { engine: Engine { sim: sim.clone(), registry, release, batch, patience: Some(PATIENCE) }, began_at };
    let ended = boot.run().await;
    sim.note(|| format!("ends: {ended:?}"));
    match ended {
        Ok(released) => Ended::Booted { released },
        Err(_) => {
            sim.saw(Seen::GaveUp);
            Ended::Done
        }
    }
}

impl Boot {
    /// Whether the release may go on.
    async fn run(&self) -> Result<bool, DatabaseError> {
        let sim = &self.engine.sim;
        let before = sim.entries().await?;
        let mut cursors = self.enter(&before).await?;
        if self.set_up(&mut cursors).await {
            self.replay(&mut cursors).await?;
        }
        if cursors.iter().any(|cursor| matches!(cursor.state, CursorState::Broke)) {
            self.stall(&cursors).await?;
        }
        if cursors.iter().any(|cursor| matches!(cursor.state, CursorState::GaveUp(_))) {
            return Err(DatabaseError::Lost);
        }
        let after = sim.entries().await?;
        let is_done = |entry: &Entry| matches!(entry.status, Status::Live | Status::Finished | Status::Retired);
        Ok(after.iter().filter(|entry| self.engine.registry.get(&entry.id).is_some()).all(is_done))
    }

    async fn enter(&self, before: &[Entry]) -> Result<Vec<Cursor>, DatabaseError> {
        let sim = &self.engine.sim;
        let known = |id: &ProjectorId| before.iter().any(|entry| entry.id == *id);
        let new: Vec<_> = self.engine.registry.iter().filter(|projector| !known(&projector.id)).collect();
        if !new.is_empty() {
            let high_water = raise_high_water(sim).await?.mark;
            for projector in new {
                let position = match projector.mode {
                    Mode::FromNow if sim.has(Bug::FromNowAtZero) => Position::START,
                    Mode::FromNow if sim.has(Bug::FromNowAtLastVisible) => sim.last_visible().await?,
                    mode => first_position(mode, high_water),
                };
                self.engine.sim.enter(projector, position, self.began_at).await?;
            }
        }
        let mut cursors = Vec::new();
        for entry in sim.entries().await? {
            let Some(projector) = self.engine.registry.get(&entry.id) else { continue };
            if Stage::Boot.plays(&entry.status) {
                cursors.push(Cursor::new(projector, entry.position));
                if before.contains(&entry) {
                    sim.saw(Seen::BootRepeated);
                }
            } else if entry.status == Status::Retired && sim.has(Bug::BootsTheRetired) {
                self.revive(&entry).await?;
                cursors.push(Cursor::new(projector, entry.position));
            }
        }
        Ok(cursors)
    }

    /// Only a deliberate bug does this.
    async fn revive(&self, entry: &Entry) -> Result<(), DatabaseError> {
        let mut transaction = self.engine.sim.begin();
        let Some(entry) = transaction.lock(&entry.id).await? else { return Ok(()) };
        transaction.write(Entry { status: Status::Booting, ..entry }).await?;
        transaction.commit().await
    }

    async fn set_up(&self, cursors: &mut [Cursor]) -> bool {
        let sim = &self.engine.sim;
        for cursor in cursors {
            let delivered = match sim.statement(None).await {
                Err(_) => Delivered::GaveUp("transient".into()),
                Ok(()) => {
                    let actor = cast::number(&cursor.projector.id);
                    if failing(&mut sim.world(), actor, 0, self.engine.release).is_none() {
                        continue;
                    }
                    sim.saw(Seen::BrokeAtSetup);
                    self.engine.break_at(&cursor.projector, Stage::Boot, None, "setup failed").await
                }
            };
            cursor.note(delivered);
            return false;
        }
        true
    }

    async fn replay(&self, cursors: &mut [Cursor]) -> Result<(), DatabaseError> {
        let sim = &self.engine.sim;
        let is_first = !sim.entries().await?.iter().any(|entry| entry.status == Status::Live);
        for round in 1.. {
            let Some(start) = cursors.iter().filter(|cursor| cursor.is_running()).map(|cursor| cursor.position).min()
            else {
                return Ok(());
            };
            let target = raise_high_water(sim).await?.mark;
            self.engine.catch_up(Stage::Boot, cursors, target).await?;
            if cursors.iter().any(|cursor| !matches!(cursor.state, CursorState::Running | CursorState::Left)) {
                return Ok(());
            }
            let was_short = target.since(start) <= self.engine.batch;
            if was_short || round >= MOST_ROUNDS_FOR_FRESHNESS {
                self.release(cursors, target, is_first).await?;
            }
        }
        Ok(())
    }

    async fn release(&self, cursors: &mut [Cursor], target: Position, is_first: bool) -> Result<(), DatabaseError> {
        let sim = &self.engine.sim;
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running()) {
            let projector = &cursor.projector;
            let row = match projector.mode {
                Mode::Once if !sim.has(Bug::OnceGoesLive) => self.finish(projector, target).await?,
                _ => {
                    let oldest = oldest_queued(&self.engine.registry, &sim.entries().await?, target);
                    self.hand_over(projector, oldest, target).await?
                }
            };
            let is_lost = row.as_ref().is_none_or(|row| row.status == Status::Retired);
            if is_lost {
                sim.saw(Seen::LetGo);
            }
            if !(is_lost && sim.has(Bug::BootNeverLetsGo)) {
                cursor.note_row(row.as_ref());
            }
            if cursor.is_running() {
                sim.saw(Seen::NotYetThere);
            }
        }
        if is_first && cursors.iter().any(|cursor| cursor.projector.mode != Mode::Once) {
            sim.set_published(target).await?;
        }
        Ok(())
    }

    async fn hand_over(
        &self,
        projector: &Registered,
        oldest_queued: Position,
        target: Position,
    ) -> Result<Option<Entry>, DatabaseError> {
        let sim = &self.engine.sim;
        if sim.has(Bug::MovesAtGoLive) || sim.has(Bug::GoesLiveWithoutLock) || sim.has(Bug::OnceGoesLive) {
            return self.hand_over_wrongly(projector, target).await;
        }
        let was_broken = Cell::new(false);
        let still = |entry: &Entry| {
            was_broken.set(entry.status.failure().is_some());
            has_reached(entry, oldest_queued)
        };
        let row = step(sim.ledger_step(&projector.id, Step::HandOver, still).await)?;
        if row.as_ref().is_some_and(|row| row.status == Status::Live) {
            sim.note(|| format!("{} is live", projector.id));
            sim.saw(Seen::HandedOver);
            if was_broken.get() {
                sim.saw(Seen::HandedOverFromBroken);
            }
            if sim.world().is_played_by_another(self.engine.release) {
                sim.saw(Seen::HandedOverBesideOldRelease);
            }
        }
        Ok(row)
    }

    /// Only deliberate bugs do this.
    async fn hand_over_wrongly(
        &self,
        projector: &Registered,
        target: Position,
    ) -> Result<Option<Entry>, DatabaseError> {
        let sim = &self.engine.sim;
        let Some(read) = sim.entries().await?.into_iter().find(|entry| entry.id == projector.id) else {
            return Ok(None);
        };
        if !Stage::Boot.plays(&read.status) {
            return Ok(Some(read));
        }
        let mut transaction = sim.begin();
        let Some(locked) = transaction.lock(&projector.id).await? else { return Ok(None) };
        let entry = match () {
            () if sim.has(Bug::GoesLiveWithoutLock) => Entry { status: Status::Live, ..read },
            () if sim.has(Bug::MovesAtGoLive) && Stage::Boot.plays(&locked.status) => {
                let mark = sim.world().database.high_water.max(target);
                Entry { status: Status::Live, position: mark, ..locked }
            }
            () if Stage::Boot.plays(&locked.status) => Entry { status: Status::Live, ..locked },
            () => return Ok(Some(locked)),
        };
        transaction.write(entry.clone()).await?;
        transaction.commit().await?;
        Ok(Some(entry))
    }

    async fn finish(&self, projector: &Registered, target: Position) -> Result<Option<Entry>, DatabaseError> {
        let sim = &self.engine.sim;
        let still = |entry: &Entry| has_reached(entry, target);
        let row = step(sim.ledger_step(&projector.id, Step::Finish, still).await)?;
        if row.as_ref().is_some_and(|row| row.status == Status::Finished) {
            sim.note(|| format!("{} is finished", projector.id));
            sim.saw(Seen::Finished);
        }
        Ok(row)
    }

    async fn stall(&self, cursors: &[Cursor]) -> Result<(), DatabaseError> {
        let sim = &self.engine.sim;
        for cursor in cursors.iter().filter(|cursor| cursor.is_running()) {
            let still = |entry: &Entry| matches!(entry.status, Status::Booting | Status::Stalled);
            step(sim.ledger_step(&cursor.projector.id, Step::Stall, still).await)?;
            sim.saw(Seen::Stalled);
        }
        Ok(())
    }
}

/// A step that the lifecycle does not have would end the boot, as an error of the database does.
fn step(taken: Result<Option<Entry>, Option<DatabaseError>>) -> Result<Option<Entry>, DatabaseError> {
    taken.map_err(|error| error.unwrap_or(DatabaseError::Lost))
}
