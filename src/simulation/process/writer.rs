//! Writers: the Rust API, which tries again, and plain inserts of any language, which do not.

use crate::model::event::{Event, Position, RecordedEvent};
use crate::simulation::occurrence::Occurrence;
use crate::simulation::projectors::TYPES;
use crate::simulation::statements::{DEFAULT_LOCK_WAIT_TIMEOUT, DatabaseError};
use crate::simulation::world::{FailureKind, Poison, Sim, World};
use crate::simulation::{projectors, schedule};

use super::Ended;

/// As `store/append.rs` has it.
const ATTEMPTS: u32 = 20;

/// What is appended in one transaction.
struct Append {
    ids: Vec<String>,
    types: Vec<usize>,
    /// The events go into one statement each, and not all into one.
    one_by_one: bool,
    /// Positions that a statement reserves beyond its rows, as `insert … select` does.
    spare: u64,
    rolls_back: bool,
    /// How long it thinks between its statements.
    delay: u64,
}

/// Appends until the simulation closes, or the log is long enough.
pub(in crate::simulation) async fn write(sim: Sim, number: u64) -> Ended {
    let retries = sim.world().rng.bool();
    for count in 0.. {
        let pause = sim.world().rng.u64(0..12);
        sim.sleep(pause).await;
        let append = {
            let mut world = sim.world();
            if world.is_closing || world.database.events.len() >= schedule::MAX_LOG_EVENTS {
                break;
            }
            plan(&mut world, number, count)
        };
        if append_events(&sim, &append, retries).await {
            sim.world().acknowledged.extend(append.ids);
        }
    }
    Ended::Done
}

fn plan(world: &mut World, number: u64, count: u64) -> Append {
    let rows = world.rng.u64(1..=3);
    let unique = world.rng.u32(..);
    let chance = world.chances.rollback;
    Append {
        ids: (0..rows).map(|row| format!("w{number}-{count}-{row}-{unique:x}")).collect(),
        types: (0..rows).map(|_| world.rng.usize(0..TYPES.len())).collect(),
        one_by_one: world.rng.bool(),
        spare: if world.roll(150) { world.rng.u64(1..3) } else { 0 },
        rolls_back: world.roll(chance),
        delay: if world.roll(250) { world.rng.u64(1..25) } else { 0 },
    }
}

/// Whether the events are known to be stored.
async fn append_events(sim: &Sim, append: &Append, retries: bool) -> bool {
    for attempt in 1..=ATTEMPTS {
        match try_append(sim, append, attempt > 1).await {
            Ok(stored) => return stored,
            // An earlier attempt was carried out, and its answer lost.
            Err(DatabaseError::EventIdTaken) => {
                sim.record(Occurrence::AppendRepeatedAfterLostAck);
                return attempt > 1;
            }
            Err(DatabaseError::PositionTaken) => sim.record(Occurrence::WriterMetFiller),
            Err(_) if !retries => return false,
            Err(_) => {}
        }
        sim.back_off().await;
    }
    false
}

/// One transaction. `Ok(false)`: it was rolled back on purpose.
async fn try_append(sim: &Sim, append: &Append, is_repeated: bool) -> Result<bool, DatabaseError> {
    let mut transaction = sim.begin();
    let rows = append.ids.len();
    let in_a_statement = if append.one_by_one { 1 } else { rows };
    for first in (0..rows).step_by(in_a_statement) {
        let mut position = transaction.reserve(in_a_statement as u64 + append.spare).await?;
        for row in first..first + in_a_statement {
            if append.delay > 0 {
                sim.record(Occurrence::ReservedNotInserted);
                sim.sleep(append.delay).await;
            }
            if is_repeated {
                transaction.check_event_id(&append.ids[row]).await?;
            }
            let event = event(&mut sim.world(), position, append, row);
            transaction.insert(event, DEFAULT_LOCK_WAIT_TIMEOUT).await?;
            position += 1;
        }
    }
    if append.rolls_back {
        sim.record(Occurrence::RolledBack);
        sim.trace(|| "rolls back".into());
        transaction.roll_back();
        return Ok(false);
    }
    transaction.commit().await?;
    sim.record(Occurrence::Appended);
    Ok(true)
}

/// The event of a row, and perhaps a projector that will not be able to take it.
fn event(world: &mut World, position: u64, append: &Append, row: usize) -> Event {
    let chance = world.chances.poison;
    if world.roll(chance) {
        let kind =
            [FailureKind::Error, FailureKind::Panic, FailureKind::Flaky][world.rng.usize(0..3)];
        let release = if world.rng.bool() {
            Some(world.rng.usize(0..projectors::RELEASE_COUNT))
        } else {
            None
        };
        let projector_index = world.rng.usize(0..projectors::PROJECTORS.len());
        world.poison.push(Poison { projector_index, position, kind, release });
    }
    // Some cannot travel in a message, and only a reference to them can.
    let payload = if world.roll(30) { "\"\u{ffff}\"" } else { "1" };
    Event::from(RecordedEvent {
        position: Position::new(position),
        event_id: append.ids[row].clone(),
        stream_id: "case".into(),
        stream_version: position,
        event_type: TYPES[append.types[row]].into(),
        recorded_at: time::OffsetDateTime::UNIX_EPOCH,
        payload: payload.into(),
        metadata: None,
    })
}
