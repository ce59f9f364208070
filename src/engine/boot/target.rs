//! Where boot has to come: the end of the log that was visible when it began, however long the high-water mark is held
//! below it.

use std::time::{Duration, Instant};

use tracing::warn;

use super::report::{BootProgress, BootWaiting};
use super::{Boot, Entry};
use crate::engine::catch_up::Cursor;
use crate::model::error::Error;
use crate::model::event::Position;
use crate::model::projector::{Mode, ProjectorId};
use crate::store::{Held, HighWater};

/// How often boot looks whether the mark has risen. Each look at a hole costs some statements.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often it logs that it still waits.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// The mark is held below the target.
#[derive(Debug)]
pub(super) struct Waiting {
    mark: Position,
    /// When the mark last rose, or boot began to wait.
    since: Instant,
    logged: Instant,
}

impl Boot<'_> {
    /// Reads where boot has to come. `false`: the log ends below its mark, and nothing can be built on it.
    pub(super) async fn read_target(&mut self) -> Result<bool, Error> {
        let mark = self.engine.persist("read the marks of the log", || self.engine.store.marks()).await?.high_water;
        let last = || self.engine.store.last_visible();
        self.target = self.engine.persist("read the end of the log", last).await?;
        if self.target >= mark {
            return Ok(true);
        }
        self.remarks.reason = Some(format!(
            "the log ends at {}, below the high-water mark {mark}: it was truncated, or the database was restored. What \
             is appended up to {mark} would never be seen. See `projectionist audit`",
            self.target
        ));
        Ok(false)
    }

    /// Whether all may be entered: a new projector of mode from_now begins at the mark, so that it would see older events
    /// if the mark lay below the target. Waits for it.
    pub(super) async fn may_enter(
        &mut self,
        before: &[Entry],
        progress: &mut impl FnMut(&BootProgress),
    ) -> Result<bool, Error> {
        let is_new = |id: &ProjectorId| before.iter().all(|entry| entry.id != *id);
        if !self.chosen.iter().any(|projector| projector.mode == Mode::FromNow && is_new(&projector.id)) {
            return Ok(true);
        }
        loop {
            let high_water = self.raise_high_water().await?;
            if high_water.mark >= self.target {
                return Ok(true);
            }
            if !self.waits(&high_water, &[], progress).await {
                return Ok(false);
            }
        }
    }

    /// Waits a moment for the mark to rise to the target, and says why. `false`: for longer than boot is patient it has
    /// not risen.
    pub(super) async fn waits(
        &mut self,
        high_water: &HighWater,
        cursors: &[Cursor],
        progress: &mut impl FnMut(&BootProgress),
    ) -> bool {
        let (mark, now) = (high_water.mark, Instant::now());
        let reason = reason(high_water, self.target);
        let waiting = match self.waiting.take() {
            Some(waiting) if waiting.mark == mark => waiting,
            Some(waiting) => Waiting { mark, since: now, ..waiting },
            None => {
                let (high_water, target) = (mark.get(), self.target.get());
                warn!(high_water, through = target, release = self.engine.release, "waiting: {reason}");
                Waiting { mark, since: now, logged: now }
            }
        };
        let waited = now - waiting.since;
        if self.engine.limits.patience.is_some_and(|patience| waited >= patience) {
            let seconds = waited.as_secs();
            self.remarks.reason = Some(format!("{reason}. Boot has waited for {seconds} s; then run it again"));
            return false;
        }
        let logged = if now - waiting.logged >= LOG_EVERY {
            warn!(
                high_water = mark.get(),
                through = self.target.get(),
                seconds = waited.as_secs(),
                release = self.engine.release,
                "still waiting: {reason}"
            );
            now
        } else {
            waiting.logged
        };
        self.waiting = Some(Waiting { logged, ..waiting });
        progress(&BootProgress::of(cursors, mark, Some(BootWaiting { reason, waited })));
        let left = self.engine.limits.patience.map_or(LOOK_EVERY, |patience| patience - waited);
        tokio::time::sleep(left.min(LOOK_EVERY)).await;
        true
    }
}

/// Why the mark has not reached the target, and what to do.
fn reason(HighWater { mark, held, .. }: &HighWater, target: Position) -> String {
    let held_by = match held {
        Some(Held::InFlight(position)) => format!(
            "a transaction that holds position {position} has neither committed nor rolled back. Look for it in \
             information_schema.innodb_trx, and end it"
        ),
        Some(Held::Gap(gap)) => {
            let (first, last) = (gap.start(), gap.end());
            format!(
                "positions {first} to {last} are missing, too many to be filled unasked. If no writer can still hold \
                 them, close the gap: projectionist fill {first} {last}"
            )
        }
        None => "nothing is visible above it any more".to_owned(),
    };
    format!("the log goes on to {target}, but the high-water mark is held at {mark}: {held_by}")
}
