//! One batch, one projector, one transaction.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use futures_util::FutureExt;
use sqlx::{AssertSqlSafe, MySqlConnection};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tracing::debug;

use crate::database::{Database, SESSION_SILENT_FOR, Session};
use crate::error::{database_error, is_hang_up, is_transient, server_error};
use crate::event::{Event, Position};
use crate::ledger::{self, Entry, Ledger};
use crate::lifecycle::Stage;
use crate::metrics;
use crate::registry::Registered;

/// How long a projector's row is claimed while its next batch is awaited.
pub(crate) const HELD_FOR: Duration = Duration::from_secs(2);

/// Events that move a projector from one position to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// Where the projector stands.
    pub(crate) after: Position,
    /// Where it will stand.
    pub(crate) through: Position,
    /// All events in between; those that it does not want are passed over.
    pub(crate) events: &'a [Event],
}

impl<'a> Batch<'a> {
    /// The events that a projector is to see.
    pub(crate) fn wanted(self, projector: &Registered) -> impl Iterator<Item = &'a Event> {
        self.events.iter().filter(|event| projector.wants(event))
    }
}

/// Why a batch was not applied. Nothing of it was.
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// The ledger no longer has the projector where this worker thought it was; `None`: not at all.
    Claim(Option<Entry>),
    /// The projector's own: an error, a panic, a commit of its own.
    Projector(anyhow::Error),
    /// The handler's own fault, or that of its connection: it did not end in time, perhaps because the connection was cut off
    /// without a word; or the two do not understand each other, perhaps because it binds more than its statement has room for.
    Doubtful(anyhow::Error),
    /// The moment's: a deadlock, a lock wait, a lost connection.
    Transient(anyhow::Error),
    /// The connection was lost while the handler sent something: the moment's fault too, unless it happens again and again.
    HungUp(anyhow::Error),
    /// Ours: a statement on the ledger that cannot succeed, for want of a grant perhaps.
    Ledger(sqlx::Error),
}

impl From<sqlx::Error> for ApplyError {
    /// Whatever our own statements run into is no fault of the projector's.
    fn from(error: sqlx::Error) -> Self {
        match is_transient(&error) {
            true => ApplyError::Transient(error.into()),
            false => ApplyError::Ledger(error),
        }
    }
}

/// Whether a projector's row stays claimed from batch to batch, and the claim in between: the commit of the one and the claim
/// for the next are one round trip then.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    /// Whether the next batch follows at once, so that it is worth while.
    pub(crate) goes_on: bool,
    claim: Option<Claim>,
}

/// A session whose transaction has locked a projector's row, and nothing else. Dropped, the pool rolls it back.
#[derive(Debug)]
struct Claim {
    session: Session,
    at: Position,
    since: Instant,
}

impl Hold {
    /// No claim before, and none after.
    pub(crate) fn none() -> Self {
        Hold::default()
    }

    pub(crate) fn is_claimed(&self) -> bool {
        self.claim.is_some()
    }

    /// Gives the row back to whoever waits for it.
    pub(crate) fn let_go(&mut self) {
        self.claim = None;
    }

    /// The session of a claim at this position. A claim that is old is given back: its session may have ended.
    fn take(&mut self, at: Position) -> Option<Session> {
        let claim = self.claim.take()?;
        (claim.at == at && claim.since.elapsed() < HELD_FOR).then_some(claim.session)
    }
}

/// Applies a batch: lock the ledger row, check the claim, run the handler, move the position, commit. That is two
/// round trips, and those of the handler; from a batch to the one that follows at once, one.
pub(crate) async fn apply(
    database: &Database,
    projector: &Registered,
    stage: Stage,
    batch: Batch<'_>,
    handler_timeout: Duration,
    hold: &mut Hold,
) -> Result<(), ApplyError> {
    let mut session = match hold.take(batch.after) {
        Some(claimed) => claimed,
        None => claim(database, projector, stage, batch.after, handler_timeout).await?,
    };
    let guard = Handling { database, session: session.id, is_on: false };
    let next = hold.goes_on.then_some(stage);
    match run(&mut session.connection, guard, projector, batch, handler_timeout, next).await? {
        Row::Claimed => hold.claim = Some(Claim { session, at: batch.through, since: Instant::now() }),
        Row::Free => database.keep(session),
        // The pool sees to it that what was begun is rolled back, as it does after an error.
        Row::Lost => {}
    }
    Ok(())
}

/// Opens a session with the row locked.
async fn claim(
    database: &Database,
    projector: &Registered,
    stage: Stage,
    at: Position,
    handler_timeout: Duration,
) -> Result<Session, ApplyError> {
    let mut session = database.session().await?;
    let connection = &mut session.connection;
    if handler_timeout >= SESSION_SILENT_FOR {
        let silent_for = handler_timeout + SESSION_SILENT_FOR;
        let allow = format!("set session wait_timeout = {}", silent_for.as_secs());
        database.answered(sqlx::raw_sql(AssertSqlSafe(allow)).execute(&mut **connection)).await?;
    }
    if !database.answered(ledger::begin(connection, projector, stage, at)).await? {
        database.answered(sqlx::raw_sql("rollback").execute(&mut **connection)).await?;
        return Err(ApplyError::Claim(Ledger::new(database).entry(&projector.id).await?));
    }
    Ok(session)
}

/// What a session has of its projector's row after a commit.
enum Row {
    Free,
    /// Locked again, for the next batch.
    Claimed,
    /// Somebody else was faster; the transaction has begun all the same.
    Lost,
}

