//! Mirrors `engine/play/`: receive, fan out, delete. Reconciles when the queue is silent.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use super::Ended;
use super::engine::Engine;
use super::high_water::raise_high_water;
use crate::engine::apply::Batch;
use crate::engine::catch_up::Cursor;
use crate::engine::play::fan_out::{Need, SortedMessages, next_need, sort_messages};
use crate::engine::play::foreign::claimed_positions;
use crate::engine::play::reconcile::Reconciler;
use crate::ledger::Entry;
use crate::model::continuity::Run;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status};
use crate::model::projector::ProjectorId;
use crate::model::registry::Registry;
use crate::queue::ForeignReason;
use crate::simulation::bug::Bug;
use crate::simulation::occurrence::Occurrence;
use crate::simulation::projectors::Release;
use crate::simulation::queue::{Receipt, ReceivedMessage, VISIBILITY_TIMEOUT};
use crate::simulation::statements::{DatabaseError, log};
use crate::simulation::world::{ProcessId, Sim, Tick};

const RECEIVE_WAIT: Tick = 10;
const RECONCILE_AFTER: Duration = Duration::from_secs(10);

struct Worker {
    number: u64,
    engine: Engine,
    reconcile: Reconciler,
    /// The live projectors at the last fan-out.
    live: Vec<ProjectorId>,
}

/// Plays until it is killed.
pub(in crate::simulation) async fn play(
    sim: Sim,
    number: u64,
    release: Release,
    registry: Registry,
) -> Ended {
    let batch = sim.world().rng.u64(1..=4);
    let engine = Engine { sim, registry, release, batch, retry_timeout: None };
    let mut worker = Worker { number, engine, reconcile: Reconciler::default(), live: Vec::new() };
    loop {
        match worker.engine.sim.receive(RECEIVE_WAIT).await {
            Ok(received) => worker.process_batch(received).await,
            Err(_) => {
                worker.engine.sim.back_off().await;
                worker.reconcile().await;
            }
        }
    }
}

impl Worker {
    async fn process_batch(&mut self, received: Vec<ReceivedMessage>) {
        if received.is_empty() {
            return self.reconcile().await;
        }
        let receipts: Vec<Receipt> = received.iter().map(|message| message.receipt).collect();
        let bodies: Vec<String> = received.iter().map(|message| message.body.to_string()).collect();
        let sim = self.engine.sim.clone();
        if sim.has(Bug::DeletesBeforeCommit) {
            let _ = sim.delete(&receipts, self.engine.release).await;
        }
        let verdicts = keep_hidden(&sim, &receipts, self.fan_out_with_retry(&bodies)).await;
        let is_deleted = |at: &usize| verdicts[*at].is_none() || sim.has(Bug::DeletesForeign);
        let (ours, foreign): (Vec<usize>, Vec<usize>) = (0..receipts.len()).partition(is_deleted);
        if ours.is_empty() {
            sim.record(Occurrence::OnlyForeign);
            sim.hide(&foreign.iter().map(|&at| receipts[at]).collect::<Vec<_>>(), 0);
            sim.back_off().await;
            return self.reconcile().await;
        }
        // If the deletion fails, the messages come again and are skipped by their positions.
        // Foreign messages stay hidden for a while.
        let _ = sim
            .delete(&ours.iter().map(|&at| receipts[at]).collect::<Vec<_>>(), self.engine.release)
            .await;
        if self.reconcile.is_due(sim.world().instant()) {
            self.reconcile().await;
        }
    }

    async fn fan_out_with_retry(&mut self, bodies: &[String]) -> Vec<Option<ForeignReason>> {
        loop {
            match self.fan_out(bodies).await {
                Ok(verdicts) => return verdicts,
                Err(_) if self.engine.sim.has(Bug::DeletesDespiteError) => {
                    return vec![None; bodies.len()];
                }
                Err(_) => self.engine.sim.back_off().await,
            }
        }
    }

    async fn fan_out(
        &mut self,
        bodies: &[String],
    ) -> Result<Vec<Option<ForeignReason>>, DatabaseError> {
        let sim = self.engine.sim.clone();
        let entries = sim.entries().await?;
        let view = sim.view(&claimed_positions(bodies)).await?;
        self.count_joined(&entries);
        if sim.has(Bug::WaitsForBroken)
            && entries.iter().any(|entry| entry.status.failure().is_some())
        {
            return Err(DatabaseError::ConnectionLost);
        }
        let SortedMessages { mut runs, has_references, foreign } = sort_messages(bodies, &view);
        if sim.has(Bug::AppliesUnsigned) {
            runs = sort_messages(
                &bodies.iter().map(|body| sign_again(body)).collect::<Vec<_>>(),
                &view,
            )
            .runs;
        }
        if runs.is_empty() && !has_references {
            return Ok(foreign);
        }
        let target = if has_references {
            sim.record(Occurrence::ReadReference);
            Some(Box::pin(raise_high_water(&sim)).await?.mark)
        } else {
            None
        };
        let registry = self.engine.registry.clone();
        for projector in registry.iter() {
            let Some(entry) =
                entries.iter().find(|entry| entry.id == projector.id && self.is_playable(entry))
            else {
                continue;
            };
            if self.is_in_background(&entry.id) {
                continue;
            }
            let mut cursor = Cursor::new(projector, entry.position);
            let processed = {
                let work = pin!(self.process(&mut cursor, &runs, target));
                Deadline { sim: &sim, work }.await
            };
            match processed {
                Some(processed) => processed?,
                None => self.move_to_background(cursor),
            }
        }
        Ok(foreign)
    }

