//! A scheduled invocation: publishes the log, and catches up what the queue does not feed.

use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::time::timeout;

use crate::engine::play::{Deadline, OutageLog, Worker};
use crate::engine::relay::Relay;
use crate::model::error::Error;
use crate::model::event::Position;
use crate::model::lifecycle::Status;
use crate::model::projector::ProjectorId;

/// How often it is looked whether all is done.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// And how often once it was, while publishing goes on.
const IDLE_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How long the relay's lease may take to be given up: it runs out by itself.
const LEASE_RELEASE_TIMEOUT: Duration = Duration::from_millis(500);

/// What a scheduled invocation answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    /// Events that were published meanwhile.
    events: u64,
    /// Everything up to here has been published.
    published: u64,
    /// The high-water mark.
    high_water: u64,
    /// Live projectors that are not yet where the mark was when it began. The next invocation goes
    /// on with them.
    lagging: Vec<String>,
    /// Live projectors of the set that were booted with another definition than this function has:
    /// it does not play them.
    outdated: Vec<String>,
    /// Projectors of the set that are broken.
    broken: Vec<String>,
    /// How often a message was received that is not of this log, by any worker or function, since
    /// the log was made.
    foreign_messages: u64,
}

/// One look at log and ledger.
struct Snapshot {
    published: Position,
    high_water: Position,
    live: Vec<(ProjectorId, Position)>,
    /// Live projectors that this function does not play: they were booted with another definition.
    outdated: Vec<ProjectorId>,
    broken: Vec<ProjectorId>,
    foreign_messages: u64,
}

/// What is known so far.
#[derive(Default)]
struct ScheduledRun {
    /// The first look: what is to be done.
    first: Option<Snapshot>,
    last: Option<Snapshot>,
    /// Why there was no look, the last time.
    error: Option<sqlx::Error>,
    outage_log: OutageLog,
}

/// Publishes until what was in the log at the beginning is published, and for `relay_for` at least;
/// and meanwhile catches up from the store the live projectors that stand still below the mark.
/// Ends when all of them are where the mark was at the beginning, or at the deadline. Nothing runs
/// on afterwards, and the relay's lease is given up.
///
/// # Errors
/// If the database is out of reach all the time, or nothing can be published.
pub(crate) async fn relay_and_reconcile(
    worker: &mut Worker,
    mut relay: Relay,
    relay_for: Duration,
    deadline: &Deadline,
) -> Result<Summary, Error> {
    let mut run = ScheduledRun::default();
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
    /// Looks again and again, and reconciles.
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

    /// Looks once, and says whether all is done.
    async fn poll(&mut self, worker: &Worker) -> bool {
        match read_snapshot(worker).await {
            Ok(snapshot) => {
                self.outage_log.record_recovery("the database works again");
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
                    self.outage_log.record_failure("cannot look at the log, trying again", &error),
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
                Error::Database,
            ));
        };
        let target = first.high_water;
        let before = first.published;
        let last = self.last.unwrap_or(first);
        if !is_done && before < target && last.published == before {
            return Err(Error::Unreachable(format!(
                "nothing of what is in the log after position {before}, through {target}, could be published; the log lines before \
                 this say why"
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
            foreign_messages: last.foreign_messages,
        })
    }
}

async fn read_snapshot(worker: &Worker) -> Result<Snapshot, sqlx::Error> {
    let (mut live, mut outdated, mut broken) = (Vec::new(), Vec::new(), Vec::new());
    let (marks, queue) =
        tokio::try_join!(worker.engine.store.marks(), worker.engine.store.queue_record())?;
    for entry in worker.entries().await? {
        match entry.status {
            Status::Live if worker.outdated().contains(&entry.id) => outdated.push(entry.id),
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
        foreign_messages,
    })
}
