//! The high-water mark: the highest position at or below which no event can still become visible.
//!
//! InnoDB assigns positions before commit. Rows therefore become visible out of order, and
//! rollbacks leave gaps. The mark passes a gap only after a filler was inserted at each of its
//! positions. The filler proves that no event can appear there.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{EventStore, Marks};
use crate::model::event::Position;

/// Visible positions from the mark on. The sessions use read committed, so every position that this
/// returns is committed. The mark's own row is included: if it is missing, the end of the log was
/// lost.
const VISIBLE: &str = "select position from events where position >= ? order by position limit ?";

const IS_VISIBLE: &str = "select exists (select 1 from events where position = ?)";

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

/// Positions that one step examines.
const PAGE: u64 = 10_000;

/// The widest gap that is filled automatically, and the most positions that are filled in one step.
///
/// A bulk insert reserves positions in steps that double up to 65,535. One rolled back `insert …
/// select` can therefore leave a gap of nearly that width. A wider gap means that an explicit
/// position was inserted, or that auto_increment was changed.
pub(crate) const MAX_FILLED: u64 = 65_536;

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

    /// Whether the row at the mark is the last one of the log.
    pub(crate) async fn ends_at(&self, mark: Position) -> Result<bool, sqlx::Error> {
        let visible = self.visible_from(mark, 1).await?;
        Ok(visible.has_mark_row && visible.above.is_empty())
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
