//! Background catch-up. Play passes messages to the live projectors of the fan-out group one after
//! the other. A projector that is far behind or slow moves to the background, so that it does not
//! delay the others. There it catches up on its own connections, and is then readmitted to the
//! group.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tracing::{debug, info, warn};

use crate::database::Database;
use crate::engine::catch_up::{Cursor, CursorState};
use crate::engine::retry::Engine;
use crate::model::event::Position;
use crate::model::lifecycle::Stage;
use crate::model::metrics;
use crate::model::projector::ProjectorId;
use crate::model::registry::RegisteredProjector;
use crate::model::wait_log::OutageLog;

/// How long one projector may delay the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackgroundLimits {
    /// The maximum number of events that one projector catches up on while the others wait.
    pub events: u64,
    /// The maximum time that one projector may take for the messages of one receive. Uncommitted
    /// work is then rolled back and repeated in the background.
    pub time: Duration,
}

impl BackgroundLimits {
    /// The defaults.
    pub const fn new() -> Self {
        BackgroundLimits { events: 10_000, time: Duration::from_secs(5) }
    }

    /// Sets [`BackgroundLimits::events`].
    pub const fn with_events(mut self, events: u64) -> Self {
        self.events = events;
        self
    }

    /// Sets [`BackgroundLimits::time`].
    pub const fn with_time(mut self, time: Duration) -> Self {
        self.time = time;
        self
    }
}

impl Default for BackgroundLimits {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a projector moves to the background.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// It would delay the others: it is slow or far behind. Both moves are logged.
    Delays,
    /// The queue did not deliver its events. This is logged by the caller, at intervals.
    NotDelivered,
    /// It retries an event later. The wait is logged, at intervals.
    Retries,
}

/// What ends the tasks in the background.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    /// Nothing.
    No,
    /// Tasks of projectors that wait for a later retry end.
    Waiting,
    /// All tasks end after their current page.
    All,
}

/// The projectors in the background, each with its catch-up task. Dropping this cancels the tasks.
/// Their uncommitted work is rolled back, and the next worker repeats it.
pub(super) struct Stragglers {
    tasks: JoinSet<CursorState>,
    in_background: HashMap<ProjectorId, (AbortHandle, Why)>,
    stop: watch::Sender<Stop>,
    /// Limits how many tasks catch up at the same time.
    permits: Arc<Semaphore>,
}

impl Stragglers {
    /// Sizes the background for the connections of `database`. Each task reads on one connection
    /// and applies on another. One connection of each kind is left for the fan-out group, and one
    /// more of the engine's own for the ledger.
    pub(super) fn new(database: &Database) -> Self {
        let readers = database.max_own_connections().saturating_sub(2);
        let at_once =
            database.max_handler_connections().saturating_sub(1).min(readers).max(1) as usize;
        Stragglers {
            tasks: JoinSet::new(),
            in_background: HashMap::new(),
            stop: watch::Sender::new(Stop::No),
            permits: Arc::new(Semaphore::new(at_once)),
        }
    }

    /// Whether a projector is still in the background.
    pub(super) fn is_catching_up(&self, id: &ProjectorId) -> bool {
        self.in_background.get(id).is_some_and(|(task, _)| !task.is_finished())
    }

    /// The projectors that are still in the background.
    pub(super) fn in_background(&self) -> HashSet<ProjectorId> {
        self.in_background.keys().filter(|id| self.is_catching_up(id)).cloned().collect()
    }

