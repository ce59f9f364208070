//! The high-water mark: the highest position at or below which no event can still become visible.
//!
//! InnoDB assigns positions before commit. Rows therefore become visible out of order, and
//! rollbacks leave gaps. The mark passes a gap only after a filler was inserted at each of its
//! positions. The filler proves that no event can appear there.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use sqlx::{AssertSqlSafe, MySqlConnection, Row};
use uuid::Uuid;

use super::{EventStore, Marks};
use crate::database::Flavor;
use crate::model::error::server_error_number;
use crate::model::event::{FILLER, Position};

/// Visible positions from the mark on. The sessions use read committed, so every position that this
/// returns is committed. The mark's own row is included: if it is missing, the end of the log was
/// lost.
const VISIBLE: &str = "select position from events where position >= ? order by position limit ?";

const IS_VISIBLE: &str = "select exists (select 1 from events where position = ?)";

/// Fails at once if a writer holds a lock in the range: its row is inserted, but the transaction
/// has neither committed nor rolled back.
const PROBE_MYSQL: &str =
    "select count(*) from events where position between ? and ? for share nowait";
const PROBE_MARIADB: &str =
    "select count(*) from events where position between ? and ? lock in share mode nowait";

/// Records what blocks the mark, so that short-lived processes know for how long. An unchanged
/// blocker keeps its time. Nothing is written if the mark has moved on.
const SET_BLOCKED: &str = "\
    update event_log \
    set blocked_position = ?, blocked_last = ?, blocked_since = utc_timestamp(6) \
    where high_water = ? and not (blocked_position <=> ? and blocked_last <=> ?)";

const CLEAR_BLOCKED: &str = "\
    update event_log \
    set blocked_position = null, blocked_last = null, blocked_since = null \
    where high_water = ? and blocked_position is not null";

/// `ignore` skips positions that a writer has taken meanwhile. The other positions are still
/// filled.
const FILL: &str =
    "insert ignore into events (position, stream_id, stream_version, event_type, payload) values ";

/// Used only for the fill. Without it, a position with an uncommitted row would block the fill for
/// the default of 50 seconds.
const SHORT_LOCK_WAIT: &str = "set session innodb_lock_wait_timeout = 1";
const DEFAULT_LOCK_WAIT: &str = "set session innodb_lock_wait_timeout = default";

/// Positions that one step examines.
const PAGE: u64 = 10_000;

/// The widest gap that is filled automatically, and the most positions that are filled in one step.
///
/// A bulk insert reserves positions in steps that double up to 65,535. One rolled back `insert …
/// select` can therefore leave a gap of nearly that width. A wider gap means that an explicit
/// position was inserted, or that auto_increment was changed.
pub(crate) const MAX_FILLED: u64 = 65_536;

/// Fillers in one statement.
const FILL_CHUNK: usize = 1_000;

/// How often the gaps of one page are filled before the fill is given up, if the mark does not
/// move.
pub(crate) const MAX_PASSES: u32 = 3;

/// The pauses before a gap is probed, in milliseconds. Most gaps are transactions that are about to
/// commit, so they close by themselves.
const GRACE_MILLIS: [u64; 5] = [1, 2, 3, 5, 9];

/// The result of an attempt to raise the mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HighWater {
    /// The mark.
    pub(crate) mark: Position,
    /// What keeps the mark from rising further. `None` if there is no gap above it.
    pub(crate) blocked: Option<Blocker>,
    /// For how long the same blocker has been recorded in `event_log`; zero if it is new.
    pub(crate) blocked_for: Duration,
    /// The fault at the end of the log, if one was found.
    pub(crate) fault: Option<LogFault>,
}

/// The mark's own position has no row: the log was truncated or restored, or its end was deleted.
/// Events appended at or below the mark are never published and never applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogFault {
    /// The high-water mark.
    pub(crate) mark: Position,
    /// The last position that has a row.
    pub(crate) last: Position,
}

impl fmt::Display for LogFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LogFault { mark, last } = self;
        if last < mark {
            write!(
                f,
                "the log ends at {last}, below the high-water mark {mark}: it was truncated or \
                 restored, or its end was deleted. Events appended at or below the mark are never \
                 applied"
            )
        } else {
            write!(f, "the high-water mark {mark} has no row: the end of the log was deleted")
        }
    }
}

