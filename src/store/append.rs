//! Appending: one transaction, a plain insert, and the answer to who else wrote meanwhile.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use sqlx::{Connection, MySqlConnection, QueryBuilder};
use uuid::Uuid;

use super::EventStore;
use crate::database::multi_row::{Rows, Statement};
use crate::model::backoff;
use crate::model::error::{is_transient, server_error_number};
use crate::model::event::{NewEvent, Position, utc_datetime};

/// One text for any number of rows, with [`INSERT_ROW`] for each.
const INSERT: &str = "insert into events (event_id, stream_id, stream_version, event_type, recorded_at, payload, metadata) values ";
const INSERT_ROW: &str = "(?, ?, ?, ?, coalesce(?, utc_timestamp(6)), ?, ?)";

const VERSIONS: &str = "select stream_id, max(stream_version) from events where stream_id in (";

const POSITION_OF: &str = "select position from events where event_id = ?";

/// Deadlocks, lock waits, tombstones and other writers of the same stream: all rare, none worth
/// more than this.
const MAX_ATTEMPTS: u32 = 20;

/// How long to go on asking whether an append has happened.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// What an append did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AppendOutcome {
    /// How many events.
    pub events: usize,
    /// The position of the last of them.
    pub last: Position,
}

/// Why nothing was appended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// An event cannot be stored at all: which one, from 0, and why.
    #[error("event {index}: {reason}")]
    InvalidEvent {
        /// Its place among those that were to be appended, from 0.
        index: usize,
        /// What does not hold.
        reason: String,
    },
    /// Another writer was there first: read the stream again and decide anew.
    #[error(
        "stream {stream_id:?} is at version {actual}, so its next event cannot have version {expected}"
    )]
    WrongVersion {
        /// Its place among those that were to be appended, from 0.
        index: usize,
        /// The stream.
        stream_id: String,
        /// The version that was asked for.
        expected: u64,
        /// The version that the stream has.
        actual: u64,
    },
    /// The log has an event of this id: this append was carried out before, or the id is not
    /// unique.
    #[error("an event with the id {event_id:?} is in the log already")]
    DuplicateEventId {
        /// The id.
        event_id: String,
    },
    /// The database failed, or stayed contended.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl EventStore {
    /// Appends events, of one stream or several, in one transaction: all of them or none.
    ///
    /// Where an event names its `stream_version`, that must be the stream's next. The events of a
    /// transaction become visible together, in order, but other writers' may lie between them.
    ///
    /// # Errors
    /// [`AppendError`]; nothing is stored then. Only where the connection was lost over the commit,
    /// and the database stayed away, nobody knows: append again with the same event ids, and what
    /// is stored is refused as a duplicate.
    pub async fn append(&self, events: &[NewEvent]) -> Result<AppendOutcome, AppendError> {
        for (index, event) in events.iter().enumerate() {
            event.check().map_err(|reason| AppendError::InvalidEvent { index, reason })?;
        }
        // Made once, before the first attempt: an attempt whose commit was not acknowledged is
        // found by them.
        let ids: Vec<String> = events
            .iter()
            .map(|event| event.event_id.clone().unwrap_or_else(|| Uuid::now_v7().to_string()))
            .collect();
        let Some(last_id) = ids.last() else {
            return Ok(AppendOutcome { events: 0, last: self.last_visible().await? });
        };
        // Once a commit was asked for, only a look at the log tells whether it happened: the next
        // attempt may find its own events in the way.
        let mut commit_sent = false;
        for attempt in 1.. {
            let error = match self.append_once(events, &ids, &mut commit_sent).await {
                Ok(()) => break,
                Err(error) => error,
            };
            let is_momentary = matches!(&error, AppendError::Database(error)
                // A tombstone took our position, or another writer our version: both are decided
                // anew.
                if is_transient(error) || matches!(collision(error), Some(Collision::Position | Collision::StreamVersion)));
            if !is_momentary || attempt == MAX_ATTEMPTS {
                match commit_sent && self.position_of(last_id).await?.is_some() {
                    true => break,
                    false => return Err(error),
                }
            }
            tokio::time::sleep(backoff::delay(attempt)).await;
        }
        let last = self.position_of(last_id).await?.ok_or(sqlx::Error::RowNotFound)?;
        Ok(AppendOutcome { events: events.len(), last })
    }

    async fn append_once(
        &self,
        events: &[NewEvent],
        ids: &[String],
        commit_sent: &mut bool,
    ) -> Result<(), AppendError> {
        let mut connection = self.database.acquire().await?;
        let begin = async {
            let mut transaction = connection.begin().await?;
            let versions = current_versions(&mut transaction, events).await?;
            Ok((transaction, versions))
        };
        let (mut transaction, versions) = self.database.with_timeout(begin).await?;
        let versions = match assign_versions(events, versions) {
            Ok(versions) => versions,
            Err(error) => {
                self.roll_back(transaction).await;
                return Err(error);
            }
        };
        let mut rows = Rows::default();
        for ((event, id), version) in events.iter().zip(ids).zip(versions) {
            rows.begin_row();
            rows.bind(id.as_str())
                .and_then(|()| rows.bind(event.stream_id.as_str()))
                .and_then(|()| rows.bind(version))
                .and_then(|()| rows.bind(event.event_type.as_str()))
                .and_then(|()| rows.bind(event.recorded_at.map(utc_datetime)))
                .and_then(|()| rows.bind(event.payload.as_str()))
                .and_then(|()| rows.bind(event.metadata.as_deref()))
                .map_err(sqlx::Error::Encode)?;
        }
        let insert = Statement { head: INSERT, row: INSERT_ROW, tail: "" };
        if let Err(error) = self.database.with_timeout(rows.execute(insert, &mut transaction)).await
        {
            self.roll_back(transaction).await;
            return Err(into_append_error(error));
        }
        *commit_sent = true;
        Ok(self.database.with_timeout(transaction.commit()).await?)
    }

    /// Rolls back, before the caller hears of anything: what a refused insert has locked would make
    /// others wait. Where that fails, the connection is not used again, and the server rolls back.
    async fn roll_back(&self, transaction: sqlx::Transaction<'_, sqlx::MySql>) {
        if let Err(error) = self.database.with_timeout(transaction.rollback()).await {
            tracing::debug!(%error, "a refused append was not rolled back at once, and is when its connection ends");
        }
    }

    async fn position_of(&self, event_id: &str) -> Result<Option<Position>, sqlx::Error> {
        let find = async || {
            let find = sqlx::query_scalar(POSITION_OF).bind(event_id);
            self.database.run_pooled(async |connection| find.fetch_optional(connection).await).await
        };
        let position: Option<u64> =
            backoff::retry_transient(Some(CONFIRM_TIMEOUT), "find out what was appended", find)
                .await?;
        Ok(position.map(Position::new))
    }
}

