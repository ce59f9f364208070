//! The ledger: table `projectors`. The only authority on what has been applied.

use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row};
use time::PrimitiveDateTime;

use crate::database::Database;
use crate::error::{MayPass, is_transient};
use crate::event::{Position, datetime};
use crate::lifecycle::{self, FailedEvent, Failure, Stage, Status, Step};
use crate::projector::{Mode, ProjectorId};
use crate::registry::Registered;

/// The columns of an [`Entry`], of those rows that the rest of the statement names.
macro_rules! select_entry {
    ($rest:literal) => {
        concat!(
            "select name, version, mode, status, position, side_effects, failed_position, failed_event_id, \
             failed_event_type, failed_error, failed_at, failed_attempts, failed_release, failed_host from projectors ",
            $rest
        )
    };
}

const ENTRIES: &str = select_entry!("order by created_at, name, version");
/// No more of them than who plays needs: it asks with every receive.
const LIVE: &str = "select name, version, position from projectors where status = 'live'";
const ENTRY: &str = select_entry!("where name = ? and version = ?");
const LOCK: &str = select_entry!("where name = ? and version = ? for update");

/// A handler that commits, or runs a statement that does (DDL), takes this savepoint away: releasing it
/// then fails with error 1305.
const SAVEPOINT: &str = "savepoint projectionist";
const RELEASE: &str = "release savepoint projectionist";

/// Fails, and so ends the packet that it is in, unless the statement before it found one row: no number is larger. A `select`
/// would do so too, with a result that somebody has to read; `do` would only warn on MariaDB.
const MOVED_ONE: &str = "set @projectionist = 18446744073709551615 + (row_count() != 1)";

/// Two boots may see a new projector at once: the row of the first stands.
const ENTER: &str = "insert into projectors (name, version, mode, status, position, side_effects) \
                     values (?, ?, ?, 'booting', ?, ?) on duplicate key update name = name";

const SET_STATUS: &str = "update projectors set status = ?, failed_position = ?, failed_event_id = ?, \
                          failed_event_type = ?, failed_error = ?, failed_at = ?, failed_attempts = ?, \
                          failed_release = ?, failed_host = ?, status_changed_at = utc_timestamp(6) \
                          where name = ? and version = ?";

/// Only what retire has marked: a projector that was booted anew meanwhile is somebody else's.
const REMOVE: &str = "delete from projectors where name = ? and version = ? and status = 'retired'";

/// What is kept of an error, in characters; `failed_error` is a `text` of 65,535 bytes.
pub(crate) const MAX_ERROR: usize = 8_000;
const MAX_RELEASE: usize = 200;
const MAX_HOST: usize = 255;

/// The ledger of one database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger {
    database: Database,
}

/// What the ledger has of one projector.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// Which projector.
    pub id: ProjectorId,
    /// The mode in which it was booted.
    pub mode: Mode,
    /// Where it stands in its life.
    pub status: Status,
    /// Every event up to here that it subscribes to has been applied, once.
    pub position: Position,
    /// Whether it acts outside the database.
    pub side_effects: bool,
}

impl Ledger {
    /// The ledger in this database.
    pub fn new(database: &Database) -> Self {
        Ledger { database: database.clone() }
    }