    async fn process(
        &self,
        cursor: &mut Cursor,
        runs: &[Run],
        target: Option<Position>,
    ) -> Result<(), DatabaseError> {
        for run in runs {
            self.process_run(cursor, run).await?;
        }
        match target {
            Some(target) => self.catch_up_from_store(cursor, target).await,
            None => Ok(()),
        }
    }

    /// Whether a projector catches up in the background of this worker.
    fn is_in_background(&self, id: &ProjectorId) -> bool {
        self.engine
            .sim
            .world()
            .in_background
            .iter()
            .any(|(worker, projector)| *worker == self.number && projector == id)
    }

    /// Moves a projector to the background, where it catches up.
    fn move_to_background(&self, cursor: Cursor) {
        let sim = &self.engine.sim;
        sim.record(Occurrence::MovedToBackground);
        sim.trace(|| {
            format!("{} moves to the background at {}", cursor.projector.id, cursor.position)
        });
        let mut world = sim.world();
        world.in_background.push((self.number, cursor.projector.id.clone()));
        if world.bug != Some(Bug::ForgetsBackgroundCatchUp) {
            let process_id = ProcessId::Straggler(self.number, self.engine.release);
            world.spawned.push((
                process_id,
                Box::pin(catch_up_in_background(self.engine.clone(), self.number, cursor)),
            ));
        }
    }

    fn is_playable(&self, entry: &Entry) -> bool {
        let has = |bug| self.engine.sim.has(bug);
        let is_live = entry.status == Status::Live || has(Bug::PlaysNonLive);
        let projector = self.engine.registry.get(&entry.id);
        let is_outdated =
            projector.is_some_and(|projector| !entry.matches_digest(&projector.digest));
        if is_live && is_outdated {
            self.engine.sim.record(Occurrence::OutdatedDefinition);
        }
        is_live && (!is_outdated || has(Bug::PlaysAnotherDefinition))
    }

    async fn process_run(&self, cursor: &mut Cursor, run: &Run) -> Result<(), DatabaseError> {
        loop {
            let next = match next_need(cursor, run, self.engine.batch) {
                Need::CatchUp if self.applies_despite_gap(cursor, run) => Need::Batch(Batch {
                    after: cursor.position,
                    through: run.last(),
                    events: run.above(cursor.position),
                }),
                need => need,
            };
            match next {
                Need::Nothing => {
                    self.engine.sim.record(Occurrence::RunSkipped);
                    return Ok(());
                }
                Need::Batch(batch) => {
                    self.engine.sim.record(Occurrence::AppliedFromQueue);
                    let projector = std::sync::Arc::clone(&cursor.projector);
                    cursor
                        .record(self.engine.apply_with_retry(&projector, Stage::Play, batch).await);
                }
                Need::CatchUp => {
                    self.engine.sim.record(Occurrence::CaughtUp);
                    self.catch_up_from_store(cursor, run.last()).await?;
                }
            }
        }
    }

    /// Whether a deliberate bug applies this run although it does not continue from the position.
    fn applies_despite_gap(&self, cursor: &Cursor, run: &Run) -> bool {
        let sim = &self.engine.sim;
        sim.has(Bug::TrustsTheQueue)
            || sim.has(Bug::CatchesUpOneTooLate) && run.prev() == cursor.position.next()
    }

    async fn catch_up_from_store(
        &self,
        cursor: &mut Cursor,
        through: Position,
    ) -> Result<(), DatabaseError> {
        self.engine.catch_up(Stage::Play, std::slice::from_mut(cursor), through).await
    }

    async fn reconcile(&mut self) {
        if !self.engine.sim.has(Bug::NeverReconciles)
            && !self.engine.sim.has(Bug::PublishedBeforeSent)
        {
            // After a database error, the next call of `reconcile` tries again.
            let _ = self.try_reconcile().await;
        }
    }

