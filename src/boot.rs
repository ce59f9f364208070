//! Boot: rounds of catch-up, until every new projector of a release can be handed over.

use std::sync::Arc;
use std::time::Instant;

use tracing::{error, info, warn};

use crate::apply;
use crate::catch_up::{Cursor, CursorState};
use crate::database::Database;
use crate::deliver::{Delivered, Engine, Failed, Limits};
use crate::error::{Error, caused_by_transient, tell};
use crate::event::Position;
use crate::handoff::{has_reached, oldest_queued};
use crate::held::HeldWatch;
use crate::ledger::{Entry, LedgerError};
use crate::lifecycle::{Stage, Status, Step};
use crate::metrics;
use crate::projector::{Mode, ProjectorId};
use crate::registry::{Registered, Registry};
use crate::retry;
use crate::store::HighWater;

/// A round that was longer than a batch is followed by another, so that projectors go live fresh; but
/// against a log that grows as fast as they replay, the handoff need not wait for ever: the queue feeds them.
pub(crate) const MOST_ROUNDS_FOR_FRESHNESS: u32 = 20;

/// Why a release may not go on though nothing of it broke.
pub(crate) const NOT_AT_ITS_END: &str = "boot did not come to its end: not every projector is live";

/// What boot did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootReport {
    /// Each projector of the set, in registry order, as the ledger has it afterwards.
    pub projectors: Vec<Booted>,
}

/// What boot did with one projector.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Booted {
    /// As the ledger has it afterwards.
    pub entry: Entry,
    /// Where it stood before; `None`: it was new.
    pub from: Option<Position>,
    /// Whether this boot had anything to do with it: it was not live, finished or retired already.
    pub attempted: bool,
}

impl BootReport {
    /// Those that are broken: the deploy must not go on.
    pub fn broken(&self) -> impl Iterator<Item = &Booted> {
        self.projectors.iter().filter(|booted| matches!(booted.entry.status, Status::Broken(_)))
    }

    /// Whether the release may go on: every projector of it is live, finished or retired.
    pub fn is_released(&self) -> bool {
        let done = |booted: &Booted| matches!(booted.entry.status, Status::Live | Status::Finished | Status::Retired);
        self.projectors.iter().all(done)
    }
}

/// How far boot is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootProgress {
    /// Where each projector stands that is being booted.
    pub positions: Vec<(ProjectorId, Position)>,
    /// Where this round ends.
    pub target: Position,
}

impl BootProgress {
    /// The position of the one that is furthest behind.
    pub fn lowest(&self) -> Position {
        self.positions.iter().map(|&(_, position)| position).min().unwrap_or(self.target)
    }
}

/// Boots every new, booting, stalled and broken projector of a set, and hands them over. Needs the database only.
///
/// `Ok` says what the ledger has now, also where a projector broke: see [`BootReport::is_released`].
///
/// # Errors
/// [`Error::Input`] where the set contradicts the ledger, [`Error::Database`] and [`Error::OutOfReach`]
/// where the database fails for longer than `limits.patience`.
pub async fn boot(
    database: &Database,
    registry: &Registry,
    limits: Limits,
    progress: impl FnMut(&BootProgress),
) -> Result<BootReport, Error> {
    let boot = Boot { engine: Engine::new(database, limits, registry), registry };
    boot.run(progress).await.inspect_err(|error| tell_failed(error, registry.release()))
}

/// Tells that a boot ended, before its end, for a reason other than a broken projector: somebody should look, for the
/// deploy stands. [`boot`] does so itself; what ends a boot outside it, and may do so only once, calls this.
pub(crate) fn tell_failed(error: &Error, release: Option<&str>) {
    let released = false;
    error!(alert = "boot_failed", %error, released, release, "boot failed: this release must not go on");
}

struct Boot<'a> {
    engine: Engine,
    registry: &'a Registry,
}

