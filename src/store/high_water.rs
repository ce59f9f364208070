//! The high-water mark: the highest position at or below which nothing can still become visible.
//!
//! InnoDB hands out positions before commit, so rows become visible out of order and rollbacks leave holes.
//! The mark moves over a hole only on proof: a tombstone of ours stands in it (design, section 3, step 2).

use std::ops::RangeInclusive;
use std::time::Duration;

use sqlx::QueryBuilder;

use super::EventStore;
use crate::database::Flavor;
use crate::error::server_error;
use crate::event::{Position, TOMBSTONE};

/// Visible positions above the mark. The isolation level of our sessions is read committed: what this
/// returns is committed.
const VISIBLE: &str = "select position from events where position > ? order by position limit ?";

/// Locked by a writer: its row is inserted and not yet committed or rolled back. An error says so at once.
const PROBE_MYSQL: &str = "select count(*) from events where position between ? and ? for share nowait";
const PROBE_MARIADB: &str = "select count(*) from events where position between ? and ? lock in share mode nowait";

/// A mark only ever rises, whoever writes it and in whatever order.
const RAISE: &str = "update event_log set high_water = greatest(high_water, ?)";

/// `ignore` skips the positions that a writer has taken meanwhile; the rest of the run is still filled.
const FILL: &str = "insert ignore into events (position, stream_id, stream_version, event_type, payload) ";

/// For the fill only: a position whose writer is still undecided is not worth 50 seconds of waiting.
const IMPATIENT: &str = "set session innodb_lock_wait_timeout = 1";
const PATIENT: &str = "set session innodb_lock_wait_timeout = default";

/// Positions looked at in one step.
const PAGE: u64 = 10_000;

/// The most missing positions in a page that are filled without being asked. More is not a rollback:
/// somebody inserted an explicit position, or set auto_increment.
pub(crate) const MOST_FILLED: u64 = 10_000;

/// Tombstones in one statement.
const FILL_CHUNK: usize = 1_000;

/// How often the holes of one page are filled without the mark having moved.
pub(crate) const MOST_PASSES: u32 = 3;

/// How long a hole is given to close by itself before it is probed: most are transactions that are
/// just about to commit.
const GRACE: Duration = Duration::from_millis(20);

/// Where the mark stands after an attempt to raise it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HighWater {
    /// The mark.
    pub(crate) mark: Position,
    /// What keeps it from rising further now, if anything is visible above it.
    pub(crate) held: Option<Held>,
}

/// What the mark waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Held {
    /// A transaction that holds this position has neither committed nor rolled back.
    InFlight(Position),
    /// So many positions are missing that an operator has to look: see [`MOST_FILLED`].
    Gap(RangeInclusive<u64>),
}

impl EventStore {
    /// Raises the mark as far as can be proved, and stores it. Safe from any number of processes at once.
    pub(crate) async fn raise_high_water(&self) -> Result<HighWater, sqlx::Error> {
        let mut mark = self.marks().await?.high_water;
        let mut passes = 0;
        loop {
            let visible = self.visible_above(mark).await?;
            let Survey { contiguous, holes } = survey(mark, &visible);
            let more = visible.len() as u64 == PAGE;
            if contiguous > mark {
                sqlx::query(RAISE).bind(contiguous.get()).execute(&self.database.pool).await?;
                mark = contiguous;
                passes = 0;
            }
            if holes.is_empty() {
                if more {
                    continue;
                }
                return Ok(HighWater { mark, held: None });
            }
            passes += 1;
            // Filled, and still a hole: whatever takes our tombstones away, it is not ours to fight here.
            let stubborn = (passes > MOST_PASSES).then(|| Held::InFlight(mark.next()));
            if let Some(held) = self.close_holes(mark).await?.or(stubborn) {
                // Below the first position that is held, holes may have been closed.
                let mark = survey(mark, &self.visible_above(mark).await?).contiguous;
                sqlx::query(RAISE).bind(mark.get()).execute(&self.database.pool).await?;
                return Ok(HighWater { mark, held: Some(held) });
            }
        }
    }

    /// The mark as far as reading proves it, stored by nobody: a run without holes is its own proof.
    pub(crate) async fn provable_high_water(&self) -> Result<Position, sqlx::Error> {
        let mut mark = self.marks().await?.high_water;
        loop {
            let visible = self.visible_above(mark).await?;
            let Survey { contiguous, holes } = survey(mark, &visible);
            mark = contiguous;
            if !holes.is_empty() || (visible.len() as u64) < PAGE {
                return Ok(mark);
            }
        }
    }

    /// Treats all holes of a page together: one grace, one probe a run, one fill. `None`: all are closed.
    async fn close_holes(&self, mark: Position) -> Result<Option<Held>, sqlx::Error> {
        tokio::time::sleep(GRACE).await;
        let holes = survey(mark, &self.visible_above(mark).await?).holes;

        let mut closing = Closing::default();
        for hole in holes {
            if !closing.takes(&hole) {
                break;
            }
            let is_locked = self.is_locked(&hole).await?;
            closing.probed(hole, is_locked);
        }
        let refused = self.fill(&closing.absent).await?;
        Ok(closing.held.or(refused))
    }

