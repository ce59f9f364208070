//! The ledger: table `projectors`. The only authority on what has been applied.

pub(crate) mod read_model;

use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row};
use time::PrimitiveDateTime;

use crate::database::Database;
use crate::model::error::{Transient, is_transient};
use crate::model::event::{Position, utc_datetime};
use crate::model::lifecycle::{self, FailedEvent, Failure, Stage, Status, Transition};
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::RegisteredProjector;

/// The columns of an [`Entry`], of those rows that the rest of the statement names.
macro_rules! select_entry {
    ($rest:literal) => {
        concat!(
            "select name, version, mode, status, position, has_side_effects, failed_position, failed_event_id, \
             failed_event_type, failed_error, failed_at, failed_attempts, failed_release, failed_host, \
             partially_applied, rebuild_reason, \
             start_position, digest, event_types, owned_tables from projectors ",
            $rest
        )
    };
}

const ENTRIES: &str = select_entry!("order by created_at, name, version");
/// No more columns than a worker needs, which asks with every receive.
const LIVE_PROJECTORS: &str =
    "select name, version, position, digest from projectors where status = 'live'";
const ENTRY: &str = select_entry!("where name = ? and version = ?");
const LOCK: &str = select_entry!("where name = ? and version = ? for update");

/// Two boots may see a new projector at once: the row of the first stands.
const REGISTER: &str = "insert into projectors \
                         (name, version, mode, status, position, has_side_effects, start_position, digest, event_types) \
                     values (?, ?, ?, 'booting', ?, ?, ?, ?, ?) on duplicate key update name = name";

/// Only over the digest that was compared with: two boots of different releases must not take turns
/// unseen.
const SET_DEFINITION: &str = "update projectors set digest = ?, event_types = ? \
                              where name = ? and version = ? and digest <=> ?";

const SET_OWNED_TABLES: &str =
    "update projectors set owned_tables = ? where name = ? and version = ?";

const CLEAR_REBUILD_REASON: &str = "update projectors set rebuild_reason = null, partially_applied = 0 where name = ? and version = ?";

const SET_STATUS: &str = "update projectors set status = ?, failed_position = ?, failed_event_id = ?, \
                          failed_event_type = ?, failed_error = ?, failed_at = ?, failed_attempts = ?, \
                          failed_release = ?, failed_host = ?, rebuild_reason = coalesce(?, rebuild_reason), \
                          status_changed_at = utc_timestamp(6) where name = ? and version = ?";

/// Only what retire has marked: a projector that was booted anew meanwhile is somebody else's.
const REMOVE: &str = "delete from projectors where name = ? and version = ? and status = 'retired'";

/// Why a projector must be rebuilt whose row was seen with the mark of a claim.
const PARTIALLY_APPLIED: &str = "a handler committed a part of a batch, by itself or by a statement that does so, and the batch \
                            did not come to its end: that part is stored without its position, so rebuild the read model";

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
    pub has_side_effects: bool,
    /// Where it began. `None`: it was booted before the ledger kept this.
    pub start_position: Option<Position>,
    /// The digest of the definition with which it was last booted. `None`: it was booted before the
    /// ledger kept this.
    pub digest: Option<String>,
    /// The event types with which it was last booted; `["*"]` is all of them. `None`: not known.
    pub event_types: Option<Vec<String>>,
    /// The tables that its setup has made or that it names as its own, as `table` or
    /// `database.table`. `None`: not known.
    pub owned_tables: Option<Vec<String>>,
    /// Why its read model must be rebuilt. Boot neither resumes such a projector nor hands it over.
    pub rebuild_reason: Option<String>,
}

impl Entry {
    /// Whether a definition with this digest is the one that it was last booted with; a row without
    /// a digest takes any.
    pub(crate) fn matches_digest(&self, digest: &str) -> bool {
        self.digest.as_deref().is_none_or(|booted| booted == digest)
    }

    /// Whether it has moved since it began, so that its read model holds something. Without a
    /// start, any position counts.
    pub(crate) fn is_past_start(&self) -> bool {
        self.position > self.start_position.unwrap_or(Position::START)
    }
}

