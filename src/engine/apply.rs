//! Applies one batch to one projector in one transaction.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use futures_util::FutureExt;
use sqlx::{AssertSqlSafe, MySqlConnection};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tracing::debug;

use crate::database::error::{
    database_error, format_chain, is_connection_lost, is_denied, is_timeout, is_transient,
    server_error_number,
};
use crate::database::{
    Database, HandlerSession, SERVER_WAIT_TIMEOUT, SessionId, TransactionOutcome,
};
use crate::engine::fenced;
use crate::ledger::{Claim, CommitOutcome, Entry, Ledger};
use crate::model::event::{Event, Position};
use crate::model::lifecycle::Stage;
use crate::model::metrics;
use crate::model::projector::SessionUse;
use crate::model::registry::RegisteredProjector;
use crate::model::retry_later::RetryLater;
use crate::model::running_statement::RunningStatement;

/// How long a projector's row stays claimed while its next batch is being read.
pub(crate) const CLAIM_CARRY_TIMEOUT: Duration = Duration::from_secs(2);

/// The events that move a projector from one position to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// The projector's position before the batch.
    pub(crate) after: Position,
    /// The projector's position after the batch.
    pub(crate) through: Position,
    /// All events between the two positions, including those that the projector does not subscribe
    /// to.
    pub(crate) events: &'a [Event],
}

impl<'a> Batch<'a> {
    /// The events of the batch that the projector subscribes to.
    pub(crate) fn wanted(self, projector: &RegisteredProjector) -> impl Iterator<Item = &'a Event> {
        self.events.iter().filter(|event| projector.subscribes_to(event))
    }

    /// The part of the batch between `position` and `end`. `None` if it is empty, or if `position`
    /// is before the batch.
    pub(crate) fn between(self, position: Position, end: Position) -> Option<Self> {
        self.above(position).map(|rest| rest.up_to(end)).filter(|part| part.after < part.through)
    }

    /// The part of the batch that lies above `position`. `None` if `position` is before the batch.
    pub(crate) fn above(self, position: Position) -> Option<Self> {
        if position < self.after {
            return None;
        }
        let known = self.events.partition_point(|event| event.position() <= position);
        Some(Batch { after: position, events: &self.events[known..], ..self })
    }

    /// The part of the batch up to and including `position`.
    pub(crate) fn up_to(self, position: Position) -> Self {
        let through = self.through.min(position).max(self.after);
        let within = self.events.partition_point(|event| event.position() <= through);
        Batch { through, events: &self.events[..within], ..self }
    }
}

/// Why a batch was not applied. Except for [`ApplyError::PartiallyApplied`], nothing was committed.
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// The projector's ledger row no longer satisfies the claim, for instance because another
    /// worker has moved its position. `None`: the row is gone.
    ClaimLost(Option<Box<Entry>>),
    /// The projector's own error: its handler failed, panicked, or changed its session.
    Projector(anyhow::Error),
    /// The transaction was rolled back while the handler ran, and the handler continued. Either the
    /// handler ignored a database error, or it rolled back itself. The error is treated as
    /// transient unless it recurs.
    RolledBack(anyhow::Error),
    /// The handler committed a part of the batch, explicitly or with a statement that commits
    /// implicitly. The batch must not be applied again, not even partly.
    PartiallyApplied(anyhow::Error),
    /// Either the handler or its connection is at fault. The handler may have timed out because the
    /// connection was cut silently. Or driver and server are out of step, for instance because the
    /// handler binds more parameters than its statement has placeholders.
    Ambiguous(anyhow::Error),
    /// A transient error of one of the engine's own statements, or a connection that does not
    /// answer.
    Transient(anyhow::Error),
    /// A transient error with which the server refused a statement of the handler: a deadlock, a
    /// lock wait timeout, a full table.
    HandlerTransient(anyhow::Error),
    /// The handler asked for a retry with a [`RetryLater`], after this delay if it named one.
    RetryLater(anyhow::Error, Option<Duration>),
    /// The connection was lost while the handler had it, or at the commit. The error is treated as
    /// transient unless it recurs.
    ConnectionClosed(anyhow::Error),
    /// The account lacks a privilege for a statement of the handler, or it cannot log in. The error
    /// persists until a person has changed that.
    Denied(anyhow::Error),
    /// A statement on the ledger failed permanently, for instance because a privilege is missing.
    Ledger(sqlx::Error),
}