    async fn try_reconcile(&mut self) -> Result<(), DatabaseError> {
        let sim = self.engine.sim.clone();
        let mark = raise_high_water(&sim).await?.mark;
        let entries = sim.entries().await?;
        let live: Vec<(ProjectorId, Position)> = entries
            .into_iter()
            .filter(|entry| {
                entry.status == Status::Live && self.engine.registry.get(&entry.id).is_some()
            })
            .filter(|entry| self.is_playable(entry))
            .map(|entry| (entry.id, entry.position))
            .filter(|(id, _)| !self.is_in_background(id))
            .collect();
        let now = sim.world().instant();
        let overdue = self.reconcile.find_overdue(now, &live, mark, RECONCILE_AFTER);
        for (id, position) in live.into_iter().filter(|(id, _)| overdue.contains(id)) {
            let Some(projector) = self.engine.registry.get(&id) else { continue };
            sim.record(Occurrence::Reconciled);
            sim.trace(|| {
                format!("reconciles {id}: it stays at {position}, and the mark is {mark}")
            });
            self.move_to_background(Cursor::new(projector, position));
        }
        Ok(())
    }

    /// Records when a projector joined while the worker was running.
    fn count_joined(&mut self, entries: &[Entry]) {
        let live: Vec<ProjectorId> = entries
            .iter()
            .filter(|entry| {
                entry.status == Status::Live && self.engine.registry.get(&entry.id).is_some()
            })
            .map(|entry| entry.id.clone())
            .collect();
        if !self.live.is_empty() && live.iter().any(|id| !self.live.contains(id)) {
            self.engine.sim.record(Occurrence::JoinedWithoutRestart);
        }
        self.live = live;
    }
}

/// Catches up a projector in the background until it is near the mark, breaks or is taken over.
/// Then it is readmitted.
async fn catch_up_in_background(engine: Engine, worker: u64, mut cursor: Cursor) -> Ended {
    let sim = engine.sim.clone();
    let start_mark = sim.world().database.high_water;
    while cursor.is_running() {
        let start = cursor.position;
        let round = async {
            let mark = raise_high_water(&sim).await?.mark;
            let through =
                if sim.has(Bug::ReadmitsTooEarly) { mark.min(start.next()) } else { mark };
            engine.catch_up(Stage::Play, std::slice::from_mut(&mut cursor), through).await?;
            Ok::<_, DatabaseError>(through.since(start))
        };
        match round.await {
            // The last round was short, so the next messages can continue from here.
            Ok(events) if events <= engine.batch => break,
            Ok(_) => {}
            Err(_) => sim.back_off().await,
        }
    }
    sim.record(Occurrence::Readmitted);
    sim.trace(|| format!("{} is readmitted at {}", cursor.projector.id, cursor.position));
    let mut world = sim.world();
    let clock = world.clock;
    world.in_background.retain(|entry| *entry != (worker, cursor.projector.id.clone()));
    world.readmitted.push((worker, cursor.projector.id.clone(), clock, start_mark));
    drop(world);
    Ended::Done
}

/// Signs a message again, so that its signature is valid. Only a deliberate bug calls this.
fn sign_again(body: &str) -> String {
    let Some((head, text)) =
        body.split_once("\",").filter(|(head, _)| head.starts_with("{\"sig\":\""))
    else {
        return body.to_owned();
    };
    let prefix_length = head.len() - head.trim_start_matches("{\"sig\":\"").len();
    format!("{}{}\",{text}", &head[..prefix_length], log().key.sign(text))
}

/// Runs `work`, which may exceed its deadline at each step. Returns `None` then; uncommitted
/// changes are rolled back.
struct Deadline<'a, F> {
    sim: &'a Sim,
    work: Pin<&'a mut F>,
}

impl<F: Future> Future for Deadline<'_, F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let is_slow = {
            let mut world = self.sim.world();
            let chance = world.chances.slow;
            world.roll(chance)
        };
        if is_slow {
            return Poll::Ready(None);
        }
        self.work.as_mut().poll(context).map(Some)
    }
}

/// Keeps messages hidden while `work` runs. If the process is paused, their visibility may end.
async fn keep_hidden<T>(sim: &Sim, receipts: &[Receipt], work: impl Future<Output = T>) -> T {
    let due = sim.now() + VISIBILITY_TIMEOUT / 3;
    KeepHidden { sim, receipts, due, work: pin!(work) }.await
}

struct KeepHidden<'a, F> {
    sim: &'a Sim,
    receipts: &'a [Receipt],
    due: Tick,
    work: Pin<&'a mut F>,
}

impl<F: Future> Future for KeepHidden<'_, F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let now = self.sim.now();
        if now >= self.due {
            self.due = now + VISIBILITY_TIMEOUT / 3;
            self.sim.hide(self.receipts, VISIBILITY_TIMEOUT);
        }
        self.work.as_mut().poll(context)
    }
}
