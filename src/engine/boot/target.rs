//! The target of boot: the last visible position when boot began. Every projector has to reach it,
//! even if the high-water mark is blocked below it for a long time.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::report::{BootProgress, BootWait};
use super::{Boot, Entry};
use crate::engine::catch_up::Cursor;
use crate::engine::error::Error;
use crate::model::event::Position;
use crate::model::projector::{Mode, ProjectorId};
use crate::model::wait_log::Reminder;
use crate::store::{Blocker, HighWater};

/// How often boot checks whether the mark has risen. Each check at a gap costs a few statements.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// A wait for a mark that is blocked below the target.
#[derive(Debug)]
pub(super) struct MarkWait {
    mark: Position,
    /// When the mark last rose, or when the wait began.
    since: Instant,
    reminder: Reminder,
}

impl Boot<'_> {
    /// Reads the target. Returns `false` if the log ends below its mark, because nothing may be
    /// built on such a log.
    pub(super) async fn read_target(&mut self) -> Result<bool, Error> {
        let mark = self
            .engine
            .retry_transient("read the marks of the log", || self.engine.store.marks())
            .await?
            .high_water;
        let last = || self.engine.store.last_visible();
        self.target = self.engine.retry_transient("read the end of the log", last).await?;
        if self.target >= mark {
            return Ok(true);
        }
        self.findings.reason = Some(format!(
            "the log ends at {}, below the high-water mark {mark}: it was truncated, or the \
             database was restored. Events appended up to {mark} would never be applied. See \
             `projectionist audit`",
            self.target
        ));
        Ok(false)
    }

    /// Waits until the mark has reached the target if there is a new projector of mode from_now.
    /// Such a projector starts at the mark, so with a mark below the target it would see older
    /// events. Returns `false` if the wait timed out.
    pub(super) async fn wait_until_registrable(
        &mut self,
        before: &[Entry],
        progress: &mut impl FnMut(&BootProgress),
    ) -> Result<bool, Error> {
        let is_new = |id: &ProjectorId| before.iter().all(|entry| entry.id != *id);
        if !self
            .selected
            .iter()
            .any(|projector| projector.mode == Mode::FromNow && is_new(&projector.id))
        {
            return Ok(true);
        }
        loop {
            let high_water = self.raise_high_water().await?;
            if high_water.mark >= self.target {
                return Ok(true);
            }
            if !self.wait_for_mark(&high_water, &[], progress).await {
                return Ok(false);
            }
        }
    }

    /// Waits for one poll interval for the mark to rise to the target, and reports why. Returns
    /// `false` if the mark has not risen for `retry_timeout`.
    pub(super) async fn wait_for_mark(
        &mut self,
        high_water: &HighWater,
        cursors: &[Cursor],
        progress: &mut impl FnMut(&BootProgress),
    ) -> bool {
        let (mark, now) = (high_water.mark, Instant::now());
        let hint = self.engine.store.open_transaction_hint();
        let reason = wait_reason(high_water, self.target, &hint);
        let mut waiting = match self.mark_wait.take() {
            Some(waiting) if waiting.mark == mark => waiting,
            Some(waiting) => MarkWait { mark, since: now, ..waiting },
            // Most gaps belong to transactions that are about to commit.
            None => MarkWait { mark, since: now, reminder: Reminder::after_a_second(now) },
        };
        let elapsed = now - waiting.since;
        if waiting.reminder.is_due(now) {
            warn!(
                high_water = mark.get(),
                through = self.target.get(),
                seconds = elapsed.as_secs(),
                release = self.engine.release,
                "waiting: {reason}"
            );
        }
        if self.engine.limits.retry_timeout.is_some_and(|retry_timeout| elapsed >= retry_timeout) {
            let seconds = elapsed.as_secs();
            self.findings.reason =
                Some(format!("{reason}. Boot gave up after {seconds} s; run it again afterwards"));
            return false;
        }
        self.mark_wait = Some(waiting);
        progress(&BootProgress::new(cursors, mark, Some(BootWait { reason, elapsed })));
        let left = self
            .engine
            .limits
            .retry_timeout
            .map_or(POLL_INTERVAL, |retry_timeout| retry_timeout - elapsed);
        tokio::time::sleep(left.min(POLL_INTERVAL)).await;
        true
    }
}

impl MarkWait {
    /// Logs the end of a wait that was logged.
    pub(super) fn end(self) {
        if self.reminder.is_logged() {
            info!(high_water = self.mark.get(), "the high-water mark has reached the target");
        }
    }
}

/// Explains why the mark has not reached the target and what to do.
fn wait_reason(
    HighWater { mark, blocked, .. }: &HighWater,
    target: Position,
    hint: &str,
) -> String {
    let cause = match blocked {
        Some(Blocker::InFlight(position)) => format!(
            "a transaction that holds position {position} has neither committed nor rolled back. \
             {hint}"
        ),
        Some(Blocker::WideGap(gap)) => {
            let (first, last) = (gap.start(), gap.end());
            format!(
                "positions {first} to {last} are missing, too many to be filled automatically. If \
                 no writer can still hold them, close the gap: projectionist fill {first} {last}"
            )
        }
        None => "no event above it is visible any more".to_owned(),
    };
    format!("the log continues to {target}, but the high-water mark is blocked at {mark}: {cause}")
}
