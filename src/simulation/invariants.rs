//! The invariants of the design, section 4, as an onlooker checks them: by what is committed, sent
//! and deleted, and by nothing that the processes say of themselves, but for the claim under which
//! they apply events.
//!
//! 1, 4, 5, 6, 10 and 11 with every commit, 2 and 3 after every step, 7 with every deletion, 8 and
//! 9 at rest, 13 with every projector that a boot releases, 15 with every call of a handler. 14 is
//! not modelled.

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

/// What must never be, and was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Violation {
    /// Its number in the design.
    pub(super) invariant: u8,
    pub(super) description: String,
}

/// What a worker believes when it applies events.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) stage: Stage,
    /// Which release it is of, and so which definition it has.
    pub(super) release: projectors::Release,
    /// Where it believes the projector to stand.
    pub(super) after: Position,
}

/// After every step: nothing lies above the mark, and whatever lies below it is decided: an event
/// or a tombstone.
pub(super) fn after_step(world: &mut World) {
    let mark = world.database.high_water;
    if mark > world.proved {
        let mut passed = world.proved.get() + 1..=mark.get();
        if let Some(open) = passed.find(|&position| world.database.committed(position).is_none()) {
            world.record_violation(3, || {
                format!("the mark is {mark}, and {open} is neither an event nor a tombstone yet")
            });
        }
        world.proved = mark;
    }
    if world.database.published > mark {
        let published = world.database.published;
        world.record_violation(2, || format!("published {published} lies above the mark {mark}"));
    }
    if let Some(row) = world.database.ledger.iter().find(|row| row.entry.position > mark) {
        let what =
            format!("{} stands at {}, above the mark {mark}", row.entry.id, row.entry.position);
        world.record_violation(2, || what);
    }
}

/// Before a transaction becomes visible.
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

/// Before a handler commits a part of its batch: the claim that it does so under is held, and marks
/// the row.
pub(super) fn before_partial_commit(world: &mut World, transaction: &OpenTransaction) {
    let Some((projector_index, row)) = transaction.locked.and_then(|projector_index| {
        Some((projector_index, world.database.ledger_row(projector_index)?))
    }) else {
        return;
    };
    let before = row.entry.clone();
    check_owner(world, projector_index, transaction, &before);
}

/// 3: what becomes visible lies above the mark.
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

/// 5, 6, 10, 11: only who holds the claim moves a projector, and only forward.
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

/// 6, 10, 11: who applies events to a projector holds the claim.
fn check_owner(
    world: &mut World,
    projector_index: usize,
    transaction: &OpenTransaction,
    before: &Entry,
) {
    let (id, from) = (&before.id, before.position);
    if world.database.permanently_retired[projector_index] {
        world.record_violation(11, || {
            format!("{id} was retired with side effects, and is played again")
        });
    }
    let Some(claim) = transaction.claim else {
        world.record_violation(4, || {
            format!("{id}, which stands at {from}, is moved, and nothing is applied")
        });
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

/// 1, 4: what is applied is what the position passes, each once, ascending, and nothing else.
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
            format!("{:?} are applied to {id}, which stays at {from}", transaction.applied)
        });
    }
    let expected = fold(world, projector_index, from, to);
    if from < to && transaction.applied != expected {
        world.record_violation(1, || {
            format!(
                "from {from} to {to}, {id} applies {:?} and not {expected:?}",
                transaction.applied
            )
        });
    }
    let held = world.database.read_models[projector_index].len();
    let applied_count =
        world.database.ledger_row(projector_index).map_or(0, |row| row.applied_count);
    if held != applied_count && from < to {
        world.record_violation(1, || {
            format!("the read model of {id} holds {held} events, and {applied_count} were applied")
        });
    }
}

/// 11, and the design's table of transitions.
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
        world.record_violation(invariant, || format!("{id}, which was {from}, is {to}"));
    }
}

/// The design's promise, and a CHECK of the ledger: who is broken does not stand before the event
/// it failed on; and just before it, where it has just broken.
fn check_failure(world: &mut World, after: &Entry) {
    let Some(event) = after.status.failure().and_then(|failure| failure.event.as_ref()) else {
        return;
    };
    if event.position > after.position.next() {
        world.record_violation(10, || {
            format!("{} stands at {}, and failed at {}", after.id, after.position, event.position)
        });
    }
}

/// A projector that was new: where it has to begin. `mark` is where the mark stood when its boot
/// began.
pub(super) fn after_register(world: &mut World, projector_index: usize, mark: Position) {
    let Some(row) = world.database.ledger_row(projector_index) else { return };
    let (id, position) = (row.entry.id.clone(), row.entry.position);
    match row.entry.mode {
        Mode::FromNow if position < mark => {
            world.record_violation(11, || {
                format!("{id} begins at {position}, and not at the mark, {mark}")
            });
        }
        Mode::FromBeginning | Mode::Once if position != Position::START => {
            world.record_violation(1, || {
                format!("{id} begins at {position}, and not at the beginning")
            });
        }
        _ => {}
    }
}

