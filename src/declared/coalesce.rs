//! Applies a batch of events. Several executions of one insert become one statement with many rows,
//! if the effect is the same.
//!
//! Rows wait in a buffer per table. A buffer joins the [`Packet`] before any other statement,
//! before another handler inserts into the same table, when it is full, and at the end of the
//! batch. The statements on one table therefore keep their order. Only inserts into *different*
//! tables change places, and these do not depend on each other: [`insert`](super::insert) has
//! checked that they read only their parameters and their own table, and
//! [`tables`](super::tables) that nothing else depends on the table.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sqlx::MySqlConnection;
use tracing::info;

use super::argument::{Argument, Lookup};
use super::handler::{Handler, Handlers};
use super::insert::Insert;
use super::packet::Packet;
use super::tables::{InsertTarget, Refusal, check_tables};
use crate::database::multi_row::MAX_BYTES;
use crate::model::event::Event;
use crate::model::projector::ProjectorId;

/// The minimum number of executions in a batch for which a table is checked. A check costs about as
/// much as twenty executions.
const MIN_EXECUTIONS: usize = 32;

/// How long a refusal of a table is remembered. An acceptance is not remembered: the next
/// transaction has no lock on the table yet, so another session may have created a trigger.
const REFUSAL_TTL: Duration = Duration::from_secs(60);

/// The most rows in a statement. More would hardly be faster.
const MAX_ROWS: usize = 1_000;

/// The maximum size of the buffers of all tables together, in bytes.
const MAX_PENDING_BYTES: usize = 8 * MAX_BYTES;

/// The tables of a projector's coalescable inserts, and their recent refusals.
#[derive(Debug, Default)]
pub(super) struct Tables {
    names: Vec<String>,
    /// For each table, whether one of its inserts is an `insert ignore`.
    ignores: Vec<bool>,
    refused: Mutex<Vec<Option<(Instant, Refusal)>>>,
    /// The reasons that are in the log.
    logged: Mutex<Vec<Option<Refusal>>>,
}

/// The index of a table in [`Tables`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableIndex(usize);

impl TableIndex {
    pub(super) fn get(self) -> usize {
        self.0
    }
}

impl Tables {
    /// The index of the insert's table. Names are compared without their case. If the server
    /// distinguishes two such names, their inserts only wait for each other needlessly.
    pub(super) fn add(&mut self, insert: &Insert) -> TableIndex {
        let known = self.names.iter().position(|other| other.eq_ignore_ascii_case(&insert.table));
        let table = known.unwrap_or_else(|| {
            self.names.push(insert.table.clone());
            self.ignores.push(false);
            self.names.len() - 1
        });
        self.ignores[table] |= insert.ignores;
        TableIndex(table)
    }

    /// All tables, to be checked.
    pub(super) fn targets(&self) -> Vec<InsertTarget<'_>> {
        self.names
            .iter()
            .zip(&self.ignores)
            .map(|(name, ignores)| InsertTarget { name, ignores: *ignores })
            .collect()
    }

    fn refused_flags(&self) -> Vec<bool> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let is_refused = |table: usize| {
            let last = refused.get(table).and_then(Option::as_ref);
            last.is_some_and(|(at, _)| at.elapsed() < REFUSAL_TTL)
        };
        (0..self.names.len()).map(is_refused).collect()
    }

    /// Remembers a refusal. Returns whether its reason should be logged.
    fn refuse(&self, table: usize, refusal: Refusal) -> bool {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.resize(self.names.len(), None);
        refused[table] = Some((Instant::now(), refusal));
        self.record_logged(table, refusal)
    }

    /// Remembers that a reason is logged now. Returns whether it differs from the last one.
    pub(super) fn record_logged(&self, table: usize, refusal: Refusal) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        logged.resize(self.names.len(), None);
        logged[table].replace(refusal) != Some(refusal)
    }
}

/// What this transaction knows about a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TableState {
    /// Its inserts are sent one by one.
    OneByOne,
    /// Worth a check. This transaction has not used the table yet, so its definition may still
    /// change.
    Unlocked,
    /// Worth a check. This transaction has written to the table, so its definition cannot change
    /// before the transaction ends.
    Locked,
    /// Checked: its inserts may be coalesced.
    Coalescable,
}

/// Applies a batch of events, with the same effect as if each statement were sent by itself.
pub(super) async fn apply(
    projector: &ProjectorId,
    handlers: &Handlers,
    events: &[&Event],
    db: &mut MySqlConnection,
) -> anyhow::Result<()> {
    let mut batch = Batch::new(projector, handlers, events);
    let added = batch.add_all(events, db).await;
    // After an invalid value, a statement that precedes it may have the first error.
    batch.flush(db).await?;
    added
}

/// The state of a batch: the waiting statements, the buffered rows and the state of each table.
struct Batch<'h> {
    projector: &'h ProjectorId,
    handlers: &'h Handlers,
    packet: Packet<'h>,
    /// Empty if no table is worth a check.
    tables: Vec<TableState>,
    pending: Vec<Option<PendingRows<'h>>>,
    /// The size of all buffers, in bytes.
    size: usize,
}

/// Buffered rows of one handler.
struct PendingRows<'h> {
    handler: &'h Handler,
    insert: &'h Insert,
    /// The statement up to its last row.
    text: String,
    rows: usize,
    /// The size of the rows, in bytes.
    size: usize,
}

