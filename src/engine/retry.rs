//! Applies one batch to one projector until there is a final outcome: it was applied, the projector
//! broke at an event, or the projector was taken over.

use std::fmt::Display;
use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use time::OffsetDateTime;
use tracing::{error, info, warn};

use crate::database::Database;
use crate::database::error::format_chain;
use crate::engine::apply::{self, ApplyError, Batch, ClaimCarry};
use crate::engine::closed_connection::ClosedConnectionDetector;
use crate::engine::retries::{Retries, RetryWait};
use crate::ledger::{self, Entry, Ledger, LedgerError};
use crate::model::backoff;
use crate::model::backoff::Transient;
use crate::model::event::{Event, Position};
use crate::model::lifecycle::{FailedEvent, Failure, Stage, Status, Transition};
use crate::model::metrics;
use crate::model::registry::{RegisteredProjector, Registry};
use crate::model::wait_log::Reminder;

/// How many times in a row a transaction may be rolled back during a handler before that counts as
/// the projector's own failure. Deadlocks are rare. A handler that rolls back itself does so every
/// time.
const MAX_ROLLBACKS: u32 = 5;

/// How long a transient error of a handler's statement is retried at once. After that the projector
/// waits outside the fan-out group.
const IMMEDIATE_RETRIES: Duration = Duration::from_secs(1);

/// The parts that boot and play share: database, store, ledger and limits.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    pub(crate) database: Database,
    pub(crate) store: crate::store::EventStore,
    pub(crate) ledger: Ledger,
    pub(crate) limits: Limits,
    /// The name of the release, if it has one.
    pub(crate) release: Option<String>,
    /// The projectors that wait for a later retry.
    pub(crate) retries: Retries,
}

/// The limits of the engine.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Limits {
    /// The maximum number of events in one transaction, at least 1.
    pub batch: u64,
    /// The maximum duration of one handler call, for a batch or an event. After that the call
    /// counts as failed.
    pub handler_timeout: Duration,
    /// How long transient errors are retried. `None`: without limit. Play always retries without
    /// limit.
    pub retry_timeout: Option<Duration>,
    /// For how long a handler may ask for later retries of one event with a
    /// [`RetryLater`](crate::RetryLater). After that the projector breaks.
    pub retry_later_limit: Duration,
    /// How long a projector may retry one event before an alert is sent.
    pub retry_alert_after: Duration,
}

impl Limits {
    /// The defaults.
    pub const fn new() -> Self {
        Limits {
            batch: 1_000,
            handler_timeout: Duration::from_secs(30),
            retry_timeout: None,
            retry_later_limit: Duration::from_secs(86_400),
            retry_alert_after: Duration::from_secs(300),
        }
    }

    /// Sets [`Limits::batch`].
    pub const fn with_batch(mut self, batch: u64) -> Self {
        self.batch = batch;
        self
    }

    /// Sets [`Limits::handler_timeout`].
    pub const fn with_handler_timeout(mut self, handler_timeout: Duration) -> Self {
        self.handler_timeout = handler_timeout;
        self
    }

    /// Sets [`Limits::retry_timeout`].
    pub const fn with_retry_timeout(mut self, retry_timeout: Option<Duration>) -> Self {
        self.retry_timeout = retry_timeout;
        self
    }

    /// Sets [`Limits::retry_later_limit`].
    pub const fn with_retry_later_limit(mut self, retry_later_limit: Duration) -> Self {
        self.retry_later_limit = retry_later_limit;
        self
    }

    /// Sets [`Limits::retry_alert_after`].
    pub const fn with_retry_alert_after(mut self, retry_alert_after: Duration) -> Self {
        self.retry_alert_after = retry_alert_after;
        self
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::new()
    }
}