/// The result of raising the mark over the visible positions, without filling gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RaiseOutcome {
    /// The mark.
    pub(crate) mark: Position,
    /// Whether there is a gap just above the mark and a visible event beyond the gap.
    pub(crate) has_gap: bool,
    /// The fault at the end of the log, if one was found.
    pub(crate) fault: Option<LogFault>,
}

/// The visible positions from the mark on.
struct VisiblePositions {
    /// The visible positions above the mark, in order.
    above: Vec<u64>,
    /// Whether the page is full, so that more positions may follow.
    is_full: bool,
    /// Whether the mark's own position has a row. Always true for mark 0.
    has_mark_row: bool,
}

/// The result of filling positions.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FillOutcome {
    /// How many positions got a filler. The others already had a row.
    pub(crate) count: u64,
    /// Set if an open transaction holds one of the positions. Positions from there on may be
    /// unfilled.
    pub(crate) blocked: Option<Blocker>,
}

/// What keeps the mark from rising.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Blocker {
    /// A transaction that holds this position has neither committed nor rolled back.
    InFlight(Position),
    /// A gap wider than [`MAX_FILLED`]. An operator has to examine it.
    WideGap(RangeInclusive<u64>),
}

impl Blocker {
    /// The values of `blocked_position` and `blocked_last`: the first position, and the last
    /// position of a gap.
    fn columns(&self) -> (u64, Option<u64>) {
        match self {
            Blocker::InFlight(position) => (position.get(), None),
            Blocker::WideGap(gap) => (*gap.start(), Some(*gap.end())),
        }
    }

    pub(super) fn from_columns(position: u64, last: Option<u64>) -> Self {
        match last {
            None => Blocker::InFlight(Position::new(position)),
            Some(last) => Blocker::WideGap(position..=last),
        }
    }
}

impl EventStore {
    /// Raises the mark as far as can be proved, and stores it. Any number of processes may call
    /// this at the same time.
    pub(crate) async fn raise_high_water(&self) -> Result<HighWater, sqlx::Error> {
        let Marks { high_water: start, blocked: before, .. } = self.marks().await?;
        let mut mark = start;
        let mut passes = 0;
        loop {
            let risen = self.raise_over_visible(mark).await?;
            if risen.mark > mark {
                passes = 0;
            }
            mark = risen.mark;
            if !risen.has_gap {
                if before.is_some() && mark == start {
                    self.clear_blocked(mark).await?;
                }
                return Ok(HighWater {
                    mark,
                    blocked: None,
                    blocked_for: Duration::ZERO,
                    fault: risen.fault,
                });
            }
            passes += 1;
            // The gap was filled several times and is still there: something deletes the fillers.
            // Report the gap as blocked instead of filling it forever.
            let unclosable = (passes > MAX_PASSES).then(|| Blocker::InFlight(mark.next()));
            if let Some(blocked) = self.close_gaps(mark).await?.or(unclosable) {
                // Gaps below the blocked position may have been closed.
                let risen = if blocked.columns().0 > mark.next().get() {
                    self.raise_over_visible(mark).await?
                } else {
                    risen
                };
                let blocked_for = before
                    .filter(|(before, _)| *before == blocked)
                    .map_or(Duration::ZERO, |(_, age)| age);
                return Ok(HighWater {
                    mark: risen.mark,
                    blocked: Some(blocked),
                    blocked_for,
                    fault: risen.fault,
                });
            }
        }
    }

    /// Raises the mark over the contiguous positions just above it. Does not wait, and leaves gaps
    /// to [`EventStore::raise_high_water`].
    pub(crate) async fn raise_over_visible(
        &self,
        mut mark: Position,
    ) -> Result<RaiseOutcome, sqlx::Error> {
        loop {
            let visible = self.visible_from(mark, PAGE).await?;
            let fault = self.find_fault(mark, &visible).await?;
            let Survey { contiguous, gaps } = survey(mark, &visible.above);
            if contiguous > mark {
                let raised = self.raise(mark, contiguous).await?;
                if raised == mark {
                    return Ok(RaiseOutcome { mark, has_gap: false, fault });
                }
                if let Some(fault) = fault {
                    // The new mark has a row, so later looks can no longer detect the fault. Log it
                    // now.
                    fault.log_alert();
                }
                mark = raised;
                if raised != contiguous {
                    // Another process raised the mark meanwhile: go on from its mark.
                    continue;
                }
            }
            let has_gap = !gaps.is_empty();
            if has_gap || !visible.is_full {
                let fault = fault.filter(|fault| fault.mark == mark);
                return Ok(RaiseOutcome { mark, has_gap, fault });
            }
        }
    }

