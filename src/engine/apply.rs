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

use crate::database::{
    Database, HandlerSession, SERVER_WAIT_TIMEOUT, SessionId, TransactionOutcome,
};
use crate::ledger::{Claim, CommitOutcome, Entry, Ledger};
use crate::model::error::{
    database_error, format_chain, is_connection_reset, is_timeout, is_transient,
    server_error_number,
};
use crate::model::event::{Event, Position};
use crate::model::lifecycle::Stage;
use crate::model::metrics;
use crate::model::projector::SessionUse;
use crate::model::registry::RegisteredProjector;

/// How long a projector's row is claimed while its next batch is awaited.
pub(crate) const CLAIM_CARRY_TIMEOUT: Duration = Duration::from_secs(2);

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
    pub(crate) fn wanted(self, projector: &RegisteredProjector) -> impl Iterator<Item = &'a Event> {
        self.events.iter().filter(|event| projector.subscribes_to(event))
    }
}

/// Why a batch was not applied. Nothing of it is stored, but for [`ApplyError::PartiallyApplied`].
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// The ledger no longer has the projector where this worker thought it was; `None`: not at all.
    ClaimLost(Option<Box<Entry>>),
    /// The projector's own: an error, a panic, a session that it has changed.
    Projector(anyhow::Error),
    /// The transaction was rolled back while the handler had it, and the handler went on: it does
    /// not pass on errors, or it rolls back by itself. The moment's fault, unless it happens again
    /// and again.
    RolledBack(anyhow::Error),
    /// The handler committed a part of the batch, by itself or by a statement that does so. The
    /// batch must not be applied again, not even in part.
    PartiallyApplied(anyhow::Error),
    /// The handler's own fault, or that of its connection: it did not end in time, perhaps because
    /// the connection was cut off without a word; or the two do not understand each other, perhaps
    /// because it binds more than its statement has room for.
    Ambiguous(anyhow::Error),
    /// The moment's: a deadlock, a lock wait, a lost connection.
    Transient(anyhow::Error),
    /// The connection was lost while the handler sent something: the moment's fault too, unless it
    /// happens again and again.
    ConnectionClosed(anyhow::Error),
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

/// Whether a projector's row stays claimed from batch to batch, and the claim in between: the
/// commit of the one and the claim for the next are one round trip then.
#[derive(Debug, Default)]
pub(crate) struct ClaimCarry {
    /// Whether the next batch follows at once, so that it is worth while.
    pub(crate) should_carry: bool,
    claim: Option<CarriedClaim>,
}

/// A session whose transaction has locked a projector's row, and nothing else. Dropped, the pool
/// rolls it back.
#[derive(Debug)]
struct CarriedClaim {
    session: HandlerSession,
    position: Position,
    since: Instant,
}

impl ClaimCarry {
    /// No claim before, and none after.
    pub(crate) fn none() -> Self {
        ClaimCarry::default()
    }

    pub(crate) fn has_claim(&self) -> bool {
        self.claim.is_some()
    }

    /// Gives the row back to whoever waits for it.
    pub(crate) fn release(&mut self) {
        self.claim = None;
    }

    /// The session of a claim at this position. A claim that is old is given back: its session may
    /// have ended.
    fn take(&mut self, at: Position) -> Option<HandlerSession> {
        let claim = self.claim.take()?;
        (claim.position == at && claim.since.elapsed() < CLAIM_CARRY_TIMEOUT)
            .then_some(claim.session)
    }
}

