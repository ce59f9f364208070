//! Fills gaps: probes which positions a writer still holds, and inserts fillers at the others.

use std::ops::RangeInclusive;

use sqlx::{AssertSqlSafe, MySqlConnection, Row};
use uuid::Uuid;

use super::{Blocker, EventStore};
use crate::database::Flavor;
use crate::database::error::server_error_number;
use crate::model::event::{FILLER, Position};

/// Fails at once if a writer holds a lock in the range: its row is inserted, but the transaction
/// has neither committed nor rolled back.
const PROBE_MYSQL: &str =
    "select count(*) from events where position between ? and ? for share nowait";
const PROBE_MARIADB: &str =
    "select count(*) from events where position between ? and ? lock in share mode nowait";

/// `ignore` skips positions that a writer has taken meanwhile. The other positions are still
/// filled.
const FILL: &str =
    "insert ignore into events (position, stream_id, stream_version, event_type, payload) values ";

/// Used only for the fill. Without it, a position with an uncommitted row would block the fill for
/// the default of 50 seconds.
const SHORT_LOCK_WAIT: &str = "set session innodb_lock_wait_timeout = 1";

/// Fillers in one statement.
const FILL_CHUNK: usize = 1_000;

/// The result of filling positions.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FillOutcome {
    /// How many positions got a filler. The others already had a row.
    pub(crate) count: u64,
    /// Set if an open transaction holds one of the positions. Positions from there on may be
    /// unfilled.
    pub(crate) blocked: Option<Blocker>,
}

impl EventStore {
    /// Returns the index of the lowest gap in which a writer holds a lock.
    ///
    /// One probe covers all gaps. If it finds a lock, a binary search finds the first locked gap.
    pub(super) async fn find_first_locked(
        &self,
        gaps: &[RangeInclusive<u64>],
    ) -> Result<Option<usize>, sqlx::Error> {
        let (Some(first), Some(last)) = (gaps.first(), gaps.last()) else { return Ok(None) };
        if !self.is_locked(&(*first.start()..=*last.end())).await? {
            return Ok(None);
        }
        // Gaps below `free` are not locked. The first lock is at or below `locked`.
        let (mut free, mut locked) = (0, gaps.len() - 1);
        while free < locked {
            let middle = free + (locked - free) / 2;
            if self.is_locked(&(*gaps[free].start()..=*gaps[middle].end())).await? {
                locked = middle;
            } else {
                free = middle + 1;
            }
        }
        Ok(Some(locked))
    }

    /// Whether an open transaction holds a lock on a position in this range.
    async fn is_locked(&self, range: &RangeInclusive<u64>) -> Result<bool, sqlx::Error> {
        let (probe, locked) = match self.database.flavor {
            Flavor::MySql => (PROBE_MYSQL, 3572),
            Flavor::MariaDb => (PROBE_MARIADB, 1205),
        };
        let probe = sqlx::query(probe).bind(range.start()).bind(range.end());
        match self.database.run_pooled(async |connection| probe.fetch_one(connection).await).await {
            Ok(_) => Ok(false),
            Err(error) if server_error_number(&error) == Some(locked) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Inserts fillers at these positions. This is the proof: a filled position can no longer
    /// become an event. A writer that still holds the position gets error 1062 and tries again.
    pub(crate) async fn fill(&self, positions: &[u64]) -> Result<FillOutcome, sqlx::Error> {
        // A new stream id, so that only a row at the same position can collide.
        self.fill_in_stream(&format!("{FILLER}-{}", Uuid::now_v7()), positions).await
    }

    /// [`EventStore::fill`] with this stream id. The stream must have no fillers at these
    /// positions.
    pub(super) async fn fill_in_stream(
        &self,
        stream_id: &str,
        positions: &[u64],
    ) -> Result<FillOutcome, sqlx::Error> {
        let mut filled = FillOutcome::default();
        if positions.is_empty() {
            return Ok(filled);
        }
        let mut connection = self.database.acquire().await?;
        self.database
            .with_timeout(sqlx::raw_sql(SHORT_LOCK_WAIT).execute(&mut *connection))
            .await?;
        for chunk in positions.chunks(FILL_CHUNK) {
            // Not prepared, because every fill has other numbers. sqlx 0.9.0 leaves Nagle's
            // algorithm on, so closing a prepared statement delays the next statement by 40 ms
            // (transact-rs/sqlx#4335).
            let row = |position: &u64| {
                format!("({position}, '{stream_id}', {position}, '{FILLER}', '{{}}')")
            };
            let fill = format!("{FILL}{}", chunk.iter().map(row).collect::<Vec<_>>().join(", "));
            match self
                .database
                .with_timeout(sqlx::raw_sql(AssertSqlSafe(fill)).execute(&mut *connection))
                .await
            {
                Ok(done) => {
                    tracing::debug!(
                        first = chunk[0],
                        positions = done.rows_affected(),
                        "filled gaps left by rollbacks"
                    );
                    filled.count += done.rows_affected();
                    if done.rows_affected() < chunk.len() as u64 {
                        self.check_all_taken(&mut connection, chunk).await?;
                    }
                }
                // The position was inserted between the probe and the fill, and is still
                // uncommitted.
                Err(error) if matches!(server_error_number(&error), Some(1205 | 1213)) => {
                    filled.blocked = Some(Blocker::InFlight(Position::new(chunk[0])));
                    break;
                }
                Err(error) => {
                    connection.close_on_drop();
                    return Err(error);
                }
            }
        }
        let restore = self.database.restore_lock_wait(&mut connection);
        self.database.with_timeout(restore).await?;
        Ok(filled)
    }

    /// Checks that each of these positions has a row. `insert ignore` drops a row for other reasons
    /// than a taken position, too; then the gap remains.
    async fn check_all_taken(
        &self,
        connection: &mut MySqlConnection,
        positions: &[u64],
    ) -> Result<(), sqlx::Error> {
        let list = positions.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let present = format!("select position from events where position in ({list})");
        let present = sqlx::raw_sql(AssertSqlSafe(present)).fetch_all(connection);
        let present: Vec<u64> = self
            .database
            .with_timeout(present)
            .await?
            .iter()
            .map(|row| row.try_get_unchecked(0))
            .collect::<Result<_, _>>()?;
        match positions.iter().find(|position| !present.contains(position)) {
            None => Ok(()),
            Some(position) => Err(sqlx::Error::InvalidArgument(format!(
                "position {position} cannot be filled: the server dropped the row, although no \
                 other row has this position; look for a trigger or a constraint on the table \
                 events"
            ))),
        }
    }
}