impl ApplyError {
    /// The handler's error, if it returned one.
    fn handler_error(&self) -> Option<&anyhow::Error> {
        match self {
            ApplyError::Projector(error)
            | ApplyError::RolledBack(error)
            | ApplyError::PartiallyApplied(error)
            | ApplyError::Ambiguous(error)
            | ApplyError::Transient(error)
            | ApplyError::Denied(error)
            | ApplyError::HandlerTransient(error)
            | ApplyError::RetryLater(error, _)
            | ApplyError::ConnectionClosed(error) => Some(error),
            ApplyError::ClaimLost(_) | ApplyError::Ledger(_) => None,
        }
    }
}

impl From<sqlx::Error> for ApplyError {
    /// Errors of the engine's own statements are never attributed to the projector.
    fn from(error: sqlx::Error) -> Self {
        if is_transient(&error) {
            ApplyError::Transient(error.into())
        } else {
            ApplyError::Ledger(error)
        }
    }
}

/// Carries the claim on a projector's row from one batch to the next. The commit of a batch and the
/// claim for the next one then take a single round trip.
#[derive(Debug, Default)]
pub(crate) struct ClaimCarry {
    /// Whether the next batch follows immediately. Otherwise carrying the claim does not pay off.
    pub(crate) should_carry: bool,
    claim: Option<CarriedClaim>,
}

/// A session whose transaction has locked a projector's row and has done nothing else. When it is
/// dropped, the pool rolls the transaction back.
#[derive(Debug)]
struct CarriedClaim {
    session: HandlerSession,
    position: Position,
    since: Instant,
}

impl ClaimCarry {
    /// Starts without a claim and leaves none.
    pub(crate) fn none() -> Self {
        ClaimCarry::default()
    }

    pub(crate) fn has_claim(&self) -> bool {
        self.claim.is_some()
    }

    /// Releases the claim, so that waiting sessions can lock the row.
    pub(crate) fn release(&mut self) {
        self.claim = None;
    }

    /// Returns the session of a claim at this position. An old claim is released instead: its
    /// session may have ended.
    fn take(&mut self, at: Position) -> Option<HandlerSession> {
        let claim = self.claim.take()?;
        (claim.position == at && claim.since.elapsed() < CLAIM_CARRY_TIMEOUT)
            .then_some(claim.session)
    }
}

/// Applies a batch: locks the ledger row, checks the claim, runs the handler, moves the position
/// and commits. Besides the handler's own round trips this takes two, or one if the claim was
/// carried over from the batch before.
pub(crate) async fn apply(
    database: &Database,
    projector: &RegisteredProjector,
    stage: Stage,
    batch: Batch<'_>,
    handler_timeout: Duration,
    carry: &mut ClaimCarry,
) -> Result<(), ApplyError> {
    if let Some(handler) = projector.fenced_handler() {
        let applying = fenced::apply(database, projector, handler, stage, batch, handler_timeout);
        return Box::pin(applying).await;
    }
    let mut session = match carry.take(batch.after) {
        Some(claimed) => claimed,
        None => claim_row(database, projector, stage, batch.after, handler_timeout).await?,
    };
    let should_carry = carry.should_carry
        && projector.session != SessionUse::PerEvent
        && !session.has_many_statements();
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
        // Dropping the session closes it and rolls back the transaction begun for the next batch.
        CommitOutcome::ClaimLost => {}
        CommitOutcome::NotMoved => {
            return Err(ApplyError::PartiallyApplied(anyhow!(
                "the handler's writes are committed, but the position is not: the handler deleted \
                 its projector's row in the ledger, or hid the ledger behind a temporary table. \
                 The batch cannot be applied again: rebuild the read model"
            )));
        }
    }
    Ok(())
}

