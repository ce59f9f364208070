//! The mirror of `store/high_water.rs`: survey, grace, probe, fill.

use std::time::Duration;

use crate::model::event::Position;
use crate::simulation::bug::Bug;
use crate::simulation::seen::Seen;
use crate::simulation::statements::DatabaseError;
use crate::simulation::world::Sim;
use crate::store::Held;
use crate::store::high_water::{Closing, HighWater, MOST_PASSES, Survey, survey};

/// Positions looked at in one step: few, so that a log has several pages.
const PAGE: usize = 7;

/// How long a hole is given to close by itself.
const GRACE: u64 = 1;

/// What came of an attempt to close holes.
enum Closed {
    /// All of them are; or, `Some`, the lowest is held.
    Proved(Option<Held>),
    /// Only a deliberate bug says so.
    Assumed,
}

/// Raises the mark as far as can be proved.
pub(super) async fn raise_high_water(sim: &Sim) -> Result<HighWater, DatabaseError> {
    let mut mark = sim.marks().await?.high_water;
    let mut passes = 0;
    loop {
        let visible = sim.visible_above(mark, PAGE).await?;
        let Survey { contiguous, holes } = survey(mark, &visible);
        let more = visible.len() == PAGE;
        if contiguous > mark {
            sim.raise(contiguous).await?;
            mark = contiguous;
            passes = 0;
        }
        if holes.is_empty() {
            if more {
                continue;
            }
            return Ok(HighWater { mark, held: None, held_for: Duration::ZERO, fault: None });
        }
        passes += 1;
        let stubborn = (passes > MOST_PASSES).then(|| Held::InFlight(mark.next()));
        let held = match close_holes(sim, mark).await? {
            Closed::Proved(held) => held.or(stubborn),
            Closed::Assumed => {
                let last = sim.visible_above(mark, PAGE).await?.last().copied();
                mark = last.map_or(mark, Position::new);
                sim.raise(mark).await?;
                return Ok(HighWater { mark, held: None, held_for: Duration::ZERO, fault: None });
            }
        };
        if let Some(held) = held {
            sim.saw(Seen::MarkHeldByWriter);
            let mark = survey(mark, &sim.visible_above(mark, PAGE).await?).contiguous;
            sim.raise(mark).await?;
            return Ok(HighWater { mark, held: Some(held), held_for: Duration::ZERO, fault: None });
        }
    }
}

/// Treats all holes of a page together.
async fn close_holes(sim: &Sim, mark: Position) -> Result<Closed, DatabaseError> {
    sim.sleep(GRACE).await;
    let holes = survey(mark, &sim.visible_above(mark, PAGE).await?).holes;
    if sim.has(Bug::SkipsHolesByTime) && !holes.is_empty() {
        return Ok(Closed::Assumed);
    }
    let mut closing = Closing::default();
    for hole in holes {
        if !closing.goes_on() {
            break;
        }
        let is_locked = sim.is_locked(&hole).await?;
        closing.probed(hole, is_locked);
    }
    if sim.has(Bug::AbsentIsProof) && closing.held.is_none() && !closing.absent.is_empty() {
        return Ok(Closed::Assumed);
    }
    let refused = sim.fill(&closing.absent).await?;
    if sim.has(Bug::IgnoresARefusedFill) && closing.held.is_none() && refused.is_some() {
        return Ok(Closed::Assumed);
    }
    Ok(Closed::Proved(closing.held.or(refused)))
}
