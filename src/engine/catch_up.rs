//! The loop that reads events from the store and applies them. Boot uses it to replay the log, and
//! play uses it to fill in events that the queue did not deliver.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream;
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tracing::debug;

use crate::engine::apply::{Batch, CLAIM_CARRY_TIMEOUT, ClaimCarry};
use crate::engine::retries::RetryWait;
use crate::engine::retry::{ApplyOutcome, Engine};
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::Stage;
use crate::model::registry::RegisteredProjector;
use crate::store::{EventFilter, Page, ReadAhead, ReadLimits};

/// How many projectors apply the same page at the same time, each in a task and on a connection of
/// its own.
pub(crate) const MAX_CONCURRENT_PROJECTORS: usize = 8;

/// A projector's progress through the log.
pub(crate) struct Cursor {
    pub(crate) projector: Arc<RegisteredProjector>,
    pub(crate) position: Position,
    pub(crate) state: CursorState,
    /// The position and the time at which this cursor started.
    pub(crate) start: (Position, Instant),
    /// Whether the projector was already broken when boot began. Such a projector neither stops the
    /// others nor is stopped by them.
    pub(crate) was_broken: bool,
}

/// Whether a cursor continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CursorState {
    /// The cursor continues.
    Running,
    /// The projector broke. Its position is just before the failing event.
    Broken,
    /// The projector waits for a later retry. The cursor continues when the retry is due.
    Waiting(RetryWait),
    /// Another worker, another boot or retire took the projector over.
    TakenOver,
    /// Transient errors outlasted the retry timeout, or the ledger cannot be written.
    GaveUp(String),
}

impl Cursor {
    pub(crate) fn new(projector: &Arc<RegisteredProjector>, position: Position) -> Self {
        let start = (position, Instant::now());
        Cursor {
            projector: Arc::clone(projector),
            position,
            state: CursorState::Running,
            start,
            was_broken: false,
        }
    }

    /// Whether boot must stop the other projectors: this one gave up, or it broke and was not
    /// broken before.
    pub(crate) fn should_stop_boot(&self) -> bool {
        match self.state {
            CursorState::Broken => !self.was_broken,
            CursorState::GaveUp(_) => true,
            CursorState::Running | CursorState::Waiting(_) | CursorState::TakenOver => false,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state == CursorState::Running
    }

    /// Whether the cursor continues, now or when its retry is due.
    pub(crate) fn is_active(&self) -> bool {
        matches!(self.state, CursorState::Running | CursorState::Waiting(_))
    }

    /// Records the outcome of a batch.
    pub(crate) fn record(&mut self, outcome: ApplyOutcome) {
        match outcome {
            ApplyOutcome::Reached(position) | ApplyOutcome::MovedByOther(position) => {
                self.position = position
            }
            ApplyOutcome::Broken => self.state = CursorState::Broken,
            ApplyOutcome::Waiting(wait) => {
                self.position = wait.position;
                self.state = CursorState::Waiting(wait);
            }
            ApplyOutcome::TakenOver => self.state = CursorState::TakenOver,
            ApplyOutcome::GaveUp(error) => self.state = CursorState::GaveUp(error),
        }
    }

    /// Records the projector's ledger row after an attempt to hand it over or to finish it. If boot
    /// still owns the projector, the cursor continues from the row's position. It is taken over if
    /// the row shows that the projector went live, was retired or removed, was booted by another
    /// release, or must be rebuilt.
    pub(crate) fn record_entry(&mut self, entry: Option<&Entry>) {
        let is_ours = |entry: &&Entry| {
            let is_playable =
                Stage::Boot.can_apply(&entry.status) && entry.rebuild_reason.is_none();
            is_playable && entry.matches_digest(&self.projector.digest)
        };
        match entry.filter(is_ours) {
            Some(entry) => self.position = entry.position,
            None => self.state = CursorState::TakenOver,
        }
    }

    fn is_behind(&self, through: Position) -> bool {
        self.is_running() && self.position < through
    }

    /// The part of a page that this cursor has to apply. `None` if the cursor is not running, or
    /// its position is outside the page.
    pub(crate) fn batch<'a>(&self, page: &'a Page) -> Option<Batch<'a>> {
        let is_in_page = (page.after..page.through).contains(&self.position);
        (self.is_running() && is_in_page).then(|| rest_of_page(page, self.position))
    }
}