    /// Every projector that was ever booted and not removed, the oldest first. Waits for no lock.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn entries(&self) -> Result<Vec<Entry>, sqlx::Error> {
        let rows = self.database.ask(async |connection| sqlx::query(ENTRIES).fetch_all(connection).await).await?;
        rows.iter().map(decode).collect()
    }

    /// The projectors that are live, of any release, and where they stand. Waits for no lock.
    pub(crate) async fn live(&self) -> Result<Vec<(ProjectorId, Position)>, sqlx::Error> {
        let live = self.database.ask(async |connection| sqlx::query_as(LIVE).fetch_all(connection).await).await?;
        let decode = |(name, version, position)| (ProjectorId { name, version }, Position::new(position));
        Ok(live.into_iter().map(decode).collect())
    }

    /// Enters a new projector as booting; one that is there already is left as it is.
    pub(crate) async fn enter(&self, projector: &Registered, position: Position) -> Result<(), sqlx::Error> {
        let enter = sqlx::query(ENTER)
            .bind(&projector.id.name)
            .bind(projector.id.version)
            .bind(projector.mode.as_str())
            .bind(position.get())
            .bind(projector.has_side_effects);
        self.database.answer(async |connection| enter.execute(connection).await).await.map(|_| ())
    }

    /// Takes a step of the lifecycle under the row's lock, if `still` holds of the row; returns the row as
    /// it is afterwards, or `None` if there is none. A row of which it does not hold is left as it is.
    pub(crate) async fn step(
        &self,
        id: &ProjectorId,
        step: Step,
        still: impl Fn(&Entry) -> bool,
    ) -> Result<Option<Entry>, LedgerError> {
        let mut connection = self.database.acquire().await?;
        let begin = async {
            let mut transaction = connection.begin().await?;
            let locked = lock(&mut transaction, id).await?;
            Ok((transaction, locked))
        };
        let (mut transaction, Some(mut entry)) = self.database.answered(begin).await? else {
            return Ok(None);
        };
        if still(&entry) {
            entry.status = lifecycle::take(&entry.status, entry.mode, step)
                .map_err(|error| LedgerError::Step(id.clone(), error))?;
            let commit = async {
                set_status(&mut transaction, id, &entry.status).await?;
                transaction.commit().await
            };
            self.database.answered(commit).await?;
        }
        Ok(Some(entry))
    }

    /// What the ledger has of one projector now. Waits for no lock.
    pub(crate) async fn entry(&self, id: &ProjectorId) -> Result<Option<Entry>, sqlx::Error> {
        let entry = sqlx::query(ENTRY).bind(&id.name).bind(id.version);
        let row = self.database.ask(async |connection| entry.fetch_optional(connection).await).await?;
        row.map(|row| decode(&row)).transpose()
    }

    /// Moves projectors together over events that none of them wants: the fence and the commit of each, in one
    /// statement. Returns how many were moved; whoever is not this stage's, or does not stand at `from`, is not.
    pub(crate) async fn pass_over(
        &self,
        ids: &[&ProjectorId],
        stage: Stage,
        from: Position,
        to: Position,
    ) -> Result<u64, sqlx::Error> {
        let identity = |id: &&ProjectorId| format!("('{}', {})", id.name, id.version);
        let identities = ids.iter().map(identity).collect::<Vec<_>>().join(", ");
        let statuses = stage.statuses();
        let pass_over = format!(
            "update projectors set position = {to} \
             where (name, version) in ({identities}) and position = {from} and status in ({statuses})"
        );
        let pass_over = sqlx::raw_sql(AssertSqlSafe(pass_over));
        let moved = self.database.ask(async |connection| pass_over.execute(connection).await).await?;
        Ok(moved.rows_affected())
    }

    /// Forgets a projector: the next boot of it would start from the beginning.
    pub(crate) async fn remove(&self, id: &ProjectorId) -> Result<(), sqlx::Error> {
        let remove = sqlx::query(REMOVE).bind(&id.name).bind(id.version);
        self.database.answer(async |connection| remove.execute(connection).await).await.map(|_| ())
    }
}

/// Why a step was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    #[error("{0}: {1}")]
    Step(ProjectorId, lifecycle::IllegalStep),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl MayPass for LedgerError {
    fn may_pass(&self) -> bool {
        match self {
            LedgerError::Step(..) => false,
            LedgerError::Database(error) => is_transient(error),
        }
    }
}

/// Locks a projector's row until the transaction ends.
async fn lock(connection: &mut MySqlConnection, id: &ProjectorId) -> Result<Option<Entry>, sqlx::Error> {
    let row = sqlx::query(LOCK).bind(&id.name).bind(id.version).fetch_optional(connection).await?;
    row.map(|row| decode(&row)).transpose()
}

/// The fence: begins the transaction that applies events, and locks the projector's row if it is still this stage's and
/// stands at `from`. `false`, with nothing locked but the transaction begun, if it is not.
///
/// In one packet, which cannot be prepared: an identity has no character that SQL knows (`Registry::add`), and the rest is
/// numbers and words of ours.
pub(crate) async fn begin(
    session: &mut MySqlConnection,
    id: &ProjectorId,
    stage: Stage,
    from: Position,
) -> Result<bool, sqlx::Error> {
    let begin = format!("start transaction; {}; {SAVEPOINT}", claim(id, stage, from));
    Ok(sqlx::raw_sql(AssertSqlSafe(begin)).execute(session).await?.rows_affected() == 1)
}

