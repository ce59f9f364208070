//! One batch, one projector, to a decision: applied, broken at an event, or no longer ours.

use std::fmt::Display;
use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use time::OffsetDateTime;
use tracing::{error, warn};

use crate::database::Database;
use crate::engine::apply::{self, ApplyError, Batch, Hold};
use crate::engine::interrupt::HangUps;
use crate::ledger::{self, Entry, Ledger, LedgerError};
use crate::model::error::{MayPass, tell};
use crate::model::event::{Event, Position};
use crate::model::lifecycle::{FailedEvent, Failure, Stage, Status, Step};
use crate::model::metrics;
use crate::model::registry::{Registered, Registry};
use crate::model::retry;

/// How often in a row a transaction may be rolled back under a handler's hands before that counts as the projector's own
/// failure. Deadlocks are rare, and what a handler does by itself it does each time.
const ROLLED_BACK_TOO_OFTEN: u32 = 5;

/// What the engine works with, in boot and in play.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    pub(crate) database: Database,
    pub(crate) store: crate::store::EventStore,
    pub(crate) ledger: Ledger,
    pub(crate) limits: Limits,
    /// The name of the release, where it has one.
    pub(crate) release: Option<String>,
}

/// What bounds the engine.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The most events in one transaction, at least 1.
    pub batch: u64,
    /// How long a handler may take for one call, a batch or an event, before it counts as failed.
    pub handler_timeout: Duration,
    /// How long transient failures are tried again; `None`, and always in play: for as long as it takes.
    pub patience: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { batch: 1_000, handler_timeout: Duration::from_secs(30), patience: None }
    }
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Delivered {
    /// The projector stands here now: at the end of the batch or, if another worker did it, beyond.
    At(Position),
    /// It stands where this batch does not begin: somebody else moved it. Go on from here.
    Elsewhere(Position),
    /// It broke, and stands just before the event that it failed on.
    Broke,
    /// Transient failures outlasted [`Limits::patience`]; it stands where it stood.
    GaveUp(String),
    /// It has left this stage: another worker broke it, another boot handed it over, it was retired.
    Left,
}

impl Engine {
    pub(crate) fn new(database: &Database, limits: Limits, registry: &Registry) -> Self {
        Engine {
            database: database.clone(),
            store: crate::store::EventStore::new(database),
            ledger: Ledger::new(database),
            // Of none, a batch would pass over what it should hold.
            limits: Limits { batch: limits.batch.max(1), ..limits },
            release: registry.release().map(str::to_owned),
        }
    }

    /// Tries again what fails only for the moment, for as long as the engine is patient. It must be harmless to repeat.
    pub(crate) async fn persist<T, E, F>(&self, what: &str, attempt: impl FnMut() -> F) -> Result<T, E>
    where
        E: MayPass + Display,
        F: Future<Output = Result<T, E>>,
    {
        retry::persist(self.limits.patience, what, attempt).await
    }

    /// Applies a batch to a projector. What is transient is tried again for as long as it takes: the
    /// caller ends this by dropping it, and then nothing of the transaction in hand is applied.
    pub(crate) async fn deliver(&self, projector: &Registered, stage: Stage, batch: Batch<'_>) -> Delivered {
        self.deliver_on(projector, stage, batch, &mut Hold::none()).await
    }

    /// [`Engine::deliver`], with the claim that the batch before may have left; and one for the next.
    pub(crate) async fn deliver_on(
        &self,
        projector: &Registered,
        stage: Stage,
        batch: Batch<'_>,
        hold: &mut Hold,
    ) -> Delivered {
        if projector.goes_event_by_event() {
            // Boxed, as what follows: it is large, and in the future of every projector.
            return Box::pin(self.deliver_each(projector, stage, batch)).await;
        }
        match self.attempt(projector, stage, batch, hold).await {
            Ok(delivered) => delivered,
            Err(failed) => Box::pin(self.isolate(projector, stage, batch, failed)).await,
        }
    }