    /// Computes the highest contiguous committed position at or above `mark`, without storing it. A
    /// gap-free range needs no filler as proof.
    pub(crate) async fn provable_high_water(
        &self,
        mut mark: Position,
    ) -> Result<Position, sqlx::Error> {
        loop {
            let visible = self.visible_from(mark, PAGE).await?;
            let Survey { contiguous, gaps } = survey(mark, &visible.above);
            mark = contiguous;
            if !gaps.is_empty() || !visible.is_full {
                return Ok(mark);
            }
        }
    }

    /// Closes the gaps of one page together: one grace period, few probes, one fill.
    ///
    /// Returns `None` if the examined gaps are closed, or if the first one closed by itself.
    async fn close_gaps(&self, mark: Position) -> Result<Option<Blocker>, sqlx::Error> {
        for pause in GRACE_MILLIS {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if self.is_visible(mark.next()).await? {
                return Ok(None);
            }
        }
        let gaps = survey(mark, &self.visible_from(mark, PAGE).await?.above).gaps;

        let first_locked = self.find_first_locked(&gaps).await?;
        let mut plan = GapPlan::default();
        for (index, gap) in gaps.into_iter().enumerate() {
            if !plan.takes_more() {
                break;
            }
            plan.add(gap, Some(index) == first_locked);
        }
        let filled = self.fill(&plan.to_fill).await?;
        Ok(plan.blocked.or(filled.blocked))
    }

