//! The trait that a team implements: a named, versioned consumer of events.

use std::fmt;
use std::str::FromStr;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sqlx::MySqlConnection;

use crate::model::event::Event;

/// A named, versioned consumer of events.
///
/// The handler receives the connection of the transaction that also moves the projector's position.
/// Its writes on that connection are applied exactly once, also after crashes and repeated
/// messages. The handler must not commit, and must not run a statement that commits implicitly,
/// such as DDL. A commit is detected and breaks the projector.
///
/// An effect *outside* that connection (an e-mail, an HTTP call) cannot be part of the transaction.
/// It happens **at least once**: pass [`Event::event_id`] on as the idempotency key, and return
/// `true` from [`Projector::has_side_effects`].
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
///                      (department varchar(100) primary key, cases bigint not null)")
///             .execute(db).await?;
///         Ok(())
///     }
///
///     async fn handle(
///         &self,
///         event: &Event,
///         db: &mut sqlx::MySqlConnection,
///     ) -> anyhow::Result<()> {
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
    /// The name: 1 to 100 characters of `A-Z a-z 0-9 _ . -`. Name and version together identify the
    /// projector.
    fn name(&self) -> &str;

    /// The version, from 1. A new version is a new projector: boot replays it from the start.
    fn version(&self) -> u32 {
        1
    }

    /// Where the projector starts, and whether it continues after boot.
    fn mode(&self) -> Mode {
        Mode::FromBeginning
    }

    /// The events that the projector subscribes to.
    fn event_types(&self) -> EventTypes {
        EventTypes::All
    }

    /// Whether the handler has effects outside the database. Retire then keeps the ledger row, so
    /// that the projector cannot be replayed by mistake.
    fn has_side_effects(&self) -> bool {
        false
    }

    /// The revision of the handler's code: a version or a hash. It is part of the definition's
    /// digest. The digest detects a worker of another release whose handler differs under the same
    /// name and version.
    ///
    /// Change the revision whenever the handler stores something else. Without a revision, the
    /// digest covers only name, version, mode, event types and side effects.
    fn revision(&self) -> String {
        String::new()
    }

    /// The tables that only this projector writes, as `table` or `database.table`. Boot refuses to
    /// build a new projector on a table that already has rows. It refuses to resume a projector if
    /// one of its tables is missing. Tables that [`Projector::setup`] creates need not be listed:
    /// boot detects them.
    fn tables(&self) -> Vec<String> {
        Vec::new()
    }

    /// What the projector's statements may leave behind in their database session.
    fn session(&self) -> SessionUse {
        SessionUse::Dedicated
    }

    /// The most events that one transaction applies. Return fewer if an event takes long, so that
    /// a batch stays within the handler's timeout.
    fn max_batch(&self) -> usize {
        usize::MAX
    }

    /// Creates the tables that the handler writes to. Boot runs setup when it first sees the
    /// projector, and whenever it resumes the projector. Setup must therefore be harmless to
    /// repeat: `create table if not exists`.
    ///
    /// Setup may take any time, but its connection must not be idle for a minute: the server then
    /// closes the connection, and boot runs setup again.
    async fn setup(&self, _db: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(())
    }

    /// The inserts of a projector file that are sent row by row, each with the reason.
    #[doc(hidden)]
    async fn row_by_row(&self, _db: &mut MySqlConnection) -> anyhow::Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Removes what setup created. `retire` runs it. It must be harmless to repeat.
    async fn teardown(&self, _db: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(())
    }

    /// Applies one event. A transient error (a deadlock, a lock wait timeout, a lost connection)
    /// rolls the batch back, and the batch is tried again. Any other error breaks the projector at
    /// this event.
    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()>;

    /// Applies several events in order; the projector subscribes to all of them. Override it if one
    /// statement can apply many events, for instance with a
    /// [`MultiRowInsert`](crate::MultiRowInsert). After an error, the same events are applied one
    /// by one, to find the one that fails.
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
    /// Nothing. Other projectors may use the session afterwards, which saves connections.
    Shared,
    /// State that only this projector may see. The session is used for this projector alone. This
    /// is the default.
    Dedicated,
    /// State that must not reach even the next event. Each event gets its own transaction and a new
    /// session.
    PerEvent,
}

/// Where a projector starts, and whether it continues after boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Replays the whole log, then goes live.
    FromBeginning,
    /// Starts at the high-water mark of its first boot. It never sees older events.
    FromNow,
    /// Replays the log up to the high-water mark, during the deploy. It never runs again.
    Once,
}

impl Mode {
    /// The mode as projector files and the ledger have it.
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
    /// Every event. Gap fillers are not included.
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

/// The identity of a projector: its name and version.
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
