//! The relay's state in `event_log`: its lease, and the position up to which the log is published.

use std::time::Duration;

use super::EventStore;
use crate::model::event::Position;

/// Takes the lease if it is free, expired or already ours. The database's clock decides, so that
/// the clocks of the hosts do not have to agree. An expiry time further away than twice the lease
/// was written before the database's clock was set back; such a lease counts as expired.
const LEASE: &str = "\
    update event_log \
    set relay_lease_holder = ?, relay_lease_expires_at = utc_timestamp(6) + interval ? second \
    where relay_lease_holder is null or relay_lease_holder = ? \
        or relay_lease_expires_at < utc_timestamp(6) \
        or relay_lease_expires_at > utc_timestamp(6) + interval 2 * ? second";

const RELEASE: &str = "\
    update event_log \
    set relay_lease_holder = null, relay_lease_expires_at = null \
    where relay_lease_holder = ?";

/// Never lowers the position. If two relays run at once, neither makes the other publish again.
const SET_PUBLISHED: &str = "update event_log set published = greatest(published, ?)";

/// `published_by_boot` comes first: an assignment sees the columns that were set before it.
const SKIP_PUBLISHED: &str = "\
    update event_log \
    set published_by_boot = if(published < ?, ?, published_by_boot), \
        published = greatest(published, ?)";

impl EventStore {
    /// Takes or extends the relay's lease for the duration `lease`. Returns `false` if another
    /// relay holds it.
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

    /// Releases the lease, so that another relay does not have to wait until it expires.
    pub(crate) async fn release_relay_lease(&self, holder: &str) -> Result<(), sqlx::Error> {
        let release = sqlx::query(RELEASE).bind(holder);
        self.database
            .run_cached(async |connection| release.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Records that every event up to `position` has been sent.
    pub(crate) async fn set_published(&self, position: Position) -> Result<(), sqlx::Error> {
        let set = sqlx::query(SET_PUBLISHED).bind(position.get());
        self.database.run_cached(async |connection| set.execute(connection).await).await.map(|_| ())
    }
    /// Lets the relay start after `position`: no projector needs the events up to it from the
    /// queue. Records that nothing was sent.
    pub(crate) async fn skip_published(&self, position: Position) -> Result<(), sqlx::Error> {
        let position = position.get();
        let skip = sqlx::query(SKIP_PUBLISHED).bind(position).bind(position).bind(position);
        self.database
            .run_cached(async |connection| skip.execute(connection).await)
            .await
            .map(|_| ())
    }
}
