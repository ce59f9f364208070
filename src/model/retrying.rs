//! The wait of a projector for a later retry: how long it waits, and when that is stored, logged
//! and alerted. Pure rules; the caller gives the time.

use std::time::{Duration, Instant};

use time::OffsetDateTime;

use crate::model::event::Position;
use crate::model::wait_log::Reminder;

/// A projector's wait for a later retry, as the ledger stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retrying {
    /// The time of the first failed attempt, in UTC.
    pub since: OffsetDateTime,
    /// The number of failed attempts.
    pub attempts: u32,
    /// The reason of the last failed attempt.
    pub reason: String,
    /// The time of the next attempt, in UTC.
    pub next_attempt: OffsetDateTime,
    /// Whether the alert for a long wait was sent.
    pub is_alerted: bool,
}

/// The delay after the first failed attempt, and the longest one, if the handler names no delay.
const FIRST_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(30);

/// The longest delay after a transient error of the server.
const MAX_TRANSIENT_DELAY: Duration = Duration::from_secs(5);

/// A shorter wait is not stored. Most waits of this kind end by themselves, and cost no write.
const STORE_AFTER: Duration = Duration::from_secs(1);

/// The shortest time between two writes of one wait.
const STORE_INTERVAL: Duration = Duration::from_secs(10);

/// A failed attempt after which the projector waits.
#[derive(Debug, Clone)]
pub(crate) struct FailedAttempt {
    /// The projector's position.
    pub(crate) position: Position,
    pub(crate) reason: String,
    /// How often the handler was called.
    pub(crate) attempts: u32,
    /// The delay that the handler named.
    pub(crate) delay: Option<Duration>,
    /// Whether the handler asked for the retry. `false`: a transient error of the server.
    pub(crate) is_requested: bool,
}

/// What this process knows about the wait of one projector.
#[derive(Debug, Clone)]
pub(crate) struct RetryState {
    /// The projector's position. At another position the wait is over.
    pub(crate) position: Position,
    /// When the first attempt failed, in this process or in an earlier one.
    pub(crate) since: Instant,
    /// When the first attempt failed for which the handler asked for a retry.
    requested_since: Option<Instant>,
    pub(crate) attempts: u32,
    /// How often the projector has begun to wait. One round can have several attempts.
    rounds: u32,
    pub(crate) reason: String,
    pub(crate) next_attempt: Instant,
    /// Whether the ledger has the wait.
    is_stored: bool,
    /// When this process last stored the wait.
    stored_at: Option<Instant>,
    pub(crate) is_alerted: bool,
    reminder: Reminder,
}

impl RetryState {
    /// The state after the first failed attempt.
    pub(crate) fn new(now: Instant, attempt: FailedAttempt) -> Self {
        let mut state = RetryState {
            position: attempt.position,
            since: now,
            requested_since: None,
            attempts: 0,
            rounds: 0,
            reason: String::new(),
            next_attempt: now,
            is_stored: false,
            stored_at: None,
            is_alerted: false,
            reminder: Reminder::new(now),
        };
        state.record(now, attempt);
        state
    }

    /// The state that the ledger has stored.
    pub(crate) fn from_stored(
        now: Instant,
        utc_now: OffsetDateTime,
        position: Position,
        stored: &Retrying,
    ) -> Self {
        let age = (utc_now - stored.since).try_into().unwrap_or_default();
        let delay = (stored.next_attempt - utc_now).try_into().unwrap_or_default();
        let since = now.checked_sub(age).unwrap_or(now);
        RetryState {
            position,
            since,
            requested_since: Some(since),
            attempts: stored.attempts,
            rounds: stored.attempts,
            reason: stored.reason.clone(),
            next_attempt: now + Duration::min(delay, MAX_STORED_DELAY),
            is_stored: true,
            stored_at: None,
            is_alerted: stored.is_alerted,
            reminder: Reminder::resumed(since, now),
        }
    }

    /// Records a failed attempt at the same position, and sets the time of the next one.
    pub(crate) fn record(&mut self, now: Instant, attempt: FailedAttempt) {
        self.attempts = self.attempts.saturating_add(attempt.attempts);
        self.rounds = self.rounds.saturating_add(1);
        self.reason = attempt.reason;
        if attempt.is_requested {
            self.requested_since.get_or_insert(now);
        }
        let max = if attempt.is_requested { MAX_DELAY } else { MAX_TRANSIENT_DELAY };
        let delay = attempt.delay.unwrap_or_else(|| delay(self.rounds).min(max));
        self.next_attempt = now + delay;
    }

    /// For how long the handler has asked for retries.
    pub(crate) fn requested_for(&self, now: Instant) -> Duration {
        self.requested_since.map_or(Duration::ZERO, |since| now.duration_since(since))
    }

