//! The simulated database. It models the behaviour of InnoDB on which the protocol depends:
//!
//! - A position is handed out at insert, before commit.
//! - A row lock lasts until its transaction ends.
//! - Reads see committed rows only.
//! - A transaction whose client is gone keeps its locks until the server notices.
//! - A restart rolls back every open transaction.

use std::collections::BTreeMap;

use super::invariants::{self, Claim};
use super::occurrence::Occurrence;
use super::world::{Tick, World};
use crate::ledger::Entry;
use crate::model::event::{Event, Position};
use crate::model::lifecycle::Status;

pub(super) type TransactionId = u64;

#[derive(Default)]
pub(super) struct Database {
    /// Table `events`, by position - 1.
    pub(super) events: Vec<Option<Row>>,
    /// The auto-increment counter: the last position that was handed out.
    pub(super) counter: u64,
    /// Table `event_log`.
    pub(super) high_water: Position,
    pub(super) published: Position,
    pub(super) lease: Option<(u64, Tick)>,
    /// Table `projectors`, the oldest first.
    pub(super) ledger: Vec<LedgerRow>,
    /// The read models, by index in `PROJECTORS`. Each holds the positions of the events that were
    /// applied, in that order.
    pub(super) read_models: [Vec<u64>; super::projectors::PROJECTORS.len()],
    pub(super) open: BTreeMap<TransactionId, OpenTransaction>,
    pub(super) last_transaction: TransactionId,
    /// The earliest `orphaned_until` of the open transactions.
    pub(super) next_orphan: Option<Tick>,
    /// The database answers no statement before this tick.
    pub(super) down_until: Tick,
    /// The projectors that were retired and have side effects. They must never be played again.
    pub(super) permanently_retired: [bool; super::projectors::PROJECTORS.len()],
}

/// A row of `events`.
pub(super) struct Row {
    pub(super) event: Event,
    /// The open transaction that inserted the row; `None` once it is committed.
    pub(super) owner: Option<TransactionId>,
}

/// A row of `projectors`.
pub(super) struct LedgerRow {
    pub(super) projector_index: usize,
    pub(super) entry: Entry,
    pub(super) lock: Option<TransactionId>,
    /// Where the projector started. Events at or below it are not applied.
    pub(super) start: Position,
    /// The tick of the last transition to live.
    pub(super) live_since: Tick,
    /// The tick at which its definition was last recorded.
    pub(super) defined_at: Tick,
    /// The number of applied events of all committed batches. The read model must hold as many.
    pub(super) applied_count: usize,
    /// Set by a claim, and reset together with the move of the position. Other transactions see it
    /// only if a handler commits in between.
    pub(super) partially_applied: bool,
}

impl LedgerRow {
    /// The row as the engine reads it.
    pub(super) fn read(&self) -> Entry {
        let mut entry = self.entry.clone();
        if self.partially_applied {
            entry
                .rebuild_reason
                .get_or_insert_with(|| "a handler committed a part of a batch".into());
        }
        if let Status::Broken(failure) = &mut entry.status {
            failure.rebuild_reason.clone_from(&entry.rebuild_reason);
        }
        entry
    }

    /// Whether the ledger records that the read model is incomplete.
    pub(super) fn must_be_rebuilt(&self) -> bool {
        self.partially_applied || self.entry.rebuild_reason.is_some()
    }
}

/// A transaction that has neither committed nor rolled back.
#[derive(Default)]
pub(super) struct OpenTransaction {
    /// The positions of inserted rows of `events`.
    pub(super) inserted: Vec<u64>,
    /// The locked ledger row, by projector index.
    pub(super) locked: Option<usize>,
    /// The new content of the locked row, if the transaction changes it.
    pub(super) written: Option<Entry>,
    /// The positions of the events that it applied to the read model.
    pub(super) applied: Vec<u64>,
    /// The claim under which it applies events.
    pub(super) claim: Option<Claim>,
    /// Set when its client is gone: the tick at which the server notices.
    pub(super) orphaned_until: Option<Tick>,
}

impl Database {
    pub(super) fn row(&self, position: u64) -> Option<&Row> {
        self.events.get(position.checked_sub(1)? as usize)?.as_ref()
    }

    pub(super) fn committed(&self, position: u64) -> Option<&Event> {
        self.row(position).filter(|row| row.owner.is_none()).map(|row| &row.event)
    }

    pub(super) fn insert_row(&mut self, position: u64, row: Row) {
        let index = position as usize - 1;
        if self.events.len() <= index {
            self.events.resize_with(index + 1, || None);
        }
        self.events[index] = Some(row);
    }