/// The outcome of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ApplyOutcome {
    /// The projector is at this position: the end of the batch, or beyond if another worker moved
    /// it.
    Reached(Position),
    /// Another worker moved the projector to this position, where the batch does not begin. The
    /// caller continues from here.
    MovedByOther(Position),
    /// The projector broke. Its position is just before the failing event.
    Broken,
    /// The projector waits for a later retry. Its position is just before the failing event.
    Waiting(RetryWait),
    /// Transient errors outlasted [`Limits::retry_timeout`], or the ledger cannot be written. The
    /// position is unchanged.
    GaveUp(String),
    /// The projector has left this stage: another worker broke it, another boot handed it over, or
    /// it was retired.
    TakenOver,
}

impl Engine {
    pub(crate) fn new(database: &Database, limits: Limits, registry: &Registry) -> Self {
        let database = database.for_engine();
        Engine {
            store: crate::store::EventStore::new(&database),
            ledger: Ledger::new(&database),
            database,
            // With a batch size of 0, a batch would move the position without applying events.
            limits: Limits { batch: limits.batch.max(1), ..limits },
            release: registry.release().map(str::to_owned),
            retries: Retries::default(),
        }
    }

    /// Retries an operation after transient errors, for up to `retry_timeout`. The operation must
    /// be idempotent.
    pub(crate) async fn retry_transient<T, E, F>(
        &self,
        what: &str,
        attempt: impl FnMut() -> F,
    ) -> Result<T, E>
    where
        E: Transient + Display,
        F: Future<Output = Result<T, E>>,
    {
        backoff::retry_transient(self.limits.retry_timeout, what, attempt).await
    }

    /// Applies a batch to a projector. Transient errors are retried until `retry_timeout`. Dropping
    /// the future cancels this, and rolls back the open transaction.
    pub(crate) async fn apply_with_retry(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
    ) -> ApplyOutcome {
        self.apply_with_retry_and_carry(projector, stage, batch, &mut ClaimCarry::none()).await
    }

    /// [`Engine::apply_with_retry`] that uses the claim of the batch before, if there is one, and
    /// may keep a claim for the next batch.
    pub(crate) async fn apply_with_retry_and_carry(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
        carry: &mut ClaimCarry,
    ) -> ApplyOutcome {
        if batch.events.len() > projector.max_batch || projector.needs_transaction_per_event() {
            carry.release();
            // This future and the next one are boxed: they are large, and would be part of the
            // future of every projector.
            return Box::pin(self.apply_in_steps(projector, stage, batch)).await;
        }
        let mut batch = batch;
        if self.retries.contains(&projector.id) {
            match Box::pin(self.retry_first_event(projector, stage, batch)).await {
                Ok(rest) => batch = rest,
                Err(outcome) => return outcome,
            }
        }
        match self.apply_whole_batch(projector, stage, batch, carry).await {
            Ok(outcome) => outcome,
            Err(failed) => Box::pin(self.isolate_failure(projector, stage, batch, failed)).await,
        }
    }

