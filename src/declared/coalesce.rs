//! Several executions of one insert as one statement, where that is the same in effect.
//!
//! Rows wait, by table, until something else is to happen: an execution that is no such insert, one
//! on the same table by another handler or with other types, too many rows, the end of the batch.
//! So the statements on each table keep their order, and only inserts into *different* tables
//! change places, and they do not know of each other: [`insert`](super::insert) has seen to it that
//! they read nothing but their parameters and their own table, and [`tables`](super::tables) that
//! nothing else hangs on it.

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

/// The fewest executions in a batch for which a table is looked at: that costs about as much as
/// twenty of them.
const MIN_EXECUTIONS: usize = 32;

/// How long a table that was refused is not looked at again. That it was accepted is never
/// remembered: the next transaction has no lock on it yet, and somebody may have made a trigger.
const REFUSAL_TTL: Duration = Duration::from_secs(60);

/// The most that waits in all tables together, in bytes.
const MAX_PENDING_BYTES: usize = 8 * MAX_BYTES;

/// The tables that a projector's coalescable inserts go to, and which of them were refused lately.
#[derive(Debug, Default)]
pub(super) struct Tables {
    names: Vec<String>,
    /// Of each, whether an `insert ignore` goes to it.
    ignores: Vec<bool>,
    refused: Mutex<Vec<Option<(Instant, Refusal)>>>,
}

/// One of [`Tables`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableIndex(usize);

impl Tables {
    /// The table of that name, in whatever case: where the server tells two apart, they only wait
    /// for each other needlessly.
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
        let is_refused = |table: usize| matches!(refused.get(table), Some(Some((at, _))) if at.elapsed() < REFUSAL_TTL);
        (0..self.names.len()).map(is_refused).collect()
    }

    /// Whether it is for another reason than the last time.
    fn refuse(&self, table: usize, refusal: Refusal) -> bool {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.resize(self.names.len(), None);
        let before = refused[table].replace((Instant::now(), refusal));
        before.is_none_or(|(_, before)| before != refusal)
    }
}

/// What is known of a table in this transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TableState {
    /// Not to be coalesced.
    OneByOne,
    /// Worth a look, and not touched yet: its definition may change still.
    Unlocked,
    /// This transaction has written to it, so that its definition stands until the end.
    Locked,
    /// Looked at, and nothing stands against it.
    Coalescable,
}

/// Applies events, as [`Handlers::apply`] does it one by one.
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

/// What waits to be sent, and what is known of the tables.
struct Coalescer<'h> {
    projector: &'h ProjectorId,
    handlers: &'h Handlers,
    tables: Vec<TableState>,
    pending: Vec<Option<PendingRows<'h>>>,
    /// In bytes.
    size: usize,
}

/// Rows of one handler.
struct PendingRows<'h> {
    handler: &'h Handler,
    insert: &'h Insert,
    rows: RowBuffer,
}

/// Rows as they will be sent.
enum RowBuffer {
    /// Of the same types, with the statement for one row.
    Bound(Arc<TypedSql>, Rows),
    /// Of any types.
    Literal(Literals),
}

impl RowBuffer {
    fn new(mode: ExecutionMode) -> Self {
        match mode {
            ExecutionMode::Prepared(text) => RowBuffer::Bound(text, Rows::default()),
            ExecutionMode::Literal => RowBuffer::Literal(Literals::default()),
        }
    }

    /// Whether a row of this form can be one of these.
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

    /// In bytes.
    fn encoded_bytes(&self) -> usize {
        match self {
            RowBuffer::Bound(_, rows) => rows.size(),
            RowBuffer::Literal(rows) => rows.encoded_bytes(),
        }
    }
}

impl<'h> Coalescer<'h> {
    /// `None` where no table is worth a look.
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
        let state =
            |(count, is_refused): (usize, bool)| match count >= MIN_EXECUTIONS && !is_refused {
                true => TableState::Unlocked,
                false => TableState::OneByOne,
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

    /// Looks at every table that is worth it and has been touched since the last time.
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
        let found =
            check_tables(&targets, db).await.context("the tables' definitions cannot be read")?;
        for (table, found) in locked.into_iter().zip(found) {
            self.tables[table] = match found {
                Ok(()) => TableState::Coalescable,
                Err(refusal) => {
                    if tables.refuse(table, refusal) {
                        info!(
                            projector = %self.projector, table = tables.names[table], reason = %refusal,
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

    /// Sends all that waits.
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