/// The part of a page after a position in it.
fn rest_of_page(page: &Page, after: Position) -> Batch<'_> {
    let known = page.events.partition_point(|event| event.position() <= after);
    Batch { after, through: page.through, events: &page.events[known..] }
}

/// Where the next page begins: the lowest position of the running cursors below `through`.
pub(crate) fn lowest_behind(cursors: &[Cursor], through: Position) -> Option<Position> {
    cursors.iter().filter(|cursor| cursor.is_behind(through)).map(|cursor| cursor.position).min()
}

impl Engine {
    /// Brings every running cursor to `through`, which must not lie above the high-water mark. The
    /// log is read once for all cursors, from the lowest position on, ahead of the handlers. In
    /// boot, the first failure of a projector that was not broken before ends the catch-up. In
    /// play, the other cursors continue without the failed one.
    ///
    /// # Errors
    /// If the log cannot be read. Transient errors are retried for the engine's `retry_timeout`.
    pub(crate) async fn catch_up(
        &self,
        stage: Stage,
        cursors: &mut [Cursor],
        through: Position,
        mut progress: impl FnMut(&[Cursor]),
    ) -> Result<(), sqlx::Error> {
        let limits =
            ReadLimits { page_events: self.limits.batch, retry_timeout: self.limits.retry_timeout };
        let stopped_boot =
            |cursors: &[Cursor]| cursors.iter().filter(|cursor| cursor.should_stop_boot()).count();
        let stopped_before = stopped_boot(cursors);
        let mut carry = ClaimCarry::none();
        let mut reading: Option<ReadAhead> = None;
        loop {
            let Some(lowest) = lowest_behind(cursors, through) else { return Ok(()) };
            let pages = match reading.take() {
                Some(pages) if pages.position() == lowest => reading.insert(pages),
                _ => {
                    let running = cursors.iter().filter(|cursor| cursor.is_running());
                    let wanted =
                        EventFilter::any_of(running.map(|cursor| cursor.projector.event_types()));
                    reading.insert(self.store.read_ahead(lowest, through, wanted, limits))
                }
            };
            let page = match timeout(CLAIM_CARRY_TIMEOUT, pages.next()).await {
                Ok(page) => page?,
                Err(_) => {
                    carry.release();
                    pages.next().await?
                }
            };
            carry.should_carry = page.through < through && self.may_carry(stage, cursors);
            self.apply_page(stage, cursors, &Arc::new(page), &mut carry).await;

            progress(cursors);
            if stage == Stage::Boot && stopped_boot(cursors) > stopped_before {
                return Ok(());
            }
        }
    }

    /// Whether a row may stay claimed from page to page. All of these must hold:
    ///
    /// - The stage is boot. In play, other workers claim the same rows.
    /// - Only one projector is running. With several, the row would stay locked while the others
    ///   are awaited, and they may wait for another boot that waits for this row.
    /// - The handler has no side effects outside its transaction. They cannot be rolled back, so
    ///   such a handler must check its row just before it runs.
    fn may_carry(&self, stage: Stage, cursors: &[Cursor]) -> bool {
        let mut running = cursors.iter().filter(|cursor| cursor.is_running());
        match (running.next(), running.next()) {
            (Some(alone), None) => {
                stage == Stage::Boot && !alone.projector.needs_transaction_per_event()
            }
            _ => false,
        }
    }

    /// Applies a page to every cursor whose position is in the page. Returns when all are done, so
    /// that no projector makes the next page wait in memory.
    async fn apply_page(
        &self,
        stage: Stage,
        cursors: &mut [Cursor],
        page: &Arc<Page>,
        carry: &mut ClaimCarry,
    ) {
        if !carry.has_claim() {
            self.skip_ahead(stage, cursors, page.through, |cursor| cursor.batch(page)).await;
        }
        let mut in_page: Vec<&mut Cursor> =
            cursors.iter_mut().filter(|cursor| cursor.batch(page).is_some()).collect();
        if let [cursor] = in_page.as_mut_slice() {
            let batch = rest_of_page(page, cursor.position);
            let applying = self.apply_with_retry_and_carry(&cursor.projector, stage, batch, carry);
            let outcome = applying.await;
            cursor.record(outcome);
            return;
        }
        let concurrency =
            MAX_CONCURRENT_PROJECTORS.min(self.database.max_handler_connections() as usize);
        stream::iter(in_page)
            .for_each_concurrent(concurrency, async |cursor| {
                let outcome = self.apply_in_task(stage, cursor, page).await;
                cursor.record(outcome);
            })
            .await;
    }

