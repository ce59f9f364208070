//! The ledger: the table `projectors`. It is the only authority on which events have been applied.

mod claim;
pub(crate) mod read_model;
mod retry;

use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row};
use time::{OffsetDateTime, PrimitiveDateTime};

use crate::database::Database;
use crate::database::error::is_transient;
use crate::model::backoff::Transient;
use crate::model::event::{Position, utc_datetime};
use crate::model::lifecycle::{self, FailedEvent, Failure, Stage, Status, Transition};
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::RegisteredProjector;
use crate::model::retrying::Retrying;
pub(crate) use claim::{Claim, CommitOutcome, fence_sql};
pub(crate) use retry::StoredWait;

/// The query for the columns of an [`Entry`], followed by the rest of the statement.
macro_rules! select_entry {
    ($rest:literal) => {
        concat!(
            "select name, version, mode, status, position, has_side_effects, failed_position, \
                failed_event_id, failed_event_type, failed_error, failed_at, failed_attempts, \
                failed_release, failed_host, partially_applied, rebuild_reason, start_position, \
                digest, event_types, owned_tables, status_changed_at, retry_position, retry_since, \
                retry_attempts, retry_reason, retry_at, retry_is_alerted \
             from projectors ",
            $rest
        )
    };
}

const ENTRIES: &str = select_entry!("order by created_at, name, version");
/// Only the columns that a worker needs, because it runs this query with every receive.
const LIVE_PROJECTORS: &str = "\
    select name, version, position, digest, ifnull(retry_position = position, 0) \
    from projectors where status = 'live'";
const ENTRY: &str = select_entry!("where name = ? and version = ?");
const LOCK: &str = select_entry!("where name = ? and version = ? for update");

/// If two boots register a new projector at once, the first row stays.
const REGISTER: &str = "\
    insert into projectors \
        (name, version, mode, status, position, has_side_effects, start_position, digest, \
        event_types) \
    values (?, ?, ?, 'booting', ?, ?, ?, ?, ?) \
    on duplicate key update name = name";

/// Only replaces the digest that the boot has compared with, so that two boots of different
/// releases notice each other.
const SET_DEFINITION: &str = "\
    update projectors \
    set digest = ?, event_types = ? \
    where name = ? and version = ? and digest <=> ?";

const SET_OWNED_TABLES: &str =
    "update projectors set owned_tables = ? where name = ? and version = ?";

const CLEAR_REBUILD_REASON: &str = "\
    update projectors \
    set rebuild_reason = null, partially_applied = 0 \
    where name = ? and version = ?";

const SET_STATUS: &str = "\
    update projectors \
    set status_changed_at = if(status = ?, status_changed_at, utc_timestamp(6)), \
        status = ?, failed_position = ?, failed_event_id = ?, failed_event_type = ?, \
        failed_error = ?, failed_at = ?, failed_attempts = ?, failed_release = ?, failed_host = ?, \
        rebuild_reason = coalesce(?, rebuild_reason), \
        retry_position = null, retry_since = null, retry_attempts = null, retry_reason = null, \
        retry_at = null, retry_is_alerted = 0 \
    where name = ? and version = ?";

/// Only deletes a retired row: a projector that was booted again meanwhile stays.
const REMOVE: &str = "delete from projectors where name = ? and version = ? and status = 'retired'";

/// The rebuild reason of a projector whose row has `partially_applied` set.
const PARTIALLY_APPLIED: &str = "a handler committed a part of a batch, by itself or by a \
    statement that commits implicitly, and the batch was not finished: that part is stored \
    without its position, so rebuild the read model";

/// The most characters of an error that are stored. `failed_error` is a `text` of 65,535 bytes.
pub(crate) const MAX_ERROR: usize = 8_000;
const MAX_RELEASE: usize = 200;
const MAX_HOST: usize = 255;

/// The ledger of one database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger {
    database: Database,
}

