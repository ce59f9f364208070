//! Writers. Some retry like the Rust API; others do not, like a plain insert in any language.

use crate::model::event::{Event, Position, RecordedEvent};
use crate::simulation::occurrence::Occurrence;
use crate::simulation::projectors::TYPES;
use crate::simulation::statements::{DatabaseError, LOCK_WAIT_TIMEOUT};
use crate::simulation::world::{FailureKind, Poison, Sim, World};
use crate::simulation::{projectors, schedule};

use super::Ended;

/// The number of attempts in `store/append.rs`.
const ATTEMPTS: u32 = 20;

/// The plan of one append, in one transaction.
struct Append {
    ids: Vec<String>,
    types: Vec<usize>,
    /// Each event has a statement of its own. Otherwise one statement inserts all.
    one_by_one: bool,
    /// Extra positions that each statement reserves, as `insert … select` does.
    spare: u64,
    rolls_back: bool,
    /// How long the writer waits before each row, in ticks.
    delay: u64,
}

/// Appends until the run settles or the log is long enough.
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

/// Appends, with retries if `retries`. Returns `true` if the events are known to be stored.
async fn append_events(sim: &Sim, append: &Append, retries: bool) -> bool {
    for attempt in 1..=ATTEMPTS {
        match try_append(sim, append, attempt > 1).await {
            Ok(stored) => return stored,
            // An earlier attempt was committed, but its acknowledgement was lost.
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

/// Runs one transaction. Returns `Ok(false)` if it was rolled back on purpose.
async fn try_append(sim: &Sim, append: &Append, is_repeated: bool) -> Result<bool, DatabaseError> {
    let mut transaction = sim.begin();
    let rows = append.ids.len();
    let rows_per_statement = if append.one_by_one { 1 } else { rows };
    for first in (0..rows).step_by(rows_per_statement) {
        let mut position = transaction.reserve(rows_per_statement as u64 + append.spare).await?;
        for row in first..first + rows_per_statement {
            if append.delay > 0 {
                sim.record(Occurrence::ReservedNotInserted);
                sim.sleep(append.delay).await;
            }
            if is_repeated {
                transaction.check_event_id(&append.ids[row]).await?;
            }
            let event = event(&mut sim.world(), position, append, row);
            transaction.insert(event, LOCK_WAIT_TIMEOUT).await?;
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

/// Makes the event of a row, and may choose a projector whose handler will fail there.
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
    // Some payloads cannot be sent in a message, so that the relay sends a reference.
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