impl<'h> Batch<'h> {
    fn new(projector: &'h ProjectorId, handlers: &'h Handlers, events: &[&Event]) -> Self {
        let tables = handlers.tables().map_or_else(Vec::new, |tables| {
            let mut executions = vec![0; tables.names.len()];
            for event in events {
                for (_, TableIndex(table)) in
                    handlers.matching(event).filter_map(Handler::coalescable_insert)
                {
                    executions[table] += 1;
                }
            }
            let state = |(count, is_refused): (usize, bool)| {
                if count >= MIN_EXECUTIONS && !is_refused {
                    TableState::Unlocked
                } else {
                    TableState::OneByOne
                }
            };
            executions.into_iter().zip(tables.refused_flags()).map(state).collect()
        });
        let pending = tables.iter().map(|_| None).collect();
        Batch { projector, handlers, packet: Packet::default(), tables, pending, size: 0 }
    }

    async fn add_all(&mut self, events: &[&Event], db: &mut MySqlConnection) -> anyhow::Result<()> {
        for event in events {
            for reset in self.handlers.reset_statements() {
                self.packet.add("the reset of the session", reset, db).await?;
            }
            let mut lookup = Lookup::new(event, &self.handlers.paths);
            for handler in self.handlers.matching(event) {
                let arguments =
                    lookup.arguments(&handler.bindings).with_context(|| handler.origin.clone())?;
                self.execute(handler, &arguments, db).await?;
            }
        }
        Ok(())
    }

    async fn execute(
        &mut self,
        handler: &'h Handler,
        arguments: &[Argument<'_>],
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let insert = handler.coalescable_insert().filter(|_| !self.tables.is_empty());
        if let Some((insert, TableIndex(table))) = insert {
            if self.tables[table] == TableState::Locked {
                self.check_locked_tables(db).await?;
            }
            if self.tables[table] == TableState::Coalescable {
                return self.buffer(handler, insert, table, arguments, db).await;
            }
            if self.tables[table] == TableState::Unlocked {
                self.tables[table] = TableState::Locked;
            }
        }
        self.flush_rows(db).await?;
        let mut statement = String::new();
        handler.write(arguments, &mut statement)?;
        self.packet.add(&handler.origin, &statement, db).await?;
        // A `call` returns several results, so its error would be attributed to another statement.
        if self.handlers.is_opaque() { self.packet.send(db).await } else { Ok(()) }
    }

    /// Checks every table that this transaction has locked since the last check.
    async fn check_locked_tables(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        // The statements that lock the tables may still wait.
        self.packet.send(db).await?;
        let tables = self.handlers.tables().context("a table was locked")?;
        let locked: Vec<usize> = (0..self.tables.len())
            .filter(|table| self.tables[*table] == TableState::Locked)
            .collect();
        let target = |table: &usize| InsertTarget {
            name: &tables.names[*table],
            ignores: tables.ignores[*table],
        };
        let targets: Vec<InsertTarget<'_>> = locked.iter().map(target).collect();
        let found = check_tables(&targets, db)
            .await
            .context("the definitions of the tables cannot be read")?;
        for (table, found) in locked.into_iter().zip(found) {
            self.tables[table] = match found {
                Ok(()) => TableState::Coalescable,
                Err(refusal) => {
                    if tables.refuse(table, refusal) {
                        info!(
                            projector = %self.projector, table = tables.names[table],
                            reason = %refusal,
                            "the table's inserts are sent one by one"
                        );
                    }
                    TableState::OneByOne
                }
            };
        }
        Ok(())
    }

    async fn buffer(
        &mut self,
        handler: &'h Handler,
        insert: &'h Insert,
        table: usize,
        arguments: &[Argument<'_>],
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let is_other = |pending: &PendingRows<'_>| !std::ptr::eq(pending.handler, handler);
        if self.pending[table].as_ref().is_some_and(is_other) {
            self.flush_table(table, db).await?;
        }
        let pending = self.pending[table].get_or_insert_with(|| {
            let mut text = String::new();
            handler.write_head(insert, &mut text);
            PendingRows { handler, insert, text, rows: 0, size: 0 }
        });
        let before = pending.text.len();
        if pending.rows > 0 {
            pending.text.push(',');
        }
        if let Err(error) = handler.write_row(insert, arguments, &mut pending.text) {
            // The rows before this one are complete, and are sent.
            pending.text.truncate(before);
            return Err(error);
        }
        pending.rows += 1;
        pending.size += pending.text.len() - before;
        let (rows, size) = (pending.rows, pending.text.len());
        self.size += size - before;
        if self.size >= MAX_PENDING_BYTES {
            return self.flush_rows(db).await;
        }
        if rows >= MAX_ROWS || size >= MAX_BYTES {
            return self.flush_table(table, db).await;
        }
        Ok(())
    }

    /// Sends all rows and statements.
    async fn flush(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.flush_rows(db).await?;
        self.packet.send(db).await
    }

    /// Adds all buffered rows to the packet.
    async fn flush_rows(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        for table in 0..self.pending.len() {
            self.flush_table(table, db).await?;
        }
        Ok(())
    }

    async fn flush_table(&mut self, table: usize, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let Some(mut pending) = self.pending[table].take() else { return Ok(()) };
        if pending.rows == 0 {
            return Ok(());
        }
        self.size -= pending.size;
        pending.handler.write_tail(pending.insert, &mut pending.text);
        self.packet.add(&pending.handler.origin, &pending.text, db).await
    }
}