    /// Readmits the projectors whose tasks have ended to the fan-out group. Returns how many of
    /// them broke.
    pub(super) fn readmit(&mut self) -> u64 {
        let mut broken = 0;
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            broken += self.record(ended);
        }
        broken
    }

    /// Waits until all tasks have ended, and adds the projectors that broke to `broken`.
    async fn join_all(&mut self, broken: &mut u64) {
        while let Some(ended) = self.tasks.join_next_with_id().await {
            *broken += self.record(ended);
        }
    }

    fn record(&mut self, ended: Result<(tokio::task::Id, CursorState), JoinError>) -> u64 {
        let task = ended.as_ref().map_or_else(JoinError::id, |(task, _)| *task);
        let id = self
            .in_background
            .iter()
            .find(|(_, (task_handle, _))| task_handle.id() == task)
            .map(|(id, (_, why))| (id.clone(), *why));
        let Some((id, why)) = id else { return 0 };
        self.in_background.remove(&id);
        match ended {
            Ok((_, CursorState::Broken)) => return 1,
            Ok((_, CursorState::Waiting(_))) => {}
            Ok(_) if why == Why::Delays => {
                info!(projector = %id, "readmitted to the fan-out group")
            }
            Ok(_) => debug!(projector = %id, "readmitted to the fan-out group"),
            Err(error) => {
                warn!(
                    projector = %id, %error,
                    "the background catch-up failed: the projector is readmitted to the fan-out \
                     group"
                )
            }
        }
        0
    }

    /// Starts a task that catches a projector up in the background.
    pub(super) fn move_to_background(
        &mut self,
        engine: &Engine,
        projector: &Arc<RegisteredProjector>,
        position: Position,
        why: Why,
    ) {
        let mut cursor = Cursor::new(projector, position);
        match engine.retries.wait_at(&projector.id, position) {
            Some(wait) => cursor.state = CursorState::Waiting(wait),
            None => metrics::record_fallback_read(&projector.id),
        }
        let (permits, stop) = (Arc::clone(&self.permits), self.stop.subscribe());
        let task = self.tasks.spawn(catch_up_in_background(engine.clone(), cursor, permits, stop));
        self.in_background.insert(projector.id.clone(), (task, why));
    }

    /// Ends all tasks. Those of projectors that wait for a later retry end at once. The others
    /// continue until `stop_signal` and then end after their current page. Tasks still running at
    /// `abort_signal` are cancelled. Returns how many projectors broke.
    pub(super) async fn shut_down(
        &mut self,
        stop_signal: impl Future<Output = ()>,
        abort_signal: impl Future<Output = ()>,
    ) -> u64 {
        let mut broken = self.readmit();
        self.stop.send_replace(Stop::Waiting);
        let ending = async {
            tokio::select! {
                biased;
                () = self.join_all(&mut broken) => return,
                () = stop_signal => {}
            }
            self.stop.send_replace(Stop::All);
            self.join_all(&mut broken).await;
        };
        tokio::select! {
            biased;
            () = ending => {}
            () = abort_signal => {}
        }
        for id in self.in_background() {
            info!(
                projector = %id,
                "background catch-up cancelled: uncommitted work is repeated later"
            );
        }
        self.tasks.shutdown().await;
        self.in_background.clear();
        self.stop.send_replace(Stop::No);
        broken
    }
}

/// Catches a projector up to the current mark. If the projector has to wait for a later retry,
/// waits and continues. Ends early if the projector breaks or is taken over, or at `stop`.
async fn catch_up_in_background(
    engine: Engine,
    mut cursor: Cursor,
    permits: Arc<Semaphore>,
    mut stop: watch::Receiver<Stop>,
) -> CursorState {
    loop {
        if let CursorState::Waiting(wait) = &cursor.state {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop >= Stop::Waiting) => return cursor.state,
                () = engine.wait_for_retry(&cursor.projector.id, wait.until) => {}
            }
            cursor.state = CursorState::Running;
        }
        // A projector that waits holds no permit.
        let permit = tokio::select! {
            permit = permits.acquire() => permit,
            _ = stop.wait_for(|stop| *stop == Stop::All) => return cursor.state,
        };
        catch_up_to_mark(&engine, &mut cursor, &mut stop).await;
        drop(permit);
        if !matches!(cursor.state, CursorState::Waiting(_)) {
            return cursor.state;
        }
    }
}

/// Runs rounds of catch-up until a round is short, the cursor stops, or `stop` ends it.
async fn catch_up_to_mark(engine: &Engine, cursor: &mut Cursor, stop: &mut watch::Receiver<Stop>) {
    let mut outage_log = OutageLog::default();
    while cursor.is_running() && *stop.borrow() != Stop::All {
        let page_ended = Notify::new();
        let round = async {
            let mark = engine.store.raise_high_water().await?.mark;
            let start = cursor.position;
            let notify_if_stopping = |_: &[Cursor]| {
                if *stop.borrow() == Stop::All {
                    page_ended.notify_one()
                }
            };
            engine
                .catch_up(Stage::Play, std::slice::from_mut(cursor), mark, notify_if_stopping)
                .await?;
            Ok::<_, sqlx::Error>(mark.since(start))
        };
        let ended = tokio::select! {
            biased;
            ended = round => ended,
            // Dropping the round here costs almost nothing: the next page has just begun.
            () = page_ended.notified() => break,
        };
        match ended {
            // The last round was short, so the next messages will continue the position.
            Ok(events) if events <= engine.limits.batch => {
                outage_log.record_recovery("the log can be read again");
                break;
            }
            Ok(_) => outage_log.record_recovery("the log can be read again"),
            Err(error) => {
                let id = &cursor.projector.id;
                let what = format!("cannot catch {id} up, trying again");
                let pause = outage_log.record_failure(&what, &error);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = stop.wait_for(|stop| *stop == Stop::All) => {}
                }
            }
        }
    }
}
