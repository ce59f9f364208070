//! Reading the log, in order, below the high-water mark.

use futures_util::TryStreamExt;
use sqlx::Row;
use sqlx::mysql::MySqlRow;
use time::OffsetDateTime;

use super::EventStore;
use crate::database::answered;
use crate::event::{Event, Position};

/// By range and not by offset, so that a page costs the same wherever it lies.
const PAGE: &str = "select position, event_id, stream_id, stream_version, event_type, recorded_at, payload, metadata \
                    from events where position > ? and position <= ? order by position";

/// Below the high-water mark positions have no holes, so the first one that is not there yet is the next.
const RECORDED_AT: &str = "select recorded_at from events where position = ?";

const LAST: &str = "select max(position) from events";

/// Payloads and metadata that a page may hold before it is cut, in bytes: memory is bounded by this and
/// by the largest event, not by the log.
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// A page of the log.
#[derive(Debug)]
pub(crate) struct Page {
    /// The events, in order.
    pub(crate) events: Vec<Event>,
    /// The page holds all events up to here.
    pub(crate) through: Position,
}

impl EventStore {
    /// Reads the events in (`after`, `through`], at most `limit` of them and fewer where they are large.
    /// `through` must not lie above the high-water mark.
    pub(crate) async fn read_after(&self, after: Position, through: Position, limit: u64) -> Result<Page, sqlx::Error> {
        let end = through.min(Position::new(after.get().saturating_add(limit)));
        answered(self.read_page(after, end)).await
    }

    async fn read_page(&self, after: Position, end: Position) -> Result<Page, sqlx::Error> {
        let mut events = Vec::with_capacity(end.since(after) as usize);
        let mut bytes = 0;
        let mut connection = self.database.acquire().await?;
        let mut rows = sqlx::query(PAGE).bind(after.get()).bind(end.get()).fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            let event = decode(&row)?;
            bytes += event.payload.len() + event.metadata.as_ref().map_or(0, String::len);
            events.push(event);
            if bytes >= PAGE_BYTES {
                drop(rows);
                // The rows that were not read are still on the wire: it is cheaper to hang up than to read them.
                connection.close_on_drop();
                let through = events.last().map_or(end, |event: &Event| event.position);
                return Ok(Page { events, through });
            }
        }
        Ok(Page { events, through: end })
    }

    /// When the event at this position was recorded; `None` if there is none.
    pub(crate) async fn recorded_at(&self, position: Position) -> Result<Option<OffsetDateTime>, sqlx::Error> {
        answered(sqlx::query_scalar(RECORDED_AT).bind(position.get()).fetch_optional(&self.database.pool)).await
    }

    /// The highest position that is visible, whether or not those below it are.
    pub(crate) async fn last_visible(&self) -> Result<Position, sqlx::Error> {
        let last: Option<u64> = answered(sqlx::query_scalar(LAST).fetch_one(&self.database.pool)).await?;
        Ok(Position::new(last.unwrap_or_default()))
    }
}

fn decode(row: &MySqlRow) -> Result<Event, sqlx::Error> {
    Ok(Event {
        position: Position::new(row.try_get(0)?),
        event_id: row.try_get(1)?,
        stream_id: row.try_get(2)?,
        stream_version: row.try_get(3)?,
        event_type: row.try_get(4)?,
        recorded_at: row.try_get(5)?,
        payload: row.try_get(6)?,
        metadata: row.try_get(7)?,
    })
}
