//! Checks the invariants of docs/architecture.md, by their numbers there.
//!
//! The checks use committed rows, sent messages and deleted messages. They do not use the state of
//! the processes, with one exception: the claim under which a process applies events.
//!
//! | invariants | checked |
//! | --- | --- |
//! | 1, 4, 5, 6, 10, 11 | at every commit |
//! | 2, 3 | after every step |
//! | 7 | at every deletion of a message |
//! | 8, 9 | when everything has settled |
//! | 13 | for every projector that a boot releases |
//! | 15 | at every call of a handler |
//!
//! Invariants 12 and 14 are not modelled.

use std::fmt;

use super::database::OpenTransaction;
use super::occurrence::Occurrence;
use super::projectors;
use super::queue::{Delivery, Message};
use super::world::{ProcessId, Tick, World};
use crate::ledger::Entry;
use crate::model::event::{Event, Position};
use crate::model::lifecycle::{Stage, Status};
use crate::model::projector::{Mode, ProjectorId};

/// A violated invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Violation {
    /// Its number in docs/architecture.md.
    pub(super) invariant: u8,
    pub(super) description: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invariant {}: {}", self.invariant, self.description)
    }
}

/// A claim: what a process assumes about a projector while it applies events.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) stage: Stage,
    /// The release of the process. It determines the definition of the projector.
    pub(super) release: projectors::Release,
    /// The position from which it applies events.
    pub(super) after: Position,
}

/// Checks 2 and 3 after a step. No projector and no published position is above the mark. Each
/// position at or below the mark holds a committed event or filler.
pub(super) fn after_step(world: &mut World) {
    let mark = world.database.high_water;
    if mark > world.proved {
        let mut passed = world.proved.get() + 1..=mark.get();
        if let Some(open) = passed.find(|&position| world.database.committed(position).is_none()) {
            world.record_violation(3, || {
                format!("the mark is {mark}, and {open} is neither an event nor a filler")
            });
        }
        world.proved = mark;
    }
    if world.database.published > mark {
        let published = world.database.published;
        world.record_violation(2, || {
            format!("the published position {published} is above the mark {mark}")
        });
    }
    if let Some(row) = world.database.ledger.iter().find(|row| row.entry.position > mark) {
        let what = format!("{} is at {}, above the mark {mark}", row.entry.id, row.entry.position);
        world.record_violation(2, || what);
    }
}

/// Checks a transaction just before it commits.
pub(super) fn before_commit(world: &mut World, transaction: &OpenTransaction) {
    check_events(world, transaction);
    let Some((projector_index, row)) = transaction.locked.and_then(|projector_index| {
        Some((projector_index, world.database.ledger_row(projector_index)?))
    }) else {
        return;
    };
    let before = row.entry.clone();
    let after = transaction.written.as_ref().unwrap_or(&before);
    check_claim(world, projector_index, transaction, &before, after);
    check_projection(world, projector_index, transaction, &before, after);
    check_transition(world, &before, after);
    check_failure(world, after);
}

/// Checks that the claim is still held when a handler commits a part of its batch.
pub(super) fn before_partial_commit(world: &mut World, transaction: &OpenTransaction) {
    let Some((projector_index, row)) = transaction.locked.and_then(|projector_index| {
        Some((projector_index, world.database.ledger_row(projector_index)?))
    }) else {
        return;
    };
    let before = row.entry.clone();
    check_owner(world, projector_index, transaction, &before);
}

/// Checks 3: each event becomes visible above the mark.
fn check_events(world: &mut World, transaction: &OpenTransaction) {
    let (mark, last) = (world.database.high_water, world.database.last_visible());
    for &position in &transaction.inserted {
        let is_event = world.database.row(position).is_some_and(|row| !row.event.is_filler());
        if is_event && position < last {
            world.record(Occurrence::VisibleOutOfOrder);
        }
        if is_event && position <= mark.get() {
            world.record_violation(3, || {
                format!("event {position} becomes visible below the mark {mark}")
            });
        }
    }
}