/// Opens a session and locks the projector's row.
async fn claim_row(
    database: &Database,
    projector: &RegisteredProjector,
    stage: Stage,
    at: Position,
    handler_timeout: Duration,
) -> Result<HandlerSession, ApplyError> {
    let mut session = database.acquire_handler_session(&projector.id, projector.session).await?;
    if handler_timeout >= SERVER_WAIT_TIMEOUT {
        let wait_timeout = handler_timeout + SERVER_WAIT_TIMEOUT;
        let sql = format!("set session wait_timeout = {}", wait_timeout.as_secs());
        session.record_set();
        database
            .with_timeout(sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *session.connection))
            .await?;
    }
    let unchanged = database.session_unchanged_condition();
    let row =
        Claim { projector, stage, savepoint: &session.savepoint, unchanged_condition: &unchanged };
    // Another worker's handler may hold the row.
    let beginning = row.begin(&mut session.connection, at);
    if !Box::pin(database.with_lock_timeout(&session.id, beginning)).await? {
        database.with_timeout(sqlx::raw_sql("rollback").execute(&mut *session.connection)).await?;
        database.release_handler_session(session);
        let entry = Ledger::new(database).entry(&projector.id).await?;
        return Err(ApplyError::ClaimLost(entry.map(Box::new)));
    }
    Ok(session)
}

/// Runs the handler in a session that has the claim, and commits. If `should_carry` is set and the
/// batch had events for the projector, the row is claimed again for the next batch.
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
        check_before_effects(projector, &wanted)?;
        run_handler(database, session, projector, &wanted, handler_timeout).await?;
    }
    let (from, to) = (batch.after, batch.through);
    let unchanged = database.session_unchanged_condition();
    let savepoint = session.savepoint.clone();
    let row = Claim { projector, stage, savepoint: &savepoint, unchanged_condition: &unchanged };
    let moving = async {
        if should_carry && !wanted.is_empty() {
            row.commit_and_begin(&mut session.connection, from, to).await
        } else {
            row.commit(&mut session.connection, from, to).await
        }
    };
    // Waits for the row if another session has locked it after the commit.
    let moved = match Box::pin(database.with_lock_timeout(&session.id, moving)).await {
        Ok(moved) => moved,
        Err(error) => return Err(Box::pin(classify_commit_error(database, session, error)).await),
    };
    session.record_commit();
    metrics::record_applied(&projector.id, wanted.len(), began.elapsed());
    Ok(moved)
}

/// Decodes every field of the events if the handler has effects outside the transaction, because
/// those cannot be rolled back. Other handlers decode only the fields that they read.
fn check_before_effects(
    projector: &RegisteredProjector,
    wanted: &[&Event],
) -> Result<(), ApplyError> {
    if !projector.has_side_effects {
        return Ok(());
    }
    match wanted.iter().find_map(|event| Some((event, event.check().err()?))) {
        Some((event, error)) => Err(ApplyError::Projector(undecodable(event, &error))),
        None => Ok(()),
    }
}

/// Runs the handler. After an error its transaction is rolled back, or the error reports a partial
/// commit.
async fn run_handler(
    database: &Database,
    session: &mut HandlerSession,
    projector: &RegisteredProjector,
    wanted: &[&Event],
    handler_timeout: Duration,
) -> Result<(), ApplyError> {
    let mut guard = RunningHandler { database, session: session.id.clone(), is_armed: true };
    let handling = projector.projector.handle_batch(wanted, &mut session.connection);
    let running = RunningStatement::default();
    let handling = running.observe(AssertUnwindSafe(handling).catch_unwind());
    let handled = timeout(handler_timeout, handling).await;
    let was_interrupted = !matches!(handled, Ok(Ok(_)));
    let failed = match handled {
        Ok(Ok(Ok(()))) => first_decode_error(wanted).map(ApplyError::Projector),
        Ok(Ok(Err(error))) => Some(classify_handler_error(database, wanted, error)),
        Ok(Err(panic)) => Some(ApplyError::Projector(panic_error("the handler", panic.as_ref()))),
        Err(_) => {
            Some(ApplyError::Ambiguous(timeout_error(projector, wanted, handler_timeout, &running)))
        }
    };
    let Some(failed) = failed else {
        guard.is_armed = false;
        return Ok(());
    };
    // An interrupted handler may have left a statement running. The session accepts no other
    // statement until that one ends.
    let stopped = if was_interrupted { database.kill_query(&session.id).await } else { Ok(()) };
    let ended = match stopped {
        Ok(()) => database.roll_back(session).await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(ended) => {
            guard.is_armed = false;
            Err(with_transaction_outcome(ended, failed))
        }
        // The connection is unusable. If the handler committed anything, `partially_applied` is set
        // in its projector's row, and the next claim fails. A session that does not respond may
        // still hold its locks, so it is killed. A lost session holds none.
        Err(error) => {
            if was_interrupted || is_timeout(&error) {
                guard.kill_session().await;
            } else {
                guard.is_armed = false;
            }
            Err(match failed {
                // For instance, the handler's statement was interrupted because its session was
                // killed.
                ApplyError::Transient(_) | ApplyError::HandlerTransient(_) if !was_interrupted => {
                    classify_rollback_error(error)
                }
                failed => failed,
            })
        }
    }
}

