//! The wait of boot for projectors that retry an event later. The other projectors of the boot do
//! not wait for them: they are replayed and handed over meanwhile.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tracing::warn;

use super::Boot;
use super::report::{BootProgress, BootWait};
use crate::engine::catch_up::{Cursor, CursorState};
use crate::engine::retries::RetryWait;
use crate::model::event::Position;
use crate::model::projector::ProjectorId;
use crate::model::wait_log::Reminder;

/// How often the progress of a wait is reported.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Since when each projector has waited at its position, and when that is logged next.
#[derive(Debug, Default)]
pub(super) struct RetryWaits(HashMap<ProjectorId, Waiting>);

#[derive(Debug)]
struct Waiting {
    position: Position,
    since: Instant,
    reminder: Reminder,
}

impl RetryWaits {
    /// For how long a projector has waited at this position.
    fn elapsed(&mut self, id: &ProjectorId, position: Position, now: Instant) -> Duration {
        self.waiting(id, position, now).since.elapsed()
    }

    fn waiting(&mut self, id: &ProjectorId, position: Position, now: Instant) -> &mut Waiting {
        let begin = || Waiting { position, since: now, reminder: Reminder::new(now) };
        let waiting = self.0.entry(id.clone()).or_insert_with(begin);
        if waiting.position != position {
            *waiting = begin();
        }
        waiting
    }
}

impl Boot<'_> {
    /// Continues the cursors whose next attempt is due, and returns whether there are any. Records
    /// since when the others have waited.
    pub(super) fn wake_retries(&mut self, cursors: &mut [Cursor]) -> bool {
        let now = Instant::now();
        let mut has_due = false;
        for cursor in cursors {
            let CursorState::Waiting(wait) = &cursor.state else { continue };
            self.retry_waits.waiting(&cursor.projector.id, cursor.position, now);
            if wait.until <= now {
                cursor.state = CursorState::Running;
                has_due = true;
            }
        }
        has_due
    }

    /// Waits for one poll interval for the next attempt of a projector, and reports why. Gives up
    /// on the projectors that have waited for `retry_timeout` at one event. Returns `false` if no
    /// projector is left to wait for.
    pub(super) async fn wait_for_retries(
        &mut self,
        cursors: &mut [Cursor],
        progress: &mut impl FnMut(&BootProgress),
    ) -> bool {
        let now = Instant::now();
        let mut next: Option<(Instant, String, Duration)> = None;
        for cursor in cursors.iter_mut() {
            let CursorState::Waiting(RetryWait { until, reason, .. }) = &cursor.state else {
                continue;
            };
            let id = cursor.projector.id.clone();
            let elapsed = self.retry_waits.elapsed(&id, cursor.position, now);
            let event = cursor.position.next();
            if self.engine.limits.retry_timeout.is_some_and(|timeout| elapsed >= timeout) {
                let seconds = elapsed.as_secs();
                let refused = format!(
                    "it is retrying event {event}, and boot gave up after {seconds} s: {reason}. \
                     Run boot again when the cause is gone: it continues where it stopped"
                );
                self.findings.refused.insert(id, refused);
                cursor.state = CursorState::TakenOver;
                continue;
            }
            let reason = format!("{id} is retrying event {event}: {reason}");
            if self.retry_waits.waiting(&id, cursor.position, now).reminder.is_due(now) {
                warn!(
                    projector = %id, position = event.get(), seconds = elapsed.as_secs(),
                    release = self.engine.release, "waiting: {reason}"
                );
            }
            if next.as_ref().is_none_or(|(first, ..)| until < first) {
                next = Some((*until, reason, elapsed));
            }
        }
        let Some((until, reason, elapsed)) = next else { return false };
        let wait = Some(BootWait { reason, elapsed });
        progress(&BootProgress::new(cursors, self.target, wait));
        let pause = until.saturating_duration_since(now).min(POLL_INTERVAL);
        tokio::time::sleep(pause).await;
        true
    }
}
