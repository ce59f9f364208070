//! Appends events: one transaction with a plain insert, retried after collisions with other
//! writers.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use sqlx::{Connection, MySqlConnection, QueryBuilder};
use tokio::sync::watch;
use uuid::Uuid;

use super::EventStore;
use crate::database::error::{is_transient, server_error_number};
use crate::database::multi_row::{Rows, Statement};
use crate::model::backoff;
use crate::model::event::{NewEvent, Position, utc_datetime};

/// The statement consists of this text and one [`INSERT_ROW`] per event.
const INSERT: &str = "\
    insert into events \
        (event_id, stream_id, stream_version, event_type, recorded_at, payload, metadata) \
    values ";
const INSERT_ROW: &str = "(?, ?, ?, ?, coalesce(?, utc_timestamp(6)), ?, ?)";

const VERSIONS: &str = "select stream_id, max(stream_version) from events where stream_id in (";

const POSITION_OF: &str = "select position from events where event_id = ?";

/// Deadlocks, lock waits, fillers and other writers of the same stream are rare, so more attempts
/// would not help.
const MAX_ATTEMPTS: u32 = 20;

/// How long to retry the query that finds out whether an append was committed.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// The result of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AppendOutcome {
    /// How many events were appended.
    pub events: usize,
    /// The position of the last appended event.
    pub last: Position,
}

/// Why nothing was appended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// An event is invalid and cannot be stored.
    #[error("event {index}: {reason}")]
    InvalidEvent {
        /// The index of the event in the append, from 0.
        index: usize,
        /// Why the event is invalid.
        reason: String,
    },
    /// Another writer appended to the stream first. Read the stream again and decide anew.
    #[error(
        "stream {stream_id:?} is at version {actual}, \
         so its next event cannot have version {expected}"
    )]
    WrongVersion {
        /// The index of the event in the append, from 0.
        index: usize,
        /// The stream.
        stream_id: String,
        /// The version that the event names.
        expected: u64,
        /// The version of the stream.
        actual: u64,
    },
    /// The log already has an event with this id: this append was carried out before, or the id is
    /// not unique.
    #[error("an event with the id {event_id:?} is in the log already")]
    DuplicateEventId {
        /// The id of the event.
        event_id: String,
    },
    /// The database failed, or the append kept colliding with other writers.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl EventStore {
    /// Appends events of one or several streams in one transaction: all of them or none.
    ///
    /// If an event names its `stream_version`, it must be the stream's next version. The events of
    /// one append become visible together and in order. Events of other writers may lie between
    /// them.
    ///
    /// # Errors
    /// [`AppendError`]. Nothing is stored then, with one exception: if the connection was lost
    /// during the commit and the database stayed unreachable, the outcome is unknown. In that case
    /// append again with the same event ids: events that are already stored are refused as
    /// duplicates.
    pub async fn append(&self, events: &[NewEvent]) -> Result<AppendOutcome, AppendError> {
        for (index, event) in events.iter().enumerate() {
            event.check().map_err(|reason| AppendError::InvalidEvent { index, reason })?;
        }
        // The ids are generated once. If a commit is not acknowledged, they are used to find out
        // whether it happened.
        let ids: Vec<String> = events
            .iter()
            .map(|event| event.event_id.clone().unwrap_or_else(|| Uuid::now_v7().to_string()))
            .collect();
        let Some(last_id) = ids.last() else {
            return Ok(AppendOutcome { events: 0, last: self.last_visible().await? });
        };
        // After a commit was sent, only a query can find out whether it happened: a retry may
        // collide with the events of its own first attempt.
        let mut commit_sent = false;
        for attempt in 1.. {
            let error = match self.append_once(events, &ids, &mut commit_sent).await {
                Ok(()) => break,
                Err(error) => error,
            };
            let can_retry = match &error {
                // After a collision, the next attempt gets a new position or a new version.
                AppendError::Database(error) => {
                    let collision = collision(error);
                    is_transient(error)
                        || matches!(collision, Some(Collision::Position | Collision::StreamVersion))
                }
                _ => false,
            };
            if !can_retry || attempt == MAX_ATTEMPTS {
                if commit_sent && self.position_of(last_id).await?.is_some() {
                    break;
                }
                return Err(error);
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
        self.database.with_timeout(transaction.commit()).await?;
        self.database.notify_append();
        Ok(())
    }

    /// A receiver that changes with each append of this process to this database.
    pub(crate) fn subscribe_to_appends(&self) -> watch::Receiver<()> {
        self.database.subscribe_to_appends()
    }

    /// Rolls back before the caller gets the error, so that other writers do not wait for the locks
    /// of a refused insert. If the rollback fails, the connection is closed and the server rolls
    /// back.
    async fn roll_back(&self, transaction: sqlx::Transaction<'_, sqlx::MySql>) {
        if let Err(error) = self.database.with_timeout(transaction.rollback()).await {
            tracing::debug!(
                %error,
                "could not roll back a refused append; the server does so when its connection ends"
            );
        }
    }

    async fn position_of(&self, event_id: &str) -> Result<Option<Position>, sqlx::Error> {
        let find = async || {
            let find = sqlx::query_scalar(POSITION_OF).bind(event_id);
            self.database.run_pooled(async |connection| find.fetch_optional(connection).await).await
        };
        let position: Option<u64> = backoff::retry_transient(
            Some(CONFIRM_TIMEOUT),
            "find out whether the append was committed",
            find,
        )
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
    // The list is padded to a power of two, so that few statements are prepared. The padding
    // repeats a stream, which does not change the result.
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

/// Assigns a version to each event, given the current versions of the streams.
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

/// The unique key that an insert violated.
#[derive(Debug, PartialEq, Eq)]
enum Collision {
    Position,
    EventId(String),
    StreamVersion,
}

/// Converts an insert's error into the error for the caller.
fn into_append_error(error: sqlx::Error) -> AppendError {
    match collision(&error) {
        Some(Collision::EventId(event_id)) => AppendError::DuplicateEventId { event_id },
        _ => AppendError::Database(error),
    }
}

/// Parses error 1062: `Duplicate entry 'E' for key 'events.KEY'` on MySQL, `'KEY'` on MariaDB.
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
        assert_eq!(
            assign_versions(&events, current).expect("the versions follow each other"),
            [7, 1, 8, 2]
        );
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
