//! The event store: tables `events` and `event_log`.

mod acceptance;
mod append;
mod event_types;
mod fill;
mod fingerprint;
pub(crate) mod high_water;
mod inspect;
mod messages;
mod read;
mod relay_state;

use std::time::Duration;

use crate::database::Database;
use crate::model::event::Position;
use crate::model::signature::{LogIdentity, SigningKey};

pub(crate) use acceptance::{AcceptOutcome, Acceptance};
pub use append::{AppendError, AppendOutcome};
pub(crate) use fingerprint::{LogAudit, MissingPositions};
pub(crate) use high_water::{Blocker, HighWater, LogFault};
pub(crate) use inspect::{AddedTypes, MarkBlocked};
pub(crate) use messages::{LogSnapshot, QueueRecord};
pub(crate) use read::{EventFilter, LogEnds, Page, ReadAhead, ReadLimits};

const MARKS: &str = "\
    select high_water, published, log_id, signing_key, blocked_position, blocked_last, \
        timestampdiff(microsecond, blocked_since, utc_timestamp(6)) \
    from event_log";

/// The event store of one database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventStore {
    database: Database,
}

/// The state of the log as a whole: the row of `event_log`.
#[derive(Debug, Clone)]
pub(crate) struct Marks {
    /// No event at or below this position can still become visible.
    pub(crate) high_water: Position,
    /// Every event up to this position has been sent to the queue.
    pub(crate) published: Position,
    /// The id of the log and the key that signs its messages. An operator may rotate both at any
    /// time.
    pub(crate) log: LogIdentity,
    /// What blocks the mark, as last recorded by a process that could not raise it, and for how
    /// long.
    pub(crate) blocked: Option<(Blocker, Duration)>,
}

/// The columns of `event_log` that make [`Marks`].
type MarksRow = (u64, u64, String, Option<Vec<u8>>);

impl Marks {
    fn from_row((high_water, published, id, key): MarksRow) -> Result<Self, sqlx::Error> {
        // The key is missing only if `migrate` was interrupted after it created the tables.
        let key = key.ok_or_else(|| {
            sqlx::Error::Configuration(
                "the log has no key to sign messages with; run `projectionist migrate`".into(),
            )
        })?;
        let log = LogIdentity { id, key: SigningKey::new(&key) };
        let (high_water, published) = (Position::new(high_water), Position::new(published));
        Ok(Marks { high_water, published, log, blocked: None })
    }
}

impl EventStore {
    /// See [`Database::open_transaction_hint`].
    pub(crate) fn open_transaction_hint(&self) -> String {
        self.database.open_transaction_hint()
    }

    /// Returns the event store of `database`.
    pub fn new(database: &Database) -> Self {
        EventStore { database: database.clone() }
    }

    /// Reads the marks.
    pub(crate) async fn marks(&self) -> Result<Marks, sqlx::Error> {
        type Row = (u64, u64, String, Option<Vec<u8>>, Option<u64>, Option<u64>, Option<i64>);
        let (high_water, published, id, key, blocked, last, age): Row = self
            .database
            .run_cached(async |connection| sqlx::query_as(MARKS).fetch_one(connection).await)
            .await?;
        // After the database's clock was set back, the age is negative: use zero.
        let age = Duration::from_micros(age.unwrap_or_default().max(0).unsigned_abs());
        let blocked = blocked.map(|position| (Blocker::from_columns(position, last), age));
        Ok(Marks { blocked, ..Marks::from_row((high_water, published, id, key))? })
    }
}
