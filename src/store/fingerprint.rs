//! The fingerprint of the log: a summary of the rows that the high-water mark has passed. An audit
//! compares it with the current rows.
//!
//! The fingerprint is the number of rows and an exclusive or over them. Each row contributes the
//! first 64 bits of SHA-256 over its position and event id. The result does not depend on the steps
//! in which the mark was raised, and the server computes it without sending rows. It detects
//! accidents, not deliberate manipulation.

use sqlx::mysql::MySqlConnection;

use super::EventStore;
use crate::model::event::Position;

const FINGERPRINT: &str = "\
    select count(*), cast(coalesce(bit_xor(cast(conv(\
        left(sha2(concat(position, ':', event_id), 256), 16), 16, 10\
    ) as unsigned)), 0) as unsigned) \
    from events \
    where position > ? and position <= ?";

/// Updates mark, count and fingerprint together, only if the mark is still the one that the sum
/// began at. If two processes raise the mark at once, the second one starts again. Raising the mark
/// also clears its recorded blocker.
const RAISE: &str = "\
    update event_log \
    set high_water = ?, row_count = row_count + ?, fingerprint = fingerprint ^ ?, \
        blocked_position = null, blocked_last = null, blocked_since = null \
    where high_water = ?";

const BASELINE: &str = "select high_water, row_count, fingerprint from event_log";

const POSITIONS: &str =
    "select position from events where position > ? and position <= ? order by position";

/// Projectors start after position 0, and no position follows the highest one.
const OUT_OF_BOUNDS: &str =
    "select position from events where position in (0, 18446744073709551615)";

/// Positions that an audit sums up in one statement.
const AUDIT_STEP: u64 = 50_000;

/// The most missing ranges that an audit lists.
pub(crate) const MAX_RANGES: usize = 100;

/// The number of some rows and the exclusive or of their hashes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Fingerprint {
    pub(super) rows: u64,
    pub(super) bits: u64,
}

/// What an audit of the log found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LogAudit {
    /// The high-water mark at the time of the audit.
    pub(crate) high_water: Position,
    /// How many rows there are at or below the mark.
    pub(crate) rows: u64,
    /// The positions at or below the mark that have no row.
    pub(crate) missing: MissingPositions,
    /// Whether the rows match those that the mark has passed, by position and event id.
    pub(crate) is_unchanged: bool,
    /// Rows at positions that no event may have: 0 and the highest possible one.
    pub(crate) out_of_bounds: Vec<u64>,
    /// The fingerprint of the rows that the audit read.
    pub(super) fingerprint: Fingerprint,
}

/// Positions without a row, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MissingPositions {
    /// How many positions are missing.
    pub(crate) count: u64,
    /// How many ranges they form.
    pub(crate) range_count: u64,
    /// The first [`MAX_RANGES`] of these ranges, each with its first and its last position.
    pub(crate) ranges: Vec<(u64, u64)>,
    /// The last position that was recorded.
    last: Option<u64>,
}

impl MissingPositions {
    /// Records a range that lies above all recorded ones.
    fn record(&mut self, first: u64, last: u64) {
        self.count += (last - first).saturating_add(1);
        if self.last.is_some_and(|before| before.saturating_add(1) == first) {
            if self.range_count as usize == self.ranges.len()
                && let Some(range) = self.ranges.last_mut()
            {
                range.1 = last;
            }
        } else {
            self.range_count += 1;
            if self.ranges.len() < MAX_RANGES {
                self.ranges.push((first, last));
            }
        }
        self.last = Some(last);
    }

    /// Records the missing positions in (`after`, `through`]. `present` are the positions in that
    /// range that have rows, in order.
    fn record_between(&mut self, after: Position, through: Position, present: &[u64]) {
        let mut expected = after.next().get();
        for &position in present {
            if position > expected {
                self.record(expected, position - 1);
            }
            expected = position.saturating_add(1);
        }
        if expected <= through.get() && through > after && present.last() != Some(&through.get()) {
            self.record(expected, through.get());
        }
    }
}

impl EventStore {
    /// Raises the mark from `from` to `to`; the caller has proved every position between them.
    /// Returns the resulting mark, which may differ because another process raised it meanwhile.
    pub(super) async fn raise(
        &self,
        from: Position,
        to: Position,
    ) -> Result<Position, sqlx::Error> {
        let sum = self
            .database
            .run_cached(async |connection| self.fingerprint_between(connection, from, to).await)
            .await?;
        if sum.rows != to.since(from) {
            // The rows existed a moment ago and were deleted since. The mark must not pass them.
            tracing::error!(
                alert = "log_fault",
                first = from.next().get(),
                last = to.get(),
                rows = sum.rows,
                "a row of the log was deleted before the high-water mark passed it; \
                 the mark stays below it"
            );
            return Ok(from);
        }
        let raise =
            sqlx::query(RAISE).bind(to.get()).bind(sum.rows).bind(sum.bits).bind(from.get());
        let raised =
            self.database.run_cached(async |connection| raise.execute(connection).await).await?;
        match raised.rows_affected() {
            0 => Ok(self.marks().await?.high_water),
            _ => Ok(to),
        }
    }

