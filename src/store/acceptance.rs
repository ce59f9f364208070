//! Acceptances: what an operator has accepted of an audit, recorded for ever.
//!
//! An accepted position gets a filler, so that below the mark there are no holes again; then the rows as they are now become
//! those that later audits compare with.

use sqlx::{Connection, Row};
use time::OffsetDateTime;

use super::fingerprint::LogAudit;
use super::high_water::Filled;
use super::{EventStore, Held};
use crate::model::event::{self, Position, TOMBSTONE};

/// Positions that are looked at in one step.
const STEP: u64 = 10_000;

/// First of all in its transaction: the mark does not rise before the new baseline is stored.
const LOCK: &str = "select high_water from event_log for update";

const COUNT_FILLERS: &str = "select count(*) from events where stream_id = ?";

const REBASE: &str = "update event_log set counted = ?, fingerprint = ?";

const RECORD: &str = "insert into log_acceptances (first_position, last_position, missing, reason, accepted_by) \
                      values (?, ?, ?, ?, concat(?, ' as ', current_user()))";

const ALL: &str = "select accepted_at, first_position, last_position, missing, reason, accepted_by \
                   from log_acceptances order by id";

/// A range that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acceptance {
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// How many of its positions had no row.
    pub(crate) missing: u64,
    pub(crate) reason: String,
    pub(crate) accepted_by: String,
    pub(crate) accepted_at: OffsetDateTime,
}

/// What came of an attempt to accept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// It is recorded. So many positions had no row.
    Recorded { missing: u64 },
    /// A transaction that has not ended holds a position of the range.
    Held(Held),
    /// Rows are missing outside the range: so many up to the mark, although the range is full.
    MissingElsewhere(u64),
}

impl EventStore {
    /// All acceptances, the oldest first.
    pub(crate) async fn acceptances(&self) -> Result<Vec<Acceptance>, sqlx::Error> {
        let rows = self.database.answer(async |connection| sqlx::query(ALL).fetch_all(connection).await).await?;
        rows.iter()
            .map(|row| {
                Ok(Acceptance {
                    first: row.try_get(1)?,
                    last: row.try_get(2)?,
                    missing: row.try_get(3)?,
                    reason: row.try_get(4)?,
                    accepted_by: row.try_get(5)?,
                    accepted_at: event::recorded_at(row, 0),
                })
            })
            .collect()
    }

    /// How many positions of a range have no row.
    pub(crate) async fn missing_between(&self, first: Position, last: Position) -> Result<u64, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let rows = self.sum(&mut connection, first.previous(), last).await?.rows;
        Ok(last.since(first.previous()).saturating_sub(rows))
    }

    /// Accepts a range of the log as it is now. Interrupted, it can be run again: what was filled is counted still.
    pub(crate) async fn accept(
        &self,
        first: Position,
        last: Position,
        reason: &str,
        by: &str,
        mut progress: impl FnMut(Position, Position),
    ) -> Result<Accepted, sqlx::Error> {
        // Not a new name with each attempt, so that the fillers of all attempts can be counted.
        let stream_id = format!("{TOMBSTONE}-accepted-{first}-{last}");
        let mut connection = self.database.acquire().await?;
        let mut after = first.previous();
        while after < last {
            let through = last.min(Position::new(after.get().saturating_add(STEP)));
            let present = self.present(&mut connection, after, through).await?;
            let absent: Vec<u64> = (after.next().get()..=through.get())
                .filter(|position| present.binary_search(position).is_err())
                .collect();
            if let Filled { held: Some(held), .. } = self.fill_as(&stream_id, &absent).await? {
                return Ok(Accepted::Held(held));
            }
            after = through;
            progress(after, last);
        }
        drop(connection);
        let LogAudit { high_water, missing, mut fingerprint, .. } = self.audit(progress).await?;
        if missing.count > 0 {
            return Ok(Accepted::MissingElsewhere(missing.count));
        }

        let mut connection = self.database.acquire().await?;
        let record = async {
            let mut transaction = connection.begin().await?;
            let now: u64 = sqlx::query_scalar(LOCK).fetch_one(&mut *transaction).await?;
            // The mark may have risen since: these rows are those that it has just passed.
            let risen = self.sum(&mut transaction, high_water, Position::new(now)).await?;
            fingerprint.rows += risen.rows;
            fingerprint.bits ^= risen.bits;
            let missing: i64 = sqlx::query_scalar(COUNT_FILLERS).bind(&stream_id).fetch_one(&mut *transaction).await?;
            let missing = missing.unsigned_abs();
            sqlx::query(REBASE).bind(fingerprint.rows).bind(fingerprint.bits).execute(&mut *transaction).await?;
            let record = sqlx::query(RECORD).bind(first.get()).bind(last.get()).bind(missing).bind(reason).bind(by);
            record.execute(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(missing)
        };
        Ok(Accepted::Recorded { missing: self.database.answered(record).await? })
    }
}
