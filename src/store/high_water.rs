//! The high-water mark: the highest position at or below which nothing can still become visible.
//!
//! InnoDB hands out positions before commit, so rows become visible out of order and rollbacks
//! leave holes. The mark moves over a hole only on proof: a tombstone of ours stands in it (design,
//! section 3, step 2).

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use sqlx::{AssertSqlSafe, MySqlConnection, Row};
use uuid::Uuid;

use super::{EventStore, Marks};
use crate::database::Flavor;
use crate::model::error::server_error_number;
use crate::model::event::{FILLER, Position};

/// Visible positions from the mark on. The isolation level of our sessions is read committed: what
/// this returns is committed. The mark's own row is read with them: where it is missing, the log
/// has lost its end.
const VISIBLE: &str = "select position from events where position >= ? order by position limit ?";

const IS_VISIBLE: &str = "select exists (select 1 from events where position = ?)";

/// Locked by a writer: its row is inserted and not yet committed or rolled back. An error says so
/// at once.
const PROBE_MYSQL: &str =
    "select count(*) from events where position between ? and ? for share nowait";
const PROBE_MARIADB: &str =
    "select count(*) from events where position between ? and ? lock in share mode nowait";

/// What holds the mark, for processes that do not live long enough to know since when. Unchanged,
/// it keeps its date; and it is not written where the mark has moved on.
const SET_BLOCKED: &str = "update event_log set blocked_position = ?, blocked_last = ?, blocked_since = utc_timestamp(6) \
                    where high_water = ? and not (blocked_position <=> ? and blocked_last <=> ?)";

const CLEAR_BLOCKED: &str = "update event_log set blocked_position = null, blocked_last = null, blocked_since = null \
                      where high_water = ? and blocked_position is not null";

/// `ignore` skips the positions that a writer has taken meanwhile; the rest of the run is still
/// filled.
const FILL: &str =
    "insert ignore into events (position, stream_id, stream_version, event_type, payload) values ";

/// For the fill only: a position whose writer is still undecided is not worth 50 seconds of
/// waiting.
const SHORT_LOCK_WAIT: &str = "set session innodb_lock_wait_timeout = 1";
const DEFAULT_LOCK_WAIT: &str = "set session innodb_lock_wait_timeout = default";

/// Positions looked at in one step.
const PAGE: u64 = 10_000;

/// The longest run of missing positions that is filled without being asked, and the most that are
/// filled at once. A bulk insert reserves positions in steps that double up to 65,535, so that one
/// `insert … select` may leave nearly so many without anybody's fault. A longer run is: somebody
/// inserted an explicit position, or set auto_increment.
pub(crate) const MAX_FILLED: u64 = 65_536;

/// Fillers in one statement.
const FILL_CHUNK: usize = 1_000;

/// How often the holes of one page are filled without the mark having moved.
pub(crate) const MAX_PASSES: u32 = 3;

/// How long a hole is given to close by itself before it is probed: the pauses between looks, in
/// milliseconds. Most are transactions that are just about to commit.
const GRACE_MILLIS: [u64; 5] = [1, 2, 3, 5, 9];

/// Where the mark stands after an attempt to raise it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HighWater {
    /// The mark.
    pub(crate) mark: Position,
    /// What keeps it from rising further now, if anything is visible above it.
    pub(crate) blocked: Option<Blocker>,
    /// How long the same thing has held it, as the log remembers; zero where it does not.
    pub(crate) blocked_for: Duration,
    /// What is wrong with the log.
    pub(crate) fault: Option<LogFault>,
}

/// The mark has no row of its own: the log was truncated or restored, or its end was deleted. What
/// is appended at or below the mark is never published and never applied.
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
        match last < mark {
            true => write!(
                f,
                "the log ends at {last}, below the high-water mark {mark}: it was truncated or restored, or its end was \
                 deleted. What is appended at or below the mark is never applied"
            ),
            false => {
                write!(f, "the high-water mark {mark} has no row: the end of the log was deleted")
            }
        }
    }
}

/// Where the mark stands after it was raised over what is visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RaiseOutcome {
    /// The mark.
    pub(crate) mark: Position,
    /// Whether something is visible above it, beyond a hole.
    pub(crate) has_gap: bool,
    /// What is wrong with the log.
    pub(crate) fault: Option<LogFault>,
}

