//! Mirrors `engine/apply.rs`, `engine/retry.rs` and `engine/catch_up.rs`. Projectors apply a page
//! one after the other here. The engine applies it concurrently; that makes no difference, because
//! the projectors share only the log.

use std::sync::Arc;

use crate::engine::apply::Batch;
use crate::engine::catch_up::{Cursor, lowest_behind};
use crate::engine::retry::{ApplyOutcome, may_mark_broken, must_be_rebuilt, resolve_lost_claim};
use crate::ledger::Entry;
use crate::model::event::{Event, Position};
use crate::model::lifecycle::{FailedEvent, Failure, Stage, Transition};
use crate::model::registry::{RegisteredProjector, Registry};
use crate::simulation::bug::Bug;
use crate::simulation::invariants::Claim;
use crate::simulation::occurrence::Occurrence;
use crate::simulation::projectors::Release;
use crate::simulation::statements::DatabaseError;
use crate::simulation::transaction::{HandlerError, Transaction};
use crate::simulation::world::{Sim, Tick};
use crate::store::Page;

#[derive(Clone)]
pub(super) struct Engine {
    pub(super) sim: Sim,
    pub(super) registry: Registry,
    pub(super) release: Release,
    /// The most events in one transaction.
    pub(super) batch: u64,
    /// How long transient errors are retried; `None` means without limit.
    pub(super) retry_timeout: Option<Tick>,
}

/// Why a batch was not applied. In all cases but `PartiallyApplied`, none of its events is applied.
enum ApplyError {
    ClaimLost(Option<Box<Entry>>),
    Projector(String),
    Transient,
    /// A part of the batch is applied, but the position has not moved.
    PartiallyApplied,
}

impl From<DatabaseError> for ApplyError {
    fn from(_: DatabaseError) -> Self {
        ApplyError::Transient
    }
}

/// The claim that one batch takes for the next, like `apply::ClaimCarry`.
#[derive(Default)]
struct ClaimCarry {
    should_carry: bool,
    claim: Option<(Position, Transaction, Entry)>,
}

impl Engine {
    async fn apply(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
        carry: &mut ClaimCarry,
    ) -> Result<(), ApplyError> {
        let wanted: Vec<&Event> = batch.wanted(projector).collect();
        let claim = Claim { stage, release: self.release, after: batch.after };
        let (mut transaction, entry) =
            match carry.claim.take().filter(|(at, ..)| *at == batch.after) {
                Some((_, transaction, entry)) => {
                    self.sim.record(Occurrence::ClaimCarried);
                    (transaction, entry)
                }
                None => self.claim(projector, claim).await?,
            };
        transaction.claim(claim);
        if !wanted.is_empty() {
            match transaction.handle(&projector.id, self.release, &wanted).await {
                Ok(()) => {}
                Err(HandlerError::Transient) => return Err(ApplyError::Transient),
                Err(HandlerError::PartiallyCommitted) => return Err(ApplyError::PartiallyApplied),
                Err(HandlerError::Own(error)) => return Err(ApplyError::Projector(error)),
                Err(HandlerError::Panic) => {
                    self.sim.record(Occurrence::Panicked);
                    // Killing the session releases the lock of the row.
                    transaction.roll_back();
                    self.sim.statement(None).await?;
                    return Err(ApplyError::Projector("the handler panicked".into()));
                }
            }
        }
        if self.sim.has(Bug::TwoTransactions) {
            transaction.commit().await?;
            transaction = self.sim.begin();
            transaction.lock(&projector.id).await?;
        }
        transaction.advance(entry, claim, batch.through).await?;
        transaction.commit().await?;
        if carry.should_carry && !wanted.is_empty() {
            carry.claim = self.claim_next(projector, stage, batch.through).await?;
        }
        Ok(())
    }

