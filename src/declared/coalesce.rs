//! Several executions of one insert as one statement, where that is the same in effect.
//!
//! Rows wait, by table, until something else is to happen: an execution that is no such insert, one on the same table by another
//! handler or with other types, too many rows, the end of the batch. So the statements on each table keep their order, and only
//! inserts into *different* tables change places, and they do not know of each other: [`insert`](super::insert) has seen to it
//! that they read nothing but their parameters and their own table, and [`tables`](super::tables) that nothing else hangs on it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sqlx::MySqlConnection;
use tracing::info;

use super::handler::{Argument, Handler, Handlers, Lookup};
use super::insert::Insert;
use super::literal::Literals;
use super::prepared::{Form, Text};
use super::tables::{Asked, Refusal, look_at};
use crate::database::multi_row::{MAX_BYTES, MAX_ROWS, Rows, Statement};
use crate::model::event::Event;
use crate::model::projector::ProjectorId;

/// The fewest executions in a batch for which a table is looked at: that costs about as much as twenty of them.
const WORTH_A_LOOK: usize = 32;

/// How long a table that was refused is not looked at again. That it was accepted is never remembered: the next transaction has
/// no lock on it yet, and somebody may have made a trigger.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// The most that waits in all tables together, in bytes.
const MAX_WAITING: usize = 8 * MAX_BYTES;

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
pub(super) struct Table(usize);

impl Tables {
    /// The table of that name, in whatever case: where the server tells two apart, they only wait for each other needlessly.
    pub(super) fn add(&mut self, insert: &Insert) -> Table {
        let known = self.names.iter().position(|other| other.eq_ignore_ascii_case(&insert.table));
        let table = known.unwrap_or_else(|| {
            self.names.push(insert.table.clone());
            self.ignores.push(false);
            self.names.len() - 1
        });
        self.ignores[table] |= insert.ignores;
        Table(table)
    }

    fn are_refused(&self) -> Vec<bool> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let is_refused = |table: usize| matches!(refused.get(table), Some(Some((at, _))) if at.elapsed() < REFUSED_FOR);
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
enum Standing {
    /// Not to be coalesced.
    Alone,
    /// Worth a look, and not touched yet: its definition may change still.
    Untouched,
    /// This transaction has written to it, so that its definition stands until the end.
    Touched,
    /// Looked at, and nothing stands against it.
    Sound,
}

/// Applies events, as [`Handlers::apply`] does it one by one.
pub(super) async fn apply(
    projector: &ProjectorId,
    handlers: &Handlers,
    events: &[&Event],
    db: &mut MySqlConnection,
) -> anyhow::Result<()> {
    let Some(mut batch) = Batch::new(projector, handlers, events) else {
        for event in events {
            handlers.apply(event, db).await?;
        }
        return Ok(());
    };
    for event in events {
        let mut lookup = Lookup::new(event, handlers);
        for handler in handlers.wanting(event) {
            let arguments = handler.arguments(&mut lookup).with_context(|| handler.origin.clone())?;
            batch.run(handler, arguments, db).await?;
        }
    }
    batch.flush(db).await
}

/// What waits to be sent, and what is known of the tables.
struct Batch<'h> {
    projector: &'h ProjectorId,
    handlers: &'h Handlers,
    tables: Vec<Standing>,
    waiting: Vec<Option<Waiting<'h>>>,
    /// In bytes.
    size: usize,
}

/// Rows of one handler.
struct Waiting<'h> {
    handler: &'h Handler,
    insert: &'h Insert,
    rows: Pending,
}

/// Rows as they will be sent.
enum Pending {
    /// Of the same types, with the statement for one row.
    Bound(Arc<Text>, Rows),
    /// Of any types.
    Literal(Literals),
}

impl Pending {
    fn new(form: Form) -> Self {
        match form {
            Form::Bound(text) => Pending::Bound(text, Rows::default()),
            Form::Literal => Pending::Literal(Literals::default()),
        }
    }

    /// Whether a row of this form can be one of these.
    fn takes(&self, form: &Form) -> bool {
        match (self, form) {
            (Pending::Bound(text, _), Form::Bound(other)) => Arc::ptr_eq(text, other),
            (Pending::Literal(_), Form::Literal) => true,
            _ => false,
        }
    }

    fn len(&self) -> usize {
        match self {
            Pending::Bound(_, rows) => rows.len(),
            Pending::Literal(rows) => rows.len(),
        }
    }