/// Checks 5, 6, 10 and 11: only the holder of the claim moves a projector, and only forward.
fn check_claim(
    world: &mut World,
    projector_index: usize,
    transaction: &OpenTransaction,
    before: &Entry,
    after: &Entry,
) {
    let (id, from, to) = (&before.id, before.position, after.position);
    if from == to && transaction.applied.is_empty() {
        return;
    }
    if to < from {
        world.record_violation(5, || format!("{id} falls back from {from} to {to}"));
    }
    check_owner(world, projector_index, transaction, before);
}

/// Checks 6, 10 and 11: the process that applies events to a projector holds the claim.
fn check_owner(
    world: &mut World,
    projector_index: usize,
    transaction: &OpenTransaction,
    before: &Entry,
) {
    let (id, from) = (&before.id, before.position);
    if world.database.permanently_retired[projector_index] {
        world.record_violation(11, || {
            format!("{id} has side effects, was retired, and is played again")
        });
    }
    let Some(claim) = transaction.claim else {
        world.record_violation(4, || format!("{id} is moved from {from} without a claim"));
        return;
    };
    let is_owner = match claim.stage {
        Stage::Boot => {
            matches!(before.status, Status::Booting | Status::Stalled | Status::Broken(_))
        }
        Stage::Play => before.status == Status::Live,
    };
    let (status, after) = (before.status.as_str(), claim.after);
    if !is_owner {
        let invariant = match before.status {
            Status::Broken(_) => 10,
            Status::Finished | Status::Retired => 11,
            _ => 6,
        };
        world.record_violation(invariant, || {
            format!("{:?} moves {id}, which is {status}", claim.stage)
        });
    }
    if before
        .digest
        .as_deref()
        .is_some_and(|booted| booted != projectors::digest(claim.release, projector_index))
    {
        world.record_violation(6, || {
            format!(
                "a worker of release {} moves {id}, booted with another definition",
                claim.release
            )
        });
    }
    if after != from {
        world.record_violation(6, || {
            format!("a worker that has {id} at {after} moves it from {from}")
        });
    }
}

/// Checks 1 and 4: the applied events are exactly the subscribed events that the position passes,
/// each once, ascending.
fn check_projection(
    world: &mut World,
    projector_index: usize,
    transaction: &OpenTransaction,
    before: &Entry,
    after: &Entry,
) {
    let (id, from, to) = (&before.id, before.position, after.position);
    if from == to && !transaction.applied.is_empty() {
        world.record_violation(4, || {
            format!("{:?} are applied to {id}, but it stays at {from}", transaction.applied)
        });
    }
    let expected = fold(world, projector_index, from, to);
    if from < to && transaction.applied != expected {
        world.record_violation(1, || {
            format!(
                "from {from} to {to}, {id} applies {:?} instead of {expected:?}",
                transaction.applied
            )
        });
    }
    let held = world.database.read_models[projector_index].len();
    let applied_count =
        world.database.ledger_row(projector_index).map_or(0, |row| row.applied_count);
    if held != applied_count && from < to {
        world.record_violation(1, || {
            format!("the read model of {id} holds {held} events, but {applied_count} were applied")
        });
    }
}

/// Checks 11 and the transitions of the lifecycle.
fn check_transition(world: &mut World, before: &Entry, after: &Entry) {
    let (from, to, id) = (before.status.as_str(), after.status.as_str(), &before.id);
    let is_legal = match (from, to) {
        ("booting" | "stalled" | "broken", "live") => before.mode != Mode::Once,
        ("booting" | "stalled" | "broken", "finished") => before.mode == Mode::Once,
        ("booting" | "stalled" | "broken" | "live", "broken") => true,
        ("booting" | "stalled", "stalled") => true,
        (from, "retired") => from != "retired" || before == after,
        (from, to) => from == to,
    };
    if !is_legal {
        let invariant = if matches!(from, "retired" | "finished") || before.mode == Mode::Once {
            11
        } else {
            6
        };
        world.record_violation(invariant, || format!("{id} goes from {from} to {to}"));
    }
}

