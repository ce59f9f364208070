//! The mirror of `apply.rs`, `deliver.rs` and `catch_up.rs`. Projectors take a page one after the other here, not
//! side by side: they share nothing but the log.

use std::sync::Arc;

use crate::engine::apply::Batch;
use crate::engine::catch_up::{Cursor, lowest_due};
use crate::engine::deliver::{Delivered, may_break, must_be_rebuilt, without_claim};
use crate::ledger::Entry;
use crate::model::event::{Event, Position};
use crate::model::lifecycle::{FailedEvent, Failure, Stage, Status, Step};
use crate::model::registry::{Registered, Registry};
use crate::simulation::bug::Bug;
use crate::simulation::cast::Release;
use crate::simulation::invariants::Claim;
use crate::simulation::seen::Seen;
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
    /// How long what is transient is tried again; `None`: for as long as it takes.
    pub(super) patience: Option<Tick>,
}

/// Why a batch was not applied. Nothing of it was, but for `Stored`.
enum ApplyError {
    Claim(Option<Box<Entry>>),
    Projector(String),
    Transient,
    /// A part of it is, without the position.
    Stored,
}

impl From<DatabaseError> for ApplyError {
    fn from(_: DatabaseError) -> Self {
        ApplyError::Transient
    }
}

/// A claim from batch to batch, as `apply::Hold` has it.
#[derive(Default)]
struct Hold {
    goes_on: bool,
    claim: Option<(Position, Transaction, Entry)>,
}

