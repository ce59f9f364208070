//! The one loop that reads MySQL and applies: boot's replay, and the repair of every hole.

use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream;
use tokio::time::timeout;
use tracing::debug;

use crate::engine::apply::{Batch, HELD_FOR, Hold};
use crate::engine::deliver::{Delivered, Engine};
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::Stage;
use crate::model::registry::Registered;
use crate::store::{Page, ReadAhead, ReadLimits, Wanted};

/// Projectors that apply one page at the same time, each on a connection of its own.
pub(crate) const SIDE_BY_SIDE: usize = 8;

/// A projector on its way through the log.
pub(crate) struct Cursor {
    pub(crate) projector: Arc<Registered>,
    pub(crate) position: Position,
    pub(crate) state: CursorState,
    /// Where it began, and when.
    pub(crate) start: (Position, Instant),
    /// Whether it was broken when boot began: then it neither stops the others nor is stopped by them.
    pub(crate) is_repair: bool,
}

/// Whether a cursor goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CursorState {
    /// It does.
    Running,
    /// Its projector broke; it stands just before the event.
    Broke,
    /// Another worker, another boot or retire took it over.
    Left,
    /// The database failed for too long.
    GaveUp(String),
}

impl Cursor {
    pub(crate) fn new(projector: &Arc<Registered>, position: Position) -> Self {
        let start = (position, Instant::now());
        Cursor { projector: Arc::clone(projector), position, state: CursorState::Running, start, is_repair: false }
    }

    /// Whether boot must not go on with the others as it did: this one broke and did not before, or gave up.
    pub(crate) fn has_stopped_boot(&self) -> bool {
        match self.state {
            CursorState::Broke => !self.is_repair,
            CursorState::GaveUp(_) => true,
            CursorState::Running | CursorState::Left => false,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state == CursorState::Running
    }

    /// Takes note of what became of a batch.
    pub(crate) fn note(&mut self, delivered: Delivered) {
        match delivered {
            Delivered::At(position) | Delivered::Elsewhere(position) => self.position = position,
            Delivered::Broke => self.state = CursorState::Broke,
            Delivered::Left => self.state = CursorState::Left,
            Delivered::GaveUp(error) => self.state = CursorState::GaveUp(error),
        }
    }

    /// Takes note of its row after an attempt to release it from boot: boot goes on with what is still its own,
    /// from where that stands, and lets go of what went live, was retired, is no more, was booted by another release, or
    /// must be rebuilt.
    pub(crate) fn note_row(&mut self, entry: Option<&Entry>) {
        let is_ours = |entry: &&Entry| {
            let is_playable = Stage::Boot.plays(&entry.status) && entry.rebuild_reason.is_none();
            is_playable && entry.is_booted_with(&self.projector.digest)
        };
        match entry.filter(is_ours) {
            Some(entry) => self.position = entry.position,
            None => self.state = CursorState::Left,
        }
    }

    fn is_due(&self, through: Position) -> bool {
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
pub(crate) fn lowest_due(cursors: &[Cursor], through: Position) -> Option<Position> {
    cursors.iter().filter(|cursor| cursor.is_due(through)).map(|cursor| cursor.position).min()
}

impl Engine {
    /// Brings every running cursor to `through`, which must not lie above the high-water mark. The log is
    /// read once for all of them, from the lowest on, and ahead of what is applied.
    /// In boot, the first failure of a projector that was not broken before ends it; in play, each cursor goes on
    /// without the others.
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
        let limits = ReadLimits { page: self.limits.batch, patience: self.limits.patience };
        let stopped_boot = |cursors: &[Cursor]| cursors.iter().filter(|cursor| cursor.has_stopped_boot()).count();
        let stopped_before = stopped_boot(cursors);
        let mut hold = Hold::none();
        let mut reading: Option<ReadAhead> = None;
        loop {
            let Some(lowest) = lowest_due(cursors, through) else { return Ok(()) };
            let pages = match reading.take() {
                Some(pages) if pages.position() == lowest => reading.insert(pages),
                _ => {
                    let running = cursors.iter().filter(|cursor| cursor.is_running());
                    let wanted = Wanted::by_any(running.map(|cursor| cursor.projector.event_types()));
                    reading.insert(self.store.read_ahead(lowest, through, wanted, limits))
                }
            };
            let page = match timeout(HELD_FOR, pages.next()).await {
                Ok(page) => page?,
                Err(_) => {
                    hold.let_go();
                    pages.next().await?
                }
            };
            hold.goes_on = page.through < through && self.may_hold(stage, cursors);
            self.pass(stage, cursors, &page, &mut hold).await;

            progress(cursors);
            if stage == Stage::Boot && stopped_boot(cursors) > stopped_before {
                return Ok(());
            }
        }
    }

    /// Whether a row may stay claimed from page to page. Only in boot, for in play other workers are at it; only where a
    /// projector is alone, for among several it would be claimed while the others are waited for, and they may wait for a
    /// boot that waits for it; and not where its handler acts elsewhere, which cannot be rolled back: such a one looks at its
    /// row just before.
    fn may_hold(&self, stage: Stage, cursors: &[Cursor]) -> bool {
        let mut running = cursors.iter().filter(|cursor| cursor.is_running());
        match (running.next(), running.next()) {
            (Some(alone), None) => stage == Stage::Boot && !alone.projector.goes_event_by_event(),
            _ => false,
        }
    }

    /// Passes a page to every cursor that stands in it.
    async fn pass(&self, stage: Stage, cursors: &mut [Cursor], page: &Page, hold: &mut Hold) {
        if !hold.is_claimed() {
            self.pass_over(stage, cursors, page.through, |cursor| cursor.batch(page)).await;
        }
        let standing_in_it = cursors.iter_mut().filter_map(|cursor| cursor.batch(page).map(|batch| (cursor, batch)));
        let mut standing_in_it: Vec<_> = standing_in_it.collect();
        if let [(cursor, batch)] = standing_in_it.as_mut_slice() {
            cursor.note(self.deliver_on(&cursor.projector, stage, *batch, hold).await);
            return;
        }
        let side_by_side = SIDE_BY_SIDE.min(self.database.handler_connections() as usize);
        stream::iter(standing_in_it)
            .for_each_concurrent(side_by_side, async |(cursor, batch)| {
                cursor.note(self.deliver(&cursor.projector, stage, batch).await);
            })
            .await;
    }

    /// Moves those cursors together whose batch up to `through` has nothing for them: it costs one statement, and not a
    /// transaction each. Whoever is not moved by that, for whatever reason, is left to be delivered to.
    pub(crate) async fn pass_over<'a>(
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
        let mut idle: Vec<&mut Cursor> = cursors.iter_mut().filter(|cursor| has_nothing(cursor)).collect();
        idle.sort_by_key(|cursor| cursor.position);
        for together in idle.chunk_by_mut(|one, other| one.position == other.position) {
            let projectors: Vec<&Registered> = together.iter().map(|cursor| cursor.projector.as_ref()).collect();
            match self.ledger.pass_over(&projectors, stage, together[0].position, through).await {
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
        let (after, through) = (Position::START, Position::new(hot_path::EVENTS));
        let page = Page { events: hot_path::events(), after, through };
        let wanted = hot_path::count(|| {
            let batch = cursor.batch(&page).expect("it stands in the page");
            batch.wanted(&cursor.projector).collect::<Vec<&Event>>()
        });
        assert_eq!((wanted.len(), wanted[0].position()), (45, Position::new(12)));
    }
}
