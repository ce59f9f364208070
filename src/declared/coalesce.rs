//! Sends several executions of one insert as one statement with many rows, if the effect is the
//! same.
//!
//! Rows wait in a buffer per table. A buffer is sent before any other statement, before another
//! handler inserts into the same table, before a row with other types, when it is full, and at the
//! end of the batch. The statements on one table therefore keep their order. Only inserts into
//! *different* tables change places, and these do not depend on each other:
//! [`insert`](super::insert) has checked that they read only their parameters and their own table,
//! and [`tables`](super::tables) that nothing else depends on the table.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sqlx::MySqlConnection;
use tracing::info;

use super::handler::{Argument, Handler, Handlers, Lookup};
use super::insert::Insert;
use super::literal::Literals;
use super::prepared::{ExecutionMode, TypedSql};
use super::tables::{InsertTarget, Refusal, check_tables};
use crate::database::multi_row::{MAX_BYTES, MAX_ROWS, Rows, Statement};
use crate::model::event::Event;
use crate::model::projector::ProjectorId;

/// The minimum number of executions in a batch for which a table is checked. A check costs about as
/// much as twenty executions.
const MIN_EXECUTIONS: usize = 32;

/// How long a refusal of a table is remembered. An acceptance is not remembered: the next
/// transaction has no lock on the table yet, so another session may have created a trigger.
const REFUSAL_TTL: Duration = Duration::from_secs(60);

/// The maximum size of the buffers of all tables together, in bytes.
const MAX_PENDING_BYTES: usize = 8 * MAX_BYTES;

/// The tables of a projector's coalescable inserts, and their recent refusals.
#[derive(Debug, Default)]
pub(super) struct Tables {
    names: Vec<String>,
    /// For each table, whether one of its inserts is an `insert ignore`.
    ignores: Vec<bool>,
    refused: Mutex<Vec<Option<(Instant, Refusal)>>>,
}

/// The index of a table in [`Tables`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableIndex(usize);

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

    fn refused_flags(&self) -> Vec<bool> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let is_refused = |table: usize| {
            let last = refused.get(table).and_then(Option::as_ref);
            last.is_some_and(|(at, _)| at.elapsed() < REFUSAL_TTL)
        };
        (0..self.names.len()).map(is_refused).collect()
    }

    /// Remembers a refusal. Returns whether its reason differs from that of the last refusal.
    fn refuse(&self, table: usize, refusal: Refusal) -> bool {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.resize(self.names.len(), None);
        let before = refused[table].replace((Instant::now(), refusal));
        before.is_none_or(|(_, before)| before != refusal)
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

/// Applies a batch of events, with the same effect as [`Handlers::apply`] for each.
pub(super) async fn apply(
    projector: &ProjectorId,
    handlers: &Handlers,
    events: &[&Event],
    db: &mut MySqlConnection,
) -> anyhow::Result<()> {
    let Some(mut coalescer) = Coalescer::new(projector, handlers, events) else {
        for event in events {
            handlers.apply(event, db).await?;
        }
        return Ok(());
    };
    for event in events {
        let mut lookup = Lookup::new(event, handlers);
        for handler in handlers.matching(event) {
            let arguments =
                handler.arguments(&mut lookup).with_context(|| handler.origin.clone())?;
            coalescer.execute(handler, arguments, db).await?;
        }
    }
    coalescer.flush(db).await
}

/// The buffered rows of a batch, and the state of each table.
struct Coalescer<'h> {
    projector: &'h ProjectorId,
    handlers: &'h Handlers,
    tables: Vec<TableState>,
    pending: Vec<Option<PendingRows<'h>>>,
    /// The size of all buffers, in bytes.
    size: usize,
}

/// Buffered rows of one handler.
struct PendingRows<'h> {
    handler: &'h Handler,
    insert: &'h Insert,
    rows: RowBuffer,
}

/// Buffered rows in the form in which they will be sent.
enum RowBuffer {
    /// Rows to bind, all of the same types, with the statement for one row.
    Bound(Arc<TypedSql>, Rows),
    /// Rows as literals, of any types.
    Literal(Literals),
}