    /// Applies the first event of a batch alone, because it failed before: with others in one
    /// transaction, another failure would call the handler twice. `Ok` is the rest of the batch.
    async fn retry_first_event<'a>(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'a>,
    ) -> Result<Batch<'a>, ApplyOutcome> {
        let Some(first) = batch.wanted(projector).next() else { return Ok(batch) };
        let step = batch.up_to(first.position());
        let applied = self.apply_whole_batch(projector, stage, step, &mut ClaimCarry::none()).await;
        let outcome = match applied {
            Ok(outcome) => outcome,
            Err(failed) => Box::pin(self.isolate_failure(projector, stage, step, failed)).await,
        };
        let ApplyOutcome::Reached(reached) = outcome else { return Err(outcome) };
        match batch.above(reached) {
            Some(rest) if rest.after < rest.through => Ok(rest),
            _ => Err(outcome),
        }
    }

    /// Applies a batch in several transactions, each with as many events as the projector allows.
    /// Side effects cannot be rolled back, so a failing event must not repeat the events before it.
    async fn apply_in_steps(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
    ) -> ApplyOutcome {
        let carry = &mut ClaimCarry::none();
        let mut position = batch.after;
        let mut wanted = batch.wanted(projector).peekable();
        loop {
            let event = wanted.by_ref().take(projector.max_batch).last();
            // The last step also covers the unsubscribed events at the end of the batch.
            let end =
                event.filter(|_| wanted.peek().is_some()).map_or(batch.through, Event::position);
            if let Some(step) = batch.between(position, end) {
                let outcome = match self.apply_whole_batch(projector, stage, step, carry).await {
                    Ok(outcome) => outcome,
                    Err(failed) => {
                        Box::pin(self.isolate_failure(projector, stage, step, failed)).await
                    }
                };
                match outcome {
                    ApplyOutcome::Reached(reached) => position = reached,
                    other => return other,
                }
            }
            if end == batch.through {
                return ApplyOutcome::Reached(position);
            }
        }
    }

    /// Applies a batch as a whole. `Err` is the projector's own failure, at an unknown event of the
    /// batch.
    async fn apply_whole_batch(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        mut batch: Batch<'_>,
        carry: &mut ClaimCarry,
    ) -> Result<ApplyOutcome, ProjectorError> {
        let began = Instant::now();
        let mut reminder = Reminder::new(began);
        let mut attempt = 1;
        let mut was_ambiguous = false;
        let mut rolled_back = 0;
        let mut closed_connection = ClosedConnectionDetector::default();
        loop {
            // Boxed, because it is large and would be part of each future above this one.
            let applied = Box::pin(apply::apply(
                &self.database,
                projector,
                stage,
                batch,
                self.limits.handler_timeout,
                carry,
            ))
            .await;
            if applied.as_ref().is_err_and(|error| !matches!(error, ApplyError::ClaimLost(_))) {
                metrics::record_failure(&projector.id);
            }
            let is_closed_by_handler = closed_connection.record(&self.database, &applied).await;
            match applied {
                Ok(()) => {
                    if reminder.has_reminded() {
                        info!(
                            projector = %projector.id, position = batch.through.get(),
                            attempts = attempt, seconds = began.elapsed().as_secs(),
                            "the transient failure is over"
                        );
                    }
                    if self.retries.contains(&projector.id)
                        && batch.wanted(projector).next().is_some()
                    {
                        Box::pin(self.end_retry(&projector.id)).await;
                    }
                    return Ok(ApplyOutcome::Reached(batch.through));
                }
                Err(ApplyError::Projector(error)) => {
                    return Err(ProjectorError::new(error, attempt));
                }
                Err(ApplyError::PartiallyApplied(error)) => {
                    let error = error.context(format!(
                        "events {} to {}",
                        batch.after.next(),
                        batch.through
                    ));
                    // The failing event is unknown, and no part of the batch may be applied again.
                    let failed = ProjectorError::for_rebuild(error, attempt);
                    return Ok(Box::pin(self.mark_broken(projector, stage, None, failed)).await);
                }
                Err(ApplyError::RolledBack(error)) if rolled_back == MAX_ROLLBACKS => {
                    return Err(ProjectorError::new(error, attempt));
                }
                Err(ApplyError::RolledBack(error)) => {
                    rolled_back += 1;
                    attempt += 1;
                    warn!(
                        projector = %projector.id, position = batch.after.get(), attempt,
                        error = format_chain(&error),
                        "the transaction was rolled back, trying again"
                    );
                    tokio::time::sleep(backoff::delay(attempt)).await;
                }
                // The first such error may be a network problem. A second one on another connection
                // is the projector's own failure.
                Err(ApplyError::Ambiguous(error)) if was_ambiguous => {
                    return Err(ProjectorError::new(error, attempt));
                }
                Err(ApplyError::Ambiguous(error)) => {
                    was_ambiguous = true;
                    attempt += 1;
                    warn!(
                        projector = %projector.id, position = batch.after.get(), attempt,
                        error = format_chain(&error),
                        "ambiguous failure, trying once more"
                    );
                }
                Err(ApplyError::ClaimLost(Some(entry))) if must_be_rebuilt(&entry, stage) => {
                    let reason = entry.rebuild_reason.unwrap_or_default();
                    let failed = ProjectorError::for_rebuild(anyhow!(reason), attempt);
                    return Ok(Box::pin(self.mark_broken(projector, stage, None, failed)).await);
                }
                Err(ApplyError::ClaimLost(entry)) => {
                    match resolve_lost_claim(entry.as_deref(), projector, stage, batch) {
                        Ok(rest) => batch = rest,
                        Err(outcome) => return Ok(outcome),
                    }
                }
                Err(ApplyError::Ledger(error)) if self.limits.retry_timeout.is_some() => {
                    return Ok(ApplyOutcome::GaveUp(error.to_string()));
                }
                Err(ApplyError::Ledger(error)) => {
                    // Play retries, because ending the worker would not fix the error.
                    attempt += 1;
                    if reminder.is_due(Instant::now()) {
                        error!(
                            projector = %projector.id, position = batch.after.get(), attempt,
                            seconds = began.elapsed().as_secs(), %error,
                            "the ledger cannot be written"
                        );
                    }
                    tokio::time::sleep(backoff::delay(attempt + 6)).await;
                }
                // Boot fails at once, so that the deploy does not wait for a person.
                Err(ApplyError::Denied(error)) if self.limits.retry_timeout.is_some() => {
                    return Ok(ApplyOutcome::GaveUp(format_chain(&error)));
                }
                // A person has to grant the privilege, so the projector waits like for a service.
                Err(ApplyError::Denied(error)) => {
                    let retry = Retry { is_requested: false, delay: None };
                    return Err(ProjectorError::for_retry(error, attempt, retry));
                }
                Err(ApplyError::ConnectionClosed(error)) if is_closed_by_handler => {
                    // The handler may have rolled back our mark and committed before its session
                    // ended, at each attempt.
                    let error = closed_connection.explain(error);
                    return Err(ProjectorError::for_rebuild(error, attempt));
                }
                Err(ApplyError::RetryLater(error, delay)) => {
                    let retry = Retry { is_requested: true, delay };
                    return Err(ProjectorError::for_retry(error, attempt, retry));
                }
                // Most errors of this kind pass at once. A longer one must not delay others.
                Err(ApplyError::HandlerTransient(error))
                    if began.elapsed() >= IMMEDIATE_RETRIES =>
                {
                    let retry = Retry { is_requested: false, delay: None };
                    return Err(ProjectorError::for_retry(error, attempt, retry));
                }
                Err(
                    ApplyError::Transient(error)
                    | ApplyError::HandlerTransient(error)
                    | ApplyError::ConnectionClosed(error),
                ) => {
                    attempt += 1;
                    // The idle connections may have been closed by the same cause.
                    self.database.release_idle_sessions();
                    if self
                        .limits
                        .retry_timeout
                        .is_some_and(|retry_timeout| began.elapsed() >= retry_timeout)
                    {
                        return Ok(ApplyOutcome::GaveUp(format_chain(&error)));
                    }
                    if reminder.is_due(Instant::now()) {
                        warn!(
                            projector = %projector.id, position = batch.after.get(), attempt,
                            seconds = began.elapsed().as_secs(), error = format_chain(&error),
                            "transient failure, trying again"
                        );
                    }
                    tokio::time::sleep(backoff::delay(attempt)).await;
                }
            }
        }
    }

    /// Applies a failed batch event by event, so that the position ends just before the failing
    /// event.
    async fn isolate_failure(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
        failed: ProjectorError,
    ) -> ApplyOutcome {
        // Marking the projector broken locks its row, so no claim may be held here.
        let carry = &mut ClaimCarry::none();
        let wanted: Vec<&Event> = batch.wanted(projector).collect();
        if let [event] = wanted[..] {
            if failed.retry.is_some() && batch.after == event.position().previous() {
                return Box::pin(self.fail_at(projector, stage, event, failed)).await;
            }
            // Moves the position over the unsubscribed events, to just before the failing one.
            return match self
                .apply_whole_batch(
                    projector,
                    stage,
                    batch.up_to(event.position().previous()),
                    carry,
                )
                .await
            {
                Ok(ApplyOutcome::Reached(_)) => {
                    Box::pin(self.fail_at(projector, stage, event, failed)).await
                }
                Ok(outcome) => outcome,
                Err(failed) => Box::pin(self.fail_at(projector, stage, event, failed)).await,
            };
        }
        let mut position = batch.after;
        for event in wanted {
            if event.position() <= position {
                continue;
            }
            for end in [event.position().previous(), event.position()] {
                let Some(step) = batch.between(position, end) else { continue };
                match self.apply_whole_batch(projector, stage, step, carry).await {
                    Ok(ApplyOutcome::Reached(reached)) => position = reached,
                    Ok(outcome) => return outcome,
                    Err(alone) => {
                        let attempts = failed.attempts + alone.attempts;
                        let failed = ProjectorError { attempts, ..alone };
                        return Box::pin(self.fail_at(projector, stage, event, failed)).await;
                    }
                }
            }
        }
        // Every event succeeded on its own, so the cause of the failure is gone.
        warn!(
            projector = %projector.id, error = format_chain(&failed.error),
            "a batch failed, but each of its events succeeded alone"
        );
        match batch.above(position) {
            Some(rest) if rest.after < rest.through => self
                .apply_whole_batch(projector, stage, rest, carry)
                .await
                .unwrap_or(ApplyOutcome::MovedByOther(position)),
            _ => ApplyOutcome::Reached(position),
        }
    }

    /// Marks a projector broken at an event. Its position must be just before that event. Without
    /// an event, the projector is marked broken at its setup.
    pub(crate) async fn mark_broken(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        event: Option<&Event>,
        failed: ProjectorError,
    ) -> ApplyOutcome {
        let before = event.map(|event| event.position().previous());
        self.mark_broken_if(projector, stage, event, failed, |entry| {
            may_mark_broken(entry, projector, stage, before)
        })
        .await
    }

    /// Marks a projector broken if its row, read under lock, satisfies `still`.
    pub(crate) async fn mark_broken_if(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        event: Option<&Event>,
        failed: ProjectorError,
        still: impl Fn(&Entry) -> bool,
    ) -> ApplyOutcome {
        let failure = Failure {
            event: event.map(|event| FailedEvent {
                position: event.position(),
                event_id: event.event_id().to_owned(),
                event_type: event.event_type().to_owned(),
            }),
            // Truncated as in the ledger, because the stored error is compared with this one below.
            error: ledger::truncate(&format_chain(&failed.error), ledger::MAX_ERROR),
            at: OffsetDateTime::now_utc(),
            attempts: failed.attempts,
            release: self.release.clone(),
            host: hostname(),
            rebuild_reason: failed.rebuild_reason,
        };
        let mut attempt = 1;
        let mut reminder = Reminder::new(Instant::now());
        loop {
            match self
                .ledger
                .transition(&projector.id, Transition::Break(failure.clone()), &still)
                .await
            {
                Ok(Some(entry)) if has_failed_with(&entry, &failure.error) => {
                    self.retries.forget(&projector.id);
                    error!(
                        alert = "projector_broken",
                        projector = %projector.id,
                        position = event.map(|event| event.position().get()),
                        status = entry.status.as_str(),
                        event_type = event.map(Event::event_type),
                        event_id = event.map(Event::event_id),
                        error = failure.error,
                        attempts = failure.attempts,
                        release = failure.release,
                        host = failure.host,
                        rebuild_reason = failure.rebuild_reason,
                        "projector broken"
                    );
                    return ApplyOutcome::Broken;
                }
                Ok(Some(entry))
                    if stage.can_apply(&entry.status)
                        && entry.matches_digest(&projector.digest) =>
                {
                    return ApplyOutcome::MovedByOther(entry.position);
                }
                Ok(_) => return ApplyOutcome::TakenOver,
                Err(LedgerError::Step(..)) => return ApplyOutcome::TakenOver,
                Err(LedgerError::Database(error)) => {
                    attempt += 1;
                    if reminder.is_due(Instant::now()) {
                        warn!(
                            projector = %projector.id, attempt, %error,
                            "cannot mark the projector broken yet, trying again"
                        );
                    }
                    tokio::time::sleep(backoff::delay(attempt)).await;
                }
            }
        }
    }
}

