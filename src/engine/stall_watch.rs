//! What is in the way of the high-water mark, and what is wrong with the log: logged when it is worth somebody's while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::model::event::Position;
use crate::store::{EventStore, Held, HighWater, LogFault};

/// A transaction may take its time. Beyond this, somebody should look: nothing after it is published or replayed.
const TOO_LONG: Duration = Duration::from_secs(10);

/// What has held the mark for this long is written to the log, where the next process finds since when. Most transactions
/// end sooner, and cost no write.
const WORTH_WRITING: Duration = Duration::from_millis(200);

/// A fault of the log stays until somebody acts: it is logged again this often.
const REMIND_EVERY: Duration = Duration::from_secs(300);

/// While the mark is held, the pauses between two full attempts to raise it: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Remembers what holds the mark, and since when, so that it is logged once and not with every look.
#[derive(Debug, Default)]
pub(crate) struct HeldWatch {
    held: Option<HeldSince>,
}

#[derive(Debug)]
struct HeldSince {
    held: Held,
    since: Instant,
    is_logged: bool,
    is_written: bool,
}

impl HeldWatch {
    /// Takes note of what holds the mark now, if anything does.
    pub(crate) fn note(&mut self, held: Option<Held>) {
        self.note_for(held, Duration::ZERO);
    }

    /// The same, where it has held the mark for `age` already, as the log remembers it.
    fn note_for(&mut self, held: Option<Held>, age: Duration) {
        let Some(held) = held else {
            if self.held.take().is_some_and(|before| before.is_logged) {
                info!("the high-water mark rises again");
            }
            return;
        };
        let now = Instant::now();
        let since = now.checked_sub(age).unwrap_or(now);
        match self.held.as_mut().filter(|before| before.held == held) {
            Some(before) => {
                before.since = before.since.min(since);
                before.is_written |= !age.is_zero();
            }
            None => self.held = Some(HeldSince { held, since, is_logged: false, is_written: !age.is_zero() }),
        }
        let Some(HeldSince { held, since, is_logged, .. }) = self.held.as_mut().filter(|held| !held.is_logged) else {
            return;
        };
        match held {
            Held::InFlight(position) if since.elapsed() > TOO_LONG => {
                *is_logged = true;
                warn!(
                    alert = "high_water_held",
                    position = position.get(),
                    seconds = since.elapsed().as_secs(),
                    "a transaction that holds this position has neither committed nor rolled back: \
                     nothing after it is published or replayed. Look for it in information_schema.innodb_trx"
                );
            }
            Held::InFlight(_) => {}
            Held::Gap(gap) => {
                *is_logged = true;
                warn!(
                    alert = "high_water_held",
                    first = gap.start(),
                    last = gap.end(),
                    "so many positions are missing that no rollback explains it: nothing after them is published or \
                     replayed. If no writer can still hold them, close the gap: projectionist fill {} {}",
                    gap.start(),
                    gap.end()
                );
            }
        }
    }
}

/// What one process knows of the mark's troubles. A worker's relay and its reconcile share it, so that each trouble is logged
/// once. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct LogWatch(Arc<Mutex<Watch>>);

#[derive(Debug, Default)]
struct Watch {
    held: HeldWatch,
    /// Where the mark was held.
    mark: Position,
    rest: Option<Rest>,
    fault: Option<(LogFault, Instant)>,
}

/// The time between two full attempts to raise a mark that is held.
#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Instant,
    pause: Duration,
}

impl LogWatch {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when the mark has been held by the same thing, if anything holds it.
    pub(crate) fn since(&self) -> Option<Instant> {
        self.watch().held.held.as_ref().map(|held| held.since)
    }

    /// Raises the mark. While it is held, most attempts are one look at one row.
    pub(crate) async fn raise_high_water(&self, store: &EventStore) -> Result<HighWater, sqlx::Error> {
        let mark = self.watch().mark;
        if self.is_held_still(store, mark).await? {
            let held = self.watch().held.held.as_ref().map(|held| held.held.clone());
            return Ok(HighWater { mark, held, held_for: Duration::ZERO, fault: None });
        }
        let high_water = store.raise_high_water().await?;
        self.note(store, &high_water).await?;
        Ok(high_water)
    }

