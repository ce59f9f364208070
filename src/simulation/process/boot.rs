//! Mirrors `engine/boot/` and `engine/handoff.rs`: register, set up, catch up in rounds, hand over.

use std::cell::Cell;

use super::Ended;
use super::engine::Engine;
use super::high_water::raise_high_water;
use crate::engine::boot::{MAX_CATCH_UP_ROUNDS, start_position};
use crate::engine::catch_up::{Cursor, CursorState};
use crate::engine::handoff::{has_reached, oldest_queued};
use crate::engine::retry::ApplyOutcome;
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status, Transition};
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::{RegisteredProjector, Registry};
use crate::simulation::bug::Bug;
use crate::simulation::invariants;
use crate::simulation::occurrence::Occurrence;
use crate::simulation::projectors::{self, Release};
use crate::simulation::statements::DatabaseError;
use crate::simulation::transaction::take_poison;
use crate::simulation::world::{Sim, Tick};

/// How long boot retries and waits for the mark.
const WAIT_TIMEOUT: Tick = 200;

/// A shorter timeout, with which boot often gives up.
const SHORT_WAIT_TIMEOUT: Tick = 20;

/// How often boot checks whether the mark has reached its target.
const POLL_INTERVAL: Tick = 3;

struct Boot {
    engine: Engine,
    /// The mark when boot began. No `from_now` projector may start below it.
    start_mark: Position,
    /// The last visible position when boot began, for the invariants.
    start_visible: Position,
    /// The position that each projector must reach.
    target: Position,
    /// Whether a projector failed that was not broken when boot began.
    is_stopped: bool,
    /// Whether boot must not release for a reason that the ledger does not record.
    is_refused: bool,
    /// The mark for which boot waits to rise, and since when.
    waiting: Option<(Position, Tick)>,
}

/// Runs one boot of a release.
pub(in crate::simulation) async fn boot(sim: Sim, release: Release, registry: Registry) -> Ended {
    let (batch, start_mark, start_visible, retry_timeout) = {
        let mut world = sim.world();
        let retry_timeout =
            if world.is_closing || world.rng.bool() { WAIT_TIMEOUT } else { SHORT_WAIT_TIMEOUT };
        (
            world.rng.u64(1..=5),
            world.database.high_water,
            Position::new(world.database.last_visible()),
            retry_timeout,
        )
    };
    let mut boot = Boot {
        engine: Engine {
            sim: sim.clone(),
            registry,
            release,
            batch,
            retry_timeout: Some(retry_timeout),
        },
        start_mark,
        start_visible,
        target: Position::START,
        is_stopped: false,
        is_refused: false,
        waiting: None,
    };
    let ended = boot.run().await;
    sim.trace(|| format!("ends: {ended:?}"));
    match ended {
        Ok(released) => Ended::Booted { released },
        Err(_) => {
            sim.record(Occurrence::GaveUp);
            Ended::Done
        }
    }
}

impl Boot {
    /// Returns `true` if the release may be deployed.
    async fn run(&mut self) -> Result<bool, DatabaseError> {
        let sim = self.engine.sim.clone();
        let mark = sim.marks().await?.high_water;
        self.target = if sim.has(Bug::TargetsTheMark) { mark } else { sim.last_visible().await? };
        let before = sim.entries().await?;
        if self.wait_until_registrable(&before).await? {
            let mut cursors = self.admit(&before).await?;
            self.replay(&mut cursors).await?;
            if cursors.iter().any(|cursor| matches!(cursor.state, CursorState::GaveUp(_))) {
                return Err(DatabaseError::ConnectionLost);
            }
        }
        let after = sim.entries().await?;
        let is_done = |entry: &Entry| match entry.status {
            Status::Live | Status::Finished => entry.rebuild_reason.is_none(),
            Status::Retired => true,
            Status::Booting | Status::Stalled | Status::Broken(_) => false,
        };
        let entry = |id: &ProjectorId| after.iter().find(|entry| entry.id == *id);
        let all_done =
            self.engine.registry.iter().all(|projector| entry(&projector.id).is_some_and(is_done));
        let released = all_done && !self.is_refused;
        if released {
            for entry in
                after.iter().filter(|entry| matches!(entry.status, Status::Live | Status::Finished))
            {
                let Some(projector) = self.engine.registry.get(&entry.id) else { continue };
                self.record_definition(projector, entry).await?;
            }
        }
        Ok(released)
    }

