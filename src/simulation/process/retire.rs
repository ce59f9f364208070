//! Mirrors `command/retire.rs`: mark as retired, tear down, remove.

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

/// Retires a random projector of the ledger, with the registry of some release.
pub(in crate::simulation) async fn retire(sim: Sim, registry: Registry) -> Ended {
    // After a database error, the operator does not try again.
    let _ = retire_any(&sim, &registry).await;
    Ended::Done
}

/// Retires a projector whose read model must be rebuilt. Retries until it succeeds.
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
        // Prefers projectors that are booting, to test a retirement during a boot.
        let booting: Vec<&Entry> =
            entries.iter().filter(|entry| Stage::Boot.can_apply(&entry.status)).collect();
        let entry = if booting.is_empty() || world.rng.u32(0..4) == 0 {
            &entries[world.rng.usize(0..entries.len())]
        } else {
            booting[world.rng.usize(0..booting.len())]
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
    // If this release does not have the projector, retire cannot drop its tables and says so. The
    // operator drops them here, unless the deliberate bug prevents it. Otherwise, a release that
    // has the projector again would build on the old tables.
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