/// Whether a projector is broken with this error.
fn has_failed_with(entry: &Entry, error: &str) -> bool {
    matches!(&entry.status, Status::Broken(failure) if failure.error == error)
}

/// Whether a projector in this stage must be rebuilt and has not been marked broken yet.
pub(crate) fn must_be_rebuilt(entry: &Entry, stage: Stage) -> bool {
    entry.rebuild_reason.is_some() && stage.can_apply(&entry.status)
}

/// A projector's own failure.
pub(crate) struct ProjectorError {
    pub(crate) error: anyhow::Error,
    pub(crate) attempts: u32,
    /// Why the read model must be rebuilt, or `None`. See [`Failure::rebuild_reason`].
    pub(crate) rebuild_reason: Option<String>,
    /// How to retry the event, if a retry can cure the failure. The projector then does not break.
    pub(crate) retry: Option<Retry>,
}

/// How to retry an event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retry {
    /// Whether the handler asked for the retry. `false`: a transient error of the server.
    pub(crate) is_requested: bool,
    /// The delay that the handler named.
    pub(crate) delay: Option<Duration>,
}

impl ProjectorError {
    /// A failure after which the projector can continue, once the cause is fixed.
    pub(crate) fn new(error: anyhow::Error, attempts: u32) -> Self {
        ProjectorError { error, attempts, rebuild_reason: None, retry: None }
    }

