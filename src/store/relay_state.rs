//! What the relay keeps: its lease, and how far the log has been published.

use std::time::Duration;

use super::EventStore;
use crate::model::event::Position;

/// Taken where it is free, expired, or ours. By the database's clock, so that the hosts' need not
/// agree. A lease that ends later than any can was written before that clock was set back: it has
/// expired, too.
const LEASE: &str = "update event_log set relay_lease_holder = ?, relay_lease_expires_at = utc_timestamp(6) + interval ? second \
                     where relay_lease_holder is null or relay_lease_holder = ? or relay_lease_expires_at < utc_timestamp(6) \
                     or relay_lease_expires_at > utc_timestamp(6) + interval 2 * ? second";

const RELEASE: &str = "update event_log set relay_lease_holder = null, relay_lease_expires_at = null where relay_lease_holder = ?";

/// Never lowered, so that of two relays at once none makes the other publish again.
const SET_PUBLISHED: &str = "update event_log set published = greatest(published, ?)";

impl EventStore {
    /// Takes or keeps the relay's lease for so long. `false`: another relay holds it.
    pub(crate) async fn acquire_relay_lease(
        &self,
        holder: &str,
        lease: Duration,
    ) -> Result<bool, sqlx::Error> {
        let seconds = lease.as_secs();
        let take = sqlx::query(LEASE).bind(holder).bind(seconds).bind(holder).bind(seconds);
        let taken =
            self.database.run_cached(async |connection| take.execute(connection).await).await?;
        Ok(taken.rows_affected() == 1)
    }

    /// Gives the lease up, so that another relay need not wait for it to expire.
    pub(crate) async fn release_relay_lease(&self, holder: &str) -> Result<(), sqlx::Error> {
        let release = sqlx::query(RELEASE).bind(holder);
        self.database
            .run_cached(async |connection| release.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Notes that everything up to here has been sent.
    pub(crate) async fn set_published(&self, position: Position) -> Result<(), sqlx::Error> {
        let set = sqlx::query(SET_PUBLISHED).bind(position.get());
        self.database.run_cached(async |connection| set.execute(connection).await).await.map(|_| ())
    }
}