/// Checks 10: the event on which a projector failed is at most one above its position. A CHECK of
/// the ledger guarantees the same.
fn check_failure(world: &mut World, after: &Entry) {
    let Some(event) = after.status.failure().and_then(|failure| failure.event.as_ref()) else {
        return;
    };
    if event.position > after.position.next() {
        world.record_violation(10, || {
            format!("{} is at {}, but failed at {}", after.id, after.position, event.position)
        });
    }
}

/// Checks where a new projector starts. `mark` is the high-water mark when its boot began.
pub(super) fn after_register(world: &mut World, projector_index: usize, mark: Position) {
    let Some(row) = world.database.ledger_row(projector_index) else { return };
    let (id, position) = (row.entry.id.clone(), row.entry.position);
    match row.entry.mode {
        Mode::FromNow if position < mark => {
            world.record_violation(11, || {
                format!("{id} starts at {position}, below the mark {mark}")
            });
        }
        Mode::FromBeginning | Mode::Once if position != Position::START => {
            world.record_violation(1, || format!("{id} starts at {position} instead of 0"));
        }
        _ => {}
    }
}

/// Checks 13: a projector that a boot released has applied everything that was visible when the
/// boot began, and its read model is the fold of the log.
pub(super) fn after_release(world: &mut World, projector_index: usize, visible: Position) {
    let Some(row) = world.database.ledger_row(projector_index) else { return };
    let (id, status, position) =
        (row.entry.id.clone(), row.entry.status.as_str(), row.entry.position);
    if position < visible {
        world.record_violation(13, || {
            format!("{id} is {status} at {position}, but {visible} was visible when boot began")
        });
    }
    let Some(row) = world.database.ledger_row(projector_index) else { return };
    let (held, expected) = (
        &world.database.read_models[projector_index],
        fold(world, projector_index, row.start, position),
    );
    if row.must_be_rebuilt() || *held != expected {
        let what =
            format!("{id} is {status} at {position}, but holds {held:?} instead of {expected:?}");
        world.record_violation(13, || what);
    }
}

/// Checks 2: the relay sends only events at or below the mark.
pub(super) fn before_send(world: &mut World, last: Position) {
    let mark = world.database.high_water;
    if last > mark {
        world.record_violation(2, || {
            format!("a message through {last} is sent, but the mark is {mark}")
        });
    }
}

/// Checks 15: an event that a handler gets is a row of the log.
pub(super) fn before_handle(world: &mut World, event: &Event) {
    let position = event.position().get();
    if world.database.committed(position) != Some(event) {
        world.record_violation(15, || {
            format!("a handler gets an event at {position} that is not in the log")
        });
    }
}

/// Checks 7. A foreign message is never deleted. A message is deleted only if each live projector
/// of this release has committed past it. Projectors that became live or were redefined after the
/// message was received are exempt. So are projectors in the background of the deleting worker,
/// because they read the store.
pub(super) fn before_delete(
    world: &mut World,
    message: &Message,
    delivery: &Delivery,
    release: projectors::Release,
) {
    let Some(last) = message.last else {
        return world.record_violation(7, || "a foreign message is deleted".into());
    };
    let needs_message = |row: &&super::database::LedgerRow| {
        let since = row.live_since.max(row.defined_at);
        row.entry.status == Status::Live
            && since < delivery.received_at
            && row.entry.position < last
    };
    let of_release = |row: &&super::database::LedgerRow| is_played_by(row, release);
    let worker = world.process_id;
    let in_group = |row: &&super::database::LedgerRow| {
        let is_in_background = |(of, id): &(u64, ProjectorId)| {
            worker == ProcessId::Play(*of, release) && *id == row.entry.id
        };
        // The projector was in the background while the others processed the message, and has read
        // its events from the store.
        let was_readmitted = |(of, id, since, start_mark): &(u64, ProjectorId, Tick, Position)| {
            worker == ProcessId::Play(*of, release)
                && *id == row.entry.id
                && *since >= delivery.received_at
                && row.entry.position >= *start_mark
        };
        !world.in_background.iter().any(is_in_background)
            && !world.readmitted.iter().any(was_readmitted)
    };
    if let Some(row) =
        world.database.ledger.iter().filter(of_release).filter(in_group).find(needs_message)
    {
        let what = format!(
            "a message through {last} is deleted, but {} is at {}",
            row.entry.id, row.entry.position
        );
        world.record_violation(7, || what);
    }
}