    /// In bytes.
    fn size(&self) -> usize {
        match self {
            Pending::Bound(_, rows) => rows.size(),
            Pending::Literal(rows) => rows.size(),
        }
    }
}

impl<'h> Batch<'h> {
    /// `None` where no table is worth a look.
    fn new(projector: &'h ProjectorId, handlers: &'h Handlers, events: &[&Event]) -> Option<Self> {
        let tables = handlers.tables()?;
        let mut executions = vec![0; tables.names.len()];
        for event in events {
            for (_, Table(table)) in handlers.wanting(event).filter_map(Handler::coalescable) {
                executions[table] += 1;
            }
        }
        let standing = |(count, is_refused): (usize, bool)| match count >= WORTH_A_LOOK && !is_refused {
            true => Standing::Untouched,
            false => Standing::Alone,
        };
        let tables: Vec<Standing> = executions.into_iter().zip(tables.are_refused()).map(standing).collect();
        let waiting = tables.iter().map(|_| None).collect();
        tables.contains(&Standing::Untouched).then_some(Batch { projector, handlers, tables, waiting, size: 0 })
    }

    async fn run(
        &mut self,
        handler: &'h Handler,
        arguments: Vec<Argument<'_>>,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        if let Some((insert, Table(table))) = handler.coalescable() {
            if self.tables[table] == Standing::Touched {
                self.look(db).await?;
            }
            if self.tables[table] == Standing::Sound {
                return self.wait(handler, insert, table, arguments, db).await;
            }
            if self.tables[table] == Standing::Untouched {
                self.tables[table] = Standing::Touched;
            }
        }
        self.flush(db).await?;
        handler.execute(arguments, db).await
    }

    /// Looks at every table that is worth it and has been touched since the last time.
    async fn look(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let tables = self.handlers.tables().context("a table was touched")?;
        let touched: Vec<usize> =
            (0..self.tables.len()).filter(|table| self.tables[*table] == Standing::Touched).collect();
        let asked = |table: &usize| Asked { name: &tables.names[*table], ignores: tables.ignores[*table] };
        let asked: Vec<Asked<'_>> = touched.iter().map(asked).collect();
        let found = look_at(&asked, db).await.context("the tables' definitions cannot be read")?;
        for (table, found) in touched.into_iter().zip(found) {
            self.tables[table] = match found {
                Ok(()) => Standing::Sound,
                Err(refusal) => {
                    if tables.refuse(table, refusal) {
                        info!(
                            projector = %self.projector, table = tables.names[table], reason = %refusal,
                            "the table's inserts are sent one by one"
                        );
                    }
                    Standing::Alone
                }
            };
        }
        Ok(())
    }

    async fn wait(
        &mut self,
        handler: &'h Handler,
        insert: &'h Insert,
        table: usize,
        arguments: Vec<Argument<'_>>,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let form = handler.form(&arguments, true);
        let joins = |waiting: &Waiting<'_>| std::ptr::eq(waiting.handler, handler) && waiting.rows.takes(&form);
        if self.waiting[table].as_ref().is_some_and(|waiting| !joins(waiting)) {
            self.send(table, db).await?;
        }
        let waiting = self.waiting[table].get_or_insert_with(|| Waiting { handler, insert, rows: Pending::new(form) });
        let before = waiting.rows.size();
        match &mut waiting.rows {
            Pending::Bound(_, rows) => handler.bind_to_row(arguments, rows)?,
            Pending::Literal(rows) => rows.add(handler.with_literals(&arguments, insert.row.clone())),
        }
        let (rows, size) = (waiting.rows.len(), waiting.rows.size());
        self.size += size - before;
        if self.size >= MAX_WAITING {
            return self.flush(db).await;
        }
        if rows >= MAX_ROWS || size >= MAX_BYTES {
            return self.send(table, db).await;
        }
        Ok(())
    }

    /// Sends all that waits.
    async fn flush(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        for table in 0..self.waiting.len() {
            self.send(table, db).await?;
        }
        Ok(())
    }

    async fn send(&mut self, table: usize, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let Some(Waiting { handler, insert, rows }) = self.waiting[table].take() else { return Ok(()) };
        self.size -= rows.size();
        let sent = match rows {
            Pending::Bound(text, rows) => {
                let (head, row, tail) = text.around(&insert.row);
                rows.send(Statement { head, row, tail }, db).await.map(|_| ())
            }
            Pending::Literal(rows) => rows.send(handler.around(&insert.row), db).await,
        };
        sent.with_context(|| handler.origin.clone())
    }
}
