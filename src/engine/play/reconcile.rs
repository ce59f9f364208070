//! Reconciliation finds events that the queue has lost, by comparing the projectors' positions with
//! the high-water mark.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::worker::Worker;
use crate::model::event::Position;
use crate::model::metrics;
use crate::model::projector::ProjectorId;

/// The longest time between two comparisons, however busy the queue is.
const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Remembers since when each live projector has been at the same position below the mark.
#[derive(Debug, Default)]
pub(crate) struct Reconciler {
    last_run: Option<Instant>,
    stationary: HashMap<ProjectorId, (Position, Instant)>,
}

impl Reconciler {
    /// Whether the next comparison is due even though the queue is busy.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        now.duration_since(*self.last_run.get_or_insert(now)) >= MAX_INTERVAL
    }

    /// Whether any projector was below the mark at the last comparison.
    pub(super) fn has_stationary(&self) -> bool {
        !self.stationary.is_empty()
    }

    /// Records the positions of the live projectors. Returns those that have been at the same
    /// position below the mark for at least `after`. A projector that moves is being fed from the
    /// queue.
    pub(crate) fn find_overdue(
        &mut self,
        now: Instant,
        live: &[(ProjectorId, Position)],
        mark: Position,
        after: Duration,
    ) -> Vec<ProjectorId> {
        self.last_run = Some(now);
        let ids: HashSet<&ProjectorId> = live.iter().map(|(id, _)| id).collect();
        self.stationary.retain(|id, _| ids.contains(id));
        let mut overdue = Vec::new();
        for (id, position) in live {
            if *position >= mark {
                self.stationary.remove(id);
                continue;
            }
            let (stood_at, since) = self.stationary.entry(id.clone()).or_insert((*position, now));
            if stood_at != position {
                (*stood_at, *since) = (*position, now);
            } else if now.duration_since(*since) >= after {
                overdue.push(id.clone());
            }
        }
        overdue
    }
}

impl Worker {
    /// Compares the positions, and catches overdue projectors up from the store. If the database is
    /// unavailable, the next call tries again.
    pub(crate) async fn reconcile(&mut self) {
        if let Err(error) = self.try_reconcile().await {
            warn!(%error, "cannot reconcile, trying again later");
        }
    }

    async fn try_reconcile(&mut self) -> Result<(), sqlx::Error> {
        self.broken += self.stragglers.readmit();
        let mark = self.watch.raise_high_water(&self.engine.store).await?.mark;
        metrics::record_mark_state(self.watch.blocked_since());
        let mut live = self.refresh_live().await?;
        live.retain(|(id, _)| !self.stragglers.is_catching_up(id));
        let overdue =
            self.reconciler.find_overdue(Instant::now(), &live, mark, self.reconcile_after);
        for (id, position) in live {
            let Some(projector) = self.registry.get(&id) else { continue };
            if self.engine.retries.contains(&id) {
                self.stragglers.move_to_background(&self.engine, projector, position);
                continue;
            }
            if !overdue.contains(&id) {
                continue;
            }
            info!(
                projector = %id, position = position.get(), high_water = mark.get(),
                "the queue does not deliver the missing events: catching up from the store"
            );
            // In the background: the catch-up may take long, and messages for the others may arrive
            // at any time.
            self.stragglers.move_to_background(&self.engine, projector, position);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_projector_idle_below_the_mark_is_overdue() {
        let id = |name: &str| ProjectorId { name: name.into(), version: 1 };
        let at = |name: &str, position| (id(name), Position::new(position));
        let (mark, after) = (Position::new(9), Duration::from_secs(2));
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);

        let mut reconciler = Reconciler::default();
        let first = [at("still", 5), at("moving", 5), at("done", 9)];
        assert_eq!(reconciler.find_overdue(start, &first, mark, after), []);
        let second = [at("still", 5), at("moving", 6), at("done", 9)];
        assert_eq!(reconciler.find_overdue(later(1), &second, mark, after), []);
        let third = [at("still", 5), at("moving", 7), at("done", 9)];
        assert_eq!(reconciler.find_overdue(later(3), &third, mark, after), [id("still")]);
        assert_eq!(reconciler.find_overdue(later(4), &[at("moving", 7)], mark, after), []);
        assert_eq!(
            reconciler.find_overdue(later(9), &[at("moving", 7), at("still", 5)], mark, after),
            [id("moving")]
        );
    }
}