/// Checks 8 and 9 after everything has settled. Each read model is the fold of the log, or the
/// ledger records that it must be rebuilt. Each live projector of the release is at the mark, and
/// the mark is at the end of the log.
pub(super) fn at_rest(world: &mut World, release: projectors::Release) {
    let (last, mark) = (world.database.last_visible(), world.database.high_water);
    if mark.get() != last {
        world.record_violation(9, || {
            format!("the log ends at {last}, but the mark stays at {mark}")
        });
    }
    let mut violations = Vec::new();
    for row in world.database.ledger.iter().filter(|row| row.entry.status != Status::Retired) {
        let (id, position) = (&row.entry.id, row.entry.position);
        let expected = fold(world, row.projector_index, row.start, position);
        let held = &world.database.read_models[row.projector_index];
        if *held != expected && !row.must_be_rebuilt() {
            violations
                .push((8, format!("{id} at {position} holds {held:?} instead of {expected:?}")));
        }
        if row.entry.status == Status::Live && is_played_by(row, release) && position < mark {
            violations.push((9, format!("{id} stays at {position}, but the mark is {mark}")));
        }
    }
    for (invariant, description) in violations {
        world.record_violation(invariant, || description);
    }
    let rows = || {
        world
            .database
            .ledger
            .iter()
            .filter(|row| projectors::is_in_release(release, row.projector_index))
    };
    let is_behind = |row: &super::database::LedgerRow| {
        row.entry.status.failure().is_some_and(|failure| failure.event.is_some())
            && row.entry.position < mark
    };
    if rows().any(is_behind)
        && rows().any(|row| row.entry.status == Status::Live && row.entry.position == mark)
    {
        world.record(Occurrence::BrokenStayedOthersMoved);
    }
    check_appends(world);
}

/// Whether a release plays a projector: it has the projector, with the definition that was booted.
pub(super) fn is_played_by(row: &super::database::LedgerRow, release: projectors::Release) -> bool {
    projectors::is_in_release(release, row.projector_index)
        && row.entry.matches_digest(projectors::digest(release, row.projector_index))
}

/// Checks that each acknowledged event is in the log, and no event twice.
fn check_appends(world: &mut World) {
    let mut ids: Vec<&str> =
        world.database.events.iter().flatten().map(|row| row.event.event_id()).collect();
    ids.sort_unstable();
    let repeated = ids.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0].to_owned());
    let lost =
        world.acknowledged.iter().find(|id| ids.binary_search(&id.as_str()).is_err()).cloned();
    if let Some(id) = repeated {
        world.record_violation(1, || format!("event {id} is in the log twice"));
    }
    if let Some(id) = lost {
        world.record_violation(1, || format!("event {id} was acknowledged, but is not in the log"));
    }
}

/// The expected read model of a projector at `position` that started at `start`: the positions of
/// the events that it subscribes to.
fn fold(world: &World, projector_index: usize, start: Position, position: Position) -> Vec<u64> {
    let range = start.get() + 1..=position.get();
    range
        .filter(|&p| {
            world
                .database
                .committed(p)
                .is_some_and(|event| projectors::wants(projector_index, event))
        })
        .collect()
}