/// Applies a batch: lock the ledger row, check the claim, run the handler, move the position,
/// commit. That is two round trips, and those of the handler; from a batch to the one that follows
/// at once, one.
pub(crate) async fn apply(
    database: &Database,
    projector: &RegisteredProjector,
    stage: Stage,
    batch: Batch<'_>,
    handler_timeout: Duration,
    carry: &mut ClaimCarry,
) -> Result<(), ApplyError> {
    let mut session = match carry.take(batch.after) {
        Some(claimed) => claimed,
        None => claim_row(database, projector, stage, batch.after, handler_timeout).await?,
    };
    let should_carry = carry.should_carry && projector.session != SessionUse::PerEvent;
    match run_and_commit(
        database,
        &mut session,
        projector,
        stage,
        batch,
        handler_timeout,
        should_carry,
    )
    .await?
    {
        CommitOutcome::Claimed => {
            carry.claim =
                Some(CarriedClaim { session, position: batch.through, since: Instant::now() })
        }
        CommitOutcome::Released => database.release_handler_session(session),
        // Dropped, the session is closed, and what was begun in it is rolled back, as after an
        // error.
        CommitOutcome::ClaimLost => {}
        CommitOutcome::NotMoved => {
            return Err(ApplyError::PartiallyApplied(anyhow!(
                "the handler's writes are stored without its position: it deleted its projector's row in the ledger, or hid \
                 the ledger behind a temporary table. The batch cannot be applied again: rebuild the read model"
            )));
        }
    }
    Ok(())
}

/// Opens a session with the row locked.
async fn claim_row(
    database: &Database,
    projector: &RegisteredProjector,
    stage: Stage,
    at: Position,
    handler_timeout: Duration,
) -> Result<HandlerSession, ApplyError> {
    let mut session = database.acquire_handler_session(&projector.id, projector.session).await?;
    if handler_timeout >= SERVER_WAIT_TIMEOUT {
        let silent_for = handler_timeout + SERVER_WAIT_TIMEOUT;
        let allow = format!("set session wait_timeout = {}", silent_for.as_secs());
        session.record_set();
        database
            .with_timeout(sqlx::raw_sql(AssertSqlSafe(allow)).execute(&mut *session.connection))
            .await?;
    }
    let unchanged = database.session_unchanged_condition();
    let row =
        Claim { projector, stage, savepoint: &session.savepoint, unchanged_condition: &unchanged };
    if !database.with_timeout(row.begin(&mut session.connection, at)).await? {
        database.with_timeout(sqlx::raw_sql("rollback").execute(&mut *session.connection)).await?;
        database.release_handler_session(session);
        let entry = Ledger::new(database).entry(&projector.id).await?;
        return Err(ApplyError::ClaimLost(entry.map(Box::new)));
    }
    Ok(session)
}

/// Runs the handler in a session that has the claim, and commits; and, if `should_carry`, claims
/// the row for what comes next, unless the batch had nothing for the projector.
async fn run_and_commit(
    database: &Database,
    session: &mut HandlerSession,
    projector: &RegisteredProjector,
    stage: Stage,
    batch: Batch<'_>,
    handler_timeout: Duration,
    should_carry: bool,
) -> Result<CommitOutcome, ApplyError> {
    let began = Instant::now();
    let wanted: Vec<&Event> = batch.wanted(projector).collect();
    if !wanted.is_empty() {
        run_handler(database, session, projector, &wanted, handler_timeout).await?;
    }
    let (from, to) = (batch.after, batch.through);
    let unchanged = database.session_unchanged_condition();
    let savepoint = session.savepoint.clone();
    let row = Claim { projector, stage, savepoint: &savepoint, unchanged_condition: &unchanged };
    let moving = async {
        match should_carry && !wanted.is_empty() {
            true => row.commit_and_begin(&mut session.connection, from, to).await,
            false => row.commit(&mut session.connection, from, to).await,
        }
    };
    let moved = match database.with_timeout(moving).await {
        Ok(moved) => moved,
        Err(error) => return Err(Box::pin(classify_commit_error(database, session, error)).await),
    };
    session.record_commit();
    metrics::record_applied(&projector.id, wanted.len(), began.elapsed());
    Ok(moved)
}

