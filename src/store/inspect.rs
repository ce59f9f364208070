//! Queries about the log for boot, status and the metrics.

use sqlx::{MySql, QueryBuilder};
use time::OffsetDateTime;

use super::EventStore;
use crate::model::event::{self, FILLER, Position};

/// Not `position = ? + 1`, because there may be a gap above the position.
const OLDEST_ABOVE: &str =
    "select recorded_at from events where position > ? order by position limit 1";

const BLOCKED: &str = "\
    select blocked_position, blocked_last, blocked_since, \
        timestampdiff(microsecond, blocked_since, utc_timestamp(6)) \
    from event_log \
    where blocked_position is not null";

/// What blocks the high-water mark, as last recorded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct MarkBlocked {
    /// The first position that blocks the mark.
    pub(crate) position: Position,
    /// The last missing position, if the blocker is a gap that is too wide to be filled
    /// automatically.
    pub(crate) last: Option<Position>,
    /// When the mark was first blocked by this, in UTC.
    pub(crate) since: OffsetDateTime,
    /// For how many seconds the mark has been blocked, by the database's clock.
    pub(crate) seconds: f64,
}

/// Event types that were added to a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AddedTypes {
    /// Only these types.
    Only(Vec<String>),
    /// All types except these.
    AllExcept(Vec<String>),
}

impl EventStore {
    /// When the oldest visible event above a position was recorded. `None` if there is no such
    /// event.
    pub(crate) async fn oldest_recorded_at_above(
        &self,
        position: Position,
    ) -> Result<Option<OffsetDateTime>, sqlx::Error> {
        let oldest = sqlx::query(OLDEST_ABOVE).bind(position.get());
        let row = self
            .database
            .run_pooled(async |connection| oldest.fetch_optional(connection).await)
            .await?;
        Ok(row.map(|row| event::decode_recorded_at(&row, 0)))
    }

    /// What blocks the mark, if the relay, a worker or a boot has recorded a blocker.
    pub(crate) async fn blocked_mark(&self) -> Result<Option<MarkBlocked>, sqlx::Error> {
        let blocked: Option<(u64, Option<u64>, OffsetDateTime, i64)> = self
            .database
            .run_pooled(async |connection| sqlx::query_as(BLOCKED).fetch_optional(connection).await)
            .await?;
        Ok(blocked.map(|(position, last, since, microseconds)| MarkBlocked {
            position: Position::new(position),
            last: last.map(Position::new),
            since,
            seconds: microseconds.max(0) as f64 / 1e6,
        }))
    }

    /// Counts the events of the added types in (`after`, `through`].
    pub(crate) async fn count_added(
        &self,
        added: &AddedTypes,
        after: Position,
        through: Position,
    ) -> Result<u64, sqlx::Error> {
        let mut query = QueryBuilder::<MySql>::new("select count(*) from events where position > ");
        query.push_bind(after.get()).push(" and position <= ").push_bind(through.get());
        query.push(" and event_type <> ").push_bind(FILLER);
        let (operator, types) = match added {
            AddedTypes::Only(types) => (" in (", types),
            AddedTypes::AllExcept(types) => (" not in (", types),
        };
        // An empty list is invalid SQL. No event type is empty, so '' matches no event.
        query.push(" and event_type").push(operator).push("''");
        for event_type in types {
            query.push(", ").push_bind(event_type.clone());
        }
        query.push(")");
        let count = query.build_query_scalar::<i64>();
        let scan = async { count.fetch_one(&mut *self.database.acquire().await?).await };
        Ok(self.database.with_scan_timeout(scan).await?.max(0) as u64)
    }
}
