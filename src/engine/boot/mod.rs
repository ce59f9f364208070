//! Boot runs rounds of catch-up until every new projector of a release can be handed over.

mod admission;
mod report;
mod retry_wait;
mod target;

use std::sync::Arc;
use std::time::Instant;

use tracing::{error, info, warn};

use crate::database::Database;
use crate::engine::catch_up::{Cursor, CursorState};
use crate::engine::error::Error;
use crate::engine::handoff::{has_reached, oldest_queued};
use crate::engine::retry::{Engine, Limits};
use crate::engine::stall_watch::BlockedWatch;
use crate::ledger::{Entry, LedgerError};
use crate::model::backoff;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status, Transition};
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::{RegisteredProjector, Registry};
use crate::store::HighWater;
use report::Findings;
pub use report::{BootProgress, BootReport, BootWait, ProjectorOutcome};
use retry_wait::RetryWaits;
use target::MarkWait;

/// The maximum number of catch-up rounds before the handoff. A round longer than one batch is
/// normally followed by another, so that projectors are up to date when they go live. If the log
/// grows as fast as it is replayed, boot stops here, and the projectors catch up after the handoff.
pub(crate) const MAX_CATCH_UP_ROUNDS: u32 = 20;

/// How boot works.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct BootSettings {
    /// The limits of the engine. Boot also waits up to `retry_timeout` for the high-water mark to
    /// reach the end of the log.
    pub limits: Limits,
    /// The projectors to boot. Empty: all projectors of the set.
    pub only: Vec<ProjectorId>,
    /// The projectors that an operator accepts although boot would refuse them, because a new
    /// projector's table has rows, a subscription was widened, or a table was restored.
    pub accept: Vec<ProjectorId>,
}

impl From<Limits> for BootSettings {
    fn from(limits: Limits) -> Self {
        BootSettings { limits, ..BootSettings::default() }
    }
}

/// Boots every new, booting, stalled and broken projector of a set and hands them over. Needs only
/// the database.
///
/// `Ok` reports the resulting state of the ledger, even if a projector broke: see
/// [`BootReport::is_released`].
///
/// # Errors
/// [`Error::Input`] if the set contradicts the ledger, or if `settings` name a projector that the
/// set does not have. [`Error::Database`] if the database fails for longer than
/// `limits.retry_timeout`. [`Error::Unreachable`] if the high-water mark stays below the last
/// visible event for that long.
pub async fn boot(
    database: &Database,
    registry: &Registry,
    settings: impl Into<BootSettings>,
    progress: impl FnMut(&BootProgress),
) -> Result<BootReport, Error> {
    let booting = async {
        let boot = Boot::new(database, registry, settings.into())?;
        // Boxed: otherwise the caller's future would be as large as boot's.
        Box::pin(boot.run(progress)).await
    };
    let booted = booting.await;
    registry.stop_processes().await;
    booted.inspect_err(|error| log_boot_failure(error, registry.release()))
}

/// Logs that boot failed for a reason other than a broken projector. An operator has to act,
/// because the deploy is blocked. [`boot`] calls this itself. A caller that fails before or after
/// [`boot`] calls it, once.
pub(crate) fn log_boot_failure(error: &Error, release: Option<&str>) {
    let released = false;
    error!(
        alert = "boot_failed", %error, released, release,
        "boot failed: this release must not proceed"
    );
}

struct Boot<'a> {
    engine: Engine,
    registry: &'a Registry,
    /// The projectors to boot.
    selected: Vec<Arc<RegisteredProjector>>,
    accept: Vec<ProjectorId>,
    /// The last visible position when boot began. Every projector has to reach it.
    target: Position,
    findings: Findings,
    blocked_watch: BlockedWatch,
    /// Set while boot waits for a mark that is blocked below the target.
    mark_wait: Option<MarkWait>,
    /// The projectors that wait for a later retry.
    retry_waits: RetryWaits,
}

impl<'a> Boot<'a> {
    fn new(
        database: &Database,
        registry: &'a Registry,
        settings: BootSettings,
    ) -> Result<Self, Error> {
        for id in settings.only.iter().chain(&settings.accept) {
            if registry.get(id).is_none() {
                let known: Vec<String> =
                    registry.iter().map(|projector| projector.id.to_string()).collect();
                return Err(Error::Input(format!(
                    "this set has no projector {id}; it has: {}",
                    known.join(", ")
                )));
            }
        }
        let is_selected = |id: &ProjectorId| settings.only.is_empty() || settings.only.contains(id);
        Ok(Boot {
            engine: Engine::new(database, settings.limits, registry),
            registry,
            selected: registry
                .iter()
                .filter(|projector| is_selected(&projector.id))
                .cloned()
                .collect(),
            accept: settings.accept,
            target: Position::START,
            findings: Findings::default(),
            blocked_watch: BlockedWatch::default(),
            mark_wait: None,
            retry_waits: RetryWaits::default(),
        })
    }

