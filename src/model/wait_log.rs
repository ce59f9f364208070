//! Logs what a wait is for: at once, and then at growing intervals. A wait that says nothing looks
//! like a program that hangs, and one line for each attempt hides all other lines.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::time::sleep_until;
use tracing::{info, warn};

use crate::model::backoff;

/// A shorter wait for something that is normally free is not news.
const NEWS_AFTER: Duration = Duration::from_secs(1);

/// When to log a condition that lasts: at once, and then at intervals that double, from five
/// seconds to five minutes.
#[derive(Debug, Clone)]
pub(crate) struct Reminder {
    next: Instant,
    interval: Duration,
    lines: u32,
}

impl Reminder {
    const FIRST_INTERVAL: Duration = Duration::from_secs(5);
    const MAX_INTERVAL: Duration = Duration::from_secs(300);

    /// The condition has begun now.
    pub(crate) fn new(now: Instant) -> Self {
        Reminder { next: now, interval: Self::FIRST_INTERVAL, lines: 0 }
    }

    /// The condition has begun now, and is often over within a second. Then it is not logged.
    pub(crate) fn after_a_second(now: Instant) -> Self {
        Reminder::new(now + NEWS_AFTER)
    }

    /// The condition has begun at `since`, and earlier processes have logged it.
    pub(crate) fn resumed(since: Instant, now: Instant) -> Self {
        let mut reminder = Reminder::new(since);
        while reminder.next <= now {
            reminder.is_due(reminder.next);
        }
        reminder
    }

    /// When the condition has to be logged next.
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// Whether the condition was logged.
    pub(crate) fn is_logged(&self) -> bool {
        self.lines > 0
    }

    /// Whether the condition was logged more than once, so that its end is news, too.
    pub(crate) fn has_reminded(&self) -> bool {
        self.lines > 1
    }

    /// Whether the condition has to be logged now. If so, sets the time of the next line.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        if now < self.next {
            return false;
        }
        self.next = now + self.interval;
        self.interval = (self.interval * 2).min(Self::MAX_INTERVAL);
        self.lines = self.lines.saturating_add(1);
        true
    }
}

/// The failures of one service in a row.
#[derive(Debug, Default)]
pub(crate) struct OutageLog {
    outage: Option<Outage>,
}

#[derive(Debug)]
struct Outage {
    attempts: u32,
    since: Instant,
    reminder: Reminder,
}

impl OutageLog {
    /// Records a failure. Returns the delay before the next attempt.
    pub(crate) fn record_failure(&mut self, what: &str, error: &dyn std::fmt::Display) -> Duration {
        let now = Instant::now();
        let begin = || Outage { attempts: 0, since: now, reminder: Reminder::new(now) };
        let outage = self.outage.get_or_insert_with(begin);
        outage.attempts += 1;
        if outage.reminder.is_due(now) {
            let seconds = now.duration_since(outage.since).as_secs();
            warn!(attempt = outage.attempts, seconds, %error, "{what}");
        }
        backoff::delay(outage.attempts + 4)
    }

    /// Records that the service works again.
    pub(crate) fn record_recovery(&mut self, what: &str) {
        if let Some(Outage { attempts, since, .. }) = self.outage.take() {
            info!(attempts, seconds = since.elapsed().as_secs(), "{what}");
        }
    }
}

/// Runs `work`. Logs that the program waits for `what` if that takes longer than a second. Takes
/// the pinned future, because copies of a large one would fill the stack.
pub(crate) async fn log_wait<T>(what: &str, mut work: Pin<&mut impl Future<Output = T>>) -> T {
    let began = Instant::now();
    let mut reminder = Reminder::after_a_second(began);
    loop {
        tokio::select! {
            biased;
            ended = &mut work => {
                if reminder.is_logged() {
                    info!(seconds = began.elapsed().as_secs(), "the wait for {what} is over");
                }
                return ended;
            }
            () = sleep_until(reminder.next().into()) => {
                if reminder.is_due(Instant::now()) {
                    warn!(seconds = began.elapsed().as_secs(), "waiting for {what}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_of_a_day_is_logged_about_every_five_minutes() {
        let start = Instant::now();
        let mut reminder = Reminder::new(start);
        let due = |second: &u64| reminder.is_due(start + Duration::from_secs(*second));
        let logged: Vec<u64> = (0..86_400).filter(due).collect();
        assert_eq!(logged[..8], [0, 5, 15, 35, 75, 155, 315, 615]);
        assert!(logged.len() < 300, "{}", logged.len());
    }
}