/// Runs the handler in a session that has the claim, and commits; and claims the row for what comes `next`, unless the batch
/// had nothing for the projector.
async fn run(
    connection: &mut MySqlConnection,
    mut guard: Handling<'_>,
    projector: &Registered,
    batch: Batch<'_>,
    handler_timeout: Duration,
    next: Option<Stage>,
) -> Result<Row, ApplyError> {
    let (database, id, began) = (guard.database, &projector.id, Instant::now());
    let wanted: Vec<&Event> = batch.wanted(projector).collect();
    if !wanted.is_empty() {
        guard.is_on = true;
        let handling = projector.projector.handle_batch(&wanted, connection);
        let handled = match timeout(handler_timeout, AssertUnwindSafe(handling).catch_unwind()).await {
            Ok(Ok(handled)) => handled,
            Ok(Err(panic)) => {
                guard.end().await;
                return Err(ApplyError::Projector(panicked("the handler", panic.as_ref())));
            }
            Err(_) => {
                guard.end().await;
                let seconds = handler_timeout.as_secs_f32();
                return Err(ApplyError::Doubtful(anyhow!("the handler took longer than {seconds} s")));
            }
        };
        if let Err(error) = handled {
            if let Some(sqlx::Error::Protocol(_)) = database_error(&error) {
                // It may wait for an answer that nobody owes it.
                guard.end().await;
                return Err(ApplyError::Doubtful(error));
            }
            guard.is_on = false;
            if let Some(error) = database_error(&error) {
                database.distrust(error);
            }
            return Err(match database_error(&error) {
                Some(lost) if is_hang_up(lost) => ApplyError::HungUp(error),
                Some(passing) if is_transient(passing) => ApplyError::Transient(error),
                _ => ApplyError::Projector(unreadable(&wanted).unwrap_or(error)),
            });
        }
        guard.is_on = false;
        if let Some(error) = unreadable(&wanted) {
            return Err(ApplyError::Projector(error));
        }
    }
    let (from, to) = (batch.after, batch.through);
    let committed = match next.filter(|_| !wanted.is_empty()) {
        None => database.answered(ledger::commit(connection, id, from, to)).await.map(|()| Row::Free),
        Some(stage) => {
            let claimed = database.answered(ledger::commit_and_begin(connection, projector, stage, from, to)).await;
            claimed.map(|is_claimed| if is_claimed { Row::Claimed } else { Row::Lost })
        }
    };
    let row = committed.map_err(|error| match server_error(&error) {
        Some(1305) => ApplyError::Projector(anyhow!(
            "the handler committed the transaction, by itself or by a statement that does so (such as DDL): \
             what it wrote is stored, but its position is not"
        )),
        Some(1690) => ApplyError::Projector(anyhow!("the handler changed its projector's own row in the ledger")),
        _ => error.into(),
    })?;
    metrics::applied(id, wanted.len(), began.elapsed());
    Ok(row)
}

/// Of a handler that was given nothing for a field that cannot be read: what it did with that does not count.
fn unreadable(wanted: &[&Event]) -> Option<anyhow::Error> {
    let (event, error) = wanted.iter().find_map(|event| Some((event, event.spoiled()?)))?;
    Some(anyhow!("event {} cannot be read: {error}", event.position()))
}

/// While a handler runs. One that is cut off may be in the middle of a statement: its connection is of no more use then,
/// and its projector's row would stay locked until the server has finished with the statement.
struct Handling<'a> {
    database: &'a Database,
    session: u64,
    is_on: bool,
}

impl Handling<'_> {
    /// Ends the session in which a handler was cut off, and with it the lock. Where that cannot be done now, it is tried
    /// once more, as where nobody waits for it: what became of the handler is known all the same.
    async fn end(mut self) {
        match self.database.kill(self.session).await {
            Ok(()) => self.is_on = false,
            Err(error) => debug!(session = self.session, %error, "a handler's session was not ended at once"),
        }
    }
}

impl Drop for Handling<'_> {
    /// The same, where nobody waits for it: the whole work was dropped, by a shutdown or for want of time.
    fn drop(&mut self) {
        let (true, Ok(runtime)) = (self.is_on, Handle::try_current()) else { return };
        let (database, session) = (self.database.clone(), self.session);
        runtime.spawn(async move {
            if let Err(error) = database.kill(session).await {
                debug!(session, %error, "a handler's session was not ended, and ends with its statement");
            }
        });
    }
}

/// Runs a projector's setup, outside any transaction: it creates tables.
pub(crate) async fn set_up(database: &Database, projector: &Registered) -> anyhow::Result<()> {
    let set_up = async |db: &mut MySqlConnection| AssertUnwindSafe(projector.projector.setup(db)).catch_unwind().await;
    database.while_connected(set_up).await?.unwrap_or_else(|panic| Err(panicked("setup", panic.as_ref())))
}

/// Runs a projector's teardown, likewise.
pub(crate) async fn tear_down(database: &Database, projector: &Registered) -> anyhow::Result<()> {
    let tear_down =
        async |db: &mut MySqlConnection| AssertUnwindSafe(projector.projector.teardown(db)).catch_unwind().await;
    database.while_connected(tear_down).await?.unwrap_or_else(|panic| Err(panicked("teardown", panic.as_ref())))
}

fn panicked(what: &str, panic: &(dyn Any + Send)) -> anyhow::Error {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)");
    anyhow!("{what} panicked: {message}")
}