    /// Whether the mark stands where it was held, below a hole, and the next full attempt is not due yet.
    pub(crate) async fn is_held_still(&self, store: &EventStore, mark: Position) -> Result<bool, sqlx::Error> {
        let is_resting = {
            let watch = self.watch();
            watch.mark == mark && watch.rest.is_some_and(|rest| Instant::now() < rest.until)
        };
        Ok(is_resting && store.stands_below_a_hole(mark).await?)
    }

    /// Takes note of a full attempt to raise the mark.
    pub(crate) async fn note(&self, store: &EventStore, high_water: &HighWater) -> Result<(), sqlx::Error> {
        let is_worth_writing = {
            let mut watch = self.watch();
            watch.note(high_water);
            watch.held.held.as_ref().is_some_and(|held| !held.is_written && held.since.elapsed() >= WORTH_WRITING)
        };
        match is_worth_writing {
            true => self.write_down(store).await,
            false => Ok(()),
        }
    }

    /// Writes down what holds the mark, if that is not written yet: before a process ends, for the next one.
    pub(crate) async fn write_down(&self, store: &EventStore) -> Result<(), sqlx::Error> {
        let (mark, held) = {
            let watch = self.watch();
            let held = watch.held.held.as_ref().filter(|held| !held.is_written);
            (watch.mark, held.map(|held| held.held.clone()))
        };
        let Some(held) = held else { return Ok(()) };
        store.set_held(mark, &held).await?;
        if let Some(written) = self.watch().held.held.as_mut().filter(|now| now.held == held) {
            written.is_written = true;
        }
        Ok(())
    }
}

impl Watch {
    fn note(&mut self, high_water: &HighWater) {
        let now = Instant::now();
        let HighWater { mark, held, held_for, fault } = high_water;
        let is_the_same = self.mark == *mark && self.held.held.as_ref().map(|held| &held.held) == held.as_ref();
        self.mark = *mark;
        self.held.note_for(held.clone(), *held_for);
        self.rest = held.as_ref().map(|_| {
            let pause =
                self.rest.filter(|_| is_the_same).map_or(FIRST_PAUSE, |rest| (rest.pause * 2).min(LONGEST_PAUSE));
            Rest { until: now + pause, pause }
        });
        self.note_fault(*fault, now);
    }

    fn note_fault(&mut self, fault: Option<LogFault>, now: Instant) {
        let Some(fault) = fault else {
            if self.fault.take().is_some() {
                info!("the high-water mark has its row again; an audit tells whether the log is what it was");
            }
            return;
        };
        // Where the log ends may change with each append; that the mark has no row is the fault.
        let is_due = self
            .fault
            .is_none_or(|(before, told)| before.mark != fault.mark || now.duration_since(told) >= REMIND_EVERY);
        if is_due {
            fault.tell();
            self.fault = Some((fault, now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(mark: u64, held: Option<u64>, age: u64) -> HighWater {
        HighWater {
            mark: Position::new(mark),
            held: held.map(|position| Held::InFlight(Position::new(position))),
            held_for: Duration::from_secs(age),
            fault: None,
        }
    }

    #[test]
    fn attempts_at_a_held_mark_become_rare_and_begin_anew_where_something_else_holds_it() {
        let mut watch = Watch::default();
        let pauses = |watch: &mut Watch, held, count| -> Vec<u128> {
            let pause = |watch: &mut Watch| {
                watch.note(&attempt(held - 1, Some(held), 0));
                watch.rest.expect("it is held").pause.as_millis()
            };
            (0..count).map(|_| pause(watch)).collect()
        };
        assert_eq!(pauses(&mut watch, 10, 7), [50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(pauses(&mut watch, 20, 2), [50, 100]);
        watch.note(&attempt(30, None, 0));
        assert!(watch.rest.is_none() && watch.held.held.is_none());
    }

    #[test]
    fn the_age_that_the_log_remembers_counts_and_is_not_written_again() {
        let mut watch = Watch::default();
        watch.note(&attempt(9, Some(10), 60));
        let held = watch.held.held.as_ref().expect("it is held");
        assert!(held.since.elapsed() >= Duration::from_secs(60) && held.is_written && held.is_logged);
    }
}
