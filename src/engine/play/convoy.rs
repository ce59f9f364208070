//! The convoy: the live projectors that are fed in sequence. One that is far behind, or slow, leaves it, catches
//! up on a connection of its own, and joins again by the chain rule, so that it holds up nobody.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tracing::{info, warn};

use crate::database::Database;
use crate::engine::catch_up::{Cursor, CursorState};
use crate::engine::deliver::Engine;
use crate::model::event::Position;
use crate::model::lifecycle::Stage;
use crate::model::metrics;
use crate::model::projector::ProjectorId;
use crate::model::registry::Registered;
use crate::model::retry;

/// How long one projector may hold up the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvoyBudget {
    /// The most events that one projector catches up on while the others wait.
    pub events: u64,
    /// The longest that one projector may take over the messages of one receive. What it has not committed by
    /// then is rolled back and done again outside the convoy.
    pub time: Duration,
}

impl Default for ConvoyBudget {
    fn default() -> Self {
        ConvoyBudget { events: 10_000, time: Duration::from_secs(5) }
    }
}

/// The projectors that have left the convoy, each with the task that catches it up. Dropped, they end; nothing that was not
/// committed is applied then: the next worker takes it up.
pub(super) struct Stragglers {
    tasks: JoinSet<CursorState>,
    outside: HashMap<ProjectorId, AbortHandle>,
    /// Whether they are to end with the page in hand.
    stop: watch::Sender<bool>,
    /// How many catch up at once.
    room: Arc<Semaphore>,
}

impl Stragglers {
    /// For a worker with this database. Each straggler reads on one connection and applies on another; one of either kind
    /// stays with the projectors in the convoy, and one of ours with the ledger.
    pub(super) fn new(database: &Database) -> Self {
        let readers = database.own_connections().saturating_sub(2);
        let at_once = database.handler_connections().saturating_sub(1).min(readers).max(1) as usize;
        Stragglers {
            tasks: JoinSet::new(),
            outside: HashMap::new(),
            stop: watch::Sender::new(false),
            room: Arc::new(Semaphore::new(at_once)),
        }
    }

    /// Whether a projector is outside the convoy still.
    pub(super) fn hold(&self, id: &ProjectorId) -> bool {
        self.outside.get(id).is_some_and(|task| !task.is_finished())
    }

    /// Who is outside the convoy still.
    pub(super) fn outside(&self) -> HashSet<ProjectorId> {
        self.outside.keys().filter(|id| self.hold(id)).cloned().collect()
    }

    /// Forgets those whose tasks have ended; they are in the convoy again. Returns how many of them broke.
    pub(super) fn rejoin(&mut self) -> u64 {
        let mut broken = 0;
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            broken += self.note(ended);
        }
        broken
    }

    /// The same, once all have ended.
    async fn all_ended(&mut self, broken: &mut u64) {
        while let Some(ended) = self.tasks.join_next_with_id().await {
            *broken += self.note(ended);
        }
    }

    fn note(&mut self, ended: Result<(tokio::task::Id, CursorState), JoinError>) -> u64 {
        let task = ended.as_ref().map_or_else(JoinError::id, |(task, _)| *task);
        let id = self.outside.iter().find(|(_, outside)| outside.id() == task).map(|(id, _)| id.clone());
        let Some(id) = id else { return 0 };
        self.outside.remove(&id);
        match ended {
            Ok((_, CursorState::Broke)) => return 1,
            Ok(_) => info!(projector = %id, "back in the convoy"),
            Err(error) => warn!(projector = %id, %error, "its catch-up ended; it is tried in the convoy again"),
        }
        0
    }

    /// Sends a projector off, to catch up by itself.
    pub(super) fn leave(&mut self, engine: &Engine, projector: &Arc<Registered>, position: Position) {
        metrics::fell_back(&projector.id);
        let cursor = Cursor::new(projector, position);
        let (room, stop) = (Arc::clone(&self.room), self.stop.subscribe());
        let task = self.tasks.spawn(catch_up_alone(engine.clone(), cursor, room, stop));
        self.outside.insert(projector.id.clone(), task);
    }

    /// Lets them go on until `soon`, then end with the page in hand, and cuts off at `cut` who has not: nobody runs on.
    /// Returns how many broke.
    pub(super) async fn wind_down(&mut self, soon: impl Future<Output = ()>, cut: impl Future<Output = ()>) -> u64 {
        let mut broken = self.rejoin();
        let ending = async {
            tokio::select! {
                biased;
                () = self.all_ended(&mut broken) => return,
                () = soon => {}
            }
            self.stop.send_replace(true);
            self.all_ended(&mut broken).await;
        };
        tokio::select! {
            biased;
            () = ending => {}
            () = cut => {}
        }
        for id in self.outside() {
            info!(projector = %id, "cut off: what it has not committed is done again later");
        }
        self.tasks.shutdown().await;
        self.outside.clear();
        self.stop.send_replace(false);
        broken
    }
}

/// Catches up to the mark as it is at the end, or until the projector breaks, is taken over, or is to stop.
async fn catch_up_alone(
    engine: Engine,
    mut cursor: Cursor,
    room: Arc<Semaphore>,
    mut stop: watch::Receiver<bool>,
) -> CursorState {
    let _room = tokio::select! {
        room = room.acquire() => room,
        _ = stop.wait_for(|stop| *stop) => return cursor.state,
    };
    let mut attempt = 1;
    while cursor.is_running() && !*stop.borrow() {
        let page_ended = Notify::new();
        let round = async {
            let mark = engine.store.raise_high_water().await?.mark;
            let start = cursor.position;
            let is_last = |_: &[Cursor]| {
                if *stop.borrow() {
                    page_ended.notify_one()
                }
            };
            engine.catch_up(Stage::Play, std::slice::from_mut(&mut cursor), mark, is_last).await?;
            Ok::<_, sqlx::Error>(mark.since(start))
        };
        let ended = tokio::select! {
            biased;
            ended = round => ended,
            // The next page has hardly begun.
            () = page_ended.notified() => break,
        };
        match ended {
            // The last round was short: the next messages continue it.
            Ok(events) if events <= engine.limits.batch => break,
            Ok(_) => attempt = 1,
            Err(error) => {
                attempt += 1;
                if retry::worth_telling(attempt) {
                    warn!(projector = %cursor.projector.id, attempt, %error, "cannot catch up, trying again");
                }
                tokio::select! {
                    () = tokio::time::sleep(retry::delay(attempt + 4)) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                }
            }
        }
    }
    cursor.state
}
