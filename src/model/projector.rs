//! What a team writes: a named, versioned consumer of events.

use std::fmt;
use std::str::FromStr;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sqlx::MySqlConnection;

use crate::model::event::Event;

/// A named, versioned consumer of events.
///
/// The handler gets the connection of the transaction that also moves the projector's position:
/// what it writes there is applied exactly once, whatever happens around it. It must not commit,
/// and no statement in it may commit on its own (DDL does): that is found out and breaks the
/// projector.
///
/// An effect *outside* that connection (an e-mail, an HTTP call) cannot be part of the transaction
/// and happens **at least once**: pass [`Event::event_id`] on as the idempotency key, and say so
/// with [`Projector::has_side_effects`].
///
/// ```
/// use projectionist::{Event, EventTypes, Projector, async_trait, sqlx};
///
/// struct CasesPerDepartment;
///
/// #[derive(serde::Deserialize)]
/// struct Received { department: String }
///
/// #[async_trait]
/// impl Projector for CasesPerDepartment {
///     fn name(&self) -> &str { "cases_per_department" }
///
///     fn event_types(&self) -> EventTypes { EventTypes::only(["Confirmation of receipt"]) }
///
///     async fn setup(&self, db: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
///         sqlx::query("create table if not exists cases_per_department
///                      (department varchar(100) primary key, cases bigint not null)").execute(db).await?;
///         Ok(())
///     }
///
///     async fn handle(&self, event: &Event, db: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
///         let received: Received = event.payload()?;
///         sqlx::query("insert into cases_per_department values (?, 1)
///                      on duplicate key update cases = cases + 1")
///             .bind(received.department).execute(db).await?;
///         Ok(())
///     }
/// }
/// ```
#[async_trait]
pub trait Projector: Send + Sync + 'static {
    /// Its name: 1 to 100 of `A-Z a-z 0-9 _ . -`. Name and version together are its identity.
    fn name(&self) -> &str;

    /// Its version. A new version is a new projector, and boots from the start.
    fn version(&self) -> u32 {
        1
    }

    /// Where it starts and whether it goes on.
    fn mode(&self) -> Mode {
        Mode::FromBeginning
    }

    /// The events that it subscribes to.
    fn event_types(&self) -> EventTypes {
        EventTypes::All
    }

    /// Whether it acts outside the database. Its ledger row then outlives it, so that it can never
    /// be played again by mistake.
    fn has_side_effects(&self) -> bool {
        false
    }

    /// A word for the state of the handler's code: a version, a hash. It is part of the
    /// definition's digest, so that a worker of another release, whose handler means something else
    /// by the same name and version, is known.
    ///
    /// Change it with every change to what the handler stores. Without one, the digest is made of
    /// name, mode, event types and side effects alone.
    fn revision(&self) -> String {
        String::new()
    }

    /// The tables that this projector writes and no other does, as `table` or `database.table`.
    /// Boot refuses to build a new projector on one that already has rows, and to carry on where
    /// one is missing. Tables that [`Projector::setup`] creates need not be named: boot sees them.
    fn tables(&self) -> Vec<String> {
        Vec::new()
    }

    /// What the projector's statements may leave behind in their database session.
    fn session(&self) -> SessionUse {
        SessionUse::Dedicated
    }

    /// Creates what the handler writes to. Boot runs it at first sight, and again whenever it
    /// resumes the projector, so it must be harmless to repeat: `create table if not exists`. It
    /// may take as long as it likes, but not be silent on its connection for a minute: then the
    /// server ends that, and it is run again.
    async fn setup(&self, _db: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(())
    }

    /// Removes what setup created. Run by `retire`; must be harmless to repeat.
    async fn teardown(&self, _db: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(())
    }

    /// Applies one event. An error breaks the projector at this event, unless it is transient
    /// (a deadlock, a lock wait, a lost connection): then the batch is rolled back and tried again.
    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()>;

    /// Applies some events in order, all of them subscribed to. Override it where one statement can
    /// serve many events, perhaps with a [`MultiRowInsert`](crate::MultiRowInsert). After an error
    /// the same events come again one by one, so that the failing one is found.
    async fn handle_batch(
        &self,
        events: &[&Event],
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        for event in events {
            self.handle(event, db).await?;
        }
        Ok(())
    }
}

/// What a projector's statements may leave behind in their database session: user variables,
/// temporary tables, user locks, prepared statements. (Session variables are checked before every
/// commit, whatever this says.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionUse {
    /// Nothing. The session may serve other projectors afterwards, which saves connections.
    Shared,
    /// Something, which only this projector may see: a session is kept for it alone. The default.
    Dedicated,
    /// Something that must not reach even the next event: each event has a transaction and a new
    /// session of its own.
    PerEvent,
}

/// Where a projector starts, and whether it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Replays the whole log, then lives.
    FromBeginning,
    /// Starts at the high-water mark of its first boot: it never sees an older event.
    FromNow,
    /// Replays the log up to the high-water mark, during the deploy, and never runs again.
    Once,
}

impl Mode {
    /// As it is written in files and in the ledger.
    pub const fn as_str(self) -> &'static str {
        match self {
            Mode::FromBeginning => "from_beginning",
            Mode::FromNow => "from_now",
            Mode::Once => "once",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Mode::FromBeginning, Mode::FromNow, Mode::Once]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| format!("unknown mode {text:?}"))
    }
}

/// The event types that a projector subscribes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventTypes {
    /// Every event; never a tombstone.
    All,
    /// Events of these types.
    Only(Vec<String>),
}

impl EventTypes {
    /// Events of these types.
    pub fn only<T: Into<String>>(types: impl IntoIterator<Item = T>) -> Self {
        EventTypes::Only(types.into_iter().map(Into::into).collect())
    }
}

/// What identifies a projector: its name and version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProjectorId {
    /// The name.
    pub name: String,
    /// The version.
    pub version: u32,
}

impl fmt::Display for ProjectorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}
