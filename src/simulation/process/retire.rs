//! The mirror of `command/retire.rs`: mark, tear down, forget.

use super::Ended;
use crate::ledger::Entry;
use crate::model::lifecycle::{Stage, Status, Transition};
use crate::model::projector::ProjectorId;
use crate::model::registry::Registry;
use crate::simulation::bug::Bug;
use crate::simulation::occurrence::Occurrence;
use crate::simulation::projectors;
use crate::simulation::statements::DatabaseError;
use crate::simulation::world::Sim;

/// Retires one of the projectors that the ledger has, with the set of a release at hand.
pub(in crate::simulation) async fn retire(sim: Sim, registry: Registry) -> Ended {
    // An operator who is refused by the database tries again, or does not.
    let _ = retire_any(&sim, &registry).await;
    Ended::Done
}

/// Retires a projector whose read model must be rebuilt.
pub(in crate::simulation) async fn rebuild(sim: Sim, registry: Registry, id: ProjectorId) -> Ended {
    while try_retire(&sim, &registry, &id, true).await.is_err() {
        sim.back_off().await;
    }
    Ended::Done
}

async fn retire_any(sim: &Sim, registry: &Registry) -> Result<(), DatabaseError> {
    let entries = sim.entries().await?;
    if entries.is_empty() {
        return Ok(());
    }
    let (entry, force) = {
        let mut world = sim.world();
        // Most of them under the hands of a boot, if there is one.
        let booting: Vec<&Entry> =
            entries.iter().filter(|entry| Stage::Boot.can_apply(&entry.status)).collect();
        let entry = match booting.is_empty() || world.rng.u32(0..4) == 0 {
            true => &entries[world.rng.usize(0..entries.len())],
            false => booting[world.rng.usize(0..booting.len())],
        };
        (entry, world.roll(300))
    };
    try_retire(sim, registry, &entry.id, force).await
}

async fn try_retire(
    sim: &Sim,
    registry: &Registry,
    id: &ProjectorId,
    force: bool,
) -> Result<(), DatabaseError> {
    let Some(entry) = sim.entries().await?.into_iter().find(|entry| entry.id == *id) else {
        return Ok(());
    };
    let projector = registry.get(id);
    if entry.status == Status::Live && projector.is_some() && !force {
        return Ok(());
    }
    if entry.status == Status::Retired && entry.has_side_effects {
        return Ok(());
    }
    sim.trace(|| format!("retires {id}"));
    if entry.status != Status::Retired {
        let still = |entry: &Entry| entry.status != Status::Retired;
        sim.ledger_transition(id, Transition::Retire, still)
            .await
            .map_err(|error| error.unwrap_or(DatabaseError::ConnectionLost))?;
    }
    sim.record(Occurrence::Retired);
    if sim.world().booting > 0 {
        sim.record(Occurrence::RetiredMetBoot);
    }
    // With a set that lacks the projector its tables are the operator's to drop, and retire tells
    // him so: here he does, unless that is the bug. Forgotten with its tables still there, it would
    // be built upon them by a release that has it again.
    let operator_drops = !entry.has_side_effects && !sim.has(Bug::RetiresWithoutTeardown);
    if projector.is_some() || operator_drops {
        sim.tear_down(id).await?;
    }
    if !entry.has_side_effects {
        sim.remove(id).await?;
        sim.record(Occurrence::Forgotten);
        sim.world().forgotten[projectors::index_of(id)] = true;
    }
    Ok(())
}