impl Engine {
    async fn apply(
        &self,
        projector: &Registered,
        stage: Stage,
        batch: Batch<'_>,
        hold: &mut Hold,
    ) -> Result<(), ApplyError> {
        let wanted: Vec<&Event> = batch.wanted(projector).collect();
        let claim = Claim { stage, release: self.release, after: batch.after };
        let (mut transaction, entry) = match hold.claim.take().filter(|(at, ..)| *at == batch.after) {
            Some((_, transaction, entry)) => {
                self.sim.saw(Seen::HeldOn);
                (transaction, entry)
            }
            None => self.claim(projector, claim).await?,
        };
        transaction.claim(claim);
        if !wanted.is_empty() {
            match transaction.handle(&projector.id, self.release, &wanted).await {
                Ok(()) => {}
                Err(HandlerError::Transient) => return Err(ApplyError::Transient),
                Err(HandlerError::Stored) => return Err(ApplyError::Stored),
                Err(HandlerError::Own(error)) => return Err(ApplyError::Projector(error)),
                Err(HandlerError::Panic) => {
                    self.sim.saw(Seen::Panicked);
                    // The session is killed, so that the row's lock is free.
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
        if hold.goes_on && !wanted.is_empty() {
            hold.claim = self.claim_next(projector, stage, batch.through).await?;
        }
        Ok(())
    }

    /// The claim that travels behind a commit, in the same packet. Others may have the row first.
    async fn claim_next(
        &self,
        projector: &Registered,
        stage: Stage,
        at: Position,
    ) -> Result<Option<(Position, Transaction, Entry)>, ApplyError> {
        if self.sim.has(Bug::HoldsUnseen) {
            let mut transaction = self.sim.begin();
            let locked = transaction.lock(&projector.id).await?;
            return Ok(locked.map(|entry| (at, transaction, entry)));
        }
        match self.claim(projector, Claim { stage, release: self.release, after: at }).await {
            Ok((transaction, entry)) => Ok(Some((at, transaction, entry))),
            Err(ApplyError::Claim(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn claim(&self, projector: &Registered, claim: Claim) -> Result<(Transaction, Entry), ApplyError> {
        let mut transaction = self.sim.begin();
        let Some(entry) = transaction.lock(&projector.id).await? else {
            self.sim.saw(Seen::RowGone);
            return Err(ApplyError::Claim(None));
        };
        if !self.holds(projector, &entry, claim) {
            self.sim.saw(match claim.stage.plays(&entry.status) {
                _ if entry.rebuild_reason.is_some() => Seen::MustBeRebuilt,
                false => Seen::StaleStatus,
                true if !entry.is_booted_with(&projector.digest) => Seen::StaleDefinition,
                true => Seen::StalePosition,
            });
            return Err(ApplyError::Claim(Some(Box::new(entry))));
        }
        transaction.claim(claim);
        Ok((transaction, entry))
    }

    /// The fence, as `ledger::Claim` has it in SQL.
    fn holds(&self, projector: &Registered, entry: &Entry, claim: Claim) -> bool {
        let has = |bug| self.sim.has(bug);
        if !entry.is_booted_with(&projector.digest) && !has(Bug::PlaysAnotherDefinition) {
            return false;
        }
        if entry.rebuild_reason.is_some() && !has(Bug::AppliesAfterAPart) {
            return false;
        }
        if has(Bug::NoStatusFence) || (has(Bug::PlaysWhatIsNotLive) && claim.stage == Stage::Play) {
            return entry.position == claim.after;
        }
        if has(Bug::NoPositionFence) {
            return claim.stage.plays(&entry.status);
        }
        claim.stage.plays(&entry.status) && entry.position == claim.after
    }

    pub(super) async fn deliver(&self, projector: &Registered, stage: Stage, batch: Batch<'_>) -> Delivered {
        self.deliver_on(projector, stage, batch, &mut Hold::default()).await
    }

    async fn deliver_on(&self, projector: &Registered, stage: Stage, batch: Batch<'_>, hold: &mut Hold) -> Delivered {
        if projector.goes_event_by_event() {
            return Box::pin(self.deliver_each(projector, stage, batch)).await;
        }
        match self.attempt(projector, stage, batch, hold).await {
            Ok(delivered) => delivered,
            // In a box: it is rare, and would make every delivery as large as itself.
            Err(failed) => Box::pin(self.isolate(projector, stage, batch, failed)).await,
        }
    }

    async fn deliver_each(&self, projector: &Registered, stage: Stage, batch: Batch<'_>) -> Delivered {
        let hold = &mut Hold::default();
        let mut position = batch.after;
        let mut wanted = batch.wanted(projector).peekable();
        loop {
            let event = wanted.next();
            let end = event.filter(|_| wanted.peek().is_some()).map_or(batch.through, Event::position);
            if let Some(step) = batch.part(position, end) {
                self.sim.saw(Seen::EventByEvent);
                let delivered = match self.attempt(projector, stage, step, hold).await {
                    Ok(delivered) => delivered,
                    Err(failed) => self.isolate(projector, stage, step, failed).await,
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

    async fn attempt(
        &self,
        projector: &Registered,
        stage: Stage,
        mut batch: Batch<'_>,
        hold: &mut Hold,
    ) -> Result<Delivered, String> {
        let began = self.sim.now();
        loop {
            match self.apply(projector, stage, batch, hold).await {
                Ok(()) => return Ok(Delivered::At(batch.through)),
                Err(ApplyError::Projector(error)) => return Err(error),
                Err(ApplyError::Stored) if self.sim.has(Bug::AppliesAfterAPart) => self.sim.back_off().await,
                Err(ApplyError::Stored) => {
                    let error = "the handler committed a part of the batch";
                    return Ok(self.break_for_rebuild(projector, stage, error).await);
                }
                Err(ApplyError::Claim(Some(entry)))
                    if must_be_rebuilt(&entry, stage) && !self.sim.has(Bug::AppliesAfterAPart) =>
                {
                    let reason = entry.rebuild_reason.unwrap_or_default();
                    return Ok(self.break_for_rebuild(projector, stage, &reason).await);
                }
                Err(ApplyError::Claim(entry)) => match without_claim(entry.as_deref(), projector, stage, batch) {
                    Ok(rest) => batch = rest,
                    Err(delivered) => return Ok(delivered),
                },
                Err(ApplyError::Transient) => {
                    if self.is_out_of_patience(began) {
                        return Ok(Delivered::GaveUp("transient".into()));
                    }
                    self.sim.back_off().await;
                }
            }
        }
    }

    async fn isolate(&self, projector: &Registered, stage: Stage, batch: Batch<'_>, failed: String) -> Delivered {
        self.sim.saw(Seen::Isolated);
        let hold = &mut Hold::default();
        let wanted: Vec<&Event> = batch.wanted(projector).collect();
        if let [event] = wanted[..] {
            return match self.attempt(projector, stage, batch.until(event.position().previous()), hold).await {
                Ok(Delivered::At(_)) => self.break_at(projector, stage, Some(event), &failed).await,
                Ok(delivered) => delivered,
                Err(error) => self.break_at(projector, stage, Some(event), &error).await,
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
                    Err(_) if self.sim.has(Bug::SkipsTheFailing) => {
                        let nothing = Batch { events: &[], ..step };
                        return self.attempt(projector, stage, nothing, hold).await.unwrap_or(Delivered::Left);
                    }
                    Err(error) => return self.break_at(projector, stage, Some(event), &error).await,
                }
            }
        }
        self.sim.saw(Seen::FlakyPassedAlone);
        match batch.from(position) {
            Some(rest) if rest.after < rest.through => {
                self.attempt(projector, stage, rest, hold).await.unwrap_or(Delivered::Elsewhere(position))
            }
            _ => Delivered::At(position),
        }
    }

    pub(super) async fn break_for_rebuild(&self, projector: &Registered, stage: Stage, reason: &str) -> Delivered {
        self.break_with(projector, stage, None, reason, Some(reason.to_owned())).await
    }

    pub(super) async fn break_at(
        &self,
        projector: &Registered,
        stage: Stage,
        event: Option<&Event>,
        error: &str,
    ) -> Delivered {
        self.break_with(projector, stage, event, error, None).await
    }

    async fn break_with(
        &self,
        projector: &Registered,
        stage: Stage,
        event: Option<&Event>,
        error: &str,
        rebuild: Option<String>,
    ) -> Delivered {
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
            rebuild,
        };
        let before = event.map(|event| event.position().previous());
        loop {
            let still = |entry: &Entry| may_break(entry, projector, stage, before);
            match self.sim.ledger_step(&projector.id, Step::Break(failure.clone()), still).await {
                Ok(Some(entry)) if matches!(&entry.status, Status::Broken(written) if written.error == failure.error) =>
                {
                    self.sim.saw(if stage == Stage::Play { Seen::BrokeInPlay } else { Seen::BrokeInBoot });
                    if failure.rebuild.is_some() {
                        self.sim.saw(Seen::BrokeForRebuild);
                    }
                    self.sim.note(|| format!("{} is broken: {error}", projector.id));
                    return Delivered::Broke;
                }
                Ok(Some(entry)) if stage.plays(&entry.status) && entry.is_booted_with(&projector.digest) => {
                    return Delivered::Elsewhere(entry.position);
                }
                Ok(_) | Err(None) => return Delivered::Left,
                Err(Some(_)) => self.sim.back_off().await,
            }
        }
    }

    /// Brings every running cursor to `through`.
    pub(super) async fn catch_up(
        &self,
        stage: Stage,
        cursors: &mut [Cursor],
        through: Position,
    ) -> Result<(), DatabaseError> {
        let stopped_boot = |cursors: &[Cursor]| cursors.iter().filter(|cursor| cursor.has_stopped_boot()).count();
        let stopped_before = stopped_boot(cursors);
        let mut hold = Hold::default();
        while let Some(lowest) = lowest_due(cursors, through) {
            let mut page = self.read(lowest, through).await?;
            let is_wanted = |event: &Event| cursors.iter().any(|c| c.is_running() && c.projector.wants(event));
            page.events.retain(is_wanted);
            hold.goes_on = page.through < through && may_hold(stage, cursors);
            for cursor in cursors.iter_mut() {
                let Some(batch) = cursor.batch(&page) else { continue };
                let projector = Arc::clone(&cursor.projector);
                cursor.note(self.deliver_on(&projector, stage, batch, &mut hold).await);
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
                Err(error) if self.is_out_of_patience(began) => return Err(error),
                Err(_) => self.sim.back_off().await,
            }
        }
    }

    pub(super) fn is_out_of_patience(&self, began: Tick) -> bool {
        self.patience.is_some_and(|patience| self.sim.now() - began >= patience)
    }
}

/// As `Engine::may_hold` has it.
fn may_hold(stage: Stage, cursors: &[Cursor]) -> bool {
    let mut running = cursors.iter().filter(|cursor| cursor.is_running());
    match (running.next(), running.next()) {
        (Some(alone), None) => stage == Stage::Boot && !alone.projector.goes_event_by_event(),
        _ => false,
    }
}
