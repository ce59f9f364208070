//! From the log to the queue: every event up to the high-water mark, in order.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use crate::engine::stall_watch::LogWatch;
use crate::model::error::Error;
use crate::model::event::Position;
use crate::model::metrics::{self, RelaySaw};
use crate::model::retry;
use crate::queue::{self, Queue, QueueError};
use crate::store::{EventStore, HighWater, Marks, Page};

/// A relay that stops without releasing its lease is missed for this long, and no longer.
const LEASE: Duration = Duration::from_secs(5);

/// How long a relay that panicked waits before it begins again.
const AFTER_A_PANIC: Duration = Duration::from_secs(1);

/// For so long after an event, the next is expected soon: it is looked for more often.
const BUSY_FOR: Duration = Duration::from_secs(1);

/// How the relay works.
#[derive(Debug, Clone, Copy)]
pub struct RelaySettings {
    /// The longest pause between two looks at a log in which nothing is new. While events come, it is a twentieth of that.
    pub interval: Duration,
    /// The most events in one message, at least 1; the queue's largest message bounds it, too.
    pub max_events: usize,
}

impl Default for RelaySettings {
    fn default() -> Self {
        RelaySettings { interval: Duration::from_millis(50), max_events: 1_000 }
    }
}

/// Publishes the log.
pub(crate) struct Relay {
    store: EventStore,
    queue: Arc<dyn Queue>,
    settings: RelaySettings,
    holder: String,
    /// When the lease was last taken: an idle log costs reads, but hardly any writes.
    leased: Option<Instant>,
    /// As this relay left them: while it has the lease, hardly anybody else moves them, and who does only makes work.
    marks: Option<Marks>,
    watch: LogWatch,
    /// Whether the log has it that this is the queue.
    is_recorded: bool,
    /// How many messages were sent: a failure after progress is a first failure.
    sent: u64,
}

/// What one look at the log came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Looked {
    /// So many events were published, up to there; zero if nothing was new.
    Published { events: u64, through: Position },
    /// Another relay holds the lease.
    Elsewhere,
}

/// Why a look failed. What was sent stays sent; what was not will be.
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
            RelayError::Database(error) => Error::Database(error),
            RelayError::Queue(error) => Error::OutOfReach(format!("the queue cannot be used: {error}")),
        }
    }
}

/// The log and both ends: a message of other ends is another message, and repeats harmlessly.
pub(crate) fn deduplication_id(log_id: &str, published: Position, last: Position) -> String {
    format!("{log_id}-{published}-{last}")
}