/// 13: what a boot has made live or finished has applied all that was visible when that boot began,
/// and its read model is the fold of the log.
pub(super) fn after_release(world: &mut World, projector_index: usize, visible: Position) {
    let Some(row) = world.database.ledger_row(projector_index) else { return };
    let (id, status, position) =
        (row.entry.id.clone(), row.entry.status.as_str(), row.entry.position);
    if position < visible {
        world.record_violation(13, || {
            format!("{id} is {status} at {position}, and {visible} was visible when boot began")
        });
    }
    let Some(row) = world.database.ledger_row(projector_index) else { return };
    let (held, expected) = (
        &world.database.read_models[projector_index],
        fold(world, projector_index, row.start, position),
    );
    if row.must_be_rebuilt() || *held != expected {
        let what =
            format!("{id} is {status} at {position}, and holds {held:?} and not {expected:?}");
        world.record_violation(13, || what);
    }
}

/// 2: only what is proved is published.
pub(super) fn before_send(world: &mut World, last: Position) {
    let mark = world.database.high_water;
    if last > mark {
        world.record_violation(2, || {
            format!("a message through {last} is sent, and the mark is {mark}")
        });
    }
}

/// 15: what a handler gets is a row of the log.
pub(super) fn before_handle(world: &mut World, event: &Event) {
    let position = event.position().get();
    if world.database.committed(position) != Some(event) {
        world.record_violation(15, || {
            format!("a handler gets an event at {position} that is not the log's")
        });
    }
}

/// 7: nothing is deleted that is not ours; and each projector of this release that was live before
/// the message was received, and still is, stands beyond it; but for those that have left the
/// convoy of the worker that deletes it, and read the store instead.
pub(super) fn before_delete(
    world: &mut World,
    message: &Message,
    delivery: &Delivery,
    release: projectors::Release,
) {
    let Some(last) = message.last else {
        return world.record_violation(7, || "a message that is not ours is deleted".into());
    };
    let waits = |row: &&super::database::LedgerRow| {
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
        // It was outside when the message was passed to the others, and has read the store.
        let was_readmitted = |(of, id, since, start_mark): &(u64, ProjectorId, Tick, Position)| {
            worker == ProcessId::Play(*of, release)
                && *id == row.entry.id
                && *since >= delivery.received_at
                && row.entry.position >= *start_mark
        };
        !world.in_background.iter().any(is_in_background)
            && !world.readmitted.iter().any(was_readmitted)
    };
    if let Some(row) = world.database.ledger.iter().filter(of_release).filter(in_group).find(waits)
    {
        let what = format!(
            "a message through {last} is deleted, and {} stands at {}",
            row.entry.id, row.entry.position
        );
        world.record_violation(7, || what);
    }
}

/// 8 and 9, when everything has come to rest: each read model is the fold of the log, or the ledger
/// has it that it must be rebuilt; and each live projector of the release stands at the mark, which
/// is the log's end.
pub(super) fn at_rest(world: &mut World, release: projectors::Release) {
    let (last, mark) = (world.database.last_visible(), world.database.high_water);
    if mark.get() != last {
        world.record_violation(9, || {
            format!("the log ends at {last}, and the mark stays at {mark}")
        });
    }
    let mut complaints = Vec::new();
    for row in world.database.ledger.iter().filter(|row| row.entry.status != Status::Retired) {
        let (id, position) = (&row.entry.id, row.entry.position);
        let expected = fold(world, row.projector_index, row.start, position);
        let held = &world.database.read_models[row.projector_index];
        if *held != expected && !row.must_be_rebuilt() {
            complaints.push((8, format!("{id} at {position} holds {held:?} and not {expected:?}")));
        }
        if row.entry.status == Status::Live && is_played_by(row, release) && position < mark {
            complaints.push((9, format!("{id} stays at {position}, and the mark is {mark}")));
        }
    }
    for (invariant, complaint) in complaints {
        world.record_violation(invariant, || complaint);
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

/// Whether a release has a projector, with the definition with which it was booted.
pub(super) fn is_played_by(row: &super::database::LedgerRow, release: projectors::Release) -> bool {
    projectors::is_in_release(release, row.projector_index)
        && row.entry.matches_digest(projectors::digest(release, row.projector_index))
}

/// What a writer was told is stored is there, once.
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
        world.record_violation(1, || format!("event {id} was acknowledged, and is not in the log"));
    }
}

/// What a projector's read model holds that began after `start` and stands at `position`.
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

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invariant {}: {}", self.invariant, self.description)
    }
}
