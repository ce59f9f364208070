//! Reads the log in order, up to the high-water mark.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::{Stream, TryStreamExt};
use sqlx::mysql::MySqlRow;
use sqlx::{MySql, MySqlConnection, QueryBuilder};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::EventStore;
use crate::database::OwnConnection;
use crate::model::backoff;
use crate::model::event::{Event, Position};

/// Reads by range instead of offset, so that a page costs the same anywhere in the log.
const RANGE: &str = "\
    select position, event_id, stream_id, stream_version, event_type, recorded_at, payload, \
        metadata \
    from events \
    where position > ";

const FIRST_FROM: &str = "select min(position) from events where position >= ?";

const ENDS: &str = "\
    select (select min(position) from events where position > 0), \
        exists (select 1 from events where position = 0), \
        exists (select 1 from events where position = 18446744073709551615)";

const LAST: &str = "select max(position) from events";

/// The most bytes of payload and metadata in a page before it is ended early. A page can exceed
/// this limit by one event, so memory is bounded by this limit and the largest event.
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// Pages that are read but not yet taken.
const PAGES_AHEAD: usize = 2;

/// The most positions that one statement reads. Each statement costs a round trip and its set-up on
/// the server.
const MAX_RANGE: u64 = 65_536;

/// How long a statement may stay open. An open statement makes the server keep old versions of
/// every changed row. The value is also far below `net_write_timeout`, after which the server
/// closes the connection of a client that does not read.
const MAX_STATEMENT_TIME: Duration = Duration::from_secs(2);

/// The most event types that the server filters by. A longer list would make the query slow.
const MAX_TYPES: usize = 200;

/// A page of the log.
#[derive(Debug)]
pub(crate) struct Page {
    /// The matching events, in order.
    pub(crate) events: Vec<Event>,
    /// The page covers the positions after this one.
    pub(crate) after: Position,
    /// The last position that the page covers.
    pub(crate) through: Position,
}

/// The ends of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogEnds {
    /// The first position above 0 that has a row.
    pub(crate) first: Option<u64>,
    /// Whether there is a row at position 0.
    pub(crate) has_position_zero: bool,
    /// Whether there is a row at the highest possible position.
    pub(crate) has_max_position: bool,
}

/// Which events are read. The server filters out the others.
#[derive(Debug, Clone, Default)]
pub(crate) struct EventFilter {
    /// `None`: every event, and the fillers.
    types: Option<BTreeSet<String>>,
}

impl EventFilter {
    /// The events that at least one of several projectors subscribes to. Each item is one
    /// projector's event types; `None` means all.
    pub(crate) fn any_of<'a>(all: impl Iterator<Item = Option<&'a HashSet<String>>>) -> Self {
        let types =
            all.map(|types| types.map(|types| types.iter().cloned())).collect::<Option<Vec<_>>>();
        let types: Option<BTreeSet<String>> =
            types.map(|types| types.into_iter().flatten().collect());
        EventFilter { types: types.filter(|types| types.len() <= MAX_TYPES) }
    }
}

/// The limits of [`EventStore::read_ahead`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadLimits {
    /// The most events in a page.
    pub(crate) page_events: u64,
    /// How long transient errors are retried. `None`: without limit.
    pub(crate) retry_timeout: Option<Duration>,
}

/// A background task that reads the log, a few pages ahead of its consumer.
pub(crate) struct ReadAhead {
    pages: mpsc::Receiver<Result<Page, sqlx::Error>>,
    next: Position,
    task: JoinHandle<()>,
}

impl ReadAhead {
    /// The next page covers the positions after this one.
    pub(crate) fn position(&self) -> Position {
        self.next
    }