    /// Applies the rest of a page to one cursor in a task of its own, so that handlers that compute
    /// use all cores. Dropping the future cancels the task.
    async fn apply_in_task(&self, stage: Stage, cursor: &Cursor, page: &Arc<Page>) -> ApplyOutcome {
        let (engine, page) = (self.clone(), Arc::clone(page));
        let (projector, after) = (Arc::clone(&cursor.projector), cursor.position);
        let mut task = JoinSet::new();
        task.spawn(async move {
            engine.apply_with_retry(&projector, stage, rest_of_page(&page, after)).await
        });
        match task.join_next().await {
            Some(Ok(outcome)) => outcome,
            // A handler's panic is an outcome. This one is a bug of ours.
            Some(Err(error)) if error.is_panic() => resume_unwind(error.into_panic()),
            ended => ApplyOutcome::GaveUp(format!(
                "the runtime is shutting down: {}",
                ended.and_then(Result::err).as_ref().map_or_else(String::new, JoinError::to_string)
            )),
        }
    }

    /// Moves all cursors whose batch up to `through` has no events for them, with one statement
    /// instead of one transaction each. Cursors that this does not move, for whatever reason, go
    /// through the normal path.
    pub(crate) async fn skip_ahead<'a>(
        &self,
        stage: Stage,
        cursors: &mut [Cursor],
        through: Position,
        batch: impl Fn(&Cursor) -> Option<Batch<'a>>,
    ) {
        let has_nothing = |cursor: &Cursor| {
            let batch = batch(cursor).filter(|batch| batch.through == through);
            batch.is_some_and(|batch| batch.wanted(&cursor.projector).next().is_none())
        };
        let mut idle: Vec<&mut Cursor> =
            cursors.iter_mut().filter(|cursor| has_nothing(cursor)).collect();
        idle.sort_by_key(|cursor| cursor.position);
        for together in idle.chunk_by_mut(|one, other| one.position == other.position) {
            let projectors: Vec<&RegisteredProjector> =
                together.iter().map(|cursor| cursor.projector.as_ref()).collect();
            match self.ledger.skip_ahead(&projectors, stage, together[0].position, through).await {
                Ok(moved) if moved == projectors.len() as u64 => {
                    together.iter_mut().for_each(|cursor| cursor.position = through);
                }
                // Only some were moved. The claim of each remaining one finds out why.
                Ok(_) => {}
                Err(error) => debug!(%error, "cannot move projectors together"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use sqlx::MySqlConnection;

    use super::*;
    use crate::model::event::Event;
    use crate::model::projector::{EventTypes, Projector};
    use crate::model::registry::Registry;
    use crate::testing::hot_path;

    struct WantsHalf;

    #[async_trait]
    impl Projector for WantsHalf {
        fn name(&self) -> &str {
            "wants_half"
        }

        fn event_types(&self) -> EventTypes {
            EventTypes::only(["Check confirmation", "Draft decision"])
        }

        async fn handle(&self, _: &Event, _: &mut MySqlConnection) -> anyhow::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn hot_path_batch_of_a_page() {
        let registry = Registry::new().with(WantsHalf).expect("a name");
        let cursor = Cursor::new(registry.iter().next().expect("one"), Position::new(10));
        let (after, through) = (Position::START, Position::new(hot_path::EVENT_COUNT));
        let page = Page { events: hot_path::events(), after, through };
        let wanted = hot_path::count(|| {
            let batch = cursor.batch(&page).expect("its position is in the page");
            batch.wanted(&cursor.projector).collect::<Vec<&Event>>()
        });
        assert_eq!((wanted.len(), wanted[0].position()), (45, Position::new(12)));
    }
}