    async fn record_definition(
        &self,
        projector: &RegisteredProjector,
        entry: &Entry,
    ) -> Result<(), DatabaseError> {
        if entry.digest.as_ref() != Some(&projector.digest) {
            self.engine.sim.set_definition(projector, entry.digest.as_deref()).await?;
        }
        Ok(())
    }

    /// Waits until new `from_now` projectors can be registered: the mark must have reached the
    /// target. Returns `false` after the timeout.
    async fn wait_until_registrable(&mut self, before: &[Entry]) -> Result<bool, DatabaseError> {
        let is_new = |id: &ProjectorId| before.iter().all(|entry| entry.id != *id);
        if !self
            .engine
            .registry
            .iter()
            .any(|projector| projector.mode == Mode::FromNow && is_new(&projector.id))
        {
            return Ok(true);
        }
        loop {
            let mark = raise_high_water(&self.engine.sim).await?.mark;
            if mark >= self.target {
                return Ok(true);
            }
            if !self.wait_for_mark(mark).await {
                return Ok(false);
            }
        }
    }

    /// Waits a moment for the mark to rise to the target. Returns `false` after the timeout.
    async fn wait_for_mark(&mut self, mark: Position) -> bool {
        let sim = self.engine.sim.clone();
        sim.record(Occurrence::WaitedForMark);
        let since =
            self.waiting.filter(|(at, _)| *at == mark).map_or(sim.now(), |(_, since)| since);
        self.waiting = Some((mark, since));
        if self.engine.is_retry_timeout_over(since) {
            sim.record(Occurrence::GaveUpWaiting);
            self.is_refused = true;
            return false;
        }
        sim.sleep(POLL_INTERVAL).await;
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
            if sim.has(Bug::BootIgnoresRebuildReason) {
                sim.accept(&entry.id).await?;
                continue;
            }
            sim.record(Occurrence::RefusedToBoot);
            self.is_refused = true;
            self.is_stopped |= !was_broken(before, entry);
            refused.push(entry.id.clone());
        }
        if !self.is_stopped && !new.is_empty() {
            let high_water = raise_high_water(&sim).await?.mark;
            for projector in new {
                let position = match projector.mode {
                    Mode::FromNow if sim.has(Bug::FromNowAtZero) => Position::START,
                    Mode::FromNow if sim.has(Bug::FromNowAtLastVisible) => {
                        sim.last_visible().await?
                    }
                    mode => start_position(mode, high_water),
                };
                sim.register(projector, position, self.start_mark).await?;
            }
        }
        let mut cursors = Vec::new();
        for entry in sim.entries().await? {
            let Some(projector) =
                registry.get(&entry.id).filter(|projector| !refused.contains(&projector.id))
            else {
                continue;
            };
            if Stage::Boot.can_apply(&entry.status) {
                let mut cursor = Cursor::new(projector, entry.position);
                cursor.was_broken = was_broken(before, &entry);
                cursors.push(cursor);
                if before.contains(&entry) {
                    sim.record(Occurrence::BootRepeated);
                }
            } else if entry.status == Status::Retired && sim.has(Bug::BootsRetired) {
                self.revive(&entry).await?;
                cursors.push(Cursor::new(projector, entry.position));
            }
        }
        self.stall(&mut cursors).await?;
        self.set_up(&mut cursors).await?;
        Ok(cursors)
    }

    /// Makes a retired projector boot again. Only a deliberate bug calls this.
    async fn revive(&self, entry: &Entry) -> Result<(), DatabaseError> {
        let mut transaction = self.engine.sim.begin();
        let Some(entry) = transaction.lock(&entry.id).await? else { return Ok(()) };
        transaction.write(Entry { status: Status::Booting, ..entry }).await?;
        transaction.commit().await
    }

    async fn set_up(&mut self, cursors: &mut [Cursor]) -> Result<(), DatabaseError> {
        let sim = self.engine.sim.clone();
        for cursor in cursors.iter_mut() {
            if !cursor.is_running() || self.is_stopped && !cursor.was_broken {
                continue;
            }
            let Some(entry) =
                sim.entries().await?.into_iter().find(|entry| entry.id == cursor.projector.id)
            else {
                cursor.state = CursorState::TakenOver;
                continue;
            };
            if !Stage::Boot.can_apply(&entry.status) {
                cursor.state = CursorState::TakenOver;
                continue;
            }
            self.record_definition(&cursor.projector, &entry).await?;
            let outcome = match sim.statement(None).await {
                Err(_) => ApplyOutcome::GaveUp("transient".into()),
                Ok(()) => {
                    let projector_index = projectors::index_of(&cursor.projector.id);
                    if take_poison(&mut sim.world(), projector_index, 0, self.engine.release)
                        .is_none()
                    {
                        continue;
                    }
                    sim.record(Occurrence::BrokeAtSetup);
                    self.engine
                        .mark_broken(&cursor.projector, Stage::Boot, None, "setup failed")
                        .await
                }
            };
            cursor.record(outcome);
            self.is_stopped |= cursor.should_stop_boot();
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
            let Some(start) = cursors
                .iter()
                .filter(|cursor| cursor.is_running())
                .map(|cursor| cursor.position)
                .min()
            else {
                return Ok(());
            };
            let mark = raise_high_water(&sim).await?.mark;
            rounds += u32::from(start < mark);
            self.engine.catch_up(Stage::Boot, cursors, mark).await?;
            if cursors.iter().any(Cursor::should_stop_boot) {
                self.is_stopped = true;
                self.stall(cursors).await?;
            }
            if mark < self.target {
                if sim.has(Bug::FinishesBelowTarget) {
                    self.finish_all(cursors, mark).await?;
                }
                if !self.wait_for_mark(mark).await {
                    return Ok(());
                }
                continue;
            }
            let was_short = mark.since(start) <= self.engine.batch;
            if was_short || rounds >= MAX_CATCH_UP_ROUNDS {
                self.hand_over_or_finish(cursors, mark, is_first).await?;
            }
        }
    }

    /// Finishes every projector of mode `once` at the mark. Only a deliberate bug calls this.
    async fn finish_all(
        &self,
        cursors: &mut [Cursor],
        mark: Position,
    ) -> Result<(), DatabaseError> {
        for cursor in cursors
            .iter_mut()
            .filter(|cursor| cursor.is_running() && cursor.projector.mode == Mode::Once)
        {
            let row = self.finish(&cursor.projector, mark).await?;
            cursor.record_entry(row.as_ref());
        }
        Ok(())
    }

    async fn hand_over_or_finish(
        &self,
        cursors: &mut [Cursor],
        mark: Position,
        is_first: bool,
    ) -> Result<(), DatabaseError> {
        let sim = &self.engine.sim;
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running()) {
            let projector = &cursor.projector;
            let row = match projector.mode {
                Mode::Once if !sim.has(Bug::HandsOffModeOnce) => {
                    self.finish(projector, mark.max(self.target)).await?
                }
                _ => {
                    let oldest = oldest_queued(&self.engine.registry, &sim.entries().await?, mark);
                    self.hand_over(projector, oldest.max(self.target), mark).await?
                }
            };
            let is_lost = row.as_ref().is_none_or(|row| row.status == Status::Retired);
            if is_lost {
                sim.record(Occurrence::RetiredDuringBoot);
            }
            if !(is_lost && sim.has(Bug::BootIgnoresRetirement)) {
                cursor.record_entry(row.as_ref());
            }
            if cursor.is_running() {
                sim.record(Occurrence::TargetNotReached);
            }
        }
        if is_first && cursors.iter().any(|cursor| cursor.projector.mode != Mode::Once) {
            sim.set_published(mark).await?;
        }
        Ok(())
    }

    async fn hand_over(
        &self,
        projector: &RegisteredProjector,
        oldest_queued: Position,
        target: Position,
    ) -> Result<Option<Entry>, DatabaseError> {
        let sim = &self.engine.sim;
        if sim.has(Bug::MovesPositionAtHandoff)
            || sim.has(Bug::HandsOffWithoutLock)
            || sim.has(Bug::HandsOffModeOnce)
        {
            return self.hand_over_wrongly(projector, target).await;
        }
        let (was_broken, is_ours) = (Cell::new(false), Cell::new(false));
        let still = |entry: &Entry| {
            was_broken.set(entry.status.failure().is_some());
            is_ours
                .set(has_reached(entry, oldest_queued) && entry.matches_digest(&projector.digest));
            is_ours.get()
        };
        let row =
            expect_legal(sim.ledger_transition(&projector.id, Transition::HandOver, still).await)?;
        if is_ours.get() {
            sim.trace(|| format!("{} is live", projector.id));
            sim.record(Occurrence::HandedOver);
            invariants::after_release(
                &mut sim.world(),
                projectors::index_of(&projector.id),
                self.start_visible,
            );
            if was_broken.get() && self.is_stopped {
                sim.record(Occurrence::RepairedBesideFailure);
            }
            if was_broken.get() {
                sim.record(Occurrence::HandedOverFromBroken);
            }
            if sim.world().is_played_by_another(self.engine.release) {
                sim.record(Occurrence::HandedOverBesideOldRelease);
            }
        }
        Ok(row)
    }

    /// Hands over incorrectly. Only deliberate bugs call this.
    async fn hand_over_wrongly(
        &self,
        projector: &RegisteredProjector,
        target: Position,
    ) -> Result<Option<Entry>, DatabaseError> {
        let sim = &self.engine.sim;
        let Some(read) = sim.entries().await?.into_iter().find(|entry| entry.id == projector.id)
        else {
            return Ok(None);
        };
        if !Stage::Boot.can_apply(&read.status) {
            return Ok(Some(read));
        }
        let mut transaction = sim.begin();
        let Some(locked) = transaction.lock(&projector.id).await? else { return Ok(None) };
        let entry = if sim.has(Bug::HandsOffWithoutLock) {
            Entry { status: Status::Live, ..read }
        } else if !Stage::Boot.can_apply(&locked.status) {
            return Ok(Some(locked));
        } else if sim.has(Bug::MovesPositionAtHandoff) {
            let mark = sim.world().database.high_water.max(target);
            Entry { status: Status::Live, position: mark, ..locked }
        } else {
            Entry { status: Status::Live, ..locked }
        };
        transaction.write(entry.clone()).await?;
        transaction.commit().await?;
        Ok(Some(entry))
    }

    async fn finish(
        &self,
        projector: &RegisteredProjector,
        target: Position,
    ) -> Result<Option<Entry>, DatabaseError> {
        let sim = &self.engine.sim;
        let is_ours = Cell::new(false);
        let still = |entry: &Entry| {
            is_ours.set(has_reached(entry, target) && entry.matches_digest(&projector.digest));
            is_ours.get()
        };
        let row =
            expect_legal(sim.ledger_transition(&projector.id, Transition::Finish, still).await)?;
        if is_ours.get() {
            sim.trace(|| format!("{} is finished", projector.id));
            invariants::after_release(
                &mut sim.world(),
                projectors::index_of(&projector.id),
                self.start_visible,
            );
            sim.record(Occurrence::Finished);
        }
        Ok(row)
    }

    async fn stall(&self, cursors: &mut [Cursor]) -> Result<(), DatabaseError> {
        if !self.is_stopped {
            return Ok(());
        }
        let sim = &self.engine.sim;
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running() && !cursor.was_broken)
        {
            let still = |entry: &Entry| matches!(entry.status, Status::Booting | Status::Stalled);
            expect_legal(
                sim.ledger_transition(&cursor.projector.id, Transition::Stall, still).await,
            )?;
            sim.record(Occurrence::Stalled);
            cursor.state = CursorState::TakenOver;
        }
        Ok(())
    }
}

/// Whether this projector was broken when boot began.
fn was_broken(before: &[Entry], entry: &Entry) -> bool {
    before.iter().any(|before| before.id == entry.id && before.status.failure().is_some())
}

/// Turns a transition that the lifecycle does not have into an error. It ends the boot, as a
/// database error does.
fn expect_legal(
    taken: Result<Option<Entry>, Option<DatabaseError>>,
) -> Result<Option<Entry>, DatabaseError> {
    taken.map_err(|error| error.unwrap_or(DatabaseError::ConnectionLost))
}
