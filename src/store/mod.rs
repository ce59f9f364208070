//! The event store: tables `events` and `event_log`.

mod append;
mod fingerprint;
pub(crate) mod high_water;
mod messages;
mod read;
mod relay_state;

use crate::database::Database;
use crate::event::Position;
use crate::signature::{LogIdentity, SigningKey};

pub use append::{AppendError, Appended};
pub(crate) use high_water::{Held, HighWater};
pub(crate) use messages::{LogView, QueueRecord};
pub(crate) use read::{Page, ReadAhead, ReadLimits, Wanted};

const MARKS: &str = "select high_water, published, log_id, signing_key from event_log";

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
}

/// The marks as a row has them.
type MarksRow = (u64, u64, String, Option<Vec<u8>>);

impl Marks {
    fn of_row((high_water, published, id, key): MarksRow) -> Result<Self, sqlx::Error> {
        // Only where `migrate` was ended after its last table and before its end.
        let key = key.ok_or_else(|| {
            sqlx::Error::Configuration("the log has no key to sign messages with; run `projectionist migrate`".into())
        })?;
        let log = LogIdentity { id, key: SigningKey::new(&key) };
        Ok(Marks { high_water: Position::new(high_water), published: Position::new(published), log })
    }
}

impl EventStore {
    /// The store in this database.
    pub fn new(database: &Database) -> Self {
        EventStore { database: database.clone() }
    }

    /// The marks as they are stored.
    pub(crate) async fn marks(&self) -> Result<Marks, sqlx::Error> {
        Marks::of_row(self.database.ask(async |connection| sqlx::query_as(MARKS).fetch_one(connection).await).await?)
    }
}
