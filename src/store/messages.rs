//! What is kept with the log for its messages: who it is, where they are sent, and how many were
//! somebody else's.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::mysql::MySqlRow;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{EventStore, Marks, MarksRow};
use crate::model::event::Position;
use crate::model::signature::KEY_BYTES;

/// The marks, and the ids of the events at ten positions, by the primary key: read with every
/// receive, and so in one statement, whose text is always the same.
const SNAPSHOT: &str = "select high_water, published, log_id, signing_key, position, event_id from event_log \
                    left join events force index (primary) on position in (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

/// How many positions [`SNAPSHOT`] takes: what one receive brings at most.
const POSITIONS_PER_SNAPSHOT: usize = 10;

/// One statement, so that no message is ever signed with the key of one log and the id of another.
const ROTATE: &str = "update event_log set log_id = ?, signing_key = ?";

const QUEUE: &str = "select queue from event_log";

const SET_QUEUE: &str = "update event_log set queue = ?";

const QUEUE_RECORD: &str = "select queue, foreign_messages, foreign_at from event_log";

const COUNT_FOREIGN: &str =
    "update event_log set foreign_messages = foreign_messages + ?, foreign_at = utc_timestamp(6)";

/// The log at one moment, as far as messages are compared with it.
#[derive(Debug, Clone)]
pub(crate) struct LogSnapshot {
    pub(crate) marks: Marks,
    /// Which event stands at each of the positions that were asked for.
    pub(crate) event_ids: HashMap<Position, String>,
}

/// What is known of the queue.
#[derive(Debug, Clone)]
pub(crate) struct QueueRecord {
    /// The queue that the log was last published to.
    pub(crate) queue: Option<String>,
    /// How often a message was received that is not of this log.
    pub(crate) foreign_messages: u64,
    /// When such messages were last counted.
    pub(crate) foreign_at: Option<OffsetDateTime>,
}

impl EventStore {
    /// The marks, and which events stand at these positions.
    pub(crate) async fn snapshot(
        &self,
        positions: &[Position],
    ) -> Result<LogSnapshot, sqlx::Error> {
        // Ten at a time: more come only from a mapping of Lambda that was set up so.
        let mut chunks = positions.chunks(POSITIONS_PER_SNAPSHOT);
        let Some(first) = chunks.next() else {
            return Ok(LogSnapshot { marks: self.marks().await?, event_ids: HashMap::new() });
        };
        let mut view = self.snapshot_chunk(first).await?;
        for chunk in chunks {
            let next = self.snapshot_chunk(chunk).await?;
            view.event_ids.extend(next.event_ids);
            // As they were last read; a row that was read before a rotation differs from what is
            // signed after it.
            view.marks = next.marks;
        }
        Ok(view)
    }

    async fn snapshot_chunk(&self, positions: &[Position]) -> Result<LogSnapshot, sqlx::Error> {
        let mut query = sqlx::query(SNAPSHOT);
        // The last is repeated, which costs nothing.
        for at in 0..POSITIONS_PER_SNAPSHOT {
            query = query.bind(positions[at.min(positions.len() - 1)].get());
        }
        let rows =
            self.database.run_cached(async |connection| query.fetch_all(connection).await).await?;
        let marks = |row: &MySqlRow| -> Result<MarksRow, sqlx::Error> {
            Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?))
        };
        let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        let marks = Marks::from_row(marks(first)?)?;
        let mut event_ids = HashMap::with_capacity(rows.len());
        for row in &rows {
            if let Some(position) = row.try_get::<Option<u64>, _>(4)? {
                event_ids.insert(Position::new(position), row.try_get(5)?);
            }
        }
        Ok(LogSnapshot { marks, event_ids })
    }

    /// Gives the log a new id and this key. What was sent before is not ours any more.
    pub(crate) async fn rotate(&self, key: &[u8; KEY_BYTES]) -> Result<String, sqlx::Error> {
        // Not by the server's uuid(), which a replica that repeats the statement would not repeat.
        let id = Uuid::now_v7().to_string();
        let rotate = sqlx::query(ROTATE).bind(&id).bind(key.as_slice());
        self.database.run_cached(async |connection| rotate.execute(connection).await).await?;
        Ok(id)
    }

    /// The queue that the log was last published to.
    pub(crate) async fn recorded_queue(&self) -> Result<Option<String>, sqlx::Error> {
        self.database
            .run_cached(async |connection| sqlx::query_scalar(QUEUE).fetch_one(connection).await)
            .await
    }

    /// Notes the queue that the log is published to.
    pub(crate) async fn record_queue(&self, queue: &str) -> Result<(), sqlx::Error> {
        let record = sqlx::query(SET_QUEUE).bind(queue);
        self.database
            .run_cached(async |connection| record.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// What is known of the queue.
    pub(crate) async fn queue_record(&self) -> Result<QueueRecord, sqlx::Error> {
        let (queue, foreign_messages, foreign_at) = self
            .database
            .run_cached(async |connection| sqlx::query_as(QUEUE_RECORD).fetch_one(connection).await)
            .await?;
        Ok(QueueRecord { queue, foreign_messages, foreign_at })
    }

    /// Adds to the number of messages that were not of this log.
    pub(crate) async fn count_foreign(&self, messages: u64) -> Result<(), sqlx::Error> {
        let count = sqlx::query(COUNT_FOREIGN).bind(messages);
        self.database
            .run_cached(async |connection| count.execute(connection).await)
            .await
            .map(|_| ())
    }
}
