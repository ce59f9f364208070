//! Acceptances: what an operator has accepted of an audit, recorded for ever.
//!
//! An accepted position gets a filler, so that below the mark there are no holes again; then the
//! rows as they are now become those that later audits compare with.

use sqlx::{Connection, Row};
use time::OffsetDateTime;

use super::fingerprint::LogAudit;
use super::high_water::FillOutcome;
use super::{Blocker, EventStore};
use crate::model::event::{self, FILLER, Position};

/// Positions that are looked at in one step.
const STEP: u64 = 10_000;

/// First of all in its transaction: the mark does not rise before the new baseline is stored.
const LOCK: &str = "select high_water from event_log for update";

const COUNT_FILLERS: &str = "select count(*) from events where stream_id = ?";

const SET_BASELINE: &str = "update event_log set row_count = ?, fingerprint = ?";

const RECORD: &str = "insert into log_acceptances (first_position, last_position, missing_positions, reason, accepted_by) \
                      values (?, ?, ?, ?, concat(?, ' as ', current_user()))";

const ACCEPTANCES: &str = "select accepted_at, first_position, last_position, missing_positions, reason, accepted_by \
                   from log_acceptances order by id";

/// A range that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acceptance {
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// How many of its positions had no row.
    pub(crate) missing_positions: u64,
    pub(crate) reason: String,
    pub(crate) accepted_by: String,
    pub(crate) accepted_at: OffsetDateTime,
}

/// What came of an attempt to accept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AcceptOutcome {
    /// It is recorded. So many positions had no row.
    Accepted { missing: u64 },
    /// A transaction that has not ended holds a position of the range.
    Blocked(Blocker),
    /// Rows are missing outside the range: so many up to the mark, although the range is full.
    MissingElsewhere(u64),
}

impl EventStore {
    /// All acceptances, the oldest first.
    pub(crate) async fn acceptances(&self) -> Result<Vec<Acceptance>, sqlx::Error> {
        let rows = self
            .database
            .run_pooled(async |connection| sqlx::query(ACCEPTANCES).fetch_all(connection).await)
            .await?;
        rows.iter()
            .map(|row| {
                Ok(Acceptance {
                    first: row.try_get(1)?,
                    last: row.try_get(2)?,
                    missing_positions: row.try_get(3)?,
                    reason: row.try_get(4)?,
                    accepted_by: row.try_get(5)?,
                    accepted_at: event::decode_recorded_at(row, 0),
                })
            })
            .collect()
    }

    /// How many positions of a range have no row.
    pub(crate) async fn missing_between(
        &self,
        first: Position,
        last: Position,
    ) -> Result<u64, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let rows = self.fingerprint_between(&mut connection, first.previous(), last).await?.rows;
        Ok(last.since(first.previous()).saturating_sub(rows))
    }

    /// Accepts a range of the log as it is now. Interrupted, it can be run again: what was filled
    /// is counted still.
    pub(crate) async fn accept(
        &self,
        first: Position,
        last: Position,
        reason: &str,
        by: &str,
        mut progress: impl FnMut(Position, Position),
    ) -> Result<AcceptOutcome, sqlx::Error> {
        // Not a new name with each attempt, so that the fillers of all attempts can be counted.
        let stream_id = format!("{FILLER}-accepted-{first}-{last}");
        let mut connection = self.database.acquire().await?;
        let mut after = first.previous();
        while after < last {
            let through = last.min(Position::new(after.get().saturating_add(STEP)));
            let present = self.positions_between(&mut connection, after, through).await?;
            let absent: Vec<u64> = (after.next().get()..=through.get())
                .filter(|position| present.binary_search(position).is_err())
                .collect();
            if let FillOutcome { blocked: Some(blocked), .. } =
                self.fill_in_stream(&stream_id, &absent).await?
            {
                return Ok(AcceptOutcome::Blocked(blocked));
            }
            after = through;
            progress(after, last);
        }
        drop(connection);
        let LogAudit { high_water, missing, mut fingerprint, .. } = self.audit(progress).await?;
        if missing.count > 0 {
            return Ok(AcceptOutcome::MissingElsewhere(missing.count));
        }

        let mut connection = self.database.acquire().await?;
        let record = async {
            let mut transaction = connection.begin().await?;
            let now: u64 = sqlx::query_scalar(LOCK).fetch_one(&mut *transaction).await?;
            // The mark may have risen since: these rows are those that it has just passed.
            let risen =
                self.fingerprint_between(&mut transaction, high_water, Position::new(now)).await?;
            fingerprint.rows += risen.rows;
            fingerprint.bits ^= risen.bits;
            let missing: i64 = sqlx::query_scalar(COUNT_FILLERS)
                .bind(&stream_id)
                .fetch_one(&mut *transaction)
                .await?;
            let missing = missing.unsigned_abs();
            sqlx::query(SET_BASELINE)
                .bind(fingerprint.rows)
                .bind(fingerprint.bits)
                .execute(&mut *transaction)
                .await?;
            let record = sqlx::query(RECORD)
                .bind(first.get())
                .bind(last.get())
                .bind(missing)
                .bind(reason)
                .bind(by);
            record.execute(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(missing)
        };
        Ok(AcceptOutcome::Accepted { missing: self.database.with_timeout(record).await? })
    }
}