    async fn run(mut self, mut progress: impl FnMut(&BootProgress)) -> Result<BootReport, Error> {
        let began = Instant::now();
        // Read first: every event that is visible now must be applied when boot ends.
        let is_whole = self.read_target().await?;
        let before = self.entries().await?;
        check_modes(&self.selected, &before)?;
        self.warn_of_missing_types().await;
        if is_whole && self.wait_until_registrable(&before, &mut progress).await? {
            let mut cursors = self.admit(&before).await?;
            self.replay(&mut cursors, &mut progress).await?;
            if let Some(gave_up) = cursors.iter().find_map(|cursor| match &cursor.state {
                CursorState::GaveUp(error) => Some(format!("{}: {error}", cursor.projector.id)),
                _ => None,
            }) {
                return Err(Error::Unreachable(format!(
                    "boot gave up on the database; run it again, it continues where it stopped: \
                     {gave_up}"
                )));
            }
        }
        let after = self.entries().await?;
        let (engine, selected, target) = (self.engine.clone(), self.selected.clone(), self.target);
        let findings = std::mem::take(&mut self.findings);
        let report =
            findings.into_report(selected.iter().map(Arc::as_ref), &before, &after, target);
        if report.is_released() {
            self.record_live_definitions(&after).await?;
        }
        log_boot_result(&report, engine.release.as_deref(), began);
        Ok(report)
    }

    /// Warns of event types that a projector names and that do not occur in the log. They may be
    /// misspelt, or their first event is yet to come.
    async fn warn_of_missing_types(&self) {
        // The warning is not worth a failed boot.
        let Ok(sample) = self.engine.store.sample_types().await else { return };
        for projector in &self.selected {
            let missing =
                projector.event_types().and_then(|types| sample.describe_missing(types.iter()));
            if let Some(missing) = missing {
                warn!(projector = %projector.id, "{missing}");
            }
        }
    }

    /// Records the definitions of the live and finished projectors, which this boot did not replay.
    /// This happens only when the release may proceed: workers do not play a projector whose
    /// recorded definition differs from theirs, and until now these are the workers of the old
    /// release.
    async fn record_live_definitions(&self, entries: &[Entry]) -> Result<(), Error> {
        let tables = self.read_tables(entries).await?;
        for projector in &self.selected {
            let entry = entries.iter().find(|entry| entry.id == projector.id);
            let Some(entry) =
                entry.filter(|entry| matches!(entry.status, Status::Live | Status::Finished))
            else {
                continue;
            };
            self.record_definition(projector, entry).await?;
            if entry.owned_tables.is_none() || self.accept.contains(&projector.id) {
                self.record_tables(projector, entry, Vec::new(), &tables).await?;
            }
        }
        Ok(())
    }

    /// Runs rounds of catch-up and handoff until no cursor is running. After a failure, only the
    /// projectors under repair continue.
    async fn replay(
        &mut self,
        cursors: &mut [Cursor],
        progress: &mut impl FnMut(&BootProgress),
    ) -> Result<(), Error> {
        let is_first = !self.entries().await?.iter().any(|entry| entry.status == Status::Live);
        let mut rounds = 0;
        loop {
            if cursors.iter().any(|cursor| matches!(cursor.state, CursorState::GaveUp(_))) {
                return Ok(());
            }
            let is_retry = self.wake_retries(cursors);
            let Some(start) = cursors
                .iter()
                .filter(|cursor| cursor.is_running())
                .map(|cursor| cursor.position)
                .min()
            else {
                if self.wait_for_retries(cursors, progress).await {
                    continue;
                }
                return Ok(());
            };
            let high_water = self.raise_high_water().await?;
            let mark = high_water.mark;
            if start < mark {
                rounds += 1;
                if !is_retry {
                    info!(round = rounds, from = start.get(), through = mark.get(), "replaying");
                }
            }
            let mut report_progress =
                |cursors: &[Cursor]| progress(&BootProgress::new(cursors, mark, None));
            report_progress(cursors);
            self.engine.catch_up(Stage::Boot, cursors, mark, report_progress).await?;
            if cursors.iter().any(Cursor::should_stop_boot) {
                self.findings.is_stopped = true;
                self.stall(cursors).await?;
            }
            if mark < self.target {
                if !self.wait_for_mark(&high_water, cursors, progress).await {
                    return Ok(());
                }
                continue;
            }
            if let Some(waited) = self.mark_wait.take() {
                waited.end();
            }
            let was_short = mark.since(start) <= self.engine.limits.batch;
            if was_short || rounds >= MAX_CATCH_UP_ROUNDS {
                self.hand_over_or_finish(cursors, mark, is_first).await?;
            }
        }
    }

