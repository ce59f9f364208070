//! Reading the log, in order, below the high-water mark.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::{Stream, TryStreamExt};
use sqlx::mysql::MySqlRow;
use sqlx::pool::PoolConnection;
use sqlx::{MySql, MySqlConnection, QueryBuilder};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::EventStore;
use crate::model::backoff;
use crate::model::event::{Event, Position};

/// By range and not by offset, so that a page costs the same wherever it lies.
const RANGE: &str = "select position, event_id, stream_id, stream_version, event_type, recorded_at, payload, metadata \
                     from events where position > ";

const FIRST_FROM: &str = "select min(position) from events where position >= ?";

const ENDS: &str = "select (select min(position) from events where position > 0), \
                    exists (select 1 from events where position = 0), \
                    exists (select 1 from events where position = 18446744073709551615)";

const LAST: &str = "select max(position) from events";

/// Payloads and metadata that a page may hold before it is cut, in bytes: memory is bounded by this
/// and by the largest event, not by the log.
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// Pages that are read and not yet taken.
const PAGES_AHEAD: usize = 2;

/// The most positions that one statement reads. Each statement costs a round trip, and what the
/// server does to begin it.
const MAX_RANGE: u64 = 65_536;

/// How long a statement may be open: while it is, the server keeps old versions of every row that
/// is changed. Far below `net_write_timeout`, too, after which the server hangs up on a reader that
/// does not read.
const MAX_STATEMENT_TIME: Duration = Duration::from_secs(2);

/// Event types that the server is asked to filter by; more of them would make it a slow question.
const MAX_TYPES: usize = 200;

/// A page of the log.
#[derive(Debug)]
pub(crate) struct Page {
    /// The events, in order: all that were asked for.
    pub(crate) events: Vec<Event>,
    /// The page begins just after this position.
    pub(crate) after: Position,
    /// And it ends with this one.
    pub(crate) through: Position,
}

/// The ends of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogEnds {
    /// The first position above 0 that has a row.
    pub(crate) first: Option<u64>,
    /// Whether there is a row at position 0.
    pub(crate) has_position_zero: bool,
    /// Whether there is a row at the highest position there is.
    pub(crate) has_max_position: bool,
}

/// Which events are read; the others are passed over by the server.
#[derive(Debug, Clone, Default)]
pub(crate) struct EventFilter {
    /// `None`: every event, and tombstones.
    types: Option<BTreeSet<String>>,
}

impl EventFilter {
    /// Those that at least one of several projectors wants, each given by its event types.
    pub(crate) fn any_of<'a>(all: impl Iterator<Item = Option<&'a HashSet<String>>>) -> Self {
        let types =
            all.map(|types| types.map(|types| types.iter().cloned())).collect::<Option<Vec<_>>>();
        let types: Option<BTreeSet<String>> =
            types.map(|types| types.into_iter().flatten().collect());
        EventFilter { types: types.filter(|types| types.len() <= MAX_TYPES) }
    }
}

/// The bounds of a reading.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadLimits {
    /// The most events in a page.
    pub(crate) page_events: u64,
    /// How long transient failures are tried again; `None`: for as long as it takes.
    pub(crate) retry_timeout: Option<Duration>,
}

/// A reading of the log that goes on by itself, a few pages ahead of who takes them.
pub(crate) struct ReadAhead {
    pages: mpsc::Receiver<Result<Page, sqlx::Error>>,
    next: Position,
    task: JoinHandle<()>,
}

impl ReadAhead {
    /// The next page begins just after this.
    pub(crate) fn position(&self) -> Position {
        self.next
    }

    /// The next page.
    ///
    /// # Errors
    /// If the log cannot be read, for longer than the reading's patience where it is transient; or
    /// if it has ended.
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
    /// Reads the events in (`after`, `through`], at most `limit` of them and fewer where they are
    /// large; each field of each can be read. `through` must not lie above the high-water mark.
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

    /// Reads rows on a session that is kept for the next, if they were read to their end.
    async fn run_read<T>(
        &self,
        read: impl AsyncFnOnce(&mut MySqlConnection) -> Result<(T, bool), sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut session = self.database.acquire_session().await?;
        let mut reading = ReadGuard { connection: &mut session.connection, is_drained: false };
        let (value, is_drained) = match read(reading.connection).await {
            Ok(read) => read,
            Err(error) => {
                // What ended this connection may have ended those that are kept.
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

    /// Begins to read all pages of the wanted events in (`after`, `through`], which must not lie
    /// above the high-water mark.
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
                // Who does not listen any more need not know.
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
        // What was sent need not be read again after a failure.
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
            // Longer while those who take the pages keep up: then the next range is one stream.
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

    /// Reads one range by one statement, and sends it page by page. Returns a page that could not
    /// be sent soon.
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
                // A slow taker must not keep the connection from others: the rest is read by
                // another statement.
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

    /// The last position of the gap that begins at `first`, or `mark` where no row follows up to
    /// it.
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

    /// Where the log begins and ends.
    pub(crate) async fn log_ends(&self) -> Result<LogEnds, sqlx::Error> {
        let ends = sqlx::query_as(ENDS);
        let (first, has_position_zero, has_max_position): (Option<u64>, bool, bool) =
            self.database.run_pooled(async |connection| ends.fetch_one(connection).await).await?;
        Ok(LogEnds { first, has_position_zero, has_max_position })
    }

    /// The highest position that is visible, whether or not those below it are.
    pub(crate) async fn last_visible(&self) -> Result<Position, sqlx::Error> {
        let last = sqlx::query_scalar(LAST);
        let last: Option<u64> =
            self.database.run_pooled(async |connection| last.fetch_one(connection).await).await?;
        Ok(Position::new(last.unwrap_or_default()))
    }
}

/// While rows are read. The rest of those that nobody wants any more are still on the wire: it is
/// cheaper to hang up than to read them.
struct ReadGuard<'c> {
    connection: &'c mut PoolConnection<MySql>,
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
        // Who wants nothing has a list, too: no type is empty.
        query.push(" and event_type in (''");
        for event_type in types {
            query.push(", ").push_bind(event_type.clone());
        }
        query.push(") order by position");
    } else {
        // Without holes, that is the same; and it costs the server a tenth less than to compare
        // each position.
        query.push(" order by position limit ").push_bind(end.since(after));
    }
    query
}

/// Reads a page from the rows of a range: fewer events than `limit` where they are large.
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
            // What types its columns have, it has in common with those that follow.
            event.check()?;
        }
        let position = event.position();
        if position > end {
            // There are fewer events than positions: somebody has deleted some.
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
            sender.send(Ok(Page { events: Vec::new(), after, through })).await.expect("it listens");
            panic!("as the test asks");
        });
        let mut reading = ReadAhead { pages, next: Position::START, task };
        assert_eq!(reading.next().await.expect("a page").through, Position::new(7));
        let ended = reading.next().await;
        assert!(matches!(ended, Err(sqlx::Error::WorkerCrashed)), "{ended:?}");
    }
}
