//! The mirror of `boot.rs` and `handoff.rs`: enter, set up, rounds of catch-up, hand over.

use std::cell::Cell;

use super::Ended;
use super::engine::Engine;
use super::high_water::raise_high_water;
use crate::engine::boot::{MOST_ROUNDS_FOR_FRESHNESS, first_position};
use crate::engine::catch_up::{Cursor, CursorState};
use crate::engine::deliver::Delivered;
use crate::engine::handoff::{has_reached, oldest_queued};
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status, Step};
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::{Registered, Registry};
use crate::simulation::bug::Bug;
use crate::simulation::cast;
use crate::simulation::cast::Release;
use crate::simulation::invariants;
use crate::simulation::seen::Seen;
use crate::simulation::statements::DatabaseError;
use crate::simulation::transaction::failing;
use crate::simulation::world::{Sim, Tick};

const PATIENCE: Tick = 200;

/// That of a hasty operator.
const LITTLE_PATIENCE: Tick = 20;

/// How often boot looks whether the mark has risen to its target.
const LOOK_EVERY: Tick = 3;

struct Boot {
    engine: Engine,
    /// Where the mark stood when it began: no from_now projector begins below.
    began_at: Position,
    /// What was visible when it began, as the onlooker saw it.
    was_visible: Position,
    /// Where it has to come.
    target: Position,
    /// Whether a projector failed that was not broken when it began.
    is_stopped: bool,
    /// Whether there is a reason that the ledger does not say why the release may not go on.
    is_refused: bool,
    /// Since when it has waited for the mark.
    waiting: Option<(Position, Tick)>,
}

