//! Fan-out: one batch of messages to every live projector, one after the other, in registry order.

use tokio::time::timeout;
use tracing::{debug, warn};

use super::foreign::{claimed_positions, verify_message};
use super::worker::Worker;
use crate::engine::apply::Batch;
use crate::engine::catch_up::{Cursor, CursorState};
use crate::model::continuity::{self, Action, Run};
use crate::model::event::Position;
use crate::model::lifecycle::Stage;
use crate::model::metrics;
use crate::model::projector::ProjectorId;
use crate::queue::{ForeignReason, Message};
use crate::store::LogSnapshot;

impl Worker {
    /// Passes messages to every live projector of the convoy by the chain rule, and counts those
    /// that break. `Ok`: each of them has committed past all of our messages, is broken, is no
    /// longer ours, or has left the convoy and reads the store instead. So they may be deleted, but
    /// for those that are not ours: it says of each message why it is not.
    ///
    /// # Errors
    /// If ledger or log cannot be read: then nothing may be deleted.
    pub(super) async fn fan_out(
        &mut self,
        bodies: &[String],
    ) -> Result<Vec<Option<ForeignReason>>, sqlx::Error> {
        // Read again with every batch: what was booted, broken or retired meanwhile joins or
        // leaves. So is the identity of the log: nothing is applied because of an id or a key that
        // was its own once.
        let positions = claimed_positions(bodies);
        let (live, view) = tokio::try_join!(
            self.engine.ledger.live_projectors(),
            self.engine.store.snapshot(&positions)
        )?;
        let live = self.select_played(live);
        self.record_log_id(&view.marks.log.id);
        let SortedMessages { runs, has_references, foreign } = sort_messages(bodies, &view);
        self.broken += self.stragglers.readmit();
        if runs.is_empty() && !has_references {
            return Ok(foreign);
        }
        let target = match has_references {
            false => None,
            true => Some(self.engine.store.raise_high_water().await?.mark),
        };

        let timed_out = self.in_progress.take();
        let mut group = self.form_group(&live, &runs, target, timed_out.as_ref());
        let background_after = self.background_after;
        if let ([run], None) = (&runs[..], target) {
            let whole = |cursor: &Cursor| match next_need(cursor, run, u64::MAX) {
                Need::Batch(batch) => Some(batch),
                Need::Nothing | Need::CatchUp => None,
            };
            let skip_ahead = self.engine.skip_ahead(Stage::Play, &mut group, run.last(), whole);
            // A row that another worker holds for longer is waited for below, by its own projector
            // only.
            let _ = timeout(background_after.time, skip_ahead).await;
        }
        for mut cursor in group {
            self.in_progress = Some(cursor.projector.id.clone());
            let processed =
                timeout(background_after.time, self.process(&mut cursor, &runs, target)).await;
            self.in_progress = None;
            match processed {
                Ok(processed) => processed?,
                Err(_) => {
                    warn!(
                        projector = %cursor.projector.id, position = cursor.position.get(),
                        seconds = background_after.time.as_secs_f32(),
                        "takes too long: leaves the convoy and catches up by itself"
                    );
                    self.stragglers.move_to_background(
                        &self.engine,
                        &cursor.projector,
                        cursor.position,
                    );
                }
            }
            self.broken += u64::from(matches!(cursor.state, CursorState::Broken));
        }
        Ok(foreign)
    }

    /// The live projectors that can follow, in registry order. Those that are far behind are sent
    /// off, and who held up the last fan-out until it was cut off: there was no time to let it go
    /// then.
    fn form_group(
        &mut self,
        live: &[(ProjectorId, Position)],
        runs: &[Run],
        target: Option<Position>,
        timed_out: Option<&ProjectorId>,
    ) -> Vec<Cursor> {
        let mut group = Vec::new();
        for projector in self.registry.iter() {
            let Some(&(_, position)) = live.iter().find(|(id, _)| *id == projector.id) else {
                continue;
            };
            if self.stragglers.is_catching_up(&projector.id) {
                continue;
            }
            let is_slow = timed_out == Some(&projector.id);
            if is_slow || is_far_behind(position, runs, target, self.background_after.events) {
                let why = if is_slow { "slow" } else { "far behind" };
                warn!(
                    projector = %projector.id, position = position.get(),
                    "{why}: leaves the convoy and catches up by itself"
                );
                self.stragglers.move_to_background(&self.engine, projector, position);
                continue;
            }
            metrics::record_duplicates(
                &projector.id,
                runs.iter().map(|run| run.count_through(position)).sum(),
            );
            group.push(Cursor::new(projector, position));
        }
        group
    }