    /// A failure that a later retry can cure.
    fn for_retry(error: anyhow::Error, attempts: u32, retry: Retry) -> Self {
        ProjectorError { retry: Some(retry), ..ProjectorError::new(error, attempts) }
    }

    /// A failure after which the read model must be rebuilt. The error is also the rebuild reason.
    pub(crate) fn for_rebuild(error: anyhow::Error, attempts: u32) -> Self {
        let rebuild_reason = Some(format_chain(&error));
        ProjectorError { rebuild_reason, ..ProjectorError::new(error, attempts) }
    }
}

/// The host's name according to the kernel. In a container, this is the container's name.
pub(crate) fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = Some(name.trim().to_owned()).filter(|name| !name.is_empty());
    name.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "unknown".into())
}

/// Decides what to do after a lost claim: another worker was faster, or a commit was not
/// acknowledged. `Ok` is the rest of the batch, which is still to be applied.
pub(crate) fn resolve_lost_claim<'a>(
    entry: Option<&Entry>,
    projector: &RegisteredProjector,
    stage: Stage,
    batch: Batch<'a>,
) -> Result<Batch<'a>, ApplyOutcome> {
    let is_ours =
        |entry: &&Entry| stage.can_apply(&entry.status) && entry.matches_digest(&projector.digest);
    let Some(entry) = entry.filter(is_ours) else { return Err(ApplyOutcome::TakenOver) };
    match batch.above(entry.position) {
        Some(rest) if rest.after < rest.through => Ok(rest),
        Some(_) => Err(ApplyOutcome::Reached(entry.position)),
        None => Err(ApplyOutcome::MovedByOther(entry.position)),
    }
}

/// Whether a projector may be marked broken. It must still be in this stage, be just before the
/// failing event, and have been booted with the definition that failed.
pub(crate) fn may_mark_broken(
    entry: &Entry,
    projector: &RegisteredProjector,
    stage: Stage,
    before: Option<Position>,
) -> bool {
    stage.can_apply(&entry.status)
        && before.is_none_or(|before| entry.position == before)
        && entry.matches_digest(&projector.digest)
}