/// Boots a release.
pub(in crate::simulation) async fn boot(sim: Sim, release: Release, registry: Registry) -> Ended {
    let (batch, began_at, was_visible, patience) = {
        let mut world = sim.world();
        let patience = if world.is_closing || world.rng.bool() { PATIENCE } else { LITTLE_PATIENCE };
        (world.rng.u64(1..=5), world.database.high_water, Position::new(world.database.last_visible()), patience)
    };
    let mut boot = Boot {
        engine: Engine { sim: sim.clone(), registry, release, batch, patience: Some(patience) },
        began_at,
        was_visible,
        target: Position::START,
        is_stopped: false,
        is_refused: false,
        waiting: None,
    };
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
    async fn run(&mut self) -> Result<bool, DatabaseError> {
        let sim = self.engine.sim.clone();
        let mark = sim.marks().await?.high_water;
        self.target = if sim.has(Bug::TargetIsTheMark) { mark } else { sim.last_visible().await? };
        let before = sim.entries().await?;
        if self.may_enter(&before).await? {
            let mut cursors = self.admit(&before).await?;
            self.replay(&mut cursors).await?;
            if cursors.iter().any(|cursor| matches!(cursor.state, CursorState::GaveUp(_))) {
                return Err(DatabaseError::Lost);
            }
        }
        let after = sim.entries().await?;
        let is_done = |entry: &Entry| match entry.status {
            Status::Live | Status::Finished => entry.rebuild_reason.is_none(),
            Status::Retired => true,
            Status::Booting | Status::Stalled | Status::Broken(_) => false,
        };
        let entry = |id: &ProjectorId| after.iter().find(|entry| entry.id == *id);
        let all_done = self.engine.registry.iter().all(|projector| entry(&projector.id).is_some_and(is_done));
        let released = all_done && !self.is_refused;
        if released {
            for entry in after.iter().filter(|entry| matches!(entry.status, Status::Live | Status::Finished)) {
                let Some(projector) = self.engine.registry.get(&entry.id) else { continue };
                self.record_definition(projector, entry).await?;
            }
        }
        Ok(released)
    }

    async fn record_definition(&self, projector: &Registered, entry: &Entry) -> Result<(), DatabaseError> {
        if entry.digest.as_ref() != Some(&projector.digest) {
            self.engine.sim.set_definition(projector, entry.digest.as_deref()).await?;
        }
        Ok(())
    }

    /// A new projector of mode from_now is entered when the mark has reached the target.
    async fn may_enter(&mut self, before: &[Entry]) -> Result<bool, DatabaseError> {
        let is_new = |id: &ProjectorId| before.iter().all(|entry| entry.id != *id);
        if !self.engine.registry.iter().any(|projector| projector.mode == Mode::FromNow && is_new(&projector.id)) {
            return Ok(true);
        }
        loop {
            let mark = raise_high_water(&self.engine.sim).await?.mark;
            if mark >= self.target {
                return Ok(true);
            }
            if !self.waits(mark).await {
                return Ok(false);
            }
        }
    }

    /// Waits a moment for the mark to rise to the target. `false`: boot is no longer patient.
    async fn waits(&mut self, mark: Position) -> bool {
        let sim = self.engine.sim.clone();
        sim.saw(Seen::WaitedForMark);
        let since = self.waiting.filter(|(at, _)| *at == mark).map_or(sim.now(), |(_, since)| since);
        self.waiting = Some((mark, since));
        if self.engine.is_out_of_patience(since) {
            sim.saw(Seen::GaveUpWaiting);
            self.is_refused = true;
            return false;
        }
        sim.sleep(LOOK_EVERY).await;
        true
    }

    async fn admit(&mut self, before: &[Entry]) -> Result<Vec<Cursor>, DatabaseError> {
        let sim = self.engine.sim.clone();
        let registry = self.engine.registry.clone();
        let entries = sim.entries().await?;
        let mut new = Vec::new();
        let mut refused = Vec::new();
        for projector in registry.iter() {
            let Some(entry) = entries.iter().find(|entry| entry.id == projector.id) else {
                new.push(projector);
                continue;
            };
            if entry.rebuild_reason.is_none() || entry.status == Status::Retired {
                continue;
            }
            if sim.has(Bug::BootResumesTheIncomplete) {
                sim.accept(&entry.id).await?;
                continue;
            }
            sim.saw(Seen::RefusedToBoot);
            self.is_refused = true;
            self.is_stopped |= !was_broken(before, entry);
            refused.push(entry.id.clone());
        }
        if !self.is_stopped && !new.is_empty() {
            let high_water = raise_high_water(&sim).await?.mark;
            for projector in new {
                let position = match projector.mode {
                    Mode::FromNow if sim.has(Bug::FromNowAtZero) => Position::START,
                    Mode::FromNow if sim.has(Bug::FromNowAtLastVisible) => sim.last_visible().await?,
                    mode => first_position(mode, high_water),
                };
                sim.enter(projector, position, self.began_at).await?;
            }
        }
        let mut cursors = Vec::new();
        for entry in sim.entries().await? {
            let Some(projector) = registry.get(&entry.id).filter(|projector| !refused.contains(&projector.id)) else {
                continue;
            };
            if Stage::Boot.plays(&entry.status) {
                let mut cursor = Cursor::new(projector, entry.position);
                cursor.is_repair = was_broken(before, &entry);
                cursors.push(cursor);
                if before.contains(&entry) {
                    sim.saw(Seen::BootRepeated);
                }
            } else if entry.status == Status::Retired && sim.has(Bug::BootsTheRetired) {
                self.revive(&entry).await?;
                cursors.push(Cursor::new(projector, entry.position));
            }
        }
        self.stall(&mut cursors).await?;
        self.set_up(&mut cursors).await?;
        Ok(cursors)
    }

    /// Only a deliberate bug does this.
    async fn revive(&self, entry: &Entry) -> Result<(), DatabaseError> {
        let mut transaction = self.engine.sim.begin();
        let Some(entry) = transaction.lock(&entry.id).await? else { return Ok(()) };
        transaction.write(Entry { status: Status::Booting, ..entry }).await?;
        transaction.commit().await
    }

    async fn set_up(&mut self, cursors: &mut [Cursor]) -> Result<(), DatabaseError> {
        let sim = self.engine.sim.clone();
        for cursor in cursors.iter_mut() {
            if !cursor.is_running() || self.is_stopped && !cursor.is_repair {
                continue;
            }
            let Some(entry) = sim.entries().await?.into_iter().find(|entry| entry.id == cursor.projector.id) else {
                cursor.state = CursorState::Left;
                continue;
            };
            if !Stage::Boot.plays(&entry.status) {
                cursor.state = CursorState::Left;
                continue;
            }
            self.record_definition(&cursor.projector, &entry).await?;
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
            self.is_stopped |= cursor.has_stopped_boot();
        }
        self.stall(cursors).await
    }

    async fn replay(&mut self, cursors: &mut [Cursor]) -> Result<(), DatabaseError> {
        let sim = self.engine.sim.clone();
        let is_first = !sim.entries().await?.iter().any(|entry| entry.status == Status::Live);
        let mut rounds = 0;
        loop {
            if cursors.iter().any(|cursor| matches!(cursor.state, CursorState::GaveUp(_))) {
                return Ok(());
            }
            let Some(start) = cursors.iter().filter(|cursor| cursor.is_running()).map(|cursor| cursor.position).min()
            else {
                return Ok(());
            };
            let mark = raise_high_water(&sim).await?.mark;
            rounds += u32::from(start < mark);
            self.engine.catch_up(Stage::Boot, cursors, mark).await?;
            if cursors.iter().any(Cursor::has_stopped_boot) {
                self.is_stopped = true;
                self.stall(cursors).await?;
            }
            if mark < self.target {
                if sim.has(Bug::FinishesBelowTheTarget) {
                    self.finish_all(cursors, mark).await?;
                }
                if !self.waits(mark).await {
                    return Ok(());
                }
                continue;
            }
            let was_short = mark.since(start) <= self.engine.batch;
            if was_short || rounds >= MOST_ROUNDS_FOR_FRESHNESS {
                self.release(cursors, mark, is_first).await?;
            }
        }
    }

    /// Only a deliberate bug does this.
    async fn finish_all(&self, cursors: &mut [Cursor], mark: Position) -> Result<(), DatabaseError> {
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running() && cursor.projector.mode == Mode::Once) {
            let row = self.finish(&cursor.projector, mark).await?;
            cursor.note_row(row.as_ref());
        }
        Ok(())
    }

    async fn release(&self, cursors: &mut [Cursor], mark: Position, is_first: bool) -> Result<(), DatabaseError> {
        let sim = &self.engine.sim;
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running()) {
            let projector = &cursor.projector;
            let row = match projector.mode {
                Mode::Once if !sim.has(Bug::OnceGoesLive) => self.finish(projector, mark.max(self.target)).await?,
                _ => {
                    let oldest = oldest_queued(&self.engine.registry, &sim.entries().await?, mark);
                    self.hand_over(projector, oldest.max(self.target), mark).await?
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
            sim.set_published(mark).await?;
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
        let (was_broken, is_ours) = (Cell::new(false), Cell::new(false));
        let still = |entry: &Entry| {
            was_broken.set(entry.status.failure().is_some());
            is_ours.set(has_reached(entry, oldest_queued) && entry.is_booted_with(&projector.digest));
            is_ours.get()
        };
        let row = step(sim.ledger_step(&projector.id, Step::HandOver, still).await)?;
        if is_ours.get() {
            sim.note(|| format!("{} is live", projector.id));
            sim.saw(Seen::HandedOver);
            invariants::after_release(&mut sim.world(), cast::number(&projector.id), self.was_visible);
            if was_broken.get() && self.is_stopped {
                sim.saw(Seen::RepairedBesideFailure);
            }
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
        let is_ours = Cell::new(false);
        let still = |entry: &Entry| {
            is_ours.set(has_reached(entry, target) && entry.is_booted_with(&projector.digest));
            is_ours.get()
        };
        let row = step(sim.ledger_step(&projector.id, Step::Finish, still).await)?;
        if is_ours.get() {
            sim.note(|| format!("{} is finished", projector.id));
            invariants::after_release(&mut sim.world(), cast::number(&projector.id), self.was_visible);
            sim.saw(Seen::Finished);
        }
        Ok(row)
    }

    async fn stall(&self, cursors: &mut [Cursor]) -> Result<(), DatabaseError> {
        if !self.is_stopped {
            return Ok(());
        }
        let sim = &self.engine.sim;
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running() && !cursor.is_repair) {
            let still = |entry: &Entry| matches!(entry.status, Status::Booting | Status::Stalled);
            step(sim.ledger_step(&cursor.projector.id, Step::Stall, still).await)?;
            sim.saw(Seen::Stalled);
            cursor.state = CursorState::Left;
        }
        Ok(())
    }
}

/// Whether a projector was broken when boot began.
fn was_broken(before: &[Entry], entry: &Entry) -> bool {
    before.iter().any(|before| before.id == entry.id && before.status.failure().is_some())
}

/// A step that the lifecycle does not have would end the boot, as an error of the database does.
fn step(taken: Result<Option<Entry>, Option<DatabaseError>>) -> Result<Option<Entry>, DatabaseError> {
    taken.map_err(|error| error.unwrap_or(DatabaseError::Lost))
}
