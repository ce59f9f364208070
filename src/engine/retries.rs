//! The projectors that wait for a later retry: their handlers asked for it, or a transient error of
//! the server did not pass. Such a projector is not broken. It waits outside the fan-out group, the
//! ledger shows its wait, and an alert reports a long one.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::time::{sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::database::error::format_chain;
use crate::engine::retry::{ApplyOutcome, Engine, ProjectorError, hostname};
use crate::ledger::{Entry, LiveProjector, StoredWait};
use crate::model::backoff;
use crate::model::event::{Event, Position};
use crate::model::lifecycle::Stage;
use crate::model::projector::ProjectorId;
use crate::model::registry::RegisteredProjector;
use crate::model::retrying::{FailedAttempt, RetryState};

/// How long a write to the ledger may take. It is best effort, and another worker may hold the row.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// A wait for the next attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RetryWait {
    /// The projector's position, just before the event.
    pub(crate) position: Position,
    pub(crate) until: Instant,
    pub(crate) reason: String,
}

/// The waits of one process. Cheap to clone; clones share the waits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Retries(Arc<Mutex<HashMap<ProjectorId, RetryState>>>);

impl Retries {
    fn lock(&self) -> MutexGuard<'_, HashMap<ProjectorId, RetryState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a projector has failed in a way that a retry can cure, and has not advanced since.
    pub(crate) fn contains(&self, id: &ProjectorId) -> bool {
        let retries = self.lock();
        !retries.is_empty() && retries.contains_key(id)
    }

    /// The wait of a projector at `position`, if it waits there.
    pub(crate) fn wait_at(&self, id: &ProjectorId, position: Position) -> Option<RetryWait> {
        let retries = self.lock();
        let state = retries.get(id).filter(|state| state.position == position)?;
        Some(RetryWait { position, until: state.next_attempt, reason: state.reason.clone() })
    }

    /// Forgets all waits. Those that are stored are read again from the ledger. For a function: the
    /// monotonic clock can stop while it is frozen, and the times in the ledger do not.
    pub(crate) fn forget_all(&self) {
        self.lock().clear();
    }

    /// Forgets a wait without a report, because the projector broke or was taken over.
    pub(crate) fn forget(&self, id: &ProjectorId) {
        self.lock().remove(id);
    }

    fn record(&self, id: &ProjectorId, now: Instant, attempt: FailedAttempt) -> RetryState {
        let mut retries = self.lock();
        match retries.get_mut(id).filter(|state| state.position == attempt.position) {
            Some(state) => {
                state.record(now, attempt);
                state.clone()
            }
            None => {
                let state = RetryState::new(now, attempt);
                retries.insert(id.clone(), state.clone());
                state
            }
        }
    }

    /// Changes the state of a projector's wait, if there is one.
    fn update<T>(&self, id: &ProjectorId, change: impl FnOnce(&mut RetryState) -> T) -> Option<T> {
        self.lock().get_mut(id).map(change)
    }
}

impl Engine {
    /// Ends the attempts at an event: the projector waits for a later retry if the error allows
    /// one, or else breaks. Its position must be just before the event.
    pub(crate) async fn fail_at(
        &self,
        projector: &RegisteredProjector,
        stage: Stage,
        event: &Event,
        failed: ProjectorError,
    ) -> ApplyOutcome {
        let Some(retry) = failed.retry else {
            return Box::pin(self.mark_broken(projector, stage, Some(event), failed)).await;
        };
        let (id, now) = (&projector.id, Instant::now());
        let attempt = FailedAttempt {
            position: event.position().previous(),
            reason: format_chain(&failed.error),
            attempts: failed.attempts,
            delay: retry.delay,
            is_requested: retry.is_requested,
        };
        let state = self.retries.record(id, now, attempt);
        let requested_for = state.requested_for(now);
        if retry.is_requested && requested_for >= self.limits.retry_later_limit {
            let error = failed.error.context(format!(
                "the handler has asked for a later retry for {} s, and the limit \
                 (--retry-later-limit) is {} s",
                requested_for.as_secs(),
                self.limits.retry_later_limit.as_secs()
            ));
            let failed = ProjectorError::new(error, state.attempts);
            return Box::pin(self.mark_broken(projector, stage, Some(event), failed)).await;
        }
        let RetryState { position, next_attempt: until, reason, .. } = state;
        Box::pin(self.report_retry(id, Some(event))).await;
        ApplyOutcome::Waiting(RetryWait { position, until, reason })
    }