/// What is visible from the mark on.
struct VisiblePositions {
    /// The positions above the mark, in order.
    above: Vec<u64>,
    /// Whether there may be more of them.
    is_full: bool,
    /// Whether the mark has its row; mark 0 needs none.
    has_mark_row: bool,
}

/// What became of positions that were to be filled.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FillOutcome {
    /// How many got a filler; the others had a row.
    pub(crate) count: u64,
    /// Where it ended early, because a transaction that has not ended holds a position.
    pub(crate) blocked: Option<Blocker>,
}

/// What the mark waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Blocker {
    /// A transaction that holds this position has neither committed nor rolled back.
    InFlight(Position),
    /// So many positions are missing that an operator has to look: see [`MAX_FILLED`].
    WideGap(RangeInclusive<u64>),
}

impl Blocker {
    /// As event_log has it: its first position, and the last of a gap.
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
    /// Raises the mark as far as can be proved, and stores it. Safe from any number of processes at
    /// once.
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
            // Filled, and still a hole: whatever takes our tombstones away, it is not ours to fight
            // here.
            let stubborn = (passes > MAX_PASSES).then(|| Blocker::InFlight(mark.next()));
            if let Some(blocked) = self.close_gaps(mark).await?.or(stubborn) {
                // Below the first position that is held, holes may have been closed.
                let risen = match blocked.columns().0 > mark.next().get() {
                    true => self.raise_over_visible(mark).await?,
                    false => risen,
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

    /// Raises the mark over what is visible just above it, and does not wait: a hole is left to
    /// [`EventStore::raise_high_water`].
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
                    // The mark has a row again, and with that nobody can see the fault any more.
                    fault.log_alert();
                }
                mark = raised;
                if raised != contiguous {
                    // Another process raised it meanwhile: on from there.
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

    /// The mark as far above this as reading proves it, stored by nobody: a run without holes is
    /// its own proof.
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

    /// Treats all holes of a page together: one grace, few probes, one fill. `None`: all that were
    /// taken are closed, or the first has closed by itself.
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

    /// The lowest hole that a writer holds who is still undecided. One probe where there is none, a
    /// few more where there is: whether anything is locked from the first hole up to another only
    /// ever turns from no to yes.
    async fn find_first_locked(
        &self,
        gaps: &[RangeInclusive<u64>],
    ) -> Result<Option<usize>, sqlx::Error> {
        let (Some(first), Some(last)) = (gaps.first(), gaps.last()) else { return Ok(None) };
        if !self.is_locked(&(*first.start()..=*last.end())).await? {
            return Ok(None);
        }
        // Free below `free`, locked at or below `locked`.
        let (mut free, mut locked) = (0, gaps.len() - 1);
        while free < locked {
            let middle = free + (locked - free) / 2;
            match self.is_locked(&(*gaps[free].start()..=*gaps[middle].end())).await? {
                true => locked = middle,
                false => free = middle + 1,
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

    /// What is wrong with the log, as far as one look at its end tells.
    pub(crate) async fn log_fault(&self) -> Result<Option<LogFault>, sqlx::Error> {
        // Under a mark that rises meanwhile, the row is there still.
        let mark = self.marks().await?.high_water;
        self.find_fault(mark, &self.visible_from(mark, 1).await?).await
    }

    /// Whether the mark stands just below a hole still: one look, at one row above it.
    pub(crate) async fn is_below_gap(&self, mark: Position) -> Result<bool, sqlx::Error> {
        let visible = self.visible_from(mark, 1).await?;
        Ok(visible.has_mark_row
            && visible.above.first().is_some_and(|&first| first > mark.next().get()))
    }

    /// Writes down what holds the mark, and since when, unless the log has it already or the mark
    /// has moved.
    pub(crate) async fn record_blocked(
        &self,
        mark: Position,
        blocked: &Blocker,
    ) -> Result<(), sqlx::Error> {
        let (position, last) = blocked.columns();
        let hold = sqlx::query(SET_BLOCKED)
            .bind(position)
            .bind(last)
            .bind(mark.get())
            .bind(position)
            .bind(last);
        self.database
            .run_cached(async |connection| hold.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Writes down that nothing holds the mark. (Where it rises, the rise says so.)
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

    /// Whether a writer that is still undecided holds a position in this range.
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

    /// Puts fillers into these positions. This is the proof: a position that is ours can no longer
    /// become anybody's event; its writer, if there still is one, gets error 1062 and tries again.
    pub(crate) async fn fill(&self, positions: &[u64]) -> Result<FillOutcome, sqlx::Error> {
        // A stream of its own, so that no row of anybody else's can be in the way but one at the
        // position itself.
        self.fill_in_stream(&format!("{FILLER}-{}", Uuid::now_v7()), positions).await
    }

    /// [`EventStore::fill`], with this stream id. No other fillers may have it at these positions.
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
            // Not prepared, for every fill has other numbers: what is prepared once and closed
            // makes the next statement wait for 40 ms, since sqlx 0.9.0 leaves Nagle's algorithm on
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
                        "filled holes left by rollbacks"
                    );
                    filled.count += done.rows_affected();
                    if done.rows_affected() < chunk.len() as u64 {
                        self.check_all_taken(&mut connection, chunk).await?;
                    }
                }
                // In flight after all: it was inserted between the probe and the fill.
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

    /// `insert ignore` also drops a row for other reasons than that its position is taken: then the
    /// hole is still there.
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
                "position {position} cannot be filled: the server dropped the row, although no other has this position; \
                 look for a trigger or a constraint on the table events"
            ))),
        }
    }
}

