//! The relay publishes the log to the queue: every event up to the high-water mark, in order.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::time::timeout;
use tracing::{debug, error, info};
use uuid::Uuid;

use crate::engine::error::Error;
use crate::engine::stall_watch::StallWatch;
use crate::model::event::Position;
use crate::model::metrics::{self, RelayProgress};
use crate::model::wait_log::OutageLog;
use crate::queue::{self, Queue, QueueError};
use crate::store::{EventStore, HighWater, Marks, Page};

/// How long the relay's lease lasts. If a relay stops without releasing it, no other relay can
/// publish for this long.
const LEASE_DURATION: Duration = Duration::from_secs(5);

/// How long a relay waits after a panic before it restarts.
const PANIC_PAUSE: Duration = Duration::from_secs(1);

/// How long after an event the relay polls the log more often, because another event is likely.
const BUSY_PERIOD: Duration = Duration::from_secs(1);

/// Without events, the pause between two polls grows to this part of the time since the last event.
const IDLE_FRACTION: u32 = 50;

/// How long a relay without the lease uses the marks that it has read.
const MARKS_LIFETIME: Duration = Duration::from_secs(5);

/// How the relay works.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct RelaySettings {
    /// The pause between two polls of a log without new events. For a second after an event, the
    /// pause is a twentieth of this.
    pub interval: Duration,
    /// The longest pause, once the log has had no event for a while: an idle worker should cost its
    /// database little. The first event of another process is published this much later at most.
    /// An append of this process ends the pause.
    pub idle_interval: Duration,
    /// The maximum number of events in one message, at least 1. The queue's message size is a
    /// second limit.
    pub max_events: usize,
}

impl RelaySettings {
    /// The defaults.
    pub const fn new() -> Self {
        RelaySettings {
            interval: Duration::from_millis(50),
            idle_interval: Duration::from_millis(500),
            max_events: 1_000,
        }
    }

    /// Sets [`RelaySettings::interval`].
    pub const fn with_interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Sets [`RelaySettings::idle_interval`].
    pub const fn with_idle_interval(mut self, idle_interval: Duration) -> Self {
        self.idle_interval = idle_interval;
        self
    }

    /// Sets [`RelaySettings::max_events`].
    pub const fn with_max_events(mut self, max_events: usize) -> Self {
        self.max_events = max_events;
        self
    }
}

impl RelaySettings {
    /// The pause after a poll that found nothing, if the last event was published `quiet` ago.
    fn pause(&self, quiet: Duration) -> Duration {
        if quiet < BUSY_PERIOD {
            self.interval / 20
        } else {
            (quiet / IDLE_FRACTION).min(self.idle_interval).max(self.interval)
        }
    }
}

impl Default for RelaySettings {
    fn default() -> Self {
        Self::new()
    }
}

/// Publishes the log to the queue.
pub(crate) struct Relay {
    store: EventStore,
    queue: Arc<dyn Queue>,
    settings: RelaySettings,
    holder: String,
    /// When the lease was last acquired or renewed. A relay that has nothing to publish lets it
    /// expire, so that an idle log costs no writes.
    leased_at: Option<Instant>,
    /// The marks as this relay last stored them. While this relay holds the lease, other processes
    /// rarely move them. If one does, the only effect is extra work.
    marks: Option<Marks>,
    /// When the marks were last read from the log.
    marks_read_at: Instant,
    watch: StallWatch,
    /// Whether the log has recorded this queue as the one that it is published to.
    is_queue_recorded: bool,
    /// The number of messages sent. The backoff starts again after a failure that followed
    /// progress.
    messages_sent: u64,
}

/// The outcome of one poll of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelayOutcome {
    /// The number of events published, 0 if there were none, and the position up to which the log
    /// is published.
    Published { events: u64, through: Position },
    /// Another relay holds the lease.
    LeasedElsewhere,
}

/// Why a poll failed. Messages that were already sent stay sent; the rest is sent by a later poll.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelayError {
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("queue: {0}")]
    Queue(#[from] QueueError),
}

impl From<RelayError> for Error {
    fn from(error: RelayError) -> Self {
        match error {
            RelayError::Database(error) => error.into(),
            RelayError::Queue(error) => error.into(),
        }
    }
}

/// The deduplication id of a message: the log's id and both ends of the range. A message with other
/// ends counts as a different message, and a duplicate is harmless.
pub(crate) fn deduplication_id(log_id: &str, published: Position, last: Position) -> String {
    format!("{log_id}-{published}-{last}")
}

/// The first position after `published` that has no row, if there is one in the page. Positions
/// after the last event belong to the next page, unless this page is empty.
fn first_gap(published: Position, page: &Page) -> Option<Position> {
    let mut next = published.next();
    for event in &page.events {
        if event.position() != next {
            return Some(next);
        }
        next = next.next();
    }
    page.events.is_empty().then_some(next)
}