    async fn visible_above(&self, mark: Position) -> Result<Vec<u64>, sqlx::Error> {
        sqlx::query_scalar(VISIBLE).bind(mark.get()).bind(PAGE).fetch_all(&self.database.pool).await
    }

    /// Whether a writer that is still undecided holds a position of this run.
    async fn is_locked(&self, run: &RangeInclusive<u64>) -> Result<bool, sqlx::Error> {
        let (probe, locked) = match self.database.flavor {
            Flavor::MySql => (PROBE_MYSQL, 3572),
            Flavor::MariaDb => (PROBE_MARIADB, 1205),
        };
        let probed: Result<i64, _> =
            sqlx::query_scalar(probe).bind(run.start()).bind(run.end()).fetch_one(&self.database.pool).await;
        match probed {
            Ok(_) => Ok(false),
            Err(error) if server_error(&error) == Some(locked) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Puts tombstones into these positions. This is the proof: a position that is ours can no longer become
    /// anybody's event; its writer, if there still is one, gets error 1062 and tries again.
    pub(crate) async fn fill(&self, positions: &[u64]) -> Result<Option<Held>, sqlx::Error> {
        if positions.is_empty() {
            return Ok(None);
        }
        let mut connection = self.database.acquire().await?;
        sqlx::raw_sql(IMPATIENT).execute(&mut *connection).await?;
        let mut held = None;
        for chunk in positions.chunks(FILL_CHUNK) {
            let mut insert = QueryBuilder::new(FILL);
            insert.push_values(chunk, |mut row, &position| {
                row.push_bind(position).push_bind(TOMBSTONE).push_bind(position).push_bind(TOMBSTONE).push("'{}'");
            });
            match insert.build().persistent(false).execute(&mut *connection).await {
                Ok(_) => tracing::debug!(first = chunk[0], positions = chunk.len(), "filled holes left by rollbacks"),
                // In flight after all: it was inserted between the probe and the fill.
                Err(error) if matches!(server_error(&error), Some(1205 | 1213)) => {
                    held = Some(Held::InFlight(Position::new(chunk[0])));
                    break;
                }
                Err(error) => {
                    connection.close_on_drop();
                    return Err(error);
                }
            }
        }
        sqlx::raw_sql(PATIENT).execute(&mut *connection).await?;
        Ok(held)
    }
}

/// What is to be done about the holes of a page, from below upwards.
#[derive(Debug, Default)]
pub(crate) struct Closing {
    /// Positions that a tombstone has to prove empty.
    pub(crate) absent: Vec<u64>,
    /// The lowest hole that cannot be closed now. The mark stays below it.
    pub(crate) held: Option<Held>,
}

impl Closing {
    /// Whether the next hole is one to be probed. Too wide: it holds the mark, and nothing above it matters now.
    pub(crate) fn takes(&mut self, hole: &RangeInclusive<u64>) -> bool {
        let length = hole.end() - hole.start() + 1;
        let takes = self.absent.len() as u64 + length <= MOST_FILLED;
        if !takes {
            self.hold(Held::Gap(hole.clone()));
        }
        takes
    }

    /// Takes note of a probe: a hole that a writer has locked is left to it.
    pub(crate) fn probed(&mut self, hole: RangeInclusive<u64>, is_locked: bool) {
        match is_locked {
            true => self.hold(Held::InFlight(Position::new(*hole.start()))),
            false => self.absent.extend(hole),
        }
    }

    fn hold(&mut self, held: Held) {
        self.held.get_or_insert(held);
    }
}

/// What stands above a mark, by the positions that are visible there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Survey {
    /// The end of the run that begins just above the mark.
    pub(crate) contiguous: Position,
    /// The runs of missing positions between it and the last visible one.
    pub(crate) holes: Vec<RangeInclusive<u64>>,
}

pub(crate) fn survey(mark: Position, visible: &[u64]) -> Survey {
    let mut contiguous = mark.get();
    let mut holes = Vec::new();
    let mut expected = mark.get() + 1;
    for &position in visible {
        if position > expected {
            holes.push(expected..=position - 1);
        } else if holes.is_empty() {
            contiguous = position;
        }
        expected = position + 1;
    }
    Survey { contiguous: Position::new(contiguous), holes }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_mark_and_the_holes_account_for_every_position(
            mark in 0u64..20,
            visible in prop::collection::btree_set(1u64..80, 0..40),
        ) {
            let visible: Vec<u64> = visible.into_iter().map(|offset| mark + offset).collect();
            let Survey { contiguous, holes } = survey(Position::new(mark), &visible);
            let missing: Vec<u64> = holes.iter().cloned().flatten().collect();
            let last = visible.last().copied().unwrap_or(mark);
            let expected: Vec<u64> = (mark + 1..=last).filter(|position| !visible.contains(position)).collect();
            prop_assert_eq!(&missing, &expected);
            // Nothing is missing at or below the mark, and the position after it is missing or the last.
            prop_assert_eq!(contiguous.get(), missing.first().map_or(last, |first| first - 1));
        }
    }
}