/// The error of a handler that was interrupted after its time limit.
fn timeout_error(
    projector: &RegisteredProjector,
    wanted: &[&Event],
    limit: Duration,
    running: &RunningStatement,
) -> anyhow::Error {
    let events = match wanted {
        [event] => format!("event {} ({})", event.position(), event.event_type()),
        [first, .., last] => format!("events {} to {}", first.position(), last.position()),
        [] => "no event".to_owned(),
    };
    let (id, seconds) = (&projector.id, limit.as_secs_f32());
    let error = anyhow!(
        "the handler of {id} took longer than {seconds} s for {events}. If it needs more time, raise \
         --handler-timeout (PROJECTIONIST_HANDLER_TIMEOUT)"
    );
    match running.last() {
        Some(place) => error.context(place),
        None => error,
    }
}

/// Classifies an error that the handler returned.
fn classify_handler_error(
    database: &Database,
    wanted: &[&Event],
    error: anyhow::Error,
) -> ApplyError {
    if let Some(error) = database_error(&error) {
        database.discard_if_outdated(error);
    }
    if let Some(delay) = RetryLater::find(&error).map(RetryLater::delay) {
        // With a decode error, the handler did not see the event as it is.
        return match first_decode_error(wanted) {
            Some(decode_error) => ApplyError::Projector(decode_error),
            None => ApplyError::RetryLater(error, delay),
        };
    }
    match database_error(&error) {
        // The driver waits for a response that the server will not send.
        Some(sqlx::Error::Protocol(_)) => ApplyError::Ambiguous(error),
        Some(lost) if is_connection_lost(lost) => ApplyError::ConnectionClosed(error),
        Some(transient @ sqlx::Error::Database(_)) if is_transient(transient) => {
            ApplyError::HandlerTransient(error)
        }
        Some(transient) if is_transient(transient) => ApplyError::Transient(error),
        Some(denied) if is_denied(denied) => ApplyError::Denied(error),
        _ => ApplyError::Projector(first_decode_error(wanted).unwrap_or(error)),
    }
}

/// Combines a handler's error with the outcome of its transaction.
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

/// Classifies a failed commit. Nothing of the batch was committed, except in the case of
/// [`ApplyError::PartiallyApplied`].
async fn classify_commit_error(
    database: &Database,
    session: &mut HandlerSession,
    error: sqlx::Error,
) -> ApplyError {
    if is_connection_lost(&error) {
        return ApplyError::ConnectionClosed(error.into());
    }
    let Some(number) = server_error_number(&error) else { return error.into() };
    if number == 1305 {
        return match database.determine_outcome(session).await {
            Ok(TransactionOutcome::Committed(by)) => {
                ApplyError::PartiallyApplied(partially_applied(&by, None))
            }
            Ok(TransactionOutcome::StillOpen | TransactionOutcome::RolledBack) => {
                ApplyError::RolledBack(anyhow!(
                    "the transaction was rolled back during the handler: by a deadlock or a lock \
                     wait timeout whose error the handler did not return, or by the handler itself"
                ))
            }
            Err(error) => classify_rollback_error(error),
        };
    }
    if is_transient(&error) {
        return error.into();
    }
    match database.changed_settings(session).await {
        Ok(Some(changed)) => ApplyError::Projector(anyhow!(
            "the handler changed its session and did not restore it: {changed}. Later statements \
             in this session would behave differently. Restore the value before the handler ends, \
             or do not change it"
        )),
        Ok(None) if number == 1690 => ApplyError::Projector(anyhow!(
            "the handler changed its projector's own row in the ledger"
        )),
        Ok(None) => error.into(),
        Err(error) => classify_rollback_error(error),
    }
}