    /// Returns the next page.
    ///
    /// # Errors
    /// If the log cannot be read. A transient error is returned after `ReadLimits::retry_timeout`.
    /// Also if the reading has ended.
    pub(crate) async fn next(&mut self) -> Result<Page, sqlx::Error> {
        let page = self.pages.recv().await.unwrap_or(Err(sqlx::Error::WorkerCrashed))?;
        self.next = page.through;
        Ok(page)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl EventStore {
    /// Reads the events in (`after`, `through`]: at most `limit` positions, and fewer if the events
    /// are large. Every field of every event is checked. `through` must not lie above the
    /// high-water mark.
    pub(crate) async fn read_after(
        &self,
        after: Position,
        through: Position,
        limit: u64,
    ) -> Result<Page, sqlx::Error> {
        let end = through.min(Position::new(after.get().saturating_add(limit)));
        self.run_read(async |connection| {
            let mut query = range_query(after, end, &EventFilter::default());
            let mut rows = query.build().fetch(connection);
            let page = self.database.with_timeout(read_page(&mut rows, after, end, limit)).await?;
            page.events.iter().try_for_each(Event::check)?;
            let is_drained = page.through == end;
            Ok((page, is_drained))
        })
        .await
    }

    /// Runs `read` on a cached session. The session is kept for the next caller if `read` reports
    /// that all rows were read.
    async fn run_read<T>(
        &self,
        read: impl AsyncFnOnce(&mut MySqlConnection) -> Result<(T, bool), sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut session = self.database.acquire_session().await?;
        let mut reading = ReadGuard { connection: &mut session.connection, is_drained: false };
        let (value, is_drained) = match read(reading.connection).await {
            Ok(read) => read,
            Err(error) => {
                // The cause of this failure may have closed the cached sessions, too.
                self.database.release_idle_sessions();
                return Err(error);
            }
        };
        reading.is_drained = is_drained;
        drop(reading);
        if is_drained {
            self.database.release_session(session);
        }
        Ok(value)
    }

    /// Starts to read the events in (`after`, `through`] that match `filter`. `through` must not
    /// lie above the high-water mark.
    pub(crate) fn read_ahead(
        &self,
        after: Position,
        through: Position,
        filter: EventFilter,
        limits: ReadLimits,
    ) -> ReadAhead {
        let (sender, pages) = mpsc::channel(PAGES_AHEAD);
        let store = self.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = store.read_all(after, through, &filter, limits, &sender).await {
                // A failed send means that the consumer has gone; it does not need the error.
                let _ = sender.send(Err(error)).await;
            }
        });
        ReadAhead { pages, next: after, task }
    }

    async fn read_all(
        &self,
        after: Position,
        through: Position,
        filter: &EventFilter,
        limits: ReadLimits,
        pages: &mpsc::Sender<Result<Page, sqlx::Error>>,
    ) -> Result<(), sqlx::Error> {
        // A retry continues after the last page that was sent.
        let reached = AtomicU64::new(after.get());
        let mut length = limits.page_events;
        while reached.load(Ordering::Relaxed) < through.get() && !pages.is_closed() {
            let end =
                through.min(Position::new(reached.load(Ordering::Relaxed).saturating_add(length)));
            let opened = Instant::now();
            let read = || self.read_range(&reached, end, filter, limits.page_events, pages);
            if let Some(page) =
                backoff::retry_transient(limits.retry_timeout, "read the log", read).await?
            {
                let through = page.through.get();
                if pages.send(Ok(page)).await.is_err() {
                    return Ok(());
                }
                reached.store(through, Ordering::Relaxed);
            }
            // Double the range while the consumer keeps up, halve it if a statement stays open too
            // long.
            length = match opened.elapsed() {
                open if open * 2 < MAX_STATEMENT_TIME => {
                    (length * 2).min(MAX_RANGE.max(limits.page_events))
                }
                open if open > MAX_STATEMENT_TIME => (length / 2).max(limits.page_events),
                _ => length,
            };
        }
        Ok(())
    }

    /// Reads one range with one statement and sends it page by page. Returns the page that the
    /// consumer did not take within [`MAX_STATEMENT_TIME`].
    async fn read_range(
        &self,
        reached: &AtomicU64,
        end: Position,
        filter: &EventFilter,
        limit: u64,
        pages: &mpsc::Sender<Result<Page, sqlx::Error>>,
    ) -> Result<Option<Page>, sqlx::Error> {
        let mut after = Position::new(reached.load(Ordering::Relaxed));
        self.run_read(async |connection| {
            let mut query = range_query(after, end, filter);
            let mut rows = query.build().fetch(connection);
            while after < end {
                let page =
                    self.database.with_timeout(read_page(&mut rows, after, end, limit)).await?;
                after = page.through;
                // A slow consumer must not keep the connection busy. Another statement reads the
                // rest.
                match timeout(MAX_STATEMENT_TIME, pages.reserve()).await {
                    Ok(Ok(place)) => place.send(Ok(page)),
                    Ok(Err(_)) => return Ok((None, false)),
                    Err(_) => return Ok((Some(page), false)),
                }
                reached.store(after.get(), Ordering::Relaxed);
            }
            Ok((None, true))
        })
        .await
    }