    /// Applies a batch with a transaction for each event that the projector wants. What it does elsewhere cannot be rolled
    /// back, so an event that fails must not repeat those before it.
    async fn deliver_each(&self, projector: &Registered, stage: Stage, batch: Batch<'_>) -> Delivered {
        let hold = &mut Hold::none();
        let mut position = batch.after;
        let mut wanted = batch.wanted(projector).peekable();
        loop {
            let event = wanted.next();
            // What follows the last event goes with it.
            let end = event.filter(|_| wanted.peek().is_some()).map_or(batch.through, Event::position);
            if let Some(step) = batch.part(position, end) {
                let delivered = match self.attempt(projector, stage, step, hold).await {
                    Ok(delivered) => delivered,
                    Err(failed) => Box::pin(self.isolate(projector, stage, step, failed)).await,
                };
                match delivered {
                    Delivered::At(reached) => position = reached,
                    other => return other,
                }
            }
            if end == batch.through {
                return Delivered::At(position);
            }
        }
    }

    /// Applies a batch whole. `Err` is the projector's own failure, somewhere in it.
    async fn attempt(
        &self,
        projector: &Registered,
        stage: Stage,
        mut batch: Batch<'_>,
        hold: &mut Hold,
    ) -> Result<Delivered, Failed> {
        let began = Instant::now();
        let mut attempt = 1;
        let mut is_doubted = false;
        let mut rolled_back = 0;
        let mut hang_ups = HangUps::default();
        loop {
            let applied =
                apply::apply(&self.database, projector, stage, batch, self.limits.handler_timeout, hold).await;
            if applied.as_ref().is_err_and(|error| !matches!(error, ApplyError::Claim(_))) {
                metrics::failed(&projector.id);
            }
            let is_its_doing = hang_ups.note(&self.database, &applied).await;
            match applied {
                Ok(()) => return Ok(Delivered::At(batch.through)),
                Err(ApplyError::Projector(error)) => return Err(Failed::new(error, attempt)),
                Err(ApplyError::Stored(error)) => {
                    let error = error.context(format!("events {} to {}", batch.after.next(), batch.through));
                    // The event is not known, and none of the batch may be tried again.
                    let failed = Failed::for_rebuild(error, attempt);
                    return Ok(Box::pin(self.break_at(projector, stage, None, failed)).await);
                }
                Err(ApplyError::RolledBack(error)) if rolled_back == ROLLED_BACK_TOO_OFTEN => {
                    return Err(Failed::new(error, attempt));
                }
                Err(ApplyError::RolledBack(error)) => {
                    rolled_back += 1;
                    attempt += 1;
                    warn!(projector = %projector.id, position = batch.after.get(), attempt, error = tell(&error), "trying again");
                    tokio::time::sleep(retry::delay(attempt)).await;
                }
                // The first may be the network's fault: on another connection, the second is not.
                Err(ApplyError::Doubtful(error)) if is_doubted => return Err(Failed::new(error, attempt)),
                Err(ApplyError::Doubtful(error)) => {
                    is_doubted = true;
                    attempt += 1;
                    warn!(projector = %projector.id, position = batch.after.get(), attempt, error = tell(&error), "trying once more");
                }
                Err(ApplyError::Claim(Some(entry))) if must_be_rebuilt(&entry, stage) => {
                    let reason = entry.rebuild_reason.unwrap_or_default();
                    let failed = Failed::for_rebuild(anyhow!(reason), attempt);
                    return Ok(Box::pin(self.break_at(projector, stage, None, failed)).await);
                }
                Err(ApplyError::Claim(entry)) => match without_claim(entry.as_deref(), projector, stage, batch) {
                    Ok(rest) => batch = rest,
                    Err(delivered) => return Ok(delivered),
                },
                Err(ApplyError::Ledger(error)) if self.limits.patience.is_some() => {
                    return Ok(Delivered::GaveUp(error.to_string()));
                }
                Err(ApplyError::Ledger(error)) => {
                    // A worker that ended would lose nothing by it, but neither would it mend it.
                    attempt += 1;
                    if retry::worth_telling(attempt) {
                        error!(projector = %projector.id, position = batch.after.get(), attempt, %error, "the ledger cannot be written");
                    }
                    tokio::time::sleep(retry::delay(attempt + 6)).await;
                }
                Err(ApplyError::HungUp(error)) if is_its_doing => {
                    return Err(Failed::new(hang_ups.explain(error), attempt));
                }
                Err(ApplyError::Transient(error) | ApplyError::HungUp(error)) => {
                    attempt += 1;
                    // What ended this connection may have ended those that are kept.
                    self.database.let_go();
                    if self.limits.patience.is_some_and(|patience| began.elapsed() >= patience) {
                        return Ok(Delivered::GaveUp(tell(&error)));
                    }
                    if retry::worth_telling(attempt) {
                        warn!(
                            projector = %projector.id, position = batch.after.get(), attempt,
                            error = tell(&error), "transient failure, trying again"
                        );
                    }
                    tokio::time::sleep(retry::delay(attempt)).await;
                }
            }
        }
    }