    pub(super) fn last_visible(&self) -> u64 {
        (1..=self.events.len() as u64)
            .rev()
            .find(|&position| self.committed(position).is_some())
            .unwrap_or(0)
    }

    pub(super) fn ledger_row(&self, projector_index: usize) -> Option<&LedgerRow> {
        self.ledger.iter().find(|row| row.projector_index == projector_index)
    }

    pub(super) fn ledger_row_mut(&mut self, projector_index: usize) -> Option<&mut LedgerRow> {
        self.ledger.iter_mut().find(|row| row.projector_index == projector_index)
    }
}

impl World {
    /// Commits a transaction: all its changes become visible at once.
    pub(super) fn commit(&mut self, id: TransactionId) {
        let Some(transaction) = self.database.open.remove(&id) else { return };
        invariants::before_commit(self, &transaction);
        for &position in &transaction.inserted {
            if let Some(row) = self.database.events[position as usize - 1].as_mut() {
                row.owner = None;
            }
        }
        let clock = self.clock;
        if let Some(projector_index) = transaction.locked {
            self.database.read_models[projector_index].extend(&transaction.applied);
            if let Some(row) = self.database.ledger_row_mut(projector_index) {
                row.lock = None;
                row.applied_count += transaction.applied.len();
                if let Some(entry) = transaction.written {
                    if row.entry.status != Status::Live && entry.status == Status::Live {
                        row.live_since = clock;
                    }
                    row.entry = entry;
                    row.partially_applied &= transaction.claim.is_none();
                }
                self.database.permanently_retired[projector_index] |=
                    row.entry.status == Status::Retired && row.entry.has_side_effects;
            }
        }
        self.releases += 1;
    }

    /// Commits a transaction in which a handler ran a commit of its own. The applied events and the
    /// mark of the claim are stored, the position is not, and the row lock is released.
    pub(super) fn commit_partially(&mut self, id: TransactionId) {
        let Some(transaction) = self.database.open.remove(&id) else { return };
        invariants::before_partial_commit(self, &transaction);
        if let Some(projector_index) = transaction.locked {
            self.database.read_models[projector_index].extend(&transaction.applied);
            if let Some(row) = self.database.ledger_row_mut(projector_index) {
                row.lock = None;
                row.partially_applied |= transaction.claim.is_some();
            }
        }
        self.releases += 1;
    }

    /// Undoes the changes of a transaction and releases its locks.
    pub(super) fn roll_back(&mut self, id: TransactionId) {
        let Some(transaction) = self.database.open.remove(&id) else { return };
        for &position in &transaction.inserted {
            self.database.events[position as usize - 1] = None;
        }
        if let Some(row) = transaction
            .locked
            .and_then(|projector_index| self.database.ledger_row_mut(projector_index))
        {
            row.lock = None;
        }
        self.releases += 1;
    }

    /// Marks a transaction whose client is gone. The server notices after a random delay.
    pub(super) fn orphan(&mut self, id: TransactionId) {
        let noticed_in = if self.is_killing { self.rng.u64(1..50) } else { self.rng.u64(1..4) };
        let until = self.clock + noticed_in;
        if let Some(transaction) = self.database.open.get_mut(&id) {
            transaction.orphaned_until.get_or_insert(until);
            self.database.next_orphan =
                Some(self.database.next_orphan.map_or(until, |next| next.min(until)));
        }
    }

    /// Rolls back the transactions whose client has been gone long enough for the server to notice.
    pub(super) fn reap_orphans(&mut self) {
        let clock = self.clock;
        if self.database.next_orphan.is_none_or(|next| next > clock) {
            return;
        }
        let is_due =
            |open: &OpenTransaction| open.orphaned_until.is_some_and(|until| until <= clock);
        while let Some((&id, _)) = self.database.open.iter().find(|(_, open)| is_due(open)) {
            self.trace(|| format!("the server rolls back transaction {id}: its client is gone"));
            self.roll_back(id);
        }
        self.database.next_orphan =
            self.database.open.values().filter_map(|open| open.orphaned_until).min();
    }

    /// Restarts the database, which rolls back every open transaction. The auto-increment counter
    /// may fall back to the last row of the table: older servers do not store it, and an unflushed
    /// redo log can lose it.
    pub(super) fn restart_database(&mut self) {
        let down_for = self.rng.u64(0..10);
        self.database.down_until = self.clock + down_for;
        while let Some((&id, _)) = self.database.open.first_key_value() {
            self.roll_back(id);
        }
        let lowest = self.database.last_visible();
        if self.rng.bool() && lowest < self.database.counter {
            self.record(Occurrence::CounterFellBack);
            self.database.counter = lowest;
        }
    }
}