/// Classifies the error of a session that could not be rolled back after a handler. The session is
/// closed, and the server then rolls it back. If the handler committed anything, the next claim
/// fails, because `partially_applied` is set in its projector's row.
fn classify_rollback_error(error: sqlx::Error) -> ApplyError {
    if is_connection_lost(&error) {
        ApplyError::ConnectionClosed(error.into())
    } else if is_transient(&error) {
        ApplyError::Transient(error.into())
    } else {
        ApplyError::Projector(anyhow!(
            "the handler left its session in a state that cannot be rolled back, for instance in \
             an XA transaction: {error}"
        ))
    }
}

fn partially_applied(by: &str, error: Option<&anyhow::Error>) -> anyhow::Error {
    let error =
        error.map(|error| format!("; then it failed: {}", format_chain(error))).unwrap_or_default();
    anyhow!(
        "the handler committed the transaction, explicitly or with a statement that commits \
         implicitly (counted: {by}). A part of this batch is stored without its position, so the \
         batch cannot be applied again: rebuild the read model{error}"
    )
}

/// The first event with a field that could not be decoded. The accessor returned a default value
/// for it, so the handler's result is discarded.
fn first_decode_error(wanted: &[&Event]) -> Option<anyhow::Error> {
    let (event, error) = wanted.iter().find_map(|event| Some((event, event.decode_error()?)))?;
    Some(undecodable(event, &error))
}

fn undecodable(event: &Event, error: &sqlx::Error) -> anyhow::Error {
    anyhow!("event {} cannot be decoded: {error}", event.position())
}

/// Guards a running handler. If the handler is interrupted, a statement may still be running: the
/// connection is unusable, and the projector's row stays locked until the server finishes that
/// statement. If the guard is dropped while armed, it kills the session.
struct RunningHandler<'a> {
    database: &'a Database,
    session: SessionId,
    is_armed: bool,
}

impl RunningHandler<'_> {
    /// Kills the session of an interrupted handler, which releases its locks. If that fails,
    /// dropping the guard tries again in the background. The caller does not need the result: it
    /// already knows the handler's error.
    async fn kill_session(mut self) {
        match self.database.kill_session(&self.session).await {
            Ok(()) => self.is_armed = false,
            Err(error) => {
                debug!(
                    session = self.session.connection_id(), %error,
                    "cannot kill a handler's session, trying once more"
                )
            }
        }
    }
}

impl Drop for RunningHandler<'_> {
    /// Kills the session in the background if the handler's future was dropped, for instance by a
    /// shutdown or a timeout.
    fn drop(&mut self) {
        if !self.is_armed {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        let (database, session) = (self.database.clone(), self.session.clone());
        runtime.spawn(async move {
            if let Err(error) = database.kill_session(&session).await {
                debug!(
                    session = session.connection_id(), %error,
                    "cannot kill a handler's session: it ends when its statement ends"
                );
            }
        });
    }
}

/// Runs a projector's setup, outside any transaction because it creates tables.
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

/// The inserts of a projector file that are sent row by row, each with the reason.
pub(crate) async fn find_row_by_row(
    database: &Database,
    projector: &RegisteredProjector,
) -> anyhow::Result<Vec<String>> {
    let find = async |db: &mut MySqlConnection| projector.projector.row_by_row(db).await;
    database.run_in_setup_session(find).await?
}

/// Runs a projector's teardown, also outside any transaction.
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
