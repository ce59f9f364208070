//! Reconciliation finds events that the queue has lost, by comparing the projectors' positions with
//! the high-water mark.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use tracing::info;

use super::background::Why;
use super::worker::Worker;
use crate::model::event::Position;
use crate::model::metrics;
use crate::model::projector::ProjectorId;
use crate::model::wait_log::Reminder;

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

/// The projectors whose events the queue does not deliver, for instance while it is unavailable.
/// They are caught up from the store every few seconds, and that is logged at growing intervals.
#[derive(Debug, Default)]
pub(super) struct Undelivered(HashMap<ProjectorId, Spell>);

#[derive(Debug)]
struct Spell {
    catch_ups: u64,
    last: Instant,
    reminder: Reminder,
}

impl Undelivered {
    /// Records a catch-up. Returns the number of catch-ups so far if they have to be logged now.
    fn record(&mut self, id: &ProjectorId, now: Instant) -> Option<u64> {
        let begin = || Spell { catch_ups: 0, last: now, reminder: Reminder::new(now) };
        let spell = self.0.entry(id.clone()).or_insert_with(begin);
        (spell.catch_ups, spell.last) = (spell.catch_ups + 1, now);
        spell.reminder.is_due(now).then_some(spell.catch_ups)
    }

    /// Logs for which projectors no catch-up has been necessary for a minute.
    fn log_ends(&mut self, now: Instant) {
        self.0.retain(|id, spell| {
            let is_over = now.duration_since(spell.last) >= MAX_INTERVAL;
            if is_over && spell.reminder.has_reminded() {
                let catch_ups = spell.catch_ups;
                info!(projector = %id, catch_ups, "the queue delivers this projector's events again");
            }
            !is_over
        });
    }
}

impl Worker {
    /// Compares the positions, and catches overdue projectors up from the store. If the database is
    /// unavailable, the next call tries again.
    pub(crate) async fn reconcile(&mut self) {
        match self.try_reconcile().await {
            Ok(()) => self.reconcile_outage.record_recovery("can reconcile again"),
            Err(error) => {
                let what = "cannot reconcile, trying again later";
                self.reconcile_outage.record_failure(what, &error);
            }
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
                self.stragglers.move_to_background(&self.engine, projector, position, Why::Retries);
                continue;
            }
            if !overdue.contains(&id) {
                continue;
            }
            if let Some(catch_ups) = self.undelivered.record(&id, Instant::now()) {
                info!(
                    projector = %id, position = position.get(), high_water = mark.get(), catch_ups,
                    "the queue does not deliver the missing events: catching up from the store"
                );
            }
            // In the background: the catch-up may take long, and messages for the others may arrive
            // at any time.
            self.stragglers.move_to_background(
                &self.engine,
                projector,
                position,
                Why::NotDelivered,
            );
        }
        self.undelivered.log_ends(Instant::now());
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
