//! The claim of a projector's row, with which a batch is applied.

use sqlx::{AssertSqlSafe, MySqlConnection};

use crate::model::event::Position;
use crate::model::lifecycle::Stage;
use crate::model::projector::ProjectorId;
use crate::model::registry::RegisteredProjector;

/// The identity and conditions with which the transaction of a batch claims and moves a projector's
/// row.
#[derive(Clone, Copy)]
pub(crate) struct Claim<'a> {
    pub(crate) projector: &'a RegisteredProjector,
    pub(crate) stage: Stage,
    /// The savepoint at the beginning of the transaction. It is lost if a handler commits or runs a
    /// statement that commits implicitly (DDL), or if a deadlock rolls back the whole transaction.
    /// Releasing it then fails with error 1305.
    pub(crate) savepoint: &'a str,
    /// An SQL condition that is true as long as the handler has not changed its session.
    pub(crate) unchanged_condition: &'a str,
}

/// The fence for a handler with a transaction of its own: its first statement. It moves the
/// projector's row if the row still belongs to this stage, its position is `from`, and it was
/// booted with this definition. Otherwise it changes no row, and the handler must roll back.
///
/// `database` is the quoted name of our database, because the handler's connection may have another
/// default. The text is safe for the reasons given at [`Claim::begin`].
pub(crate) fn fence_sql(
    database: &str,
    projector: &RegisteredProjector,
    stage: Stage,
    from: Position,
    to: Position,
) -> String {
    let (ProjectorId { name, version }, digest) = (&projector.id, &projector.digest);
    let statuses = stage.statuses_sql();
    format!(
        "update {database}.projectors set position = {to} \
         where name = '{name}' and version = {version} and position = {from} \
         and status in ({statuses}) and not partially_applied and rebuild_reason is null \
         and (digest is null or digest = '{digest}')"
    )
}

/// What happened to a projector's row in a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CommitOutcome {
    /// The row was moved and is not locked.
    Released,
    /// The row was moved and is locked for the next batch.
    Claimed,
    /// The row was moved, but another session locked it first. A new transaction has begun
    /// nevertheless.
    ClaimLost,
    /// The handler's writes are committed, but no row was moved: the handler deleted the row, or
    /// hid the ledger behind a temporary table.
    NotMoved,
}

impl Claim<'_> {
    /// The fence. Begins the transaction that applies events, and locks the projector's row if it
    /// still belongs to this stage, its position is `from`, and it was booted with this definition.
    /// Otherwise returns `false` and locks nothing.
    ///
    /// The statements are one packet, which cannot be prepared. The text is safe: name and version
    /// have no special characters (`Registry::add` checks that), and the other parts are numbers
    /// and our own words. The session's `autocommit` is off, so the first statement begins the
    /// transaction.
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

    /// Moves the claimed projector and commits, in one packet. The packet fails before the commit
    /// if the transaction was replaced, the row was changed, or the session was changed.
    ///
    /// # Errors
    /// The server's error 1305 if the transaction was replaced, 1690 if the row or the session was
    /// changed. After an error nothing is committed, unless only the answer was lost.
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

    /// [`Claim::commit`] and then [`Claim::begin`] for the next batch, in one packet. A session
    /// that already waits for the row gets it first.
    ///
    /// # Errors
    /// As for [`Claim::commit`]. After any other error, the commit may have happened.
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

    /// Marks the row as partially applied. The commit clears the mark together with the new
    /// position, so no other session sees the mark, unless a handler commits in between. Then a
    /// part of the batch is stored, and no claim succeeds any more.
    fn claim_sql(self, at: Position) -> String {
        let Claim { projector, stage, savepoint, .. } = self;
        let (ProjectorId { name, version }, digest) = (&projector.id, &projector.digest);
        let statuses = stage.statuses_sql();
        format!(
            "update projectors set partially_applied = 1 \
             where name = '{name}' and version = {version} and position = {at} \
             and status in ({statuses}) and not partially_applied and rebuild_reason is null \
             and (digest is null or digest = '{digest}'); \
             savepoint {savepoint}"
        )
    }

    /// Moves the row. If a condition is false, the sum exceeds the largest number, so that the
    /// update fails. The sum contains a column of the row, because a constant would be evaluated in
    /// any case.
    fn advance_sql(self, from: Position, to: Position) -> String {
        let Claim { projector, savepoint, unchanged_condition: unchanged, .. } = self;
        let ProjectorId { name, version } = &projector.id;
        format!(
            "release savepoint {savepoint}; \
             update projectors set partially_applied = 0, \
             position = if(position = {from} and {unchanged}, {to}, \
             18446744073709551615 + (position >= 0)) \
             where name = '{name}' and version = {version}"
        )
    }
}
