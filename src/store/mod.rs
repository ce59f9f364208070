//! The event store: tables `events` and `event_log`.

mod append;
mod fingerprint;
pub(crate) mod high_water;
mod look;
mod read;
mod relay_state;

use crate::database::Database;
use crate::event::Position;

pub use append::{AppendError, Appended};
pub(crate) use high_water::{Held, HighWater};
pub(crate) use look::{AddedTypes, HeldMark};
pub(crate) use read::{Page, ReadAhead, ReadLimits, Wanted};

const MARKS: &str = "select high_water, published, log_id from event_log";

/// The event store of one database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventStore {
    database: Database,
}

/// What is known of the log as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Marks {
    /// Nothing can still become visible at or below it.
    pub(crate) high_water: Position,
    /// Everything up to it has been sent to the queue.
    pub(crate) published: Position,
    /// Which log this is.
    pub(crate) log_id: String,
}

impl EventStore {
    /// The store in this database.
    pub fn new(database: &Database) -> Self {
        EventStore { database: database.clone() }
    }

    /// The marks as they are stored.
    pub(crate) async fn marks(&self) -> Result<Marks, sqlx::Error> {
        let (high_water, published, log_id): (u64, u64, String) =
            self.database.ask(async |connection| sqlx::query_as(MARKS).fetch_one(connection).await).await?;
        Ok(Marks { high_water: Position::new(high_water), published: Position::new(published), log_id })
    }
}