/// A live projector, as far as a worker has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LiveProjector {
    pub(crate) id: ProjectorId,
    pub(crate) position: Position,
    /// The digest of the definition with which it was last booted, if the ledger has one.
    pub(crate) digest: Option<String>,
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
        let rows = self
            .database
            .run_cached(async |connection| sqlx::query(ENTRIES).fetch_all(connection).await)
            .await?;
        rows.iter().map(decode_entry).collect()
    }

    /// The projectors that are live, of any release. Waits for no lock.
    pub(crate) async fn live_projectors(&self) -> Result<Vec<LiveProjector>, sqlx::Error> {
        let live = self
            .database
            .run_cached(async |connection| {
                sqlx::query_as(LIVE_PROJECTORS).fetch_all(connection).await
            })
            .await?;
        let decode = |(name, version, position, digest)| LiveProjector {
            id: ProjectorId { name, version },
            position: Position::new(position),
            digest,
        };
        Ok(live.into_iter().map(decode).collect())
    }

    /// Enters a new projector as booting; one that is there already is left as it is.
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

    /// Records the definition with which a projector is booted, in place of the one with the digest
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

    /// Forgets why a read model must be rebuilt: an operator has repaired it.
    pub(crate) async fn clear_rebuild_reason(&self, id: &ProjectorId) -> Result<(), sqlx::Error> {
        let accept = sqlx::query(CLEAR_REBUILD_REASON).bind(&id.name).bind(id.version);
        self.database
            .run_pooled(async |connection| accept.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Takes a step of the lifecycle under the row's lock, if `still` holds of the row; returns the
    /// row as it is afterwards, or `None` if there is none. A row of which it does not hold is left
    /// as it is.
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
            let commit = async {
                set_status(&mut transaction, id, &entry.status).await?;
                transaction.commit().await
            };
            self.database.with_timeout(commit).await?;
        }
        Ok(Some(entry))
    }

    /// What the ledger has of one projector now. Waits for no lock.
    pub(crate) async fn entry(&self, id: &ProjectorId) -> Result<Option<Entry>, sqlx::Error> {
        let entry = sqlx::query(ENTRY).bind(&id.name).bind(id.version);
        let row = self
            .database
            .run_cached(async |connection| entry.fetch_optional(connection).await)
            .await?;
        row.map(|row| decode_entry(&row)).transpose()
    }

    /// Moves projectors together over events that none of them wants: the fence and the commit of
    /// each, in one statement. Returns how many were moved. A projector is not moved that is not
    /// this stage's, does not stand at `from`, or was booted with another definition.
    pub(crate) async fn skip_ahead(
        &self,
        projectors: &[&RegisteredProjector],
        stage: Stage,
        from: Position,
        to: Position,
    ) -> Result<u64, sqlx::Error> {
        let identity = |of: &&RegisteredProjector| format!("('{}', {})", of.id.name, of.id.version);
        let identities = projectors.iter().map(identity).collect::<Vec<_>>().join(", ");
        // A digest contains the identity, so that one list of digests serves all of them.
        let digest = |of: &&RegisteredProjector| format!("'{}'", of.digest);
        let digests = projectors.iter().map(digest).collect::<Vec<_>>().join(", ");
        let statuses = stage.statuses_sql();
        let skip_ahead = format!(
            "update projectors set position = {to} \
             where (name, version) in ({identities}) and position = {from} and status in ({statuses}) \
             and not partially_applied and rebuild_reason is null and (digest is null or digest in ({digests}))"
        );
        let skip_ahead = sqlx::raw_sql(AssertSqlSafe(skip_ahead));
        let moved = self
            .database
            .run_cached(async |connection| skip_ahead.execute(connection).await)
            .await?;
        Ok(moved.rows_affected())
    }

    /// Forgets a projector: the next boot of it would start from the beginning.
    pub(crate) async fn remove(&self, id: &ProjectorId) -> Result<(), sqlx::Error> {
        let remove = sqlx::query(REMOVE).bind(&id.name).bind(id.version);
        self.database
            .run_pooled(async |connection| remove.execute(connection).await)
            .await
            .map(|_| ())
    }
}

/// Why a step was not taken.
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

/// A projector's row, as the transaction that applies a batch to it claims and moves it.
#[derive(Clone, Copy)]
pub(crate) struct Claim<'a> {
    pub(crate) projector: &'a RegisteredProjector,
    pub(crate) stage: Stage,
    /// The savepoint that stands at the beginning of the transaction. A handler that commits, or
    /// runs a statement that does (DDL), takes it away: releasing it then fails with error 1305. So
    /// does a deadlock, which rolls back the whole transaction.
    pub(crate) savepoint: &'a str,
    /// A condition that holds as long as the handler has not changed its session.
    pub(crate) unchanged_condition: &'a str,
}

/// What has become of a projector's row with a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CommitOutcome {
    /// It was moved, and nobody has it.
    Released,
    /// It was moved, and is locked for the next batch.
    Claimed,
    /// It was moved, and another session had it before it could be locked again. A transaction has
    /// begun all the same.
    ClaimLost,
    /// The handler's writes are committed, and no row was moved: the handler deleted it, or hid the
    /// ledger behind a temporary table.
    NotMoved,
}

