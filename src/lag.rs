//! How far behind each projector is.

use time::OffsetDateTime;

use crate::event::Position;
use crate::ledger::{Entry, Ledger};
use crate::lifecycle::Status;
use crate::store::EventStore;

/// Where the log and every projector of the ledger stand.
#[derive(Debug)]
pub(crate) struct Standing {
    /// The mark, proved anew and not as last stored: with no relay running, the stored one would hide the lag.
    pub(crate) high_water: Position,
    /// Everything up to it has been sent to the queue.
    pub(crate) published: Position,
    /// Every projector of the ledger, the oldest first.
    pub(crate) projectors: Vec<(Entry, Lag)>,
    now: OffsetDateTime,
}

/// How far behind a projector is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Lag {
    /// Positions between its own and the mark, whether or not it wants them; 0 of one that is finished or retired.
    pub(crate) events: u64,
    /// The age of the oldest of them, to the millisecond.
    pub(crate) seconds: f64,
}

impl Standing {
    /// Waits for no lock. Takes a few statements, and one for each projector that is behind.
    pub(crate) async fn read(ledger: &Ledger, store: &EventStore) -> Result<Self, sqlx::Error> {
        let entries = ledger.entries().await?;
        let marks = store.marks().await?;
        let high_water = store.provable_high_water(marks.high_water).await?;
        let mut standing =
            Standing { high_water, published: marks.published, projectors: Vec::new(), now: OffsetDateTime::now_utc() };
        for entry in entries {
            let lag = match entry.status {
                Status::Finished | Status::Retired => Lag::default(),
                _ => standing.lag(store, entry.position).await?,
            };
            standing.projectors.push((entry, lag));
        }
        Ok(standing)
    }

    /// The lag of whoever stands at this position.
    pub(crate) async fn lag(&self, store: &EventStore, position: Position) -> Result<Lag, sqlx::Error> {
        let events = self.high_water.since(position);
        let oldest = match events {
            0 => None,
            _ => store.recorded_at(position.next()).await?,
        };
        let seconds = oldest.map_or(0.0, |oldest| (self.now - oldest).as_seconds_f64().max(0.0));
        Ok(Lag { events, seconds: (seconds * 1000.0).round() / 1000.0 })
    }
}