    /// Brings one projector past all runs, and through the target of the references.
    async fn process(
        &self,
        cursor: &mut Cursor,
        runs: &[Run],
        target: Option<Position>,
    ) -> Result<(), sqlx::Error> {
        for run in runs {
            self.process_run(cursor, run).await?;
        }
        match target {
            Some(target) => self.catch_up_from_store(cursor, target).await,
            None => Ok(()),
        }
    }

    /// Brings one projector past one run.
    async fn process_run(&self, cursor: &mut Cursor, run: &Run) -> Result<(), sqlx::Error> {
        loop {
            match next_need(cursor, run, self.engine.limits.batch) {
                Need::Nothing => return Ok(()),
                Need::Batch(batch) => cursor.record(
                    self.engine.apply_with_retry(&cursor.projector, Stage::Play, batch).await,
                ),
                Need::CatchUp => {
                    debug!(
                        projector = %cursor.projector.id, position = cursor.position.get(), prev = run.prev().get(),
                        "the queue does not continue this projector: catching up from the store"
                    );
                    self.catch_up_from_store(cursor, run.last()).await?;
                }
            }
        }
    }

    /// Catches one projector up from the store.
    pub(super) async fn catch_up_from_store(
        &self,
        cursor: &mut Cursor,
        through: Position,
    ) -> Result<(), sqlx::Error> {
        if cursor.is_running() && cursor.position < through {
            metrics::record_fallback_read(&cursor.projector.id);
        }
        self.engine.catch_up(Stage::Play, std::slice::from_mut(cursor), through, |_| {}).await
    }
}

/// Whether a projector would have to read more than `max_events` events from the store before it
/// can follow.
fn is_far_behind(
    position: Position,
    runs: &[Run],
    target: Option<Position>,
    max_events: u64,
) -> bool {
    let before_the_runs = runs.first().map_or(0, |run| run.prev().since(position));
    let after_the_runs = target
        .map_or(0, |target| target.since(runs.last().map_or(position, Run::last).max(position)));
    before_the_runs.max(after_the_runs) > max_events
}

/// What a projector still needs before a message that carries a run may be deleted, as far as it is
/// concerned.
#[derive(Debug)]
pub(crate) enum Need<'a> {
    /// It has committed past the run, is broken, or is no longer ours.
    Nothing,
    /// The next events of the run.
    Batch(Batch<'a>),
    /// What lies before the run's end, from the store.
    CatchUp,
}

/// The chain rule for one projector, in batches.
pub(crate) fn next_need<'a>(cursor: &Cursor, run: &'a Run, limit: u64) -> Need<'a> {
    if !cursor.is_running() {
        return Need::Nothing;
    }
    match continuity::choose_action(cursor.position, run) {
        Action::Skip => Need::Nothing,
        Action::Apply => {
            let rest = run.above(cursor.position);
            let events = &rest[..rest.len().min(limit as usize)];
            let through = events.last().map_or(run.last(), |event| event.position());
            Need::Batch(Batch { after: cursor.position, through, events })
        }
        Action::CatchUp => Need::CatchUp,
    }
}

/// What came with one receive.
#[derive(Debug)]
pub(crate) struct SortedMessages {
    /// The events, joined and in order.
    pub(crate) runs: Vec<Run>,
    /// Whether there are events that have to be read from the store.
    pub(crate) has_references: bool,
    /// Of each message, in the order in which they came, why it is not ours; `None`: it is.
    pub(crate) foreign: Vec<Option<ForeignReason>>,
}

/// Reads messages. Each run is compared with the log before it is joined to others.
pub(crate) fn sort_messages(bodies: &[String], view: &LogSnapshot) -> SortedMessages {
    let mut runs = Vec::new();
    let mut has_references = false;
    let foreign = bodies.iter().map(|body| match verify_message(body, view) {
        Message::Events(run) => {
            runs.push(run);
            None
        }
        Message::Reference(_) => {
            has_references = true;
            None
        }
        Message::Foreign(why) => Some(why),
    });
    let foreign = foreign.collect();
    SortedMessages { runs: continuity::merge(runs), has_references, foreign }
}