impl Boot<'_> {
    async fn run(&self, mut progress: impl FnMut(&BootProgress)) -> Result<BootReport, Error> {
        let began = Instant::now();
        let before = self.entries().await?;
        check_modes(self.registry, &before)?;
        let mut cursors = self.enter(&before).await?;

        if self.set_up(&mut cursors).await {
            self.replay(&mut cursors, &mut progress).await?;
        }
        if cursors.iter().any(|cursor| matches!(cursor.state, CursorState::Broke)) {
            self.stall(&cursors).await?;
        }
        if let Some(gave_up) = cursors.iter().find_map(|cursor| match &cursor.state {
            CursorState::GaveUp(error) => Some(format!("{}: {error}", cursor.projector.id)),
            _ => None,
        }) {
            return Err(Error::OutOfReach(format!(
                "boot gave up on the database; run it again, it goes on where it stopped: {gave_up}"
            )));
        }
        let report = self.report(&before, &self.entries().await?);
        let (released, release) = (report.is_released(), self.engine.release.as_deref());
        let seconds = retry::seconds(began.elapsed());
        if released {
            info!(released, release, seconds, projectors = report.projectors.len(), "booted: this release may go on");
        } else {
            let broken: Vec<String> = report.broken().map(|booted| booted.entry.id.to_string()).collect();
            let error = broken.is_empty().then_some(NOT_AT_ITS_END);
            let broken = (!broken.is_empty()).then(|| broken.join(" "));
            error!(
                alert = "boot_failed",
                broken, error, released, release, seconds, "boot failed: this release must not go on"
            );
        }
        Ok(report)
    }

    /// Enters the new ones, and gives a cursor to each that is to be booted.
    async fn enter(&self, before: &[Entry]) -> Result<Vec<Cursor>, Error> {
        let known = |id: &ProjectorId| before.iter().any(|entry| entry.id == *id);
        let new: Vec<_> = self.registry.iter().filter(|projector| !known(&projector.id)).collect();
        if !new.is_empty() {
            let high_water = self.raise_high_water().await?.mark;
            for projector in new {
                let position = first_position(projector.mode, high_water);
                let enter = || self.engine.ledger.enter(projector, position);
                self.engine.persist("enter a projector", enter).await?;
            }
        }
        let mut cursors = Vec::new();
        for entry in self.entries().await? {
            let Some(projector) = self.registry.get(&entry.id) else { continue };
            if Stage::Boot.plays(&entry.status) {
                info!(
                    projector = %entry.id, mode = %entry.mode, status = %entry.status, position = entry.position.get(),
                    release = self.engine.release, "booting"
                );
                cursors.push(Cursor::new(projector, entry.position));
            } else if entry.status == Status::Retired {
                warn!(projector = %entry.id, status = %entry.status, "retired, and never played again: take it out of the set, or give it a new version");
            }
        }
        Ok(cursors)
    }

    /// Runs each projector's setup; at the first that fails, `false`.
    async fn set_up(&self, cursors: &mut [Cursor]) -> bool {
        for cursor in cursors {
            let set_up = || apply::set_up(&self.engine.database, &cursor.projector);
            if let Err(error) = self.engine.persist("run a setup", set_up).await {
                metrics::failed(&cursor.projector.id);
                let error = error.context("setup failed");
                let delivered = match caused_by_transient(&error) {
                    true => Delivered::GaveUp(tell(&error)),
                    false => self.engine.break_at(&cursor.projector, Stage::Boot, None, Failed::new(error, 1)).await,
                };
                cursor.note(delivered);
                return false;
            }
        }
        true
    }

    /// Rounds of catch-up and handoff, until none is left or one broke.
    async fn replay(&self, cursors: &mut [Cursor], progress: &mut impl FnMut(&BootProgress)) -> Result<(), Error> {
        let mut held = HeldWatch::default();
        let is_first = !self.entries().await?.iter().any(|entry| entry.status == Status::Live);
        for round in 1.. {
            let Some(start) = cursors.iter().filter(|cursor| cursor.is_running()).map(|cursor| cursor.position).min()
            else {
                return Ok(());
            };
            let high_water = self.raise_high_water().await?;
            held.note(high_water.held);
            let target = high_water.mark;
            info!(round, from = start.get(), through = target.get(), "replaying");
            let mut tell = |cursors: &[Cursor]| progress(&BootProgress::of(cursors, target));
            tell(cursors);
            self.engine.catch_up(Stage::Boot, cursors, target, tell).await?;
            if cursors.iter().any(|cursor| !matches!(cursor.state, CursorState::Running | CursorState::Left)) {
                return Ok(());
            }
            let was_short = target.since(start) <= self.engine.limits.batch;
            if was_short || round >= MOST_ROUNDS_FOR_FRESHNESS {
                self.release(cursors, target, is_first).await?;
            }
        }
        Ok(())
    }

    /// Hands over, or finishes, every cursor that has come far enough.
    async fn release(&self, cursors: &mut [Cursor], target: Position, is_first: bool) -> Result<(), Error> {
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running()) {
            let row = match cursor.projector.mode {
                Mode::Once => self.finish(cursor, target).await?,
                Mode::FromBeginning | Mode::FromNow => {
                    let oldest = oldest_queued(self.registry, &self.entries().await?, target);
                    self.engine.hand_over(cursor, oldest).await?
                }
            };
            cursor.note_row(row.as_ref());
        }
        if is_first && cursors.iter().any(|cursor| cursor.projector.mode != Mode::Once) {
            // Nobody awaits anything below: the queue need not carry the history of the log.
            let publish = || self.engine.store.set_published(target);
            self.engine.persist("set the published mark", publish).await?;
        }
        Ok(())
    }

    /// Finishes a projector of mode once, if it still stands at or beyond the mark of this round. Returns its row
    /// as it is afterwards, if there is one.
    async fn finish(&self, cursor: &Cursor, target: Position) -> Result<Option<Entry>, LedgerError> {
        let id = &cursor.projector.id;
        let still = |entry: &Entry| has_reached(entry, target);
        let step = || self.engine.ledger.step(id, Step::Finish, still);
        let entry = self.engine.persist("finish", step).await?;
        if let Some(entry) = entry.as_ref().filter(|entry| entry.status == Status::Finished) {
            let (from, began) = cursor.start;
            info!(
                projector = %id, status = %entry.status, position = entry.position.get(),
                events = entry.position.since(from), seconds = retry::seconds(began.elapsed()),
                release = self.engine.release, "finished"
            );
        }
        Ok(entry)
    }

    /// Marks as stalled what this boot did not come to the end with, because another broke.
    async fn stall(&self, cursors: &[Cursor]) -> Result<(), Error> {
        for cursor in cursors.iter().filter(|cursor| cursor.is_running()) {
            let still = |entry: &Entry| matches!(entry.status, Status::Booting | Status::Stalled);
            let step = || self.engine.ledger.step(&cursor.projector.id, Step::Stall, still);
            self.engine.persist("stall a projector", step).await?;
            warn!(
                projector = %cursor.projector.id, status = "stalled", position = cursor.position.get(),
                release = self.engine.release, "stalled: another projector of this boot broke"
            );
        }
        Ok(())
    }

    async fn entries(&self) -> Result<Vec<Entry>, sqlx::Error> {
        self.engine.persist("read the ledger", || self.engine.ledger.entries()).await
    }

    async fn raise_high_water(&self) -> Result<HighWater, sqlx::Error> {
        self.engine.persist("raise the high-water mark", || self.engine.store.raise_high_water()).await
    }

    fn report(&self, before: &[Entry], after: &[Entry]) -> BootReport {
        let of = |entries: &[Entry], projector: &Arc<Registered>| {
            entries.iter().find(|entry| entry.id == projector.id).cloned()
        };
        let projectors = self.registry.iter().filter_map(|projector| {
            let (before, entry) = (of(before, projector), of(after, projector)?);
            let attempted = before.as_ref().is_none_or(|before| Stage::Boot.plays(&before.status));
            Some(Booted { from: before.map(|before| before.position), entry, attempted })
        });
        BootReport { projectors: projectors.collect() }
    }
}

impl BootProgress {
    fn of(cursors: &[Cursor], target: Position) -> Self {
        let running = cursors.iter().filter(|cursor| cursor.is_running());
        BootProgress {
            positions: running.map(|cursor| (cursor.projector.id.clone(), cursor.position)).collect(),
            target,
        }
    }
}

/// Where a projector begins that is seen for the first time.
pub(crate) fn first_position(mode: Mode, high_water: Position) -> Position {
    match mode {
        Mode::FromNow => high_water,
        Mode::FromBeginning | Mode::Once => Position::START,
    }
}

/// A mode is decided once, at first sight: what was skipped or replayed then cannot be taken back.
fn check_modes(registry: &Registry, ledger: &[Entry]) -> Result<(), Error> {
    for entry in ledger {
        if let Some(projector) = registry.get(&entry.id).filter(|projector| projector.mode != entry.mode) {
            return Err(Error::Input(format!(
                "projector {} was booted as {} and is {} now: give it a new version to run it in another mode",
                entry.id, entry.mode, projector.mode
            )));
        }
    }
    Ok(())
}

impl From<LedgerError> for Error {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Database(error) => Error::Database(error),
            LedgerError::Step(..) => Error::Input(error.to_string()),
        }
    }
}