/// The ledger's row of one projector.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The name and version of the projector.
    pub id: ProjectorId,
    /// The mode in which the projector was booted.
    pub mode: Mode,
    /// The status of the projector's lifecycle.
    pub status: Status,
    /// Since when the projector has had this status, in UTC.
    pub status_since: OffsetDateTime,
    /// Every event up to this position that the projector subscribes to has been applied, once.
    pub position: Position,
    /// Whether the projector has effects outside the database.
    pub has_side_effects: bool,
    /// The position at which the projector started. `None` if an older release booted it.
    pub start_position: Option<Position>,
    /// The digest of the definition with which the projector was last booted. `None` if an older
    /// release booted it.
    pub digest: Option<String>,
    /// The event types with which the projector was last booted; `["*"]` means all. `None` if
    /// they are unknown.
    pub event_types: Option<Vec<String>>,
    /// The tables that the projector's setup created or that it declares as its own, as `table` or
    /// `database.table`. `None` if they are unknown.
    pub owned_tables: Option<Vec<String>>,
    /// Why the read model must be rebuilt. Boot neither resumes such a projector nor hands it over.
    pub rebuild_reason: Option<String>,
    /// Set while the projector waits for a later retry of its next event.
    pub retrying: Option<Retrying>,
}

impl Entry {
    /// Whether a definition has the digest of the last boot. Without a stored digest, every
    /// definition matches.
    pub(crate) fn matches_digest(&self, digest: &str) -> bool {
        self.digest.as_deref().is_none_or(|booted| booted == digest)
    }

    /// Whether the projector has advanced since its start, so that its read model may have content.
    /// If the start is unknown, any position above 0 counts.
    pub(crate) fn is_past_start(&self) -> bool {
        self.position > self.start_position.unwrap_or(Position::START)
    }
}

/// The part of a live projector's row that a worker needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LiveProjector {
    pub(crate) id: ProjectorId,
    pub(crate) position: Position,
    /// The digest of the definition with which the projector was last booted, if it is known.
    pub(crate) digest: Option<String>,
    /// Whether the projector waits for a later retry of its next event.
    pub(crate) is_retrying: bool,
}

impl Ledger {
    /// Returns the ledger of `database`.
    pub fn new(database: &Database) -> Self {
        Ledger { database: database.clone() }
    }

