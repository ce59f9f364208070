//! Acceptances: the ranges of the log whose differences an operator has accepted after an audit.
//! They are never deleted.
//!
//! Each missing position of an accepted range gets a filler, so that there are no gaps below the
//! mark. The current rows become the baseline of later audits.

use sqlx::{Connection, Row};
use time::OffsetDateTime;

use super::fill::FillOutcome;
use super::fingerprint::LogAudit;
use super::{Blocker, EventStore};
use crate::model::event::{self, FILLER, Position};

/// Positions that one step examines.
const STEP: u64 = 10_000;

/// The first statement of its transaction. The lock keeps the mark from rising before the new
/// baseline is stored.
const LOCK: &str = "select high_water from event_log for update";

const COUNT_FILLERS: &str = "select count(*) from events where stream_id = ?";

const SET_BASELINE: &str = "update event_log set row_count = ?, fingerprint = ?";

const RECORD: &str = "\
    insert into log_acceptances \
        (first_position, last_position, missing_positions, reason, accepted_by) \
    values (?, ?, ?, ?, concat(?, ' as ', current_user()))";

const ACCEPTANCES: &str = "\
    select accepted_at, first_position, last_position, missing_positions, reason, accepted_by \
    from log_acceptances \
    order by id";

/// An accepted range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acceptance {
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// How many positions of the range had no row.
    pub(crate) missing_positions: u64,
    pub(crate) reason: String,
    pub(crate) accepted_by: String,
    pub(crate) accepted_at: OffsetDateTime,
}

/// The result of an attempt to accept a range.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AcceptOutcome {
    /// The acceptance is recorded. `missing` positions of the range had no row.
    Accepted { missing: u64 },
    /// An open transaction holds a position of the range.
    Blocked(Blocker),
    /// This many rows are missing up to the mark, outside the range. Nothing is recorded.
    MissingElsewhere(u64),
}

impl EventStore {
    /// Reads all acceptances, the oldest first.
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

    /// Counts the positions from `first` to `last` that have no row.
    pub(crate) async fn missing_between(
        &self,
        first: Position,
        last: Position,
    ) -> Result<u64, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let rows = self.fingerprint_between(&mut connection, first.previous(), last).await?.rows;
        Ok(last.since(first.previous()).saturating_sub(rows))
    }

    /// Accepts the current rows of a range. If this is interrupted, it can be run again: the count
    /// includes the fillers of earlier attempts. `progress` gets the position that was reached and
    /// the last one.
    pub(crate) async fn accept(
        &self,
        first: Position,
        last: Position,
        reason: &str,
        by: &str,
        mut progress: impl FnMut(Position, Position),
    ) -> Result<AcceptOutcome, sqlx::Error> {
        // Each attempt uses the same stream, so that the fillers of all attempts can be counted.
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
            // The mark may have risen since the audit. Add the rows that it has passed.
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