async fn current_versions(
    connection: &mut MySqlConnection,
    events: &[NewEvent],
) -> Result<HashMap<String, u64>, sqlx::Error> {
    let streams: HashSet<&str> = events.iter().map(|event| event.stream_id.as_str()).collect();
    let mut streams: Vec<&str> = streams.into_iter().collect();
    // A prepared statement for each power of two, not for each number. To name a stream twice does
    // no harm.
    let last = streams.last().copied().unwrap_or_default();
    streams.resize(streams.len().next_power_of_two(), last);
    let mut query = QueryBuilder::new(VERSIONS);
    let mut list = query.separated(", ");
    for stream in streams {
        list.push_bind(stream);
    }
    query.push(") group by stream_id");
    let rows: Vec<(String, u64)> = query.build_query_as().fetch_all(connection).await?;
    Ok(rows.into_iter().collect())
}

/// The version of each event, from those that their streams have now.
fn assign_versions(
    events: &[NewEvent],
    mut current: HashMap<String, u64>,
) -> Result<Vec<u64>, AppendError> {
    let mut versions = Vec::with_capacity(events.len());
    for (index, event) in events.iter().enumerate() {
        let version = current.entry(event.stream_id.clone()).or_default();
        if let Some(expected) = event.stream_version.filter(|&expected| expected != *version + 1) {
            let stream_id = event.stream_id.clone();
            return Err(AppendError::WrongVersion { index, stream_id, expected, actual: *version });
        }
        *version += 1;
        versions.push(*version);
    }
    Ok(versions)
}

/// Which unique key a row ran into.
#[derive(Debug, PartialEq, Eq)]
enum Collision {
    Position,
    EventId(String),
    StreamVersion,
}

/// What an insert ran into, as the caller should know it.
fn into_append_error(error: sqlx::Error) -> AppendError {
    match collision(&error) {
        Some(Collision::EventId(event_id)) => AppendError::DuplicateEventId { event_id },
        _ => AppendError::Database(error),
    }
}

/// Reads error 1062: `Duplicate entry 'E' for key 'events.KEY'` on MySQL, `'KEY'` on MariaDB.
fn collision(error: &sqlx::Error) -> Option<Collision> {
    if server_error_number(error) != Some(1062) {
        return None;
    }
    let message = error.as_database_error()?.message();
    let (entry, key) = message.rsplit_once("' for key '")?;
    let entry = entry.split_once('\'').map_or(entry, |(_, entry)| entry);
    match key.trim_end_matches('\'').rsplit('.').next()? {
        "PRIMARY" => Some(Collision::Position),
        "events_event_id" => Some(Collision::EventId(entry.to_owned())),
        "events_stream_version" => Some(Collision::StreamVersion),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(stream: &str, version: Option<u64>, bytes: usize) -> NewEvent {
        NewEvent {
            event_id: None,
            stream_id: stream.into(),
            stream_version: version,
            event_type: "Confirmation of receipt".into(),
            recorded_at: None,
            payload: format!("\"{}\"", "x".repeat(bytes - 2)),
            metadata: None,
        }
    }

    #[test]
    fn versions_are_counted_per_stream() {
        let events = [
            event("a", None, 2),
            event("b", None, 2),
            event("a", Some(8), 2),
            event("b", Some(2), 2),
        ];
        let current = HashMap::from([("a".to_owned(), 6)]);
        assert_eq!(assign_versions(&events, current).expect("as expected"), [7, 1, 8, 2]);
    }

    #[test]
    fn a_version_that_is_not_the_next_is_refused() {
        let error = assign_versions(
            &[event("a", None, 2), event("a", Some(2), 2)],
            HashMap::from([("a".into(), 1)]),
        );
        let Err(AppendError::WrongVersion { index: 1, expected: 2, actual: 2, .. }) = error else {
            panic!("{error:?}");
        };
    }
}
