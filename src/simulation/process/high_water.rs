//! Mirrors `store/high_water.rs`: survey, grace period, probe, fill.

use std::time::Duration;

use crate::model::event::Position;
use crate::simulation::bug::Bug;
use crate::simulation::occurrence::Occurrence;
use crate::simulation::statements::DatabaseError;
use crate::simulation::world::Sim;
use crate::store::Blocker;
use crate::store::high_water::{GapPlan, HighWater, MAX_PASSES, Survey, survey};

/// The most positions that one step reads. It is small, so that a log has several pages.
const PAGE: usize = 7;

/// How long a gap may close by itself before it is probed.
const GRACE: u64 = 1;

/// The result of an attempt to close gaps.
enum CloseOutcome {
    /// All gaps of the page are closed, or the given blocker prevents it for the lowest one.
    Proved(Option<Blocker>),
    /// A deliberate bug treats the gaps as closed without proof.
    Assumed,
}

/// Raises the mark to the highest position that can be proved.
pub(super) async fn raise_high_water(sim: &Sim) -> Result<HighWater, DatabaseError> {
    let mut mark = sim.marks().await?.high_water;
    let mut passes = 0;
    loop {
        let visible = sim.visible_above(mark, PAGE).await?;
        let Survey { contiguous, gaps } = survey(mark, &visible);
        let more = visible.len() == PAGE;
        if contiguous > mark {
            sim.raise_mark(contiguous).await?;
            mark = contiguous;
            passes = 0;
        }
        if gaps.is_empty() {
            if more {
                continue;
            }
            return Ok(HighWater { mark, blocked: None, blocked_for: Duration::ZERO, fault: None });
        }
        passes += 1;
        let unclosable = (passes > MAX_PASSES).then(|| Blocker::InFlight(mark.next()));
        let blocked = match close_gaps(sim, mark).await? {
            CloseOutcome::Proved(blocker) => blocker.or(unclosable),
            CloseOutcome::Assumed => {
                let last = sim.visible_above(mark, PAGE).await?.last().copied();
                mark = last.map_or(mark, Position::new);
                sim.raise_mark(mark).await?;
                return Ok(HighWater {
                    mark,
                    blocked: None,
                    blocked_for: Duration::ZERO,
                    fault: None,
                });
            }
        };
        if blocked.is_some() {
            sim.record(Occurrence::MarkBlockedByWriter);
            let mark = survey(mark, &sim.visible_above(mark, PAGE).await?).contiguous;
            sim.raise_mark(mark).await?;
            return Ok(HighWater { mark, blocked, blocked_for: Duration::ZERO, fault: None });
        }
    }
}

/// Tries to close all gaps of a page together.
async fn close_gaps(sim: &Sim, mark: Position) -> Result<CloseOutcome, DatabaseError> {
    sim.sleep(GRACE).await;
    let gaps = survey(mark, &sim.visible_above(mark, PAGE).await?).gaps;
    if sim.has(Bug::SkipsGapsByTime) && !gaps.is_empty() {
        return Ok(CloseOutcome::Assumed);
    }
    let mut plan = GapPlan::default();
    for gap in gaps {
        if !plan.takes_more() {
            break;
        }
        let is_locked = sim.is_locked(&gap).await?;
        plan.add(gap, is_locked);
    }
    if sim.has(Bug::TreatsAbsentAsRolledBack) && plan.blocked.is_none() && !plan.to_fill.is_empty()
    {
        return Ok(CloseOutcome::Assumed);
    }
    let refused = sim.fill(&plan.to_fill).await?;
    if sim.has(Bug::IgnoresBlockedFill) && plan.blocked.is_none() && refused.is_some() {
        return Ok(CloseOutcome::Assumed);
    }
    Ok(CloseOutcome::Proved(plan.blocked.or(refused)))
}
