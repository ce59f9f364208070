//! A scheduled invocation: publishes the log, and catches up projectors that get no messages.

use std::time::{Duration, Instant};

use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::timeout;

use crate::engine::error::Error;
use crate::engine::play::{Deadline, Worker};
use crate::engine::relay::Relay;
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::Status;
use crate::model::projector::ProjectorId;
use crate::model::wait_log::OutageLog;

/// The pause between two checks whether the work is done.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The pause once the work is done, while publishing continues.
const IDLE_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How long releasing the relay's lease may take. A lease that is not released expires.
const LEASE_RELEASE_TIMEOUT: Duration = Duration::from_millis(500);

/// The response of a scheduled invocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    /// How many events were published during the invocation.
    events: u64,
    /// The position up to which every event has been published.
    published: u64,
    /// The high-water mark.
    high_water: u64,
    /// Live projectors that are below the high-water mark of the invocation's beginning. The next
    /// invocation continues with them.
    lagging: Vec<String>,
    /// Live projectors of the set that were booted with another definition than this function has.
    /// The function does not play them.
    outdated: Vec<String>,
    /// Projectors of the set that are broken.
    broken: Vec<String>,
    /// Live projectors that wait for a later retry of an event. The invocation does not wait for
    /// them.
    retrying: Vec<String>,
    /// How often any worker or function has received a message that is not of this log, since the
    /// log was created.
    foreign_messages: u64,
}

/// The state of log and ledger at one time.
struct Snapshot {
    published: Position,
    high_water: Position,
    live: Vec<(ProjectorId, Position)>,
    /// Live projectors that this function does not play, because they were booted with another
    /// definition.
    outdated: Vec<ProjectorId>,
    broken: Vec<ProjectorId>,
    /// Live projectors whose next attempt at an event is not due yet.
    retrying: Vec<ProjectorId>,
    foreign_messages: u64,
}

/// The state of a scheduled invocation.
#[derive(Default)]
struct ScheduledRun {
    /// The first snapshot. Its high-water mark is the target.
    first: Option<Snapshot>,
    last: Option<Snapshot>,
    /// The error of the last snapshot, if it failed.
    error: Option<sqlx::Error>,
    outage_log: OutageLog,
}

/// Publishes the log, and meanwhile catches up live projectors that do not advance from the store.
/// The target is the high-water mark at the beginning. Ends when every event up to the target is
/// published, every live projector has reached it, and `relay_for` is over; or at the deadline.
/// Afterwards no task runs on, and the relay's lease is released.
///
/// # Errors
/// If the database cannot be reached during the whole invocation, or if no event can be published.
pub(crate) async fn relay_and_reconcile(
    worker: &mut Worker,
    mut relay: Relay,
    relay_for: Duration,
    deadline: &Deadline,
) -> Result<Summary, Error> {
    let mut run = ScheduledRun::default();
    worker.engine.retries.forget_all();
    let is_done = tokio::select! {
        biased;
        () = run.poll_until_done(worker, relay_for) => true,
        () = relay.run() => false,
        () = deadline.reached() => false,
    };
    let _ = timeout(LEASE_RELEASE_TIMEOUT, relay.release_lease()).await;
    worker.shut_down_stragglers(Duration::ZERO, deadline).await;
    run.summary(is_done)
}

impl ScheduledRun {
    /// Reconciles and takes snapshots until the work is done and `relay_for` is over.
    async fn poll_until_done(&mut self, worker: &mut Worker, relay_for: Duration) {
        let began = Instant::now();
        loop {
            worker.reconcile().await;
            let is_done = self.poll(worker).await;
            if is_done && began.elapsed() >= relay_for {
                return;
            }
            tokio::time::sleep(if is_done {
                IDLE_POLL_INTERVAL.min(relay_for)
            } else {
                POLL_INTERVAL
            })
            .await;
        }
    }

    /// Takes a snapshot, and returns whether the work is done.
    async fn poll(&mut self, worker: &Worker) -> bool {
        match read_snapshot(worker).await {
            Ok(snapshot) => {
                self.outage_log.record_recovery("the database can be reached again");
                self.error = None;
                let target =
                    self.first.as_ref().map_or(snapshot.high_water, |first| first.high_water);
                let is_done = snapshot.published >= target
                    && snapshot.live.iter().all(|(_, position)| *position >= target);
                match self.first {
                    Some(_) => self.last = Some(snapshot),
                    None => self.first = Some(snapshot),
                }
                is_done
            }
            Err(error) => {
                tokio::time::sleep(
                    self.outage_log.record_failure("cannot read the log, trying again", &error),
                )
                .await;
                self.error = Some(error);
                false
            }
        }
    }

    fn summary(self, is_done: bool) -> Result<Summary, Error> {
        let Some(first) = self.first else {
            return Err(self.error.map_or_else(
                || Error::Unreachable("the database did not answer in time".into()),
                Error::from,
            ));
        };
        let target = first.high_water;
        let before = first.published;
        let last = self.last.unwrap_or(first);
        if !is_done && before < target && last.published == before {
            return Err(Error::Unreachable(format!(
                "no event after position {before}, through {target}, could be published; the log \
                lines before this one say why"
            )));
        }
        let lagging = last.live.iter().filter(|(_, position)| *position < target);
        Ok(Summary {
            events: last.published.since(before),
            published: last.published.get(),
            high_water: last.high_water.get(),
            lagging: lagging.map(|(id, _)| id.to_string()).collect(),
            outdated: last.outdated.iter().map(ToString::to_string).collect(),
            broken: last.broken.iter().map(ToString::to_string).collect(),
            retrying: last.retrying.iter().map(ToString::to_string).collect(),
            foreign_messages: last.foreign_messages,
        })
    }
}

/// Whether a projector waits for an attempt that is not due yet.
fn is_waiting(entry: &Entry) -> bool {
    entry.retrying.as_ref().is_some_and(|retry| retry.next_attempt > OffsetDateTime::now_utc())
}

async fn read_snapshot(worker: &Worker) -> Result<Snapshot, sqlx::Error> {
    let (mut live, mut outdated, mut broken) = (Vec::new(), Vec::new(), Vec::new());
    let mut retrying = Vec::new();
    let (marks, queue) =
        tokio::try_join!(worker.engine.store.marks(), worker.engine.store.queue_record())?;
    for entry in worker.entries().await? {
        match entry.status {
            Status::Live if worker.outdated().contains(&entry.id) => outdated.push(entry.id),
            Status::Live if is_waiting(&entry) => retrying.push(entry.id),
            Status::Live => live.push((entry.id, entry.position)),
            Status::Broken(_) => broken.push(entry.id),
            _ => {}
        }
    }
    let foreign_messages = queue.foreign_messages;
    Ok(Snapshot {
        published: marks.published,
        high_water: marks.high_water,
        live,
        outdated,
        broken,
        retrying,
        foreign_messages,
    })
}