    /// Returns the index of the lowest gap in which a writer holds a lock.
    ///
    /// One probe covers all gaps. If it finds a lock, a binary search finds the first locked gap.
    async fn find_first_locked(
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

    async fn visible_from(
        &self,
        mark: Position,
        limit: u64,
    ) -> Result<VisiblePositions, sqlx::Error> {
        let visible = sqlx::query_scalar(VISIBLE).bind(mark.get()).bind(limit + 1);
        let mut above: Vec<u64> = self
            .database
            .run_cached(async |connection| visible.fetch_all(connection).await)
            .await?;
        let is_full = above.len() as u64 > limit;
        let has_row = above.first() == Some(&mark.get());
        if has_row {
            above.remove(0);
        }
        Ok(VisiblePositions { above, is_full, has_mark_row: has_row || mark == Position::START })
    }

    async fn find_fault(
        &self,
        mark: Position,
        visible: &VisiblePositions,
    ) -> Result<Option<LogFault>, sqlx::Error> {
        match visible.has_mark_row {
            true => Ok(None),
            false => Ok(Some(LogFault { mark, last: self.last_visible().await? })),
        }
    }

    /// Checks the end of the log with one query.
    pub(crate) async fn log_fault(&self) -> Result<Option<LogFault>, sqlx::Error> {
        // If another process raises the mark meanwhile, this mark's row still exists.
        let mark = self.marks().await?.high_water;
        self.find_fault(mark, &self.visible_from(mark, 1).await?).await
    }

    /// Whether there is still a gap just above the mark. Reads at most one row above the mark.
    pub(crate) async fn is_below_gap(&self, mark: Position) -> Result<bool, sqlx::Error> {
        let visible = self.visible_from(mark, 1).await?;
        Ok(visible.has_mark_row
            && visible.above.first().is_some_and(|&first| first > mark.next().get()))
    }

    /// Records what blocks the mark, and since when, unless the log has recorded it already or the
    /// mark has moved.
    pub(crate) async fn record_blocked(
        &self,
        mark: Position,
        blocked: &Blocker,
    ) -> Result<(), sqlx::Error> {
        let (position, last) = blocked.columns();
        let record = sqlx::query(SET_BLOCKED)
            .bind(position)
            .bind(last)
            .bind(mark.get())
            .bind(position)
            .bind(last);
        self.database
            .run_cached(async |connection| record.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Records that nothing blocks the mark. Not needed after a rise: raising the mark clears the
    /// record.
    pub(crate) async fn clear_blocked(&self, mark: Position) -> Result<(), sqlx::Error> {
        let clear = sqlx::query(CLEAR_BLOCKED).bind(mark.get());
        self.database
            .run_cached(async |connection| clear.execute(connection).await)
            .await
            .map(|_| ())
    }

    async fn is_visible(&self, position: Position) -> Result<bool, sqlx::Error> {
        let is_visible = sqlx::query_scalar(IS_VISIBLE).bind(position.get());
        self.database.run_cached(async |connection| is_visible.fetch_one(connection).await).await
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
        self.database
            .with_timeout(sqlx::raw_sql(DEFAULT_LOCK_WAIT).execute(&mut *connection))
            .await?;
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

impl LogFault {
    /// Logs the fault as an alert.
    pub(crate) fn log_alert(&self) {
        tracing::error!(
            alert = "log_fault",
            first = self.last.min(self.mark.previous()).next().get(),
            last = self.mark.get(),
            high_water = self.mark.get(),
            "{self}. Restore the rows, or accept their loss: \
             projectionist audit --accept FIRST LAST --reason TEXT"
        );
    }
}

/// What to do with the gaps of a page. Gaps are added in ascending order.
#[derive(Debug, Default)]
pub(crate) struct GapPlan {
    /// Positions that need a filler.
    pub(crate) to_fill: Vec<u64>,
    /// The lowest gap that cannot be closed now. The mark stays below it.
    pub(crate) blocked: Option<Blocker>,
    /// Whether the plan has no room for the next gap. Higher gaps wait for the next pass.
    is_full: bool,
}

impl GapPlan {
    /// Whether the next gap can be added.
    pub(crate) fn takes_more(&self) -> bool {
        !self.is_full && self.blocked.is_none()
    }

    /// Adds the next gap. `is_locked` says that a probe found a lock there.
    ///
    /// A locked gap is left to its writer, whatever its width: one transaction may insert more rows
    /// than [`MAX_FILLED`]. The gaps above it are left, too. The mark cannot pass the locked gap,
    /// so filling them gains nothing. It could also make a running `insert … select` fail, which
    /// has reserved positions there.
    pub(crate) fn add(&mut self, gap: RangeInclusive<u64>, is_locked: bool) {
        let length = (gap.end() - gap.start()).saturating_add(1);
        if is_locked {
            self.blocked = Some(Blocker::InFlight(Position::new(*gap.start())));
        } else if length > MAX_FILLED {
            self.blocked = Some(Blocker::WideGap(gap));
        } else if self.to_fill.len() as u64 + length > MAX_FILLED {
            // Many short gaps are rollbacks, too. The rest of the page follows when these are
            // closed.
            self.is_full = true;
        } else {
            self.to_fill.extend(gap);
        }
    }
}

/// The visible positions above a mark, split into contiguous positions and gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Survey {
    /// The last of the contiguous positions that begin just above the mark.
    pub(crate) contiguous: Position,
    /// The ranges of missing positions below the last visible one.
    pub(crate) gaps: Vec<RangeInclusive<u64>>,
}

pub(crate) fn survey(mark: Position, visible: &[u64]) -> Survey {
    let mut contiguous = mark.get();
    let mut gaps = Vec::new();
    let mut expected = mark.next().get();
    for &position in visible {
        if position > expected {
            gaps.push(expected..=position - 1);
        } else if gaps.is_empty() {
            contiguous = position;
        }
        expected = position.saturating_add(1);
    }
    Survey { contiguous: Position::new(contiguous), gaps }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_mark_and_the_gaps_account_for_every_position(
            mark in 0u64..20,
            visible in prop::collection::btree_set(1u64..80, 0..40),
        ) {
            let visible: Vec<u64> = visible.into_iter().map(|offset| mark + offset).collect();
            let Survey { contiguous, gaps } = survey(Position::new(mark), &visible);
            let missing: Vec<u64> = gaps.iter().cloned().flatten().collect();
            let last = visible.last().copied().unwrap_or(mark);
            let expected: Vec<u64> =
                (mark + 1..=last).filter(|position| !visible.contains(position)).collect();
            prop_assert_eq!(&missing, &expected);
            // The position after the mark is missing, unless the mark is the last position.
            prop_assert_eq!(contiguous.get(), missing.first().map_or(last, |first| first - 1));
        }
    }
}
