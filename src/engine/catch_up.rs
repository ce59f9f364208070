//! The one loop that reads MySQL and applies: boot's replay, and the repair of every hole.

use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream;
use tokio::time::timeout;
use tracing::debug;

use crate::engine::apply::{Batch, CLAIM_CARRY_TIMEOUT, ClaimCarry};
use crate::engine::retry::{ApplyOutcome, Engine};
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::Stage;
use crate::model::registry::RegisteredProjector;
use crate::store::{EventFilter, Page, ReadAhead, ReadLimits};

/// Projectors that apply one page at the same time, each on a connection of its own.
pub(crate) const MAX_CONCURRENT_PROJECTORS: usize = 8;

/// A projector on its way through the log.
pub(crate) struct Cursor {
    pub(crate) projector: Arc<RegisteredProjector>,
    pub(crate) position: Position,
    pub(crate) state: CursorState,
    /// Where it began, and when.
    pub(crate) start: (Position, Instant),
    /// Whether it was broken when boot began: then it neither stops the others nor is stopped by
    /// them.
    pub(crate) was_broken: bool,
}

/// Whether a cursor goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CursorState {
    /// It does.
    Running,
    /// Its projector broke; it stands just before the event.
    Broken,
    /// Another worker, another boot or retire took it over.
    TakenOver,
    /// The database failed for too long.
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

    /// Whether boot must not go on with the others as it did: this one broke and did not before, or
    /// gave up.
    pub(crate) fn should_stop_boot(&self) -> bool {
        match self.state {
            CursorState::Broken => !self.was_broken,
            CursorState::GaveUp(_) => true,
            CursorState::Running | CursorState::TakenOver => false,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state == CursorState::Running
    }

    /// Takes note of what became of a batch.
    pub(crate) fn record(&mut self, outcome: ApplyOutcome) {
        match outcome {
            ApplyOutcome::Reached(position) | ApplyOutcome::MovedByOther(position) => {
                self.position = position
            }
            ApplyOutcome::Broken => self.state = CursorState::Broken,
            ApplyOutcome::TakenOver => self.state = CursorState::TakenOver,
            ApplyOutcome::GaveUp(error) => self.state = CursorState::GaveUp(error),
        }
    }

    /// Takes note of its row after an attempt to release it from boot: boot goes on with what is
    /// still its own, from where that stands, and lets go of what went live, was retired, is no
    /// more, was booted by another release, or must be rebuilt.
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

    /// What it applies of a page, if it stands in it.
    pub(crate) fn batch<'a>(&self, page: &'a Page) -> Option<Batch<'a>> {
        if !self.is_running() || !(page.after..page.through).contains(&self.position) {
            return None;
        }
        let known = page.events.partition_point(|event| event.position() <= self.position);
        Some(Batch { after: self.position, through: page.through, events: &page.events[known..] })
    }
}

/// Where the next page begins: at the position of the cursor that is furthest behind `through`.
pub(crate) fn lowest_behind(cursors: &[Cursor], through: Position) -> Option<Position> {
    cursors.iter().filter(|cursor| cursor.is_behind(through)).map(|cursor| cursor.position).min()
}

impl Engine {
    /// Brings every running cursor to `through`, which must not lie above the high-water mark. The
    /// log is read once for all of them, from the lowest on, and ahead of what is applied. In boot,
    /// the first failure of a projector that was not broken before ends it; in play, each cursor
    /// goes on without the others.
    ///
    /// # Errors
    /// If the log cannot be read, for longer than the engine's patience where it is transient.
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
            self.apply_page(stage, cursors, &page, &mut carry).await;

            progress(cursors);
            if stage == Stage::Boot && stopped_boot(cursors) > stopped_before {
                return Ok(());
            }
        }
    }

    /// Whether a row may stay claimed from page to page. Only in boot, for in play other workers
    /// are at it; only where a projector is alone, for among several it would be claimed while the
    /// others are waited for, and they may wait for a boot that waits for it; and not where its
    /// handler acts elsewhere, which cannot be rolled back: such a one looks at its row just
    /// before.
    fn may_carry(&self, stage: Stage, cursors: &[Cursor]) -> bool {
        let mut running = cursors.iter().filter(|cursor| cursor.is_running());
        match (running.next(), running.next()) {
            (Some(alone), None) => {
                stage == Stage::Boot && !alone.projector.needs_transaction_per_event()
            }
            _ => false,
        }
    }

    /// Passes a page to every cursor that stands in it.
    async fn apply_page(
        &self,
        stage: Stage,
        cursors: &mut [Cursor],
        page: &Page,
        carry: &mut ClaimCarry,
    ) {
        if !carry.has_claim() {
            self.skip_ahead(stage, cursors, page.through, |cursor| cursor.batch(page)).await;
        }
        let in_page =
            cursors.iter_mut().filter_map(|cursor| cursor.batch(page).map(|batch| (cursor, batch)));
        let mut in_page: Vec<_> = in_page.collect();
        if let [(cursor, batch)] = in_page.as_mut_slice() {
            cursor.record(
                self.apply_with_retry_and_carry(&cursor.projector, stage, *batch, carry).await,
            );
            return;
        }
        let concurrency =
            MAX_CONCURRENT_PROJECTORS.min(self.database.max_handler_connections() as usize);
        stream::iter(in_page)
            .for_each_concurrent(concurrency, async |(cursor, batch)| {
                cursor.record(self.apply_with_retry(&cursor.projector, stage, batch).await);
            })
            .await;
    }

    /// Moves those cursors together whose batch up to `through` has nothing for them: it costs one
    /// statement, and not a transaction each. Whoever is not moved by that, for whatever reason, is
    /// left to be delivered to.
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
                // Some were moved and some were not: each will find out by its own claim.
                Ok(_) => {}
                Err(error) => debug!(%error, "projectors were not moved together"),
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
            let batch = cursor.batch(&page).expect("it stands in the page");
            batch.wanted(&cursor.projector).collect::<Vec<&Event>>()
        });
        assert_eq!((wanted.len(), wanted[0].position()), (45, Position::new(12)));
    }
}
