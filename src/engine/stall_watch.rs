//! Watches the high-water mark for blockers and the log for faults, and logs them at a limited
//! rate.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::model::event::Position;
use crate::store::{Blocker, EventStore, HighWater, LogFault};

/// How long an open transaction may block the mark before a warning is logged. Nothing after its
/// position is published or replayed.
const WARN_AFTER: Duration = Duration::from_secs(10);

/// How long the mark must be blocked before the cause is stored in the log, where the next process
/// reads since when. Most transactions end sooner and cost no write.
const STORE_AFTER: Duration = Duration::from_millis(200);

/// How often a fault of the log is logged again until an operator fixes it.
const REMIND_EVERY: Duration = Duration::from_secs(300);

/// While the mark is blocked: the first and the longest pause between two full attempts to raise
/// it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Remembers what blocks the mark and since when, so that it is logged once and not with every
/// poll.
#[derive(Debug, Default)]
pub(crate) struct BlockedWatch {
    current: Option<BlockedSince>,
}

#[derive(Debug)]
struct BlockedSince {
    cause: Blocker,
    since: Instant,
    is_logged: bool,
    is_stored: bool,
}

impl BlockedWatch {
    /// Records what blocks the mark now, or `None`.
    pub(crate) fn record(&mut self, store: &EventStore, blocker: Option<Blocker>) {
        self.record_with_age(blocker, Duration::ZERO, || store.open_transaction_hint());
    }

    /// Records what blocks the mark now, or `None`. According to the log, it has been blocked for
    /// `age` already. `hint` says how to find an open transaction.
    fn record_with_age(
        &mut self,
        blocker: Option<Blocker>,
        age: Duration,
        hint: impl Fn() -> String,
    ) {
        let Some(blocker) = blocker else {
            if self.current.take().is_some_and(|before| before.is_logged) {
                info!("the high-water mark rises again");
            }
            return;
        };
        let now = Instant::now();
        let since = now.checked_sub(age).unwrap_or(now);
        match self.current.as_mut().filter(|before| before.cause == blocker) {
            Some(before) => {
                before.since = before.since.min(since);
                before.is_stored |= !age.is_zero();
            }
            None => {
                self.current = Some(BlockedSince {
                    cause: blocker,
                    since,
                    is_logged: false,
                    is_stored: !age.is_zero(),
                })
            }
        }
        let Some(BlockedSince { cause: blocker, since, is_logged, .. }) =
            self.current.as_mut().filter(|blocked| !blocked.is_logged)
        else {
            return;
        };
        match blocker {
            Blocker::InFlight(position) if since.elapsed() > WARN_AFTER => {
                *is_logged = true;
                warn!(
                    alert = "high_water_blocked",
                    position = position.get(),
                    seconds = since.elapsed().as_secs(),
                    "a transaction that holds this position has neither committed nor rolled back: \
                     nothing after it is published or replayed. {}",
                    hint()
                );
            }
            Blocker::InFlight(_) => {}
            Blocker::WideGap(gap) => {
                *is_logged = true;
                warn!(
                    alert = "high_water_blocked",
                    first = gap.start(),
                    last = gap.end(),
                    "too many positions are missing to be explained by a rollback: nothing after \
                     them is published or replayed. If no writer can still hold them, close the \
                     gap: projectionist fill {} {}",
                    gap.start(),
                    gap.end()
                );
            }
        }
    }
}

/// What one process knows about the mark. A worker's relay and its reconciliation share it, so that
/// each problem is logged once. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct StallWatch(Arc<Mutex<StallState>>);

#[derive(Debug, Default)]
struct StallState {
    blocked_watch: BlockedWatch,
    /// The position of the mark at the last full attempt to raise it.
    mark: Position,
    pause: Option<Pause>,
    fault: Option<(LogFault, Instant)>,
}

/// The pause between two full attempts to raise a blocked mark.
#[derive(Debug, Clone, Copy)]
struct Pause {
    until: Instant,
    length: Duration,
}

impl StallWatch {
    fn lock(&self) -> MutexGuard<'_, StallState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when the same cause has blocked the mark, or `None` if the mark is not blocked.
    pub(crate) fn blocked_since(&self) -> Option<Instant> {
        self.lock().blocked_watch.current.as_ref().map(|blocked| blocked.since)
    }

    /// Raises the mark. While it is blocked, most calls read only one row.
    pub(crate) async fn raise_high_water(
        &self,
        store: &EventStore,
    ) -> Result<HighWater, sqlx::Error> {
        let mark = self.lock().mark;
        if self.is_still_blocked(store, mark).await? {
            let blocker =
                self.lock().blocked_watch.current.as_ref().map(|blocked| blocked.cause.clone());
            return Ok(HighWater {
                mark,
                blocked: blocker,
                blocked_for: Duration::ZERO,
                fault: None,
            });
        }
        let high_water = store.raise_high_water().await?;
        self.record(store, &high_water).await?;
        Ok(high_water)
    }