    /// The last position of the gap that begins at `first`, or `mark` if no row follows up to
    /// `mark`.
    pub(crate) async fn end_of_gap(
        &self,
        first: Position,
        mark: Position,
    ) -> Result<Position, sqlx::Error> {
        let next = sqlx::query_scalar(FIRST_FROM).bind(first.get());
        let next: Option<u64> =
            self.database.run_pooled(async |connection| next.fetch_one(connection).await).await?;
        Ok(next.map_or(mark, |next| Position::new(next).previous()).min(mark))
    }

    /// Reads the ends of the log.
    pub(crate) async fn log_ends(&self) -> Result<LogEnds, sqlx::Error> {
        let ends = sqlx::query_as(ENDS);
        let (first, has_position_zero, has_max_position): (Option<u64>, bool, bool) =
            self.database.run_pooled(async |connection| ends.fetch_one(connection).await).await?;
        Ok(LogEnds { first, has_position_zero, has_max_position })
    }

    /// The highest visible position. There may be gaps below it.
    pub(crate) async fn last_visible(&self) -> Result<Position, sqlx::Error> {
        let last = sqlx::query_scalar(LAST);
        let last: Option<u64> =
            self.database.run_pooled(async |connection| last.fetch_one(connection).await).await?;
        Ok(Position::new(last.unwrap_or_default()))
    }
}

/// Closes the connection on drop, unless all rows were read: closing is cheaper than reading the
/// rows that are still in transit.
struct ReadGuard<'c> {
    connection: &'c mut OwnConnection,
    is_drained: bool,
}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        if !self.is_drained {
            self.connection.close_on_drop();
        }
    }
}

fn range_query(after: Position, end: Position, filter: &EventFilter) -> QueryBuilder<MySql> {
    let mut query = QueryBuilder::new(RANGE);
    query.push_bind(after.get());
    if let Some(types) = &filter.types {
        query.push(" and position <= ").push_bind(end.get());
        // An empty list is invalid SQL. No event type is empty, so '' matches no event.
        query.push(" and event_type in (''");
        for event_type in types {
            query.push(", ").push_bind(event_type.clone());
        }
        query.push(") order by position");
    } else {
        // Up to the mark there are no gaps, so a row limit ends at the same position. It costs the
        // server 10% less than a comparison per row.
        query.push(" order by position limit ").push_bind(end.since(after));
    }
    query
}

/// Reads a page from the rows of a range. It has fewer than `limit` events if they are large.
async fn read_page(
    rows: &mut (impl Stream<Item = Result<MySqlRow, sqlx::Error>> + Unpin),
    after: Position,
    end: Position,
    limit: u64,
) -> Result<Page, sqlx::Error> {
    let mut events = Vec::with_capacity(end.since(after).min(limit) as usize);
    let mut bytes = 0;
    while let Some(row) = rows.try_next().await? {
        let event = Event::from_row(row)?;
        if events.is_empty() {
            // The rows of one statement have the same column types, so checking the first is
            // enough.
            event.check()?;
        }
        let position = event.position();
        if position > end {
            // Rows were deleted, so the row limit reached beyond `end`.
            continue;
        }
        bytes += event.json_bytes();
        events.push(event);
        if position < end && (events.len() as u64 >= limit || bytes >= PAGE_BYTES) {
            return Ok(Page { events, after, through: position });
        }
    }
    Ok(Page { events, after, through: end })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_truncated_read_is_an_error_and_not_the_end_of_the_log() {
        let (sender, pages) = mpsc::channel(PAGES_AHEAD);
        let task = tokio::spawn(async move {
            let (after, through) = (Position::START, Position::new(7));
            sender
                .send(Ok(Page { events: Vec::new(), after, through }))
                .await
                .expect("the receiver is open");
            panic!("the reading fails");
        });
        let mut reading = ReadAhead { pages, next: Position::START, task };
        assert_eq!(reading.next().await.expect("a page").through, Position::new(7));
        let ended = reading.next().await;
        assert!(matches!(ended, Err(sqlx::Error::WorkerCrashed)), "{ended:?}");
    }
}