    /// Applies a batch that failed event by event, so that the position ends just before the failing one.
    async fn isolate(&self, projector: &Registered, stage: Stage, batch: Batch<'_>, failed: Failed) -> Delivered {
        // Whoever marks it broken needs the row.
        let hold = &mut Hold::none();
        let wanted: Vec<&Event> = batch.wanted(projector).collect();
        if let [event] = wanted[..] {
            // The events before it are not wanted, but the position stands just before the one that failed.
            return match self.attempt(projector, stage, batch.until(event.position().previous()), hold).await {
                Ok(Delivered::At(_)) => self.break_at(projector, stage, Some(event), failed).await,
                Ok(delivered) => delivered,
                Err(failed) => self.break_at(projector, stage, Some(event), failed).await,
            };
        }
        let mut position = batch.after;
        for event in wanted {
            if event.position() <= position {
                continue;
            }
            for end in [event.position().previous(), event.position()] {
                let Some(step) = batch.part(position, end) else { continue };
                match self.attempt(projector, stage, step, hold).await {
                    Ok(Delivered::At(reached)) => position = reached,
                    Ok(delivered) => return delivered,
                    Err(alone) => {
                        let attempts = failed.attempts + alone.attempts;
                        return self.break_at(projector, stage, Some(event), Failed { attempts, ..alone }).await;
                    }
                }
            }
        }
        // Each passed on its own, so the batch failed for a reason that has gone.
        warn!(projector = %projector.id, error = tell(&failed.error), "a batch failed, but each of its events alone did not");
        match batch.from(position) {
            Some(rest) if rest.after < rest.through => {
                self.attempt(projector, stage, rest, hold).await.unwrap_or(Delivered::Elsewhere(position))
            }
            _ => Delivered::At(position),
        }
    }

    /// Marks a projector broken at an event that it stands just before; without one, at its setup.
    pub(crate) async fn break_at(
        &self,
        projector: &Registered,
        stage: Stage,
        event: Option<&Event>,
        failed: Failed,
    ) -> Delivered {
        let before = event.map(|event| event.position().previous());
        self.break_if(projector, stage, event, failed, |entry| may_break(entry, projector, stage, before)).await
    }

    /// Marks a projector broken if `still` holds of its row, under the row's lock.
    pub(crate) async fn break_if(
        &self,
        projector: &Registered,
        stage: Stage,
        event: Option<&Event>,
        failed: Failed,
        still: impl Fn(&Entry) -> bool,
    ) -> Delivered {
        let failure = Failure {
            event: event.map(|event| FailedEvent {
                position: event.position(),
                event_id: event.event_id().to_owned(),
                event_type: event.event_type().to_owned(),
            }),
            // As the ledger keeps it: by this it is known again.
            error: ledger::limited(&tell(&failed.error), ledger::MAX_ERROR),
            at: OffsetDateTime::now_utc(),
            attempts: failed.attempts,
            release: self.release.clone(),
            host: host(),
            rebuild: failed.rebuild,
        };
        let mut attempt = 1;
        loop {
            match self.ledger.step(&projector.id, Step::Break(failure.clone()), &still).await {
                Ok(Some(entry)) if matches!(&entry.status, Status::Broken(written) if written.error == failure.error) =>
                {
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
                        rebuild = failure.rebuild,
                        "projector broken"
                    );
                    return Delivered::Broke;
                }
                Ok(Some(entry)) if stage.plays(&entry.status) && entry.is_booted_with(&projector.digest) => {
                    return Delivered::Elsewhere(entry.position);
                }
                Ok(_) => return Delivered::Left,
                Err(LedgerError::Step(..)) => return Delivered::Left,
                Err(LedgerError::Database(error)) => {
                    attempt += 1;
                    if retry::worth_telling(attempt) {
                        warn!(projector = %projector.id, attempt, %error, "cannot mark the projector broken yet, trying again");
                    }
                    tokio::time::sleep(retry::delay(attempt)).await;
                }
            }
        }
    }
}