/// The first position of a page after `published` that has no row, if any has none. Those behind its last event begin the
/// next page.
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
    /// A relay of a process that knows of the log what `watch` knows.
    pub(crate) fn new(store: EventStore, queue: Arc<dyn Queue>, settings: RelaySettings, watch: LogWatch) -> Self {
        let holder = Uuid::now_v7().to_string();
        let settings = RelaySettings { max_events: settings.max_events.max(1), ..settings };
        Relay { store, queue, settings, holder, leased: None, marks: None, watch, is_recorded: false, sent: 0 }
    }

    /// Publishes until it is dropped; the lease it then holds runs out. Failures, and panics, are logged and tried again: a
    /// relay that ended by itself would look like a log in which nothing happens.
    pub(crate) async fn run(&mut self) {
        loop {
            let ended = AssertUnwindSafe(self.run_until_it_panics()).catch_unwind().await;
            let Err(panic) = ended.map(|never: Infallible| match never {});
            let message = panic.downcast_ref::<&str>().copied();
            let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            error!(error = message.unwrap_or("(no message)"), "the relay panicked; it begins again");
            // What it was about to note is read again.
            (self.leased, self.marks) = (None, None);
            tokio::time::sleep(AFTER_A_PANIC).await;
        }
    }

    async fn run_until_it_panics(&mut self) -> Infallible {
        let mut attempt = 1;
        let mut last_event: Option<Instant> = None;
        loop {
            let before = self.sent;
            match self.look().await {
                Ok(Looked::Published { events, through }) => {
                    if attempt > 1 {
                        info!("the relay works again");
                    }
                    attempt = 1;
                    if events > 0 {
                        debug!(events, published = through.get(), "published");
                        last_event = Some(Instant::now());
                        continue;
                    }
                    let is_busy = last_event.is_some_and(|last| last.elapsed() < BUSY_FOR);
                    tokio::time::sleep(self.settings.interval / if is_busy { 20 } else { 1 }).await;
                }
                Ok(Looked::Elsewhere) => tokio::time::sleep(LEASE / 5).await,
                Err(error) => {
                    attempt = if self.sent > before { 2 } else { attempt + 1 };
                    if retry::worth_telling(attempt) {
                        warn!(attempt, %error, "the relay cannot work now, trying again");
                    }
                    tokio::time::sleep(retry::delay(attempt + 4)).await;
                }
            }
        }
    }

    /// Gives the lease up. Best effort: it runs out by itself.
    pub(crate) async fn release(&self) {
        if let Err(error) = self.watch.write_down(&self.store).await {
            debug!(%error, "what holds the high-water mark was not written down");
        }
        if let Err(error) = self.store.release_relay(&self.holder).await {
            debug!(%error, "the relay's lease was not released, and runs out by itself");
        }
    }

    /// Raises the mark and publishes everything up to it.
    pub(crate) async fn look(&mut self) -> Result<Looked, RelayError> {
        let leased = match self.leased {
            Some(leased) if leased.elapsed() < LEASE / 3 => leased,
            _ => {
                let asked = Instant::now();
                self.leased = self.store.lease_relay(&self.holder, LEASE).await?.then_some(asked);
                let Some(leased) = self.leased else { return Ok(Looked::Elsewhere) };
                // Others may have moved them meanwhile, or have given the log another id and key: until now, messages were
                // signed with the ones before. They are not ours then, and nobody applies them; their events come from the store.
                self.marks = None;
                leased
            }
        };
        let marks = match self.marks.take() {
            Some(marks) => marks,
            None => self.store.marks().await?,
        };
        let mark = self.raise_high_water(&marks).await?;
        let mut published = marks.published;
        while published < mark {
            let page = self.store.read_after(published, mark, self.settings.max_events as u64).await?;
            if let Some(first) = first_gap(published, &page) {
                // Below the mark every position had a row: these were deleted since. The audit names all of them.
                let last = self.store.end_of_gap(first, mark).await?;
                error!(
                    alert = "log_fault",
                    first = first.get(),
                    last = last.get(),
                    "the rows of the log between these positions are gone: nothing can be published of them"
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
                self.sent += 1;
                metrics::sent(packed.events);
                published = packed.last;
                rest = &rest[packed.events..];
            }
            // The next look renews the lease before it goes on.
            if leased.elapsed() > LEASE / 2 {
                break;
            }
        }
        metrics::looked(RelaySaw { high_water: mark, published });
        metrics::mark_held(self.watch.since());
        let events = published.since(marks.published);
        let held = marks.held.filter(|_| mark == marks.high_water);
        self.marks = Some(Marks { high_water: mark, published, held, ..marks });
        Ok(Looked::Published { events, through: published })
    }

    /// Has it kept with the log which queue this is, so that a worker on another one is noticed.
    async fn record_queue(&mut self) -> Result<(), sqlx::Error> {
        if self.is_recorded {
            return Ok(());
        }
        if let Some(queue) = self.queue.identity()
            && self.store.recorded_queue().await?.as_ref() != Some(&queue)
        {
            self.store.record_queue(&queue).await?;
        }
        self.is_recorded = true;
        Ok(())
    }

    /// Raises the mark. What is proved is published before a hole above it is waited for.
    async fn raise_high_water(&mut self, marks: &Marks) -> Result<Position, sqlx::Error> {
        if self.watch.is_held_still(&self.store, marks.high_water).await? {
            return Ok(marks.high_water);
        }
        let risen = self.store.raise_over_visible(marks.high_water).await?;
        if risen.meets_a_hole && risen.mark > marks.published {
            return Ok(risen.mark);
        }
        let high_water = match risen.meets_a_hole {
            true => self.store.raise_high_water().await?,
            false => {
                if marks.held.is_some() && risen.mark == marks.high_water {
                    self.store.let_go(risen.mark).await?;
                }
                HighWater { mark: risen.mark, held: None, held_for: Duration::ZERO, fault: risen.fault }
            }
        };
        self.watch.note(&self.store, &high_water).await?;
        Ok(high_water.mark)
    }
}