impl Claim<'_> {
    /// The fence: begins the transaction that applies events, and locks the projector's row if it
    /// is still this stage's, its position is `from`, and it was booted with this definition.
    /// `false`, with nothing locked, if it is not.
    ///
    /// In one packet, which cannot be prepared: an identity has no character that SQL knows
    /// (`Registry::add`), and the rest is numbers and words of ours. The session's `autocommit` is
    /// off, so that the first statement begins the transaction.
    pub(crate) async fn begin(
        self,
        session: &mut MySqlConnection,
        from: Position,
    ) -> Result<bool, sqlx::Error> {
        Ok(sqlx::raw_sql(AssertSqlSafe(self.claim_sql(from)))
            .execute(session)
            .await?
            .rows_affected()
            == 1)
    }

    /// Moves a projector whose claim is held, and commits, in one packet: it ends before the commit
    /// where the transaction is another one, the row is not as it was locked, or the session has
    /// been changed.
    ///
    /// # Errors
    /// With the server's number 1305 if the transaction is no longer the one that was begun; 1690
    /// if the row or the session has changed. After an error nothing is committed, unless it is the
    /// answer that was lost.
    pub(crate) async fn commit(
        self,
        session: &mut MySqlConnection,
        from: Position,
        to: Position,
    ) -> Result<CommitOutcome, sqlx::Error> {
        let commit = format!("{}; commit", self.advance_sql(from, to));
        let rows = sqlx::raw_sql(AssertSqlSafe(commit)).execute(session).await?.rows_affected();
        Ok(if rows == 1 { CommitOutcome::Released } else { CommitOutcome::NotMoved })
    }

    /// [`Claim::commit`], and [`Claim::begin`] for the next batch behind it in the same packet.
    /// Another session that waits for the row has it first.
    ///
    /// # Errors
    /// As [`Claim::commit`]. After any other error it may be committed all the same.
    pub(crate) async fn commit_and_begin(
        self,
        session: &mut MySqlConnection,
        from: Position,
        to: Position,
    ) -> Result<CommitOutcome, sqlx::Error> {
        let commit = format!("{}; commit; {}", self.advance_sql(from, to), self.claim_sql(to));
        let rows = sqlx::raw_sql(AssertSqlSafe(commit)).execute(session).await?.rows_affected();
        Ok(match rows {
            2 => CommitOutcome::Claimed,
            1 => CommitOutcome::ClaimLost,
            _ => CommitOutcome::NotMoved,
        })
    }

    /// The row is marked as half applied, and unmarked with the position. Nobody ever sees the
    /// mark, unless a handler commits in between: then a part of the batch is stored, and no claim
    /// succeeds any more.
    fn claim_sql(self, at: Position) -> String {
        let Claim { projector, stage, savepoint, .. } = self;
        let (ProjectorId { name, version }, digest) = (&projector.id, &projector.digest);
        let statuses = stage.statuses_sql();
        format!(
            "update projectors set partially_applied = 1 \
             where name = '{name}' and version = {version} and position = {at} and status in ({statuses}) \
             and not partially_applied and rebuild_reason is null and (digest is null or digest = '{digest}'); \
             savepoint {savepoint}"
        )
    }

    /// No number is larger than that one, so that the update fails where the condition does not
    /// hold. (It depends on the row, or it would be computed, and fail, in any case.)
    fn advance_sql(self, from: Position, to: Position) -> String {
        let Claim { projector, savepoint, unchanged_condition: unchanged, .. } = self;
        let ProjectorId { name, version } = &projector.id;
        format!(
            "release savepoint {savepoint}; \
             update projectors set partially_applied = 0, \
             position = if(position = {from} and {unchanged}, {to}, 18446744073709551615 + (position >= 0)) \
             where name = '{name}' and version = {version}"
        )
    }
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
            format!("projectors.{column} has {text:?}, which this release does not know").into(),
        )
    };
    let rebuild_reason: Option<String> = row.try_get("rebuild_reason")?;
    let rebuild_reason = match row.try_get("partially_applied")? {
        true => rebuild_reason.or_else(|| Some(PARTIALLY_APPLIED.into())),
        false => rebuild_reason,
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
    Ok(Entry {
        id: ProjectorId { name: row.try_get("name")?, version: row.try_get("version")? },
        mode: mode.parse().map_err(|_| unreadable("mode", &mode))?,
        status,
        position: Position::new(row.try_get("position")?),
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