/// Whether a projector of this stage was found half applied, and nobody has marked it broken yet.
pub(crate) fn must_be_rebuilt(entry: &Entry, stage: Stage) -> bool {
    entry.rebuild_reason.is_some() && stage.plays(&entry.status)
}

/// A projector's own failure, and how often what failed was tried.
pub(crate) struct Failed {
    pub(crate) error: anyhow::Error,
    pub(crate) attempts: u32,
    /// Why the read model must be rebuilt, if it must: see [`Failure::rebuild`].
    pub(crate) rebuild: Option<String>,
}

impl Failed {
    /// A failure after which the projector may go on, once its cause is removed.
    pub(crate) fn new(error: anyhow::Error, attempts: u32) -> Self {
        Failed { error, attempts, rebuild: None }
    }

    /// A failure after which the read model must be rebuilt. The error is the reason, too.
    pub(crate) fn for_rebuild(error: anyhow::Error, attempts: u32) -> Self {
        let rebuild = Some(tell(&error));
        Failed { error, attempts, rebuild }
    }
}

/// This host's name, as the kernel has it; in a container, the container's.
pub(crate) fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = Some(name.trim().to_owned()).filter(|name| !name.is_empty());
    name.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "unknown".into())
}

/// What becomes of a batch whose claim does not hold: another worker was faster, or a commit of ours was not
/// acknowledged. `Ok`: go on with this, the rest of it.
pub(crate) fn without_claim<'a>(
    entry: Option<&Entry>,
    projector: &Registered,
    stage: Stage,
    batch: Batch<'a>,
) -> Result<Batch<'a>, Delivered> {
    let is_ours = |entry: &&Entry| stage.plays(&entry.status) && entry.is_booted_with(&projector.digest);
    let Some(entry) = entry.filter(is_ours) else { return Err(Delivered::Left) };
    match batch.from(entry.position) {
        Some(rest) if rest.after < rest.through => Ok(rest),
        Some(_) => Err(Delivered::At(entry.position)),
        None => Err(Delivered::Elsewhere(entry.position)),
    }
}

/// Whether a projector may be marked broken: it is still this stage's, stands just before the event that failed, and was
/// booted with the definition that failed.
pub(crate) fn may_break(entry: &Entry, projector: &Registered, stage: Stage, before: Option<Position>) -> bool {
    stage.plays(&entry.status)
        && before.is_none_or(|before| entry.position == before)
        && entry.is_booted_with(&projector.digest)
}

impl<'a> Batch<'a> {
    /// What of it lies between a projector that stands at `position` and `end`, if anything does.
    pub(crate) fn part(self, position: Position, end: Position) -> Option<Self> {
        self.from(position).map(|rest| rest.until(end)).filter(|part| part.after < part.through)
    }

    /// What is left of it for a projector that stands at `position`; `None` if that lies before it.
    pub(crate) fn from(self, position: Position) -> Option<Self> {
        if position < self.after {
            return None;
        }
        let known = self.events.partition_point(|event| event.position() <= position);
        Some(Batch { after: position, events: &self.events[known..], ..self })
    }

    /// Its beginning, through `position`.
    pub(crate) fn until(self, position: Position) -> Self {
        let through = self.through.min(position).max(self.after);
        let within = self.events.partition_point(|event| event.position() <= through);
        Batch { through, events: &self.events[..within], ..self }
    }
}
