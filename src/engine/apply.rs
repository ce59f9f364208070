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

use crate::database::{Database, Ended, HandlerSession, SESSION_SILENT_FOR, SessionId};
use crate::ledger::{Claim, Entry, Ledger, Moved};
use crate::model::error::{database_error, is_hang_up, is_time_out, is_transient, server_error, tell};
use crate::model::event::{Event, Position};
use crate::model::lifecycle::Stage;
use crate::model::metrics;
use crate::model::projector::SessionUse;
use crate::model::registry::Registered;

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

/// Why a batch was not applied. Nothing of it is stored, but for [`ApplyError::Stored`].
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// The ledger no longer has the projector where this worker thought it was; `None`: not at all.
    Claim(Option<Box<Entry>>),
    /// The projector's own: an error, a panic, a session that it has changed.
    Projector(anyhow::Error),
    /// The transaction was rolled back while the handler had it, and the handler went on: it does not pass on errors, or it
    /// rolls back by itself. The moment's fault, unless it happens again and again.
    RolledBack(anyhow::Error),
    /// The handler committed a part of the batch, by itself or by a statement that does so. The batch must not be applied
    /// again, not even in part.
    Stored(anyhow::Error),
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
    claim: Option<Claimed>,
}

/// A session whose transaction has locked a projector's row, and nothing else. Dropped, the pool rolls it back.
#[derive(Debug)]
struct Claimed {
    session: HandlerSession,
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
    fn take(&mut self, at: Position) -> Option<HandlerSession> {
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
    let next = hold.goes_on && projector.session != SessionUse::EachEvent;
    match run(database, &mut session, projector, stage, batch, handler_timeout, next).await? {
        Moved::Claimed => hold.claim = Some(Claimed { session, at: batch.through, since: Instant::now() }),
        Moved::Free => database.keep_handler_session(session),
        // Dropped, the session is closed, and what was begun in it is rolled back, as after an error.
        Moved::Lost => {}
        Moved::No => {
            return Err(ApplyError::Stored(anyhow!(
                "the handler's writes are stored without its position: it deleted its projector's row in the ledger, or hid \
                 the ledger behind a temporary table. The batch cannot be applied again: rebuild the read model"
            )));
        }
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
) -> Result<HandlerSession, ApplyError> {
    let mut session = database.handler_session(&projector.id, projector.session).await?;
    if handler_timeout >= SESSION_SILENT_FOR {
        let silent_for = handler_timeout + SESSION_SILENT_FOR;
        let allow = format!("set session wait_timeout = {}", silent_for.as_secs());
        session.has_set();
        database.answered(sqlx::raw_sql(AssertSqlSafe(allow)).execute(&mut *session.connection)).await?;
    }
    let unchanged = database.session_is_unchanged();
    let row = Claim { projector, stage, savepoint: &session.savepoint, unchanged: &unchanged };
    if !database.answered(row.begin(&mut session.connection, at)).await? {
        database.answered(sqlx::raw_sql("rollback").execute(&mut *session.connection)).await?;
        database.keep_handler_session(session);
        let entry = Ledger::new(database).entry(&projector.id).await?;
        return Err(ApplyError::Claim(entry.map(Box::new)));
    }
    Ok(session)
}

/// Runs the handler in a session that has the claim, and commits; and, if `next`, claims the row for what comes next, unless
/// the batch had nothing for the projector.
async fn run(
    database: &Database,
    session: &mut HandlerSession,
    projector: &Registered,
    stage: Stage,
    batch: Batch<'_>,
    handler_timeout: Duration,
    next: bool,
) -> Result<Moved, ApplyError> {
    let began = Instant::now();
    let wanted: Vec<&Event> = batch.wanted(projector).collect();
    if !wanted.is_empty() {
        handle(database, session, projector, &wanted, handler_timeout).await?;
    }
    let (from, to) = (batch.after, batch.through);
    let unchanged = database.session_is_unchanged();
    let savepoint = session.savepoint.clone();
    let row = Claim { projector, stage, savepoint: &savepoint, unchanged: &unchanged };
    let moving = async {
        match next && !wanted.is_empty() {
            true => row.commit_and_begin(&mut session.connection, from, to).await,
            false => row.commit(&mut session.connection, from, to).await,
        }
    };
    let moved = match database.answered(moving).await {
        Ok(moved) => moved,
        Err(error) => return Err(Box::pin(not_committed(database, session, error)).await),
    };
    session.committed();
    metrics::applied(&projector.id, wanted.len(), began.elapsed());
    Ok(moved)
}

/// Runs the handler. After an error its transaction is rolled back, or the error says what is stored of it.
async fn handle(
    database: &Database,
    session: &mut HandlerSession,
    projector: &Registered,
    wanted: &[&Event],
    handler_timeout: Duration,
) -> Result<(), ApplyError> {
    let mut guard = Handling { database, session: session.id.clone(), is_on: true };
    let handling = projector.projector.handle_batch(wanted, &mut session.connection);
    let handled = timeout(handler_timeout, AssertUnwindSafe(handling).catch_unwind()).await;
    let is_cut_off = !matches!(handled, Ok(Ok(_)));
    let failed = match handled {
        Ok(Ok(Ok(()))) => unreadable(wanted).map(ApplyError::Projector),
        Ok(Ok(Err(error))) => Some(failure(database, wanted, error)),
        Ok(Err(panic)) => Some(ApplyError::Projector(panicked("the handler", panic.as_ref()))),
        Err(_) => {
            let seconds = handler_timeout.as_secs_f32();
            Some(ApplyError::Doubtful(anyhow!("the handler took longer than {seconds} s")))
        }
    };
    let Some(failed) = failed else {
        guard.is_on = false;
        return Ok(());
    };
    // It may be in the middle of a statement, which must end before the session can say anything.
    let stopped = match is_cut_off {
        true => database.stop_statement(&session.id).await,
        false => Ok(()),
    };
    let ended = match stopped {
        Ok(()) => database.roll_back(session).await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(ended) => {
            guard.is_on = false;
            Err(with_what_is_stored(ended, failed))
        }
        // Its connection is of no use any more. What it committed before, the mark in its row tells. A session that does
        // not answer may hold its locks still; one that is lost does not.
        Err(error) => {
            match is_cut_off || is_time_out(&error) {
                true => guard.end().await,
                false => guard.is_on = false,
            }
            Err(failed)
        }
    }
}

/// What a handler's error says: whose fault it is.
fn failure(database: &Database, wanted: &[&Event], error: anyhow::Error) -> ApplyError {
    if let Some(error) = database_error(&error) {
        database.distrust(error);
    }
    match database_error(&error) {
        // The driver waits for an answer that nobody owes it.
        Some(sqlx::Error::Protocol(_)) => ApplyError::Doubtful(error),
        Some(lost) if is_hang_up(lost) => ApplyError::HungUp(error),
        Some(passing) if is_transient(passing) => ApplyError::Transient(error),
        _ => ApplyError::Projector(unreadable(wanted).unwrap_or(error)),
    }
}

/// An error of a handler, with what became of its transaction.
fn with_what_is_stored(ended: Ended, error: ApplyError) -> ApplyError {
    match (ended, error) {
        (Ended::Stored(by), error) => ApplyError::Stored(stored(&by, error.cause())),
        (Ended::RolledBack, ApplyError::Projector(error)) => ApplyError::RolledBack(error),
        (_, error) => error,
    }
}

/// Why a commit of ours failed. Nothing of the batch is stored, or it says so.
async fn not_committed(database: &Database, session: &mut HandlerSession, error: sqlx::Error) -> ApplyError {
    let Some(number) = server_error(&error) else { return error.into() };
    if number == 1305 {
        return match database.how_it_ended(session).await {
            Ok(Ended::Stored(by)) => ApplyError::Stored(stored(&by, None)),
            Ok(Ended::Whole | Ended::RolledBack) => ApplyError::RolledBack(anyhow!(
                "the transaction was rolled back while the handler had it: by a deadlock or a lock wait whose error the handler \
                 did not pass on, or by the handler itself"
            )),
            Err(lost) => lost.into(),
        };
    }
    if is_transient(&error) {
        return error.into();
    }
    match database.changed_settings(session).await {
        Ok(Some(changed)) => ApplyError::Projector(anyhow!(
            "the handler has changed its session and not changed it back: {changed}. What it applies next would mean \
             something else; set the value back before the handler ends, or do without it"
        )),
        Ok(None) if number == 1690 => {
            ApplyError::Projector(anyhow!("the handler changed its projector's own row in the ledger"))
        }
        Ok(None) => error.into(),
        Err(lost) => lost.into(),
    }
}

fn stored(by: &str, error: Option<&anyhow::Error>) -> anyhow::Error {
    let error = error.map(|error| format!("; then it failed: {}", tell(error))).unwrap_or_default();
    anyhow!(
        "the handler committed the transaction, by itself or by a statement that does so (counted: {by}). A part of this \
         batch is stored without its position, so that it cannot be applied again: rebuild the read model{error}"
    )
}

impl ApplyError {
    /// What the handler returned, if it did.
    fn cause(&self) -> Option<&anyhow::Error> {
        match self {
            ApplyError::Projector(error)
            | ApplyError::RolledBack(error)
            | ApplyError::Stored(error)
            | ApplyError::Doubtful(error)
            | ApplyError::Transient(error)
            | ApplyError::HungUp(error) => Some(error),
            ApplyError::Claim(_) | ApplyError::Ledger(_) => None,
        }
    }
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
    session: SessionId,
    is_on: bool,
}

impl Handling<'_> {
    /// Ends the session in which a handler was cut off, and with it the lock. Where that cannot be done now, it is tried
    /// once more, as where nobody waits for it: what became of the handler is known all the same.
    async fn end(mut self) {
        match self.database.kill(&self.session).await {
            Ok(()) => self.is_on = false,
            Err(error) => debug!(session = self.session.number(), %error, "a handler's session was not ended at once"),
        }
    }
}

impl Drop for Handling<'_> {
    /// The same, where nobody waits for it: the whole work was dropped, by a shutdown or for want of time.
    fn drop(&mut self) {
        let (true, Ok(runtime)) = (self.is_on, Handle::try_current()) else { return };
        let (database, session) = (self.database.clone(), self.session.clone());
        runtime.spawn(async move {
            if let Err(error) = database.kill(&session).await {
                debug!(session = session.number(), %error, "a handler's session was not ended, and ends with its statement");
            }
        });
    }
}

/// Runs a projector's setup, outside any transaction: it creates tables.
pub(crate) async fn set_up(database: &Database, projector: &Registered) -> anyhow::Result<()> {
    let set_up = async |db: &mut MySqlConnection| AssertUnwindSafe(projector.projector.setup(db)).catch_unwind().await;
    database.for_setup(set_up).await?.unwrap_or_else(|panic| Err(panicked("setup", panic.as_ref())))
}

/// Runs a projector's teardown, likewise.
pub(crate) async fn tear_down(database: &Database, projector: &Registered) -> anyhow::Result<()> {
    let tear_down =
        async |db: &mut MySqlConnection| AssertUnwindSafe(projector.projector.teardown(db)).catch_unwind().await;
    database.for_setup(tear_down).await?.unwrap_or_else(|panic| Err(panicked("teardown", panic.as_ref())))
}

fn panicked(what: &str, panic: &(dyn Any + Send)) -> anyhow::Error {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)");
    anyhow!("{what} panicked: {message}")
}