    /// Reads the rows of all projectors, the oldest first. Waits for no lock.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn entries(&self) -> Result<Vec<Entry>, sqlx::Error> {
        let rows = self
            .database
            .run_cached(async |connection| sqlx::query(ENTRIES).fetch_all(connection).await)
            .await?;
        rows.iter().map(decode_entry).collect()
    }

    /// Reads the live projectors of all releases. Waits for no lock.
    pub(crate) async fn live_projectors(&self) -> Result<Vec<LiveProjector>, sqlx::Error> {
        let live = self
            .database
            .run_cached(async |connection| {
                sqlx::query_as(LIVE_PROJECTORS).fetch_all(connection).await
            })
            .await?;
        let decode =
            |(name, version, position, digest, retrying): (_, _, _, _, i64)| LiveProjector {
                id: ProjectorId { name, version },
                position: Position::new(position),
                digest,
                is_retrying: retrying != 0,
            };
        Ok(live.into_iter().map(decode).collect())
    }

    /// Inserts a new projector with the status booting. An existing row stays as it is.
    pub(crate) async fn register(
        &self,
        projector: &RegisteredProjector,
        position: Position,
    ) -> Result<(), sqlx::Error> {
        let register = sqlx::query(REGISTER)
            .bind(&projector.id.name)
            .bind(projector.id.version)
            .bind(projector.mode.as_str())
            .bind(position.get())
            .bind(projector.has_side_effects)
            .bind(position.get())
            .bind(&projector.digest)
            .bind(encode_list(&projector.subscription()));
        self.database
            .run_pooled(async |connection| register.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Records the definition with which a projector is booted, if the stored digest is still
    /// `before`.
    pub(crate) async fn set_definition(
        &self,
        projector: &RegisteredProjector,
        before: Option<&str>,
    ) -> Result<(), sqlx::Error> {
        let set = sqlx::query(SET_DEFINITION)
            .bind(&projector.digest)
            .bind(encode_list(&projector.subscription()))
            .bind(&projector.id.name)
            .bind(projector.id.version)
            .bind(before);
        self.database.run_pooled(async |connection| set.execute(connection).await).await.map(|_| ())
    }

    /// Records the tables that a projector owns.
    pub(crate) async fn set_owned_tables(
        &self,
        id: &ProjectorId,
        tables: &[String],
    ) -> Result<(), sqlx::Error> {
        let set =
            sqlx::query(SET_OWNED_TABLES).bind(encode_list(tables)).bind(&id.name).bind(id.version);
        self.database.run_pooled(async |connection| set.execute(connection).await).await.map(|_| ())
    }

    /// Clears the rebuild reason, after an operator has repaired the read model.
    pub(crate) async fn clear_rebuild_reason(&self, id: &ProjectorId) -> Result<(), sqlx::Error> {
        let clear = sqlx::query(CLEAR_REBUILD_REASON).bind(&id.name).bind(id.version);
        self.database
            .run_pooled(async |connection| clear.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Applies a lifecycle transition under the row's lock, if `condition` holds for the row;
    /// otherwise the row stays as it is. Returns the resulting row, or `None` if there is no such
    /// row.
    pub(crate) async fn transition(
        &self,
        id: &ProjectorId,
        step: Transition,
        condition: impl Fn(&Entry) -> bool,
    ) -> Result<Option<Entry>, LedgerError> {
        let mut connection = self.database.acquire().await?;
        let begin = async {
            let mut transaction = connection.begin().await?;
            let locked = lock(&mut transaction, id).await?;
            Ok((transaction, locked))
        };
        let (mut transaction, Some(mut entry)) = self.database.with_timeout(begin).await? else {
            return Ok(None);
        };
        if condition(&entry) {
            entry.status = lifecycle::apply_transition(&entry.status, entry.mode, step)
                .map_err(|error| LedgerError::Step(id.clone(), error))?;
            entry.retrying = None;
            let commit = async {
                set_status(&mut transaction, id, &entry.status).await?;
                transaction.commit().await
            };
            self.database.with_timeout(commit).await?;
        }
        Ok(Some(entry))
    }

    /// Reads the current row of one projector. Waits for no lock.
    pub(crate) async fn entry(&self, id: &ProjectorId) -> Result<Option<Entry>, sqlx::Error> {
        let entry = sqlx::query(ENTRY).bind(&id.name).bind(id.version);
        let row = self
            .database
            .run_cached(async |connection| entry.fetch_optional(connection).await)
            .await?;
        row.map(|row| decode_entry(&row)).transpose()
    }

    /// Moves several projectors over events that none of them subscribes to: the fence and the
    /// commit of each, in one statement. Returns how many were moved.
    ///
    /// A projector is not moved if it does not belong to this stage, its position is not `from`, or
    /// it was booted with another definition.
    pub(crate) async fn skip_ahead(
        &self,
        projectors: &[&RegisteredProjector],
        stage: Stage,
        from: Position,
        to: Position,
    ) -> Result<u64, sqlx::Error> {
        let identity = |projector: &&RegisteredProjector| {
            let ProjectorId { name, version } = &projector.id;
            format!("('{name}', {version})")
        };
        let identities = projectors.iter().map(identity).collect::<Vec<_>>().join(", ");
        // A digest covers name and version, so one list of digests is enough for all projectors.
        let digest = |projector: &&RegisteredProjector| format!("'{}'", projector.digest);
        let digests = projectors.iter().map(digest).collect::<Vec<_>>().join(", ");
        let statuses = stage.statuses_sql();
        let skip_ahead = format!(
            "update projectors set position = {to} \
             where (name, version) in ({identities}) and position = {from} \
             and status in ({statuses}) and not partially_applied and rebuild_reason is null \
             and (digest is null or digest in ({digests}))"
        );
        let skip_ahead = sqlx::raw_sql(AssertSqlSafe(skip_ahead));
        let moved = self
            .database
            .run_cached(async |connection| skip_ahead.execute(connection).await)
            .await?;
        Ok(moved.rows_affected())
    }

    /// Deletes a retired projector's row. The next boot of the projector starts from the beginning.
    pub(crate) async fn remove(&self, id: &ProjectorId) -> Result<(), sqlx::Error> {
        let remove = sqlx::query(REMOVE).bind(&id.name).bind(id.version);
        self.database
            .run_pooled(async |connection| remove.execute(connection).await)
            .await
            .map(|_| ())
    }
}

/// Why a transition failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    #[error("{0}: {1}")]
    Step(ProjectorId, lifecycle::IllegalTransition),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl Transient for LedgerError {
    fn is_transient(&self) -> bool {
        match self {
            LedgerError::Step(..) => false,
            LedgerError::Database(error) => is_transient(error),
        }
    }
}

/// Locks a projector's row until the transaction ends.
async fn lock(
    connection: &mut MySqlConnection,
    id: &ProjectorId,
) -> Result<Option<Entry>, sqlx::Error> {
    let row = sqlx::query(LOCK).bind(&id.name).bind(id.version).fetch_optional(connection).await?;
    row.map(|row| decode_entry(&row)).transpose()
}

async fn set_status(
    connection: &mut MySqlConnection,
    id: &ProjectorId,
    status: &Status,
) -> Result<(), sqlx::Error> {
    let failure = status.failure();
    let event = failure.and_then(|failure| failure.event.as_ref());
    sqlx::query(SET_STATUS)
        .bind(status.as_str())
        .bind(status.as_str())
        .bind(event.map(|event| event.position.get()))
        .bind(event.map(|event| &event.event_id))
        .bind(event.map(|event| &event.event_type))
        .bind(failure.map(|failure| failure.error.as_str()))
        .bind(failure.map(|failure| utc_datetime(failure.at)))
        .bind(failure.map(|failure| failure.attempts))
        .bind(
            failure
                .and_then(|failure| failure.release.as_deref())
                .map(|release| truncate(release, MAX_RELEASE)),
        )
        .bind(failure.map(|failure| truncate(&failure.host, MAX_HOST)))
        .bind(
            failure
                .and_then(|failure| failure.rebuild_reason.as_deref())
                .map(|reason| truncate(reason, MAX_ERROR)),
        )
        .bind(&id.name)
        .bind(id.version)
        .execute(connection)
        .await
        .map(|_| ())
}

pub(crate) fn truncate(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

fn decode_entry(row: &MySqlRow) -> Result<Entry, sqlx::Error> {
    let unreadable = |column: &str, text: &str| {
        sqlx::Error::Decode(
            format!("projectors.{column} has {text:?}, which this release does not support").into(),
        )
    };
    let rebuild_reason: Option<String> = row.try_get("rebuild_reason")?;
    let rebuild_reason = if row.try_get("partially_applied")? {
        rebuild_reason.or_else(|| Some(PARTIALLY_APPLIED.into()))
    } else {
        rebuild_reason
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
            rebuild_reason: rebuild_reason.clone(),
        }),
        unknown => return Err(unreadable("status", unknown)),
    };
    let position = Position::new(row.try_get("position")?);
    Ok(Entry {
        id: ProjectorId { name: row.try_get("name")?, version: row.try_get("version")? },
        mode: mode.parse().map_err(|_| unreadable("mode", &mode))?,
        retrying: retry::decode_retrying(row, &status, position)?,
        status,
        status_since: row.try_get::<PrimitiveDateTime, _>("status_changed_at")?.assume_utc(),
        position,
        has_side_effects: row.try_get("has_side_effects")?,
        start_position: row.try_get::<Option<u64>, _>("start_position")?.map(Position::new),
        digest: row.try_get("digest")?,
        event_types: decode_list(row, "event_types")?,
        owned_tables: decode_list(row, "owned_tables")?,
        rebuild_reason,
    })
}

fn encode_list(list: &[String]) -> String {
    serde_json::Value::from(list).to_string()
}

fn decode_list(row: &MySqlRow, column: &str) -> Result<Option<Vec<String>>, sqlx::Error> {
    let Some(text) = row.try_get::<Option<String>, _>(column)? else { return Ok(None) };
    let list = serde_json::from_str(&text).map_err(|error| {
        sqlx::Error::Decode(
            format!("projectors.{column} is not a JSON list of strings: {error}").into(),
        )
    })?;
    Ok(Some(list))
}

fn decode_failed_event(row: &MySqlRow) -> Result<Option<FailedEvent>, sqlx::Error> {
    let Some(position) = row.try_get::<Option<u64>, _>("failed_position")? else { return Ok(None) };
    Ok(Some(FailedEvent {
        position: Position::new(position),
        event_id: row.try_get("failed_event_id")?,
        event_type: row.try_get("failed_event_type")?,
    }))
}