    /// Logs, alerts and stores what is due about a projector's wait.
    async fn report_retry(&self, id: &ProjectorId, event: Option<&Event>) {
        let now = Instant::now();
        let due = self.retries.update(id, |state| {
            let should_log = state.should_log(now);
            let should_alert = state.should_alert(now, self.limits.retry_alert_after);
            let should_store = should_alert || state.should_store(now);
            if should_store {
                state.record_stored(now);
            }
            (state.clone(), should_log, should_alert, should_store)
        });
        let Some((state, should_log, should_alert, should_store)) = due else { return };
        let age = now.duration_since(state.since);
        let delay = state.next_attempt.saturating_duration_since(now);
        if should_alert {
            warn!(
                alert = "projector_retrying",
                projector = %id,
                position = state.position.next().get(),
                event_type = event.map(Event::event_type),
                event_id = event.map(Event::event_id),
                error = state.reason,
                attempts = state.attempts,
                seconds = age.as_secs(),
                release = self.release,
                host = hostname(),
                "the projector has been retrying an event for long: its read model is behind, and \
                 all others go on"
            );
        } else if should_log {
            warn!(
                projector = %id, position = state.position.next().get(), attempts = state.attempts,
                error = state.reason, seconds = age.as_secs(),
                next_attempt_in = backoff::seconds(delay),
                "cannot apply an event now: the projector waits and tries again, and all others go \
                 on"
            );
        }
        if should_store {
            let wait = StoredWait {
                position: state.position,
                age,
                attempts: state.attempts,
                reason: &state.reason,
                delay,
                is_alerted: state.is_alerted,
            };
            if let Err(error) = within(self.ledger.store_retry(id, wait)).await {
                debug!(projector = %id, error, "cannot store that the projector is retrying");
            }
        }
    }

    /// Ends a projector's wait, if there is one, because the projector has advanced.
    pub(crate) async fn end_retry(&self, id: &ProjectorId) {
        let Some(state) = self.retries.lock().remove(id) else { return };
        let cleared = if state.is_stored() {
            within(self.ledger.clear_retry(id, state.position)).await
        } else {
            Ok(false)
        };
        let seconds = state.since.elapsed().as_secs();
        let (position, attempts) = (state.position.next().get(), state.attempts);
        // If another worker has cleared the wait, that worker sends the alert.
        if state.is_alerted && !matches!(cleared, Ok(false)) {
            warn!(
                alert = "projector_recovered",
                projector = %id, position, attempts, seconds, release = self.release,
                host = hostname(), "the projector no longer retries: its event is applied"
            );
        } else {
            info!(projector = %id, position, attempts, seconds, "applied after retries");
        }
    }

    /// Takes over the wait that the ledger has stored for a projector, from an earlier process or
    /// from another worker.
    pub(crate) fn resume_retry(&self, entry: &Entry) {
        let Some(stored) = &entry.retrying else { return };
        let (now, utc_now) = (Instant::now(), OffsetDateTime::now_utc());
        self.retries
            .lock()
            .entry(entry.id.clone())
            .or_insert_with(|| RetryState::from_stored(now, utc_now, entry.position, stored));
    }

    /// Compares the waits of this process with the ledger: ends those of projectors that have
    /// advanced, and takes over stored ones.
    pub(crate) async fn sync_retries(&self, live: &[LiveProjector]) -> Result<(), sqlx::Error> {
        if !live.iter().any(|live| live.is_retrying) && self.retries.lock().is_empty() {
            return Ok(());
        }
        for LiveProjector { id, position, is_retrying, .. } in live {
            let known = self.retries.update(id, |state| state.position);
            match known {
                Some(known) if known < *position => self.end_retry(id).await,
                None if *is_retrying => {
                    if let Some(entry) = self.ledger.entry(id).await? {
                        self.resume_retry(&entry);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until the next attempt of a projector is due, and reports meanwhile.
    pub(crate) async fn wait_for_retry(&self, id: &ProjectorId, until: Instant) {
        let alert_after = self.limits.retry_alert_after;
        while Instant::now() < until {
            let next = self.retries.update(id, |state| state.next_step(alert_after));
            sleep_until(next.map_or(until, |next| next.min(until)).into()).await;
            if Instant::now() < until {
                Box::pin(self.report_retry(id, None)).await;
            }
        }
    }
}

/// Runs a best-effort write. The error is text, because it is only logged.
async fn within<T>(write: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, String> {
    match timeout(WRITE_TIMEOUT, write).await {
        Ok(written) => written.map_err(|error| error.to_string()),
        Err(_) => Err("no answer in time".into()),
    }
}