impl Relay {
    /// Creates a relay that shares `watch` with the rest of its process.
    pub(crate) fn new(
        store: EventStore,
        queue: Arc<dyn Queue>,
        settings: RelaySettings,
        watch: StallWatch,
    ) -> Self {
        let holder = Uuid::now_v7().to_string();
        let settings = RelaySettings { max_events: settings.max_events.max(1), ..settings };
        Relay {
            store,
            queue,
            settings,
            holder,
            leased_at: None,
            marks: None,
            marks_read_at: Instant::now(),
            watch,
            is_queue_recorded: false,
            messages_sent: 0,
        }
    }

    /// Publishes until the future is dropped; the lease then expires. Failures and panics are
    /// logged and retried: a relay that ended would look the same as an idle log.
    pub(crate) async fn run(&mut self) {
        loop {
            let ended = AssertUnwindSafe(self.run_until_panic()).catch_unwind().await;
            let Err(panic) = ended.map(|never: Infallible| match never {});
            let message = panic.downcast_ref::<&str>().copied();
            let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            error!(error = message.unwrap_or("(no message)"), "the relay panicked and restarts");
            // The cached state may be inconsistent after a panic, so it is read again.
            (self.leased_at, self.marks) = (None, None);
            tokio::time::sleep(PANIC_PAUSE).await;
        }
    }

    async fn run_until_panic(&mut self) -> Infallible {
        let mut outage_log = OutageLog::default();
        let mut last_event = Instant::now();
        let mut is_standby = false;
        let mut appends = self.store.subscribe_to_appends();
        loop {
            let before = self.messages_sent;
            appends.mark_unchanged();
            match self.publish_new().await {
                Ok(RelayOutcome::Published { events, through }) => {
                    outage_log.record_recovery("the relay works again");
                    if std::mem::take(&mut is_standby) {
                        info!(published = through.get(), "this process publishes the log now");
                    }
                    if events > 0 {
                        debug!(events, published = through.get(), "published");
                        last_event = Instant::now();
                        continue;
                    }
                    // An append of this process ends the pause.
                    let pause = self.settings.pause(last_event.elapsed());
                    if let Ok(Ok(())) = timeout(pause, appends.changed()).await {
                        last_event = Instant::now();
                    }
                }
                Ok(RelayOutcome::LeasedElsewhere) => {
                    // The normal state of all processes with a relay but one.
                    if !std::mem::replace(&mut is_standby, true) {
                        info!(
                            "another process publishes the log; this one takes over when that ends"
                        );
                    }
                    tokio::time::sleep(LEASE_DURATION / 5).await;
                }
                Err(error) => {
                    if self.messages_sent > before {
                        outage_log = OutageLog::default();
                    }
                    let what = "the relay cannot work now, trying again";
                    tokio::time::sleep(outage_log.record_failure(what, &error)).await;
                }
            }
        }
    }

    /// Releases the lease, best effort: otherwise it expires.
    pub(crate) async fn release_lease(&self) {
        if let Err(error) = self.watch.store_blocked(&self.store).await {
            debug!(%error, "cannot store what blocks the high-water mark");
        }
        if let Err(error) = self.store.release_relay_lease(&self.holder).await {
            debug!(%error, "cannot release the relay's lease: it expires");
        }
    }