    /// Hands over or finishes every running cursor that has come far enough: at least to the
    /// target.
    async fn hand_over_or_finish(
        &self,
        cursors: &mut [Cursor],
        mark: Position,
        is_first: bool,
    ) -> Result<(), Error> {
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_running()) {
            let row = match cursor.projector.mode {
                Mode::Once => self.finish(cursor, mark.max(self.target)).await?,
                Mode::FromBeginning | Mode::FromNow => {
                    let oldest = oldest_queued(self.registry, &self.entries().await?, mark);
                    self.engine.hand_over(cursor, oldest.max(self.target)).await?
                }
            };
            cursor.record_entry(row.as_ref());
        }
        if is_first && cursors.iter().any(|cursor| cursor.projector.mode != Mode::Once) {
            // No live projector needs earlier events, so the queue does not have to carry the
            // history of the log.
            let skip = || self.engine.store.skip_published(mark);
            self.engine.retry_transient("set the published mark", skip).await?;
        }
        Ok(())
    }

    /// Finishes a projector of mode once if its position is still at or beyond `target`. Returns
    /// the resulting row, if any.
    async fn finish(
        &self,
        cursor: &Cursor,
        target: Position,
    ) -> Result<Option<Entry>, LedgerError> {
        let id = &cursor.projector.id;
        let still = |entry: &Entry| {
            has_reached(entry, target) && entry.matches_digest(&cursor.projector.digest)
        };
        let step = || self.engine.ledger.transition(id, Transition::Finish, still);
        let entry = self.engine.retry_transient("finish", step).await?;
        if let Some(entry) = entry.as_ref().filter(|entry| entry.status == Status::Finished) {
            let (from, began) = cursor.start;
            info!(
                projector = %id, status = %entry.status, position = entry.position.get(),
                events = entry.position.since(from), seconds = backoff::seconds(began.elapsed()),
                release = self.engine.release, "finished"
            );
        }
        Ok(entry)
    }

    /// If a projector has failed that was not broken before, marks the others as stalled.
    /// Projectors under repair continue.
    async fn stall(&self, cursors: &mut [Cursor]) -> Result<(), Error> {
        if !self.findings.is_stopped {
            return Ok(());
        }
        for cursor in cursors.iter_mut().filter(|cursor| cursor.is_active() && !cursor.was_broken) {
            let still = |entry: &Entry| matches!(entry.status, Status::Booting | Status::Stalled);
            let step =
                || self.engine.ledger.transition(&cursor.projector.id, Transition::Stall, still);
            self.engine.retry_transient("stall a projector", step).await?;
            warn!(
                projector = %cursor.projector.id, status = "stalled",
                position = cursor.position.get(), release = self.engine.release,
                "stalled: another projector of this boot failed"
            );
            cursor.state = CursorState::TakenOver;
        }
        Ok(())
    }

    async fn entries(&self) -> Result<Vec<Entry>, sqlx::Error> {
        self.engine.retry_transient("read the ledger", || self.engine.ledger.entries()).await
    }

    async fn raise_high_water(&mut self) -> Result<HighWater, sqlx::Error> {
        let raise = || self.engine.store.raise_high_water();
        let high_water = self.engine.retry_transient("raise the high-water mark", raise).await?;
        self.blocked_watch.record(&self.engine.store, high_water.blocked.clone());
        Ok(high_water)
    }
}

fn log_boot_result(report: &BootReport, release: Option<&str>, began: Instant) {
    let (released, seconds) = (report.is_released(), backoff::seconds(began.elapsed()));
    if released {
        info!(
            released,
            release,
            seconds,
            projectors = report.projectors.len(),
            "booted: this release may proceed"
        );
        return;
    }
    let broken: Vec<String> = report.broken().map(|booted| booted.id.to_string()).collect();
    let is_only_broken = report.is_only_broken();
    let error = (!is_only_broken).then(|| report.explain());
    let broken = (!broken.is_empty()).then(|| broken.join(" "));
    error!(
        alert = "boot_failed",
        broken, error, released, release, seconds, "boot failed: this release must not proceed"
    );
}

/// The start position of a new projector.
pub(crate) fn start_position(mode: Mode, high_water: Position) -> Position {
    match mode {
        Mode::FromNow => high_water,
        Mode::FromBeginning | Mode::Once => Position::START,
    }
}

/// Refuses a changed mode. The mode is fixed when a projector is registered, because events that
/// were skipped or replayed then cannot be changed later.
fn check_modes(selected: &[Arc<RegisteredProjector>], ledger: &[Entry]) -> Result<(), Error> {
    for entry in ledger {
        let projector = selected.iter().find(|projector| projector.id == entry.id);
        if let Some(projector) = projector.filter(|projector| projector.mode != entry.mode) {
            return Err(Error::Input(format!(
                "projector {} was booted in mode {}, but its mode is now {}: give it a new version \
                 to run it in another mode",
                entry.id, entry.mode, projector.mode
            )));
        }
    }
    Ok(())
}

impl From<LedgerError> for Error {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Database(error) => error.into(),
            LedgerError::Step(..) => Error::Input(error.to_string()),
        }
    }
}
