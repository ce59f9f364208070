//! The columns `retry_…`: a projector's wait for a later retry.
//!
//! They are only valid at the position that they name. So the commit of a batch, which moves the
//! position, ends the wait without touching them.

use std::time::Duration;

use sqlx::Row;
use sqlx::mysql::MySqlRow;
use time::PrimitiveDateTime;

use super::{Ledger, MAX_ERROR, truncate};
use crate::model::event::Position;
use crate::model::lifecycle::Status;
use crate::model::projector::ProjectorId;
use crate::model::retrying::Retrying;

/// The times are the database's own, so that the clocks of several hosts need not agree.
const STORE: &str = "\
    update projectors \
    set retry_position = position, retry_since = utc_timestamp(6) - interval ? microsecond, \
        retry_attempts = ?, retry_reason = ?, \
        retry_at = utc_timestamp(6) + interval ? microsecond, retry_is_alerted = ? \
    where name = ? and version = ? and position = ? \
        and status in ('booting', 'stalled', 'broken', 'live')";

/// Affects a row only once, so that one of several workers reports the end of the wait.
const CLEAR: &str = "\
    update projectors \
    set retry_position = null, retry_since = null, retry_attempts = null, retry_reason = null, \
        retry_at = null, retry_is_alerted = 0 \
    where name = ? and version = ? and retry_position = ?";

/// A wait to be stored.
#[derive(Debug)]
pub(crate) struct StoredWait<'a> {
    pub(crate) position: Position,
    /// For how long the projector has been retrying.
    pub(crate) age: Duration,
    pub(crate) attempts: u32,
    pub(crate) reason: &'a str,
    /// The time until the next attempt.
    pub(crate) delay: Duration,
    pub(crate) is_alerted: bool,
}

impl Ledger {
    /// Stores a projector's wait, if the projector is still at its position.
    pub(crate) async fn store_retry(
        &self,
        id: &ProjectorId,
        wait: StoredWait<'_>,
    ) -> Result<(), sqlx::Error> {
        let micros = |duration: Duration| duration.as_micros() as u64;
        let store = sqlx::query(STORE)
            .bind(micros(wait.age))
            .bind(wait.attempts)
            .bind(truncate(wait.reason, MAX_ERROR))
            .bind(micros(wait.delay))
            .bind(wait.is_alerted)
            .bind(&id.name)
            .bind(id.version)
            .bind(wait.position.get());
        self.database
            .run_pooled(async |connection| store.execute(connection).await)
            .await
            .map(|_| ())
    }

    /// Clears a projector's wait at `position`. Returns whether there was one.
    pub(crate) async fn clear_retry(
        &self,
        id: &ProjectorId,
        position: Position,
    ) -> Result<bool, sqlx::Error> {
        let clear = sqlx::query(CLEAR).bind(&id.name).bind(id.version).bind(position.get());
        let cleared =
            self.database.run_pooled(async |connection| clear.execute(connection).await).await?;
        Ok(cleared.rows_affected() > 0)
    }
}

/// Decodes the wait of a projector, unless it is over.
pub(super) fn decode_retrying(
    row: &MySqlRow,
    status: &Status,
    position: Position,
) -> Result<Option<Retrying>, sqlx::Error> {
    let retry_position: Option<u64> = row.try_get("retry_position")?;
    if retry_position != Some(position.get()) || !status.can_retry() {
        return Ok(None);
    }
    Ok(Some(Retrying {
        since: row.try_get::<PrimitiveDateTime, _>("retry_since")?.assume_utc(),
        attempts: row.try_get("retry_attempts")?,
        reason: row.try_get("retry_reason")?,
        next_attempt: row.try_get::<PrimitiveDateTime, _>("retry_at")?.assume_utc(),
        is_alerted: row.try_get("retry_is_alerted")?,
    }))
}
