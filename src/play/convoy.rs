//! The convoy: the live projectors that are fed in sequence. One that is far behind, or slow, leaves it, catches
//! up on a connection of its own, and joins again by the chain rule, so that it holds up nobody.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::catch_up::{Cursor, CursorState};
use crate::deliver::Engine;
use crate::event::Position;
use crate::lifecycle::Stage;
use crate::metrics;
use crate::projector::ProjectorId;
use crate::registry::Registered;
use crate::retry;

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

/// The projectors that have left the convoy, each with the task that catches it up.
#[derive(Default)]
pub(super) struct Stragglers {
    tasks: HashMap<ProjectorId, JoinHandle<CursorState>>,
}

impl Stragglers {
    /// Whether a projector is outside the convoy still.
    pub(super) fn hold(&self, id: &ProjectorId) -> bool {
        self.tasks.get(id).is_some_and(|task| !task.is_finished())
    }

    /// Forgets those whose tasks have ended; they are in the convoy again. Returns how many of them broke.
    pub(super) async fn rejoin(&mut self) -> u64 {
        let ended: Vec<ProjectorId> =
            self.tasks.iter().filter(|(_, task)| task.is_finished()).map(|(id, _)| id.clone()).collect();
        let mut broken = 0;
        for id in ended {
            let Some(task) = self.tasks.remove(&id) else { continue };
            match task.await {
                Ok(CursorState::Broke) => broken += 1,
                Ok(_) => info!(projector = %id, "back in the convoy"),
                Err(error) => warn!(projector = %id, %error, "its catch-up ended; it is tried in the convoy again"),
            }
        }
        broken
    }

    /// Sends a projector off, to catch up by itself.
    pub(super) fn leave(&mut self, engine: &Engine, projector: &Arc<Registered>, position: Position) {
        metrics::fell_back(&projector.id);
        let task = tokio::spawn(catch_up_alone(engine.clone(), Cursor::new(projector, position)));
        self.tasks.insert(projector.id.clone(), task);
    }
}

impl Drop for Stragglers {
    /// Nothing that was not committed is applied: the next worker takes it up.
    fn drop(&mut self) {
        self.tasks.values().for_each(JoinHandle::abort);
    }
}

/// Catches up to the mark as it is at the end, or until the projector breaks or is taken over.
async fn catch_up_alone(engine: Engine, mut cursor: Cursor) -> CursorState {
    let mut attempt = 1;
    while cursor.is_running() {
        let round = async {
            let mark = engine.store.raise_high_water().await?.mark;
            let start = cursor.position;
            engine.catch_up(Stage::Play, std::slice::from_mut(&mut cursor), mark, |_| {}).await?;
            Ok::<_, sqlx::Error>(mark.since(start))
        };
        match round.await {
            // The last round was short: the next messages continue it.
            Ok(events) if events <= engine.limits.batch => break,
            Ok(_) => attempt = 1,
            Err(error) => {
                attempt += 1;
                if retry::worth_telling(attempt) {
                    warn!(projector = %cursor.projector.id, attempt, %error, "cannot catch up, trying again");
                }
                tokio::time::sleep(retry::delay(attempt + 4)).await;
            }
        }
    }
    cursor.state
}