/// Runs the handler. After an error its transaction is rolled back, or the error says what is
/// stored of it.
async fn run_handler(
    database: &Database,
    session: &mut HandlerSession,
    projector: &RegisteredProjector,
    wanted: &[&Event],
    handler_timeout: Duration,
) -> Result<(), ApplyError> {
    let mut guard = RunningHandler { database, session: session.id.clone(), is_armed: true };
    let handling = projector.projector.handle_batch(wanted, &mut session.connection);
    let handled = timeout(handler_timeout, AssertUnwindSafe(handling).catch_unwind()).await;
    let was_interrupted = !matches!(handled, Ok(Ok(_)));
    let failed = match handled {
        Ok(Ok(Ok(()))) => first_decode_error(wanted).map(ApplyError::Projector),
        Ok(Ok(Err(error))) => Some(classify_handler_error(database, wanted, error)),
        Ok(Err(panic)) => Some(ApplyError::Projector(panic_error("the handler", panic.as_ref()))),
        Err(_) => {
            let seconds = handler_timeout.as_secs_f32();
            Some(ApplyError::Ambiguous(anyhow!("the handler took longer than {seconds} s")))
        }
    };
    let Some(failed) = failed else {
        guard.is_armed = false;
        return Ok(());
    };
    // It may be in the middle of a statement, which must end before the session can say anything.
    let stopped = match was_interrupted {
        true => database.kill_query(&session.id).await,
        false => Ok(()),
    };
    let ended = match stopped {
        Ok(()) => database.roll_back(session).await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(ended) => {
            guard.is_armed = false;
            Err(with_transaction_outcome(ended, failed))
        }
        // Its connection is of no use any more. What it committed before, the mark in its row
        // tells. A session that does not answer may hold its locks still; one that is lost does
        // not.
        Err(error) => {
            match was_interrupted || is_timeout(&error) {
                true => guard.kill_session().await,
                false => guard.is_armed = false,
            }
            Err(failed)
        }
    }
}

/// What a handler's error says: whose fault it is.
fn classify_handler_error(
    database: &Database,
    wanted: &[&Event],
    error: anyhow::Error,
) -> ApplyError {
    if let Some(error) = database_error(&error) {
        database.discard_if_read_only(error);
    }
    match database_error(&error) {
        // The driver waits for an answer that nobody owes it.
        Some(sqlx::Error::Protocol(_)) => ApplyError::Ambiguous(error),
        Some(lost) if is_connection_reset(lost) => ApplyError::ConnectionClosed(error),
        Some(passing) if is_transient(passing) => ApplyError::Transient(error),
        _ => ApplyError::Projector(first_decode_error(wanted).unwrap_or(error)),
    }
}

/// An error of a handler, with what became of its transaction.
fn with_transaction_outcome(ended: TransactionOutcome, error: ApplyError) -> ApplyError {
    match (ended, error) {
        (TransactionOutcome::Committed(by), error) => {
            ApplyError::PartiallyApplied(partially_applied(&by, error.handler_error()))
        }
        (TransactionOutcome::RolledBack, ApplyError::Projector(error)) => {
            ApplyError::RolledBack(error)
        }
        (_, error) => error,
    }
}