    /// Whether the wait has to be stored now: a wait of some length at once, and then with a
    /// minimum time between two writes.
    pub(crate) fn should_store(&self, now: Instant) -> bool {
        match self.stored_at {
            Some(stored_at) => now.duration_since(stored_at) >= STORE_INTERVAL,
            None => self.next_attempt.duration_since(self.since) >= STORE_AFTER,
        }
    }

    pub(crate) fn record_stored(&mut self, now: Instant) {
        (self.is_stored, self.stored_at) = (true, Some(now));
    }

    pub(crate) fn is_stored(&self) -> bool {
        self.is_stored
    }

    /// Whether the wait has to be logged now: at once, and then at growing intervals.
    pub(crate) fn should_log(&mut self, now: Instant) -> bool {
        self.reminder.is_due(now)
    }

    /// Whether the alert for a long wait is due. Returns `true` once.
    pub(crate) fn should_alert(&mut self, now: Instant, alert_after: Duration) -> bool {
        let is_due = !self.is_alerted && now.duration_since(self.since) >= alert_after;
        self.is_alerted |= is_due;
        is_due
    }

    /// When something about the wait has to be logged, alerted or done next.
    pub(crate) fn next_step(&self, alert_after: Duration) -> Instant {
        let next = self.next_attempt.min(self.reminder.next());
        if self.is_alerted { next } else { next.min(self.since + alert_after) }
    }
}

/// A stored delay is not longer than this, whatever the clocks of two hosts say.
const MAX_STORED_DELAY: Duration = crate::model::retry_later::RetryLater::MAX_DELAY;

/// The delay in this round, with jitter.
fn delay(round: u32) -> Duration {
    let ceiling = FIRST_DELAY.saturating_mul(1 << round.saturating_sub(1).min(8)).min(MAX_DELAY);
    ceiling.mul_f64(0.75 + fastrand::f64() / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(delay: Option<u64>) -> FailedAttempt {
        FailedAttempt {
            position: Position::new(4),
            reason: "503".into(),
            attempts: 1,
            delay: delay.map(Duration::from_millis),
            is_requested: true,
        }
    }

    #[test]
    fn a_delay_grows_to_half_a_minute_and_no_further() {
        for round in 1..40 {
            let ceiling = Duration::from_secs(1 << (round - 1).min(5)).min(MAX_DELAY);
            let delay = delay(round);
            assert!(delay <= ceiling && delay * 2 > ceiling, "{round}: {delay:?}");
        }
    }

    #[test]
    fn a_short_wait_is_not_stored_and_a_long_one_at_once_and_then_rarely() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut flicker = RetryState::new(start, attempt(Some(20)));
        for tried in 1..40 {
            assert!(!flicker.should_store(at(20 * tried)));
            flicker.record(at(20 * tried), attempt(Some(20)));
        }
        let mut writes = 0;
        for tried in 40..4_000 {
            let now = at(20 * tried);
            flicker.record(now, attempt(Some(20)));
            if flicker.should_store(now) {
                flicker.record_stored(now);
                writes += 1;
            }
        }
        assert_eq!(writes, 8, "80 s with an attempt every 20 ms");
        assert!(RetryState::new(start, attempt(Some(1_000))).should_store(start));
    }

    #[test]
    fn a_wait_is_alerted_once_after_its_time_and_logged_at_growing_intervals() {
        let start = Instant::now();
        let after = Duration::from_secs(300);
        let mut state = RetryState::new(start, attempt(Some(3_600_000)));
        let (mut logged, mut alerted) = (Vec::new(), Vec::new());
        let mut now = start;
        while now < start + Duration::from_secs(1_000) {
            let seconds = now.duration_since(start).as_secs();
            if state.should_log(now) {
                logged.push(seconds);
            }
            if state.should_alert(now, after) {
                alerted.push(seconds);
            }
            now = state.next_step(after);
        }
        assert_eq!(logged, [0, 5, 15, 35, 75, 155, 315, 615, 915]);
        assert_eq!(alerted, [300]);
    }

    #[test]
    fn a_stored_wait_keeps_its_beginning_and_its_next_attempt() {
        let (now, utc_now) = (Instant::now(), OffsetDateTime::UNIX_EPOCH);
        let stored = Retrying {
            since: utc_now - Duration::from_secs(50),
            attempts: 7,
            reason: "503".into(),
            next_attempt: utc_now + Duration::from_secs(20),
            is_alerted: true,
        };
        let state = RetryState::from_stored(now, utc_now, Position::new(4), &stored);
        assert_eq!(now - state.since, Duration::from_secs(50));
        assert_eq!(state.next_attempt - now, Duration::from_secs(20));
        assert!(state.is_alerted && state.is_stored());
        // The lines of an earlier process are not repeated: 0, 5, 15, 35 and then 75 s.
        assert_eq!(state.reminder.next() - state.since, Duration::from_secs(75));
    }
}
