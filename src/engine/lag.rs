//! How far behind each projector is.

use time::OffsetDateTime;

use crate::ledger::{Entry, Ledger};
use crate::model::event::Position;
use crate::model::lifecycle::Status;
use crate::store::{EventStore, MarkBlocked};

/// A hole is a matter of milliseconds in a healthy log. In seconds.
const REPORT_BLOCKED_AFTER_SECONDS: f64 = 3.0;

/// Where the log and every projector of the ledger stand.
#[derive(Debug)]
pub(crate) struct LagReport {
    /// The mark, proved anew and not as last stored: with no relay running, the stored one would
    /// hide the lag.
    pub(crate) high_water: Position,
    /// The end of the log, whether or not the mark has reached it: lag counts to it.
    pub(crate) visible: Position,
    /// What has held the mark, for long enough to be worth a word.
    pub(crate) blocked: Option<MarkBlocked>,
    /// Everything up to it has been sent to the queue.
    pub(crate) published: Position,
    /// Every projector of the ledger, the oldest first.
    pub(crate) projectors: Vec<(Entry, Lag)>,
    now: OffsetDateTime,
}

/// How far behind a projector is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Lag {
    /// Positions between its own and the end of the log, whether or not it wants them; 0 if it is
    /// finished or retired.
    pub(crate) events: u64,
    /// The age of the oldest event that is visible there, to the millisecond.
    pub(crate) seconds: f64,
}

impl LagReport {
    /// Waits for no lock. Takes a few statements, and one for each projector that is behind.
    pub(crate) async fn read(ledger: &Ledger, store: &EventStore) -> Result<Self, sqlx::Error> {
        let entries = ledger.entries().await?;
        let marks = store.marks().await?;
        let high_water = store.provable_high_water(marks.high_water).await?;
        let visible = store.last_visible().await?;
        // Most holes are transactions that are just about to commit.
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

    /// The lag of a projector at this position.
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