    /// Whether the mark is still blocked by a gap just above it and the next full attempt is not
    /// due yet.
    pub(crate) async fn is_still_blocked(
        &self,
        store: &EventStore,
        mark: Position,
    ) -> Result<bool, sqlx::Error> {
        let is_pausing = {
            let watch = self.lock();
            watch.mark == mark && watch.pause.is_some_and(|pause| Instant::now() < pause.until)
        };
        Ok(is_pausing && store.is_below_gap(mark).await?)
    }

    /// Records a full attempt to raise the mark.
    pub(crate) async fn record(
        &self,
        store: &EventStore,
        high_water: &HighWater,
    ) -> Result<(), sqlx::Error> {
        let should_store = {
            let mut watch = self.lock();
            watch.record(high_water, || store.open_transaction_hint());
            let current = watch.blocked_watch.current.as_ref();
            current.is_some_and(|now| !now.is_stored && now.since.elapsed() >= STORE_AFTER)
        };
        if should_store { self.store_blocked(store).await } else { Ok(()) }
    }

    /// Stores in the log what blocks the mark, unless that is stored already. Before a process
    /// ends, this passes the cause on to the next process.
    pub(crate) async fn store_blocked(&self, store: &EventStore) -> Result<(), sqlx::Error> {
        let (mark, blocker) = {
            let watch = self.lock();
            let current = watch.blocked_watch.current.as_ref().filter(|now| !now.is_stored);
            (watch.mark, current.map(|now| now.cause.clone()))
        };
        let Some(blocker) = blocker else { return Ok(()) };
        store.record_blocked(mark, &blocker).await?;
        if let Some(written) =
            self.lock().blocked_watch.current.as_mut().filter(|now| now.cause == blocker)
        {
            written.is_stored = true;
        }
        Ok(())
    }
}

impl StallState {
    fn record(&mut self, high_water: &HighWater, hint: impl Fn() -> String) {
        let now = Instant::now();
        let HighWater { mark, blocked: blocker, blocked_for, fault } = high_water;
        let is_unchanged = self.mark == *mark
            && self.blocked_watch.current.as_ref().map(|blocked| &blocked.cause)
                == blocker.as_ref();
        self.mark = *mark;
        self.blocked_watch.record_with_age(blocker.clone(), *blocked_for, hint);
        self.pause = blocker.as_ref().map(|_| {
            let length = self
                .pause
                .filter(|_| is_unchanged)
                .map_or(FIRST_PAUSE, |pause| (pause.length * 2).min(LONGEST_PAUSE));
            Pause { until: now + length, length }
        });
        self.record_fault(*fault, now);
    }

    fn record_fault(&mut self, fault: Option<LogFault>, now: Instant) {
        let Some(fault) = fault else {
            if self.fault.take().is_some() {
                info!(
                    "the row of the high-water mark exists again; run an audit to check whether \
                     the log is intact"
                );
            }
            return;
        };
        // The fault is that the mark has no row. The end of the log may change with each append.
        let is_due = self.fault.is_none_or(|(before, logged_at)| {
            before.mark != fault.mark || now.duration_since(logged_at) >= REMIND_EVERY
        });
        if is_due {
            fault.log_alert();
            self.fault = Some((fault, now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(mark: u64, blocker: Option<u64>, age: u64) -> HighWater {
        HighWater {
            mark: Position::new(mark),
            blocked: blocker.map(|position| Blocker::InFlight(Position::new(position))),
            blocked_for: Duration::from_secs(age),
            fault: None,
        }
    }

    #[test]
    fn attempts_at_a_blocked_mark_back_off_and_restart_when_the_blocker_changes() {
        let mut watch = StallState::default();
        let pauses = |watch: &mut StallState, blocker, count| -> Vec<u128> {
            let pause = |watch: &mut StallState| {
                watch.record(&attempt(blocker - 1, Some(blocker), 0), String::new);
                watch.pause.expect("it is blocked").length.as_millis()
            };
            (0..count).map(|_| pause(watch)).collect()
        };
        assert_eq!(pauses(&mut watch, 10, 7), [50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(pauses(&mut watch, 20, 2), [50, 100]);
        watch.record(&attempt(30, None, 0), String::new);
        assert!(watch.pause.is_none() && watch.blocked_watch.current.is_none());
    }

    #[test]
    fn the_blocked_since_stored_in_the_log_counts_and_is_not_rewritten() {
        let mut watch = StallState::default();
        watch.record(&attempt(9, Some(10), 60), String::new);
        let blocked = watch.blocked_watch.current.as_ref().expect("it is blocked");
        assert!(
            blocked.since.elapsed() >= Duration::from_secs(60)
                && blocked.is_stored
                && blocked.is_logged
        );
    }
}