    /// Compares the log up to the current mark with the rows that the mark has passed. `progress`
    /// gets the position that was reached and the mark.
    pub(crate) async fn audit(
        &self,
        mut progress: impl FnMut(Position, Position),
    ) -> Result<LogAudit, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let out_of_bounds = self
            .database
            .with_timeout(sqlx::query_scalar(OUT_OF_BOUNDS).fetch_all(&mut *connection))
            .await?;
        let (high_water, rows, bits): (u64, u64, u64) =
            sqlx::query_as(BASELINE).fetch_one(&mut *connection).await?;
        let (high_water, recorded) = (Position::new(high_water), Fingerprint { rows, bits });
        let mut found = Fingerprint::default();
        let mut missing = MissingPositions::default();
        let mut after = Position::START;
        while after < high_water {
            let through = high_water.min(Position::new(after.get().saturating_add(AUDIT_STEP)));
            let sum = self.fingerprint_between(&mut connection, after, through).await?;
            if sum.rows != through.since(after) {
                let present = self.positions_between(&mut connection, after, through).await?;
                missing.record_between(after, through, &present);
            }
            found = Fingerprint { rows: found.rows + sum.rows, bits: found.bits ^ sum.bits };
            after = through;
            progress(after, high_water);
        }
        let is_unchanged = found == recorded;
        Ok(LogAudit {
            high_water,
            rows: found.rows,
            missing,
            is_unchanged,
            out_of_bounds,
            fingerprint: found,
        })
    }

    /// Reads the positions in (`after`, `through`] that have rows, in order.
    pub(super) async fn positions_between(
        &self,
        connection: &mut MySqlConnection,
        after: Position,
        through: Position,
    ) -> Result<Vec<u64>, sqlx::Error> {
        let present = sqlx::query_scalar(POSITIONS).bind(after.get()).bind(through.get());
        self.database.with_timeout(present.fetch_all(connection)).await
    }

    pub(super) async fn fingerprint_between(
        &self,
        connection: &mut MySqlConnection,
        after: Position,
        through: Position,
    ) -> Result<Fingerprint, sqlx::Error> {
        let sum = sqlx::query_as(FINGERPRINT).bind(after.get()).bind(through.get());
        let (rows, bits): (i64, u64) =
            self.database.with_timeout(sum.fetch_one(connection)).await?;
        Ok(Fingerprint { rows: rows.unsigned_abs(), bits })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The step size changes neither the missing ranges nor their count.
        #[test]
        fn missing_positions_are_joined_into_ranges_across_steps(
            present in prop::collection::btree_set(1u64..200, 0..200),
            step in 1u64..50,
        ) {
            let (end, mut missing, mut after) = (200, MissingPositions::default(), 0);
            while after < end {
                let through = (after + step).min(end);
                let here: Vec<u64> = present.range(after + 1..=through).copied().collect();
                missing.record_between(Position::new(after), Position::new(through), &here);
                after = through;
            }
            let absent: Vec<u64> =
                (1..=end).filter(|position| !present.contains(position)).collect();
            let listed: Vec<u64> =
                missing.ranges.iter().flat_map(|&(first, last)| first..=last).collect();
            prop_assert_eq!(missing.count, absent.len() as u64);
            prop_assert_eq!(&listed, &absent);
            prop_assert_eq!(missing.range_count, missing.ranges.len() as u64);
            prop_assert!(missing.ranges.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0));
        }
    }

    #[test]
    fn the_first_missing_ranges_are_named_and_all_are_counted() {
        let mut missing = MissingPositions::default();
        for odd in (1..1_000).step_by(2) {
            missing.record_between(Position::new(odd - 1), Position::new(odd + 1), &[odd]);
        }
        assert_eq!(
            (missing.count, missing.range_count, missing.ranges.len()),
            (500, 500, MAX_RANGES)
        );
        // A range beyond the listed ones does not lengthen the last listed range.
        missing.record_between(Position::new(1_000), Position::new(1_001), &[]);
        assert_eq!(
            (missing.count, missing.range_count, missing.ranges.last()),
            (501, 500, Some(&(200, 200)))
        );
    }

    #[test]
    fn the_highest_possible_position_does_not_overflow() {
        let mut missing = MissingPositions::default();
        missing.record_between(Position::new(u64::MAX - 3), Position::new(u64::MAX), &[u64::MAX]);
        assert_eq!(missing.ranges, [(u64::MAX - 2, u64::MAX - 1)]);
        missing.record_between(Position::new(u64::MAX), Position::new(u64::MAX), &[]);
        assert_eq!(missing.count, 2);
    }
}