impl RowBuffer {
    fn new(mode: ExecutionMode) -> Self {
        match mode {
            ExecutionMode::Prepared(text) => RowBuffer::Bound(text, Rows::default()),
            ExecutionMode::Literal => RowBuffer::Literal(Literals::default()),
        }
    }

    /// Whether a row of this form can be added.
    fn accepts(&self, mode: &ExecutionMode) -> bool {
        match (self, mode) {
            (RowBuffer::Bound(text, _), ExecutionMode::Prepared(other)) => Arc::ptr_eq(text, other),
            (RowBuffer::Literal(_), ExecutionMode::Literal) => true,
            _ => false,
        }
    }

    fn len(&self) -> usize {
        match self {
            RowBuffer::Bound(_, rows) => rows.len(),
            RowBuffer::Literal(rows) => rows.len(),
        }
    }

    /// The size of the rows, in bytes.
    fn encoded_bytes(&self) -> usize {
        match self {
            RowBuffer::Bound(_, rows) => rows.size(),
            RowBuffer::Literal(rows) => rows.encoded_bytes(),
        }
    }
}

impl<'h> Coalescer<'h> {
    /// `None` if no table is worth a check.
    fn new(projector: &'h ProjectorId, handlers: &'h Handlers, events: &[&Event]) -> Option<Self> {
        let tables = handlers.tables()?;
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
        let tables: Vec<TableState> =
            executions.into_iter().zip(tables.refused_flags()).map(state).collect();
        let pending = tables.iter().map(|_| None).collect();
        tables.contains(&TableState::Unlocked).then_some(Coalescer {
            projector,
            handlers,
            tables,
            pending,
            size: 0,
        })
    }

    async fn execute(
        &mut self,
        handler: &'h Handler,
        arguments: Vec<Argument<'_>>,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        if let Some((insert, TableIndex(table))) = handler.coalescable_insert() {
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
        self.flush(db).await?;
        handler.execute(arguments, db).await
    }

    /// Checks every table that this transaction has locked since the last check.
    async fn check_locked_tables(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
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
        arguments: Vec<Argument<'_>>,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let mode = handler.execution_mode(&arguments, true);
        let joins = |pending: &PendingRows<'_>| {
            std::ptr::eq(pending.handler, handler) && pending.rows.accepts(&mode)
        };
        if self.pending[table].as_ref().is_some_and(|pending| !joins(pending)) {
            self.send(table, db).await?;
        }
        let pending = self.pending[table].get_or_insert_with(|| PendingRows {
            handler,
            insert,
            rows: RowBuffer::new(mode),
        });
        let before = pending.rows.encoded_bytes();
        match &mut pending.rows {
            RowBuffer::Bound(_, rows) => handler.bind_to_row(arguments, rows)?,
            RowBuffer::Literal(rows) => {
                rows.add(handler.with_literals(&arguments, insert.row.clone()))
            }
        }
        let (rows, size) = (pending.rows.len(), pending.rows.encoded_bytes());
        self.size += size - before;
        if self.size >= MAX_PENDING_BYTES {
            return self.flush(db).await;
        }
        if rows >= MAX_ROWS || size >= MAX_BYTES {
            return self.send(table, db).await;
        }
        Ok(())
    }

    /// Sends all buffered rows.
    async fn flush(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        for table in 0..self.pending.len() {
            self.send(table, db).await?;
        }
        Ok(())
    }

    async fn send(&mut self, table: usize, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let Some(PendingRows { handler, insert, rows }) = self.pending[table].take() else {
            return Ok(());
        };
        self.size -= rows.encoded_bytes();
        let sent = match rows {
            RowBuffer::Bound(text, rows) => {
                let (head, row, tail) = text.split_at_row(&insert.row);
                rows.execute(Statement { head, row, tail }, db).await.map(|_| ())
            }
            RowBuffer::Literal(rows) => rows.execute(handler.split_at_row(&insert.row), db).await,
        };
        sent.with_context(|| handler.origin.clone())
    }
}
