//! Fan-out: passes one batch of messages to every live projector, one after the other, in registry
//! order.

use std::collections::HashMap;

use tokio::time::timeout;
use tracing::{debug, warn};

use super::background::Why;
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
    /// Passes messages to every live projector of the fan-out group by the continuity rule, and
    /// counts the projectors that break. The result has one entry per message: `None` if it belongs
    /// to this log, or the reason why it is foreign.
    ///
    /// On `Ok`, the messages of this log may be deleted. Each projector has committed past them, is
    /// broken, was taken over, or has moved to the background, where it reads the store instead.
    ///
    /// # Errors
    /// If the ledger or the log cannot be read. Then no message may be deleted.
    pub(super) async fn fan_out(
        &mut self,
        bodies: &[String],
    ) -> Result<Vec<Option<ForeignReason>>, sqlx::Error> {
        // Read again with every batch, so that projectors that were booted, broken or retired join
        // or leave. The log's identity is also read again: a message with an old id or key must not
        // be applied.
        let positions = claimed_positions(bodies);
        let (live, view) = tokio::try_join!(
            self.engine.ledger.live_projectors(),
            self.engine.store.snapshot(&positions)
        )?;
        let live = self.select_played(live).await?;
        self.record_log_id(&view.marks.log.id);
        let SortedMessages { runs, has_references, foreign } = sort_messages(bodies, &view);
        self.broken += self.stragglers.readmit();
        if runs.is_empty() && !has_references {
            return Ok(foreign);
        }
        let target = if has_references {
            Some(self.engine.store.raise_high_water().await?.mark)
        } else {
            None
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
            // If another worker holds a row for longer, only that row's projector waits for it
            // below.
            let _ = timeout(background_after.time, skip_ahead).await;
        }
        for mut cursor in group {
            self.in_progress = Some(cursor.projector.id.clone());
            let processed =
                timeout(background_after.time, self.process(&mut cursor, &runs, target)).await;
            self.in_progress = None;
            match processed {
                Ok(processed) => {
                    processed?;
                    if matches!(cursor.state, CursorState::Waiting(_)) {
                        self.stragglers.move_to_background(
                            &self.engine,
                            &cursor.projector,
                            cursor.position,
                            Why::Retries,
                        );
                    }
                }
                Err(_) => {
                    warn!(
                        projector = %cursor.projector.id, position = cursor.position.get(),
                        seconds = background_after.time.as_secs_f32(),
                        "slow: moves to the background and catches up there"
                    );
                    self.stragglers.move_to_background(
                        &self.engine,
                        &cursor.projector,
                        cursor.position,
                        Why::Delays,
                    );
                }
            }
            self.broken += u64::from(matches!(cursor.state, CursorState::Broken));
        }
        Ok(foreign)
    }

    /// The fan-out group in registry order. Projectors that are far behind move to the background.
    /// So does the projector that was in progress when the last fan-out was interrupted, because
    /// there was no time to move it then.
    fn form_group(
        &mut self,
        live: &[(ProjectorId, Position)],
        runs: &[Run],
        target: Option<Position>,
        timed_out: Option<&ProjectorId>,
    ) -> Vec<Cursor> {
        let live: HashMap<&ProjectorId, Position> =
            live.iter().map(|(id, position)| (id, *position)).collect();
        let mut group = Vec::new();
        for projector in self.registry.iter() {
            let Some(&position) = live.get(&projector.id) else { continue };
            if self.stragglers.is_catching_up(&projector.id) {
                continue;
            }
            if self.engine.retries.contains(&projector.id) {
                // Its next attempt is not made here, where the others would wait for it.
                self.stragglers.move_to_background(&self.engine, projector, position, Why::Retries);
                continue;
            }
            let is_slow = timed_out == Some(&projector.id);
            if is_slow || is_far_behind(position, runs, target, self.background_after.events) {
                let why = if is_slow { "slow" } else { "far behind" };
                warn!(
                    projector = %projector.id, position = position.get(),
                    "{why}: moves to the background and catches up there"
                );
                self.stragglers.move_to_background(&self.engine, projector, position, Why::Delays);
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

    /// Brings one projector past all runs and, if there are references, to `target`.
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
                        projector = %cursor.projector.id, position = cursor.position.get(),
                        prev = run.prev().get(),
                        "the messages do not continue this projector's position: catching up from \
                         the store"
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
/// can continue with the runs or reach the target.
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

/// What a projector still needs before the message with a run may be deleted.
#[derive(Debug)]
pub(crate) enum Need<'a> {
    /// Nothing: the projector has committed past the run, is broken or was taken over.
    Nothing,
    /// The next events of the run.
    Batch(Batch<'a>),
    /// The events up to the end of the run, from the store.
    CatchUp,
}

/// Applies the continuity rule to one projector, in batches of at most `limit` events.
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

/// The messages of one receive, sorted.
#[derive(Debug)]
pub(crate) struct SortedMessages {
    /// The runs of events, merged and in order.
    pub(crate) runs: Vec<Run>,
    /// Whether there are references, whose events have to be read from the store.
    pub(crate) has_references: bool,
    /// For each message, in the order received: why it is foreign, or `None` if it belongs to this
    /// log.
    pub(crate) foreign: Vec<Option<ForeignReason>>,
}

/// Parses messages. Each run is compared with the log before it is merged with others.
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