/// Why a commit of ours failed. Nothing of the batch is stored, or it says so.
async fn classify_commit_error(
    database: &Database,
    session: &mut HandlerSession,
    error: sqlx::Error,
) -> ApplyError {
    let Some(number) = server_error_number(&error) else { return error.into() };
    if number == 1305 {
        return match database.determine_outcome(session).await {
            Ok(TransactionOutcome::Committed(by)) => {
                ApplyError::PartiallyApplied(partially_applied(&by, None))
            }
            Ok(TransactionOutcome::StillOpen | TransactionOutcome::RolledBack) => {
                ApplyError::RolledBack(anyhow!(
                    "the transaction was rolled back while the handler had it: by a deadlock or a lock wait whose error the handler \
                 did not pass on, or by the handler itself"
                ))
            }
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
        Ok(None) if number == 1690 => ApplyError::Projector(anyhow!(
            "the handler changed its projector's own row in the ledger"
        )),
        Ok(None) => error.into(),
        Err(lost) => lost.into(),
    }
}

fn partially_applied(by: &str, error: Option<&anyhow::Error>) -> anyhow::Error {
    let error =
        error.map(|error| format!("; then it failed: {}", format_chain(error))).unwrap_or_default();
    anyhow!(
        "the handler committed the transaction, by itself or by a statement that does so (counted: {by}). A part of this \
         batch is stored without its position, so that it cannot be applied again: rebuild the read model{error}"
    )
}

impl ApplyError {
    /// What the handler returned, if it did.
    fn handler_error(&self) -> Option<&anyhow::Error> {
        match self {
            ApplyError::Projector(error)
            | ApplyError::RolledBack(error)
            | ApplyError::PartiallyApplied(error)
            | ApplyError::Ambiguous(error)
            | ApplyError::Transient(error)
            | ApplyError::ConnectionClosed(error) => Some(error),
            ApplyError::ClaimLost(_) | ApplyError::Ledger(_) => None,
        }
    }
}

/// Of a handler that was given nothing for a field that cannot be read: what it did with that does
/// not count.
fn first_decode_error(wanted: &[&Event]) -> Option<anyhow::Error> {
    let (event, error) = wanted.iter().find_map(|event| Some((event, event.decode_error()?)))?;
    Some(anyhow!("event {} cannot be read: {error}", event.position()))
}

/// While a handler runs. One that is cut off may be in the middle of a statement: its connection is
/// of no more use then, and its projector's row would stay locked until the server has finished
/// with the statement.
struct RunningHandler<'a> {
    database: &'a Database,
    session: SessionId,
    is_armed: bool,
}

impl RunningHandler<'_> {
    /// Ends the session in which a handler was cut off, and with it the lock. Where that cannot be
    /// done now, it is tried once more, as where nobody waits for it: what became of the handler is
    /// known all the same.
    async fn kill_session(mut self) {
        match self.database.kill_session(&self.session).await {
            Ok(()) => self.is_armed = false,
            Err(error) => {
                debug!(session = self.session.connection_id(), %error, "a handler's session was not ended at once")
            }
        }
    }
}

impl Drop for RunningHandler<'_> {
    /// The same, where nobody waits for it: the whole work was dropped, by a shutdown or for want
    /// of time.
    fn drop(&mut self) {
        let (true, Ok(runtime)) = (self.is_armed, Handle::try_current()) else { return };
        let (database, session) = (self.database.clone(), self.session.clone());
        runtime.spawn(async move {
            if let Err(error) = database.kill_session(&session).await {
                debug!(session = session.connection_id(), %error, "a handler's session was not ended, and ends with its statement");
            }
        });
    }
}

/// Runs a projector's setup, outside any transaction: it creates tables.
pub(crate) async fn set_up(
    database: &Database,
    projector: &RegisteredProjector,
) -> anyhow::Result<()> {
    let set_up = async |db: &mut MySqlConnection| {
        AssertUnwindSafe(projector.projector.setup(db)).catch_unwind().await
    };
    database
        .run_in_setup_session(set_up)
        .await?
        .unwrap_or_else(|panic| Err(panic_error("setup", panic.as_ref())))
}

/// Runs a projector's teardown, likewise.
pub(crate) async fn tear_down(
    database: &Database,
    projector: &RegisteredProjector,
) -> anyhow::Result<()> {
    let tear_down = async |db: &mut MySqlConnection| {
        AssertUnwindSafe(projector.projector.teardown(db)).catch_unwind().await
    };
    database
        .run_in_setup_session(tear_down)
        .await?
        .unwrap_or_else(|panic| Err(panic_error("teardown", panic.as_ref())))
}

fn panic_error(what: &str, panic: &(dyn Any + Send)) -> anyhow::Error {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)");
    anyhow!("{what} panicked: {message}")
}