    /// Raises the mark and publishes all events up to the new mark.
    pub(crate) async fn publish_new(&mut self) -> Result<RelayOutcome, RelayError> {
        let leased_at = match self.leased_at {
            Some(leased_at) if leased_at.elapsed() < LEASE_DURATION / 3 => leased_at,
            _ => {
                if let Some(published) = self.find_all_published().await? {
                    return Ok(RelayOutcome::Published { events: 0, through: published });
                }
                let requested_at = Instant::now();
                self.leased_at = self
                    .store
                    .acquire_relay_lease(&self.holder, LEASE_DURATION)
                    .await?
                    .then_some(requested_at);
                let Some(leased_at) = self.leased_at else {
                    return Ok(RelayOutcome::LeasedElsewhere);
                };
                // While this relay did not hold the lease, another process may have moved the
                // marks, or an operator may have changed the log's id and key. Messages signed with
                // the old key are foreign: projectors never apply them, and read those events from
                // the store.
                self.marks = None;
                leased_at
            }
        };
        let marks = match self.marks.take() {
            Some(marks) => marks,
            None => self.read_marks().await?,
        };
        let mark = self.raise_high_water(&marks).await?;
        let mut published = marks.published;
        while published < mark {
            let page =
                self.store.read_after(published, mark, self.settings.max_events as u64).await?;
            if let Some(first) = first_gap(published, &page) {
                // Every position below the mark once had a row, so these rows were deleted. The
                // audit lists all of them.
                let last = self.store.end_of_gap(first, mark).await?;
                error!(
                    alert = "log_fault",
                    first = first.get(),
                    last = last.get(),
                    "rows of the log were deleted between these positions: their events cannot be \
                     published"
                );
                if page.events.is_empty() {
                    self.store.set_published(last).await?;
                    published = last;
                    continue;
                }
            }
            let mut rest = page.events.as_slice();
            while !rest.is_empty() {
                self.record_queue().await?;
                let (bytes, most) = (self.queue.max_message_bytes(), self.settings.max_events);
                let packed = queue::pack(&marks.log, published, rest, bytes, most);
                let deduplication_id = deduplication_id(&marks.log.id, published, packed.last);
                self.queue.send(&packed.body, &deduplication_id).await?;
                self.store.set_published(packed.last).await?;
                self.messages_sent += 1;
                metrics::record_sent_message(packed.event_count);
                published = packed.last;
                rest = &rest[packed.event_count..];
            }
            // The next poll renews the lease before it continues.
            if leased_at.elapsed() > LEASE_DURATION / 2 {
                break;
            }
        }
        metrics::record_relay_progress(RelayProgress { high_water: mark, published });
        metrics::record_mark_state(self.watch.blocked_since());
        let events = published.since(marks.published);
        let blocked = marks.blocked.filter(|_| mark == marks.high_water);
        self.marks = Some(Marks { high_water: mark, published, blocked, ..marks });
        Ok(RelayOutcome::Published { events, through: published })
    }

    /// The published position, if the log has nothing else to publish. Only reads, so that a relay
    /// needs no lease for it.
    async fn find_all_published(&mut self) -> Result<Option<Position>, sqlx::Error> {
        let marks = match self.marks.take() {
            Some(marks) if self.marks_read_at.elapsed() < MARKS_LIFETIME => marks,
            _ => self.read_marks().await?,
        };
        let (mark, published) = (marks.high_water, marks.published);
        // A blocked mark, or a log that ends below it, is examined under the lease.
        let is_all = published == mark
            && marks.blocked.is_none()
            && self.watch.blocked_since().is_none()
            && self.store.ends_at(mark).await?;
        if !is_all {
            return Ok(None);
        }
        let high_water =
            HighWater { mark, blocked: None, blocked_for: Duration::ZERO, fault: None };
        self.watch.record(&self.store, &high_water).await?;
        metrics::record_relay_progress(RelayProgress { high_water: mark, published });
        metrics::record_mark_state(None);
        self.marks = Some(marks);
        Ok(Some(published))
    }

    async fn read_marks(&mut self) -> Result<Marks, sqlx::Error> {
        self.marks_read_at = Instant::now();
        self.store.marks().await
    }

    /// Records in the log which queue it is published to, so that a worker on another queue is
    /// detected.
    async fn record_queue(&mut self) -> Result<(), sqlx::Error> {
        if self.is_queue_recorded {
            return Ok(());
        }
        if let Some(queue) = self.queue.identity()
            && self.store.recorded_queue().await?.as_ref() != Some(&queue)
        {
            self.store.record_queue(&queue).await?;
        }
        self.is_queue_recorded = true;
        Ok(())
    }

    /// Raises the mark. A position that is already proved is published before waiting for a gap
    /// above it.
    async fn raise_high_water(&mut self, marks: &Marks) -> Result<Position, sqlx::Error> {
        if self.watch.is_still_blocked(&self.store, marks.high_water).await? {
            return Ok(marks.high_water);
        }
        let risen = self.store.raise_over_visible(marks.high_water).await?;
        if risen.has_gap && risen.mark > marks.published {
            return Ok(risen.mark);
        }
        let high_water = if risen.has_gap {
            self.store.raise_high_water().await?
        } else {
            if marks.blocked.is_some() && risen.mark == marks.high_water {
                self.store.clear_blocked(risen.mark).await?;
            }
            HighWater {
                mark: risen.mark,
                blocked: None,
                blocked_for: Duration::ZERO,
                fault: risen.fault,
            }
        };
        self.watch.record(&self.store, &high_water).await?;
        Ok(high_water.mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_with_the_quiet_time_up_to_the_idle_interval() {
        let settings = RelaySettings::new();
        let pause = |seconds| settings.pause(Duration::from_secs_f64(seconds)).as_secs_f64();
        let pauses = [0.5, 2.0, 10.0, 25.0, 3_600.0].map(pause);
        assert_eq!(pauses, [0.0025, 0.05, 0.2, 0.5, 0.5]);
        let slow = settings.with_interval(Duration::from_secs(2));
        assert_eq!(slow.pause(Duration::from_secs(3_600)), Duration::from_secs(2));
    }
}
