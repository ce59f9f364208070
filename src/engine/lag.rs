//! Measures how far each projector is behind the log.

use time::OffsetDateTime;

use crate::ledger::{Entry, Ledger};
use crate::model::event::Position;
use crate::model::lifecycle::Status;
use crate::store::{EventStore, MarkBlocked};

/// How long the mark must have been blocked before a report mentions it, in seconds. In a healthy
/// log, a gap lasts for milliseconds.
const REPORT_BLOCKED_AFTER_SECONDS: f64 = 3.0;

/// The positions of the log and of every projector in the ledger.
#[derive(Debug)]
pub(crate) struct LagReport {
    /// The high-water mark, computed anew. Without a running relay the stored mark is outdated and
    /// would hide the lag.
    pub(crate) high_water: Position,
    /// The last visible position of the log, which may be above the mark. Lag is measured up to
    /// here.
    pub(crate) visible: Position,
    /// What blocks the mark, if it has been blocked for at least [`REPORT_BLOCKED_AFTER_SECONDS`].
    pub(crate) blocked: Option<MarkBlocked>,
    /// Everything up to this position has been sent to the queue.
    pub(crate) published: Position,
    /// Every projector in the ledger, the oldest first.
    pub(crate) projectors: Vec<(Entry, Lag)>,
    now: OffsetDateTime,
}

/// How far a projector is behind the log.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Lag {
    /// The number of positions between the projector and the end of the log, whether or not it
    /// subscribes to their events. 0 if the projector is finished or retired.
    pub(crate) events: u64,
    /// The age of the oldest visible event after the projector's position, in seconds, rounded to
    /// milliseconds.
    pub(crate) seconds: f64,
}

impl LagReport {
    /// Reads the report without waiting for locks. Takes a few statements, and one more for each
    /// projector that is behind.
    pub(crate) async fn read(ledger: &Ledger, store: &EventStore) -> Result<Self, sqlx::Error> {
        let entries = ledger.entries().await?;
        let marks = store.marks().await?;
        let high_water = store.provable_high_water(marks.high_water).await?;
        let visible = store.last_visible().await?;
        // Most gaps belong to transactions that are about to commit.
        let blocked = store.blocked_mark().await?.filter(|blocked| {
            blocked.seconds >= REPORT_BLOCKED_AFTER_SECONDS && visible > high_water
        });
        let mut lag_report = LagReport {
            high_water,
            visible,
            blocked,
            published: marks.published,
            projectors: Vec::new(),
            now: OffsetDateTime::now_utc(),
        };
        for entry in entries {
            let lag = match entry.status {
                Status::Finished | Status::Retired => Lag::default(),
                _ => lag_report.lag(store, entry.position).await?,
            };
            lag_report.projectors.push((entry, lag));
        }
        Ok(lag_report)
    }

    /// The lag of a projector at `position`.
    pub(crate) async fn lag(
        &self,
        store: &EventStore,
        position: Position,
    ) -> Result<Lag, sqlx::Error> {
        let events = self.visible.since(position);
        let oldest =
            if events > 0 { store.oldest_recorded_at_above(position).await? } else { None };
        let seconds = oldest.map_or(0.0, |oldest| (self.now - oldest).as_seconds_f64().max(0.0));
        Ok(Lag { events, seconds: (seconds * 1000.0).round() / 1000.0 })
    }
}