impl LogFault {
    /// Logs the alert.
    pub(crate) fn log_alert(&self) {
        tracing::error!(
            alert = "log_fault",
            first = self.last.min(self.mark.previous()).next().get(),
            last = self.mark.get(),
            high_water = self.mark.get(),
            "{self}. Restore the rows, or accept their loss: projectionist audit --accept FIRST LAST --reason TEXT"
        );
    }
}

/// What is to be done about the holes of a page, from below upwards.
#[derive(Debug, Default)]
pub(crate) struct GapPlan {
    /// Positions that a filler has to prove empty.
    pub(crate) to_fill: Vec<u64>,
    /// The lowest hole that cannot be closed now. The mark stays below it.
    pub(crate) blocked: Option<Blocker>,
    /// What lies above is not looked at now.
    is_full: bool,
}

impl GapPlan {
    /// Whether the next hole is one to be looked at.
    pub(crate) fn takes_more(&self) -> bool {
        !self.is_full && self.blocked.is_none()
    }

    /// Takes note of a probe.
    ///
    /// A hole that a writer has locked is left to it, and with it all above: the mark cannot pass
    /// it, so nothing is gained by filling what lies beyond, and something may be lost: an `insert
    /// … select` that still runs has reserved positions there, and would have to start again. Of
    /// any length, too: one transaction may well insert more rows than an operator should be called
    /// for.
    pub(crate) fn add(&mut self, gap: RangeInclusive<u64>, is_locked: bool) {
        let length = (gap.end() - gap.start()).saturating_add(1);
        if is_locked {
            self.blocked = Some(Blocker::InFlight(Position::new(*gap.start())));
        } else if length > MAX_FILLED {
            self.blocked = Some(Blocker::WideGap(gap));
        } else if self.to_fill.len() as u64 + length > MAX_FILLED {
            // Many short holes are rollbacks still: the rest of the page has its turn when these
            // are closed.
            self.is_full = true;
        } else {
            self.to_fill.extend(gap);
        }
    }
}

/// What stands above a mark, by the positions that are visible there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Survey {
    /// The end of the run that begins just above the mark.
    pub(crate) contiguous: Position,
    /// The runs of missing positions between it and the last visible one.
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
            let expected: Vec<u64> = (mark + 1..=last).filter(|position| !visible.contains(position)).collect();
            prop_assert_eq!(&missing, &expected);
            // Nothing is missing at or below the mark, and the position after it is missing or the
            // last.
            prop_assert_eq!(contiguous.get(), missing.first().map_or(last, |first| first - 1));
        }
    }
}
