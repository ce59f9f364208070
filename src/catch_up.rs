//! The one loop that reads MySQL and applies: boot's replay, and the repair of every hole.

use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream;
use tracing::warn;

use crate::apply::Batch;
use crate::deliver::{Delivered, Engine};
use crate::error::is_transient;
use crate::event::Position;
use crate::lifecycle::Stage;
use crate::registry::Registered;
use crate::retry;
use crate::store::Page;

/// Projectors that apply one page at the same time, each on a connection of its own.
pub(crate) const SIDE_BY_SIDE: usize = 8;

/// A projector on its way through the log.
pub(crate) struct Cursor {
    pub(crate) projector: Arc<Registered>,
    pub(crate) position: Position,
    pub(crate) state: CursorState,
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
        Cursor { projector: Arc::clone(projector), position, state: CursorState::Running }
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

    fn is_due(&self, through: Position) -> bool {
        self.is_running() && self.position < through
    }

    /// What it applies of the page that begins after `after`, if it stands in it.
    pub(crate) fn batch<'a>(&self, after: Position, page: &'a Page) -> Option<Batch<'a>> {
        if !self.is_running() || !(after..page.through).contains(&self.position) {
            return None;
        }
        let known = page.events.partition_point(|event| event.position <= self.position);
        Some(Batch { after: self.position, through: page.through, events: &page.events[known..] })
    }
}

/// Where the next page begins: at the position of the cursor that is furthest behind `through`.
pub(crate) fn lowest_due(cursors: &[Cursor], through: Position) -> Option<Position> {
    cursors.iter().filter(|cursor| cursor.is_due(through)).map(|cursor| cursor.position).min()
}

impl Engine {
    /// Brings every running cursor to `through`, which must not lie above the high-water mark. The log is
    /// read once for all of them, from the lowest on, the next page while this one is applied.
    /// In boot, the first failure ends it; in play, each cursor goes on without the others.
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
        let mut ahead: Option<(Position, Page)> = None;
        let mut limit = self.limits.batch;
        loop {
            let Some(lowest) = lowest_due(cursors, through) else { return Ok(()) };
            let page = match ahead.take() {
                Some((after, page)) if after == lowest => page,
                _ => self.read(lowest, through, limit).await?,
            };
            // A page that was cut because its events are large tells how many to ask for next.
            limit = (page.through.since(lowest) * 2).clamp(1, self.limits.batch);

            let read_ahead = async {
                match page.through < through {
                    true => self.read(page.through, through, limit).await.map(Some),
                    false => Ok(None),
                }
            };
            let (following, ()) = tokio::join!(read_ahead, self.pass(stage, cursors, lowest, &page));
            ahead = following?.map(|following| (page.through, following));

            progress(cursors);
            let stopped = |cursor: &Cursor| !matches!(cursor.state, CursorState::Running | CursorState::Left);
            if stage == Stage::Boot && cursors.iter().any(stopped) {
                return Ok(());
            }
        }
    }

    /// Passes a page to every cursor that stands in it.
    async fn pass(&self, stage: Stage, cursors: &mut [Cursor], after: Position, page: &Page) {
        let standing_in_it =
            cursors.iter_mut().filter_map(|cursor| cursor.batch(after, page).map(|batch| (cursor, batch)));
        stream::iter(standing_in_it)
            .for_each_concurrent(SIDE_BY_SIDE, async |(cursor, batch)| {
                cursor.note(self.deliver(&cursor.projector, stage, batch).await);
            })
            .await;
    }

    async fn read(&self, after: Position, through: Position, limit: u64) -> Result<Page, sqlx::Error> {
        let began = Instant::now();
        for attempt in 2.. {
            match self.store.read_after(after, through, limit).await {
                Ok(page) => return Ok(page),
                Err(error) if !is_transient(&error) => return Err(error),
                Err(error) if self.limits.patience.is_some_and(|patience| began.elapsed() >= patience) => {
                    return Err(error);
                }
                Err(error) => {
                    if retry::worth_telling(attempt) {
                        warn!(position = after.get(), attempt, %error, "cannot read the log, trying again");
                    }
                    tokio::time::sleep(retry::delay(attempt)).await;
                }
            }
        }
        unreachable!("the loop ends only by returning")
    }
}
