//! The event store: tables `events` and `event_log`.

mod acceptance;
mod append;
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

const MARKS: &str = "select high_water, published, log_id, signing_key, blocked_position, blocked_last, \
                     timestampdiff(microsecond, blocked_since, utc_timestamp(6)) from event_log";

/// The event store of one database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventStore {
    database: Database,
}

/// What is known of the log as a whole.
#[derive(Debug, Clone)]
pub(crate) struct Marks {
    /// Nothing can still become visible at or below it.
    pub(crate) high_water: Position,
    /// Everything up to it has been sent to the queue.
    pub(crate) published: Position,
    /// Which log this is, and the key of its messages. An operator may change both at any time.
    pub(crate) log: LogIdentity,
    /// What holds the mark, as somebody wrote down who could not raise it, and for how long it has.
    pub(crate) blocked: Option<(Blocker, Duration)>,
}

/// The marks as a row has them.
type MarksRow = (u64, u64, String, Option<Vec<u8>>);

impl Marks {
    fn from_row((high_water, published, id, key): MarksRow) -> Result<Self, sqlx::Error> {
        // Only where `migrate` was ended after its last table and before its end.
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
    /// The store in this database.
    pub fn new(database: &Database) -> Self {
        EventStore { database: database.clone() }
    }

    /// The marks as they are stored.
    pub(crate) async fn marks(&self) -> Result<Marks, sqlx::Error> {
        type Row = (u64, u64, String, Option<Vec<u8>>, Option<u64>, Option<u64>, Option<i64>);
        let (high_water, published, id, key, blocked, last, age): Row = self
            .database
            .run_cached(async |connection| sqlx::query_as(MARKS).fetch_one(connection).await)
            .await?;
        // A clock that was set back makes it young, not old.
        let age = Duration::from_micros(age.unwrap_or_default().max(0).unsigned_abs());
        let blocked = blocked.map(|position| (Blocker::from_columns(position, last), age));
        Ok(Marks { blocked, ..Marks::from_row((high_water, published, id, key))? })
    }
}