/// Moves a projector whose claim is held, and commits, in one packet too: it ends before the commit where the row is no
/// longer as it was locked.
///
/// # Errors
/// With the server's number 1305 if the transaction is no longer the one that was begun; 1690 if the row has changed. After
/// an error nothing is committed, unless it is the answer that was lost.
pub(crate) async fn commit(
    session: &mut MySqlConnection,
    id: &ProjectorId,
    from: Position,
    to: Position,
) -> Result<(), sqlx::Error> {
    let commit = format!("{}; commit", advance(id, from, to));
    sqlx::raw_sql(AssertSqlSafe(commit)).execute(session).await.map(|_| ())
}

/// [`commit`], and [`begin`] for the next batch behind it in the same packet. Returns what the latter does; whoever waits
/// for the row has it first.
///
/// # Errors
/// As [`commit`]. After any other error it may be committed all the same.
pub(crate) async fn commit_and_begin(
    session: &mut MySqlConnection,
    id: &ProjectorId,
    stage: Stage,
    from: Position,
    to: Position,
) -> Result<bool, sqlx::Error> {
    let commit = format!("{}; commit and chain; {}; {SAVEPOINT}", advance(id, from, to), claim(id, stage, to));
    Ok(sqlx::raw_sql(AssertSqlSafe(commit)).execute(session).await?.rows_affected() == 2)
}

/// An update that changes nothing locks as `for update` does, and says in fewer words whether there is such a row.
fn claim(ProjectorId { name, version }: &ProjectorId, stage: Stage, at: Position) -> String {
    let statuses = stage.statuses();
    format!(
        "update projectors set status = status \
         where name = '{name}' and version = {version} and position = {at} and status in ({statuses})"
    )
}

fn advance(ProjectorId { name, version }: &ProjectorId, from: Position, to: Position) -> String {
    format!(
        "{RELEASE}; \
         update projectors set position = {to} \
         where name = '{name}' and version = {version} and position = {from}; \
         {MOVED_ONE}"
    )
}

async fn set_status(connection: &mut MySqlConnection, id: &ProjectorId, status: &Status) -> Result<(), sqlx::Error> {
    let failure = status.failure();
    let event = failure.and_then(|failure| failure.event.as_ref());
    sqlx::query(SET_STATUS)
        .bind(status.as_str())
        .bind(event.map(|event| event.position.get()))
        .bind(event.map(|event| &event.event_id))
        .bind(event.map(|event| &event.event_type))
        .bind(failure.map(|failure| failure.error.as_str()))
        .bind(failure.map(|failure| datetime(failure.at)))
        .bind(failure.map(|failure| failure.attempts))
        .bind(failure.and_then(|failure| failure.release.as_deref()).map(|release| limited(release, MAX_RELEASE)))
        .bind(failure.map(|failure| limited(&failure.host, MAX_HOST)))
        .bind(&id.name)
        .bind(id.version)
        .execute(connection)
        .await
        .map(|_| ())
}

pub(crate) fn limited(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

fn decode(row: &MySqlRow) -> Result<Entry, sqlx::Error> {
    let unreadable = |column: &str, text: &str| {
        sqlx::Error::Decode(format!("projectors.{column} has {text:?}, which this release does not know").into())
    };
    let mode: String = row.try_get("mode")?;
    let status: String = row.try_get("status")?;
    let status = match status.as_str() {
        "booting" => Status::Booting,
        "live" => Status::Live,
        "stalled" => Status::Stalled,
        "finished" => Status::Finished,
        "retired" => Status::Retired,
        "broken" => Status::Broken(Failure {
            event: decode_failed_event(row)?,
            error: row.try_get("failed_error")?,
            at: row.try_get::<PrimitiveDateTime, _>("failed_at")?.assume_utc(),
            attempts: row.try_get("failed_attempts")?,
            release: row.try_get("failed_release")?,
            host: row.try_get("failed_host")?,
        }),
        unknown => return Err(unreadable("status", unknown)),
    };
    Ok(Entry {
        id: ProjectorId { name: row.try_get("name")?, version: row.try_get("version")? },
        mode: mode.parse().map_err(|_| unreadable("mode", &mode))?,
        status,
        position: Position::new(row.try_get("position")?),
        side_effects: row.try_get("side_effects")?,
    })
}

fn decode_failed_event(row: &MySqlRow) -> Result<Option<FailedEvent>, sqlx::Error> {
    let Some(position) = row.try_get::<Option<u64>, _>("failed_position")? else { return Ok(None) };
    Ok(Some(FailedEvent {
        position: Position::new(position),
        event_id: row.try_get("failed_event_id")?,
        event_type: row.try_get("failed_event_type")?,
    }))
}