    /// Claims the next batch, as the engine does in the same packet as the commit. Another process
    /// may lock the row first.
    async fn claim_next(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        at: Position,
    ) -> Result<Option<(Position, Transaction, Entry)>, ApplyError> {
        if self.sim.has(Bug::CarriesUncheckedClaim) {
            let mut transaction = self.sim.begin();
            let locked = transaction.lock(&projector.id).await?;
            return Ok(locked.map(|entry| (at, transaction, entry)));
        }
        match self.claim(projector, Claim { stage, release: self.release, after: at }).await {
            Ok((transaction, entry)) => Ok(Some((at, transaction, entry))),
            Err(ApplyError::ClaimLost(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn claim(
        &self,
        projector: &RegisteredProjector,
        claim: Claim,
    ) -> Result<(Transaction, Entry), ApplyError> {
        let mut transaction = self.sim.begin();
        let Some(entry) = transaction.lock(&projector.id).await? else {
            self.sim.record(Occurrence::RowGone);
            return Err(ApplyError::ClaimLost(None));
        };
        if !self.is_claimable(projector, &entry, claim) {
            self.sim.record(if entry.rebuild_reason.is_some() {
                Occurrence::MustBeRebuilt
            } else if !claim.stage.can_apply(&entry.status) {
                Occurrence::StaleStatus
            } else if !entry.matches_digest(&projector.digest) {
                Occurrence::StaleDefinition
            } else {
                Occurrence::StalePosition
            });
            return Err(ApplyError::ClaimLost(Some(Box::new(entry))));
        }
        transaction.claim(claim);
        Ok((transaction, entry))
    }

    /// The fence, which `ledger::Claim` checks in SQL.
    fn is_claimable(&self, projector: &RegisteredProjector, entry: &Entry, claim: Claim) -> bool {
        let has = |bug| self.sim.has(bug);
        if !entry.matches_digest(&projector.digest) && !has(Bug::PlaysAnotherDefinition) {
            return false;
        }
        if entry.rebuild_reason.is_some() && !has(Bug::ReappliesPartialBatch) {
            return false;
        }
        if has(Bug::NoStatusFence) || (has(Bug::PlaysNonLive) && claim.stage == Stage::Play) {
            return entry.position == claim.after;
        }
        if has(Bug::NoPositionFence) {
            return claim.stage.can_apply(&entry.status);
        }
        claim.stage.can_apply(&entry.status) && entry.position == claim.after
    }

    pub(super) async fn apply_with_retry(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
    ) -> ApplyOutcome {
        self.apply_with_retry_and_carry(projector, stage, batch, &mut ClaimCarry::default()).await
    }

    async fn apply_with_retry_and_carry(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
        carry: &mut ClaimCarry,
    ) -> ApplyOutcome {
        if projector.needs_transaction_per_event() {
            return Box::pin(self.apply_each_event(projector, stage, batch)).await;
        }
        match self.apply_whole_batch(projector, stage, batch, carry).await {
            Ok(outcome) => outcome,
            // Boxed because it is rare: unboxed, it would enlarge the future of every batch.
            Err(failed) => Box::pin(self.isolate_failure(projector, stage, batch, failed)).await,
        }
    }

    async fn apply_each_event(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
    ) -> ApplyOutcome {
        let carry = &mut ClaimCarry::default();
        let mut position = batch.after;
        let mut wanted = batch.wanted(projector).peekable();
        loop {
            let event = wanted.next();
            let end =
                event.filter(|_| wanted.peek().is_some()).map_or(batch.through, Event::position);
            if let Some(step) = batch.between(position, end) {
                self.sim.record(Occurrence::EventByEvent);
                let outcome = match self.apply_whole_batch(projector, stage, step, carry).await {
                    Ok(outcome) => outcome,
                    Err(failed) => self.isolate_failure(projector, stage, step, failed).await,
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

    async fn apply_whole_batch(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        mut batch: Batch<'_>,
        carry: &mut ClaimCarry,
    ) -> Result<ApplyOutcome, String> {
        let began = self.sim.now();
        loop {
            match self.apply(projector, stage, batch, carry).await {
                Ok(()) => return Ok(ApplyOutcome::Reached(batch.through)),
                Err(ApplyError::Projector(error)) => return Err(error),
                Err(ApplyError::PartiallyApplied) if self.sim.has(Bug::ReappliesPartialBatch) => {
                    self.sim.back_off().await
                }
                Err(ApplyError::PartiallyApplied) => {
                    let error = "the handler committed a part of the batch";
                    return Ok(self.mark_broken_for_rebuild(projector, stage, error).await);
                }
                Err(ApplyError::ClaimLost(Some(entry)))
                    if must_be_rebuilt(&entry, stage)
                        && !self.sim.has(Bug::ReappliesPartialBatch) =>
                {
                    let reason = entry.rebuild_reason.unwrap_or_default();
                    return Ok(self.mark_broken_for_rebuild(projector, stage, &reason).await);
                }
                Err(ApplyError::ClaimLost(entry)) => {
                    match resolve_lost_claim(entry.as_deref(), projector, stage, batch) {
                        Ok(rest) => batch = rest,
                        Err(outcome) => return Ok(outcome),
                    }
                }
                Err(ApplyError::Transient) => {
                    if self.is_retry_timeout_over(began) {
                        return Ok(ApplyOutcome::GaveUp("transient".into()));
                    }
                    self.sim.back_off().await;
                }
            }
        }
    }

    async fn isolate_failure(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        batch: Batch<'_>,
        failed: String,
    ) -> ApplyOutcome {
        self.sim.record(Occurrence::Isolated);
        let carry = &mut ClaimCarry::default();
        let wanted: Vec<&Event> = batch.wanted(projector).collect();
        if let [event] = wanted[..] {
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
                    self.mark_broken(projector, stage, Some(event), &failed).await
                }
                Ok(outcome) => outcome,
                Err(error) => self.mark_broken(projector, stage, Some(event), &error).await,
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
                    Err(_) if self.sim.has(Bug::SkipsFailingEvent) => {
                        let nothing = Batch { events: &[], ..step };
                        return self
                            .apply_whole_batch(projector, stage, nothing, carry)
                            .await
                            .unwrap_or(ApplyOutcome::TakenOver);
                    }
                    Err(error) => {
                        return self.mark_broken(projector, stage, Some(event), &error).await;
                    }
                }
            }
        }
        self.sim.record(Occurrence::FlakyPassedAlone);
        match batch.above(position) {
            Some(rest) if rest.after < rest.through => self
                .apply_whole_batch(projector, stage, rest, carry)
                .await
                .unwrap_or(ApplyOutcome::MovedByOther(position)),
            _ => ApplyOutcome::Reached(position),
        }
    }

    pub(super) async fn mark_broken_for_rebuild(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        reason: &str,
    ) -> ApplyOutcome {
        self.mark_broken_with(projector, stage, None, reason, Some(reason.to_owned())).await
    }

    pub(super) async fn mark_broken(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        event: Option<&Event>,
        error: &str,
    ) -> ApplyOutcome {
        self.mark_broken_with(projector, stage, event, error, None).await
    }

    async fn mark_broken_with(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        event: Option<&Event>,
        error: &str,
        rebuild_reason: Option<String>,
    ) -> ApplyOutcome {
        let failed = |event: &Event| FailedEvent {
            position: event.position(),
            event_id: event.event_id().to_owned(),
            event_type: event.event_type().to_owned(),
        };
        let at = time::OffsetDateTime::UNIX_EPOCH;
        let failure = Failure {
            event: event.map(failed),
            error: error.to_owned(),
            at,
            attempts: 1,
            release: None,
            host: "simulation".into(),
            rebuild_reason,
        };
        let before = event.map(|event| event.position().previous());
        loop {
            let still = |entry: &Entry| may_mark_broken(entry, projector, stage, before);
            match self
                .sim
                .ledger_transition(&projector.id, Transition::Break(failure.clone()), still)
                .await
            {
                Ok(Some(entry))
                    if entry
                        .status
                        .failure()
                        .is_some_and(|written| written.error == failure.error) =>
                {
                    self.sim.record(if stage == Stage::Play {
                        Occurrence::BrokeInPlay
                    } else {
                        Occurrence::BrokeInBoot
                    });
                    if failure.rebuild_reason.is_some() {
                        self.sim.record(Occurrence::BrokeForRebuild);
                    }
                    self.sim.trace(|| format!("{} is broken: {error}", projector.id));
                    return ApplyOutcome::Broken;
                }
                Ok(Some(entry))
                    if stage.can_apply(&entry.status)
                        && entry.matches_digest(&projector.digest) =>
                {
                    return ApplyOutcome::MovedByOther(entry.position);
                }
                Ok(_) | Err(None) => return ApplyOutcome::TakenOver,
                Err(Some(_)) => self.sim.back_off().await,
            }
        }
    }

    /// Applies the log to every running cursor up to `through`.
    pub(super) async fn catch_up(
        &self,
        stage: Stage,
        cursors: &mut [Cursor],
        through: Position,
    ) -> Result<(), DatabaseError> {
        let stopped_boot =
            |cursors: &[Cursor]| cursors.iter().filter(|cursor| cursor.should_stop_boot()).count();
        let stopped_before = stopped_boot(cursors);
        let mut carry = ClaimCarry::default();
        while let Some(lowest) = lowest_behind(cursors, through) {
            let mut page = self.read(lowest, through).await?;
            let is_wanted = |event: &Event| {
                cursors.iter().any(|c| c.is_running() && c.projector.subscribes_to(event))
            };
            page.events.retain(is_wanted);
            carry.should_carry = page.through < through && may_carry(stage, cursors);
            for cursor in cursors.iter_mut() {
                let Some(batch) = cursor.batch(&page) else { continue };
                let projector = Arc::clone(&cursor.projector);
                cursor.record(
                    self.apply_with_retry_and_carry(&projector, stage, batch, &mut carry).await,
                );
            }
            if stage == Stage::Boot && stopped_boot(cursors) > stopped_before {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn read(&self, after: Position, through: Position) -> Result<Page, DatabaseError> {
        let began = self.sim.now();
        loop {
            match self.sim.read_after(after, through, self.batch).await {
                Ok(page) => return Ok(page),
                Err(error) if self.is_retry_timeout_over(began) => return Err(error),
                Err(_) => self.sim.back_off().await,
            }
        }
    }

    pub(super) fn is_retry_timeout_over(&self, began: Tick) -> bool {
        self.retry_timeout.is_some_and(|retry_timeout| self.sim.now() - began >= retry_timeout)
    }
}

/// The rule of `Engine::may_carry`.
fn may_carry(stage: Stage, cursors: &[Cursor]) -> bool {
    let mut running = cursors.iter().filter(|cursor| cursor.is_running());
    match (running.next(), running.next()) {
        (Some(alone), None) => {
            stage == Stage::Boot && !alone.projector.needs_transaction_per_event()
        }
        _ => false,
    }
}
