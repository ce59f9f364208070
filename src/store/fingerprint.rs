//! The fingerprint of the log: what stood at or below the high-water mark when it passed, so that an audit
//! can tell later whether it still does.
//!
//! It is a count and the exclusive or of 64 bits of SHA-256 over each row's position and event id: it does not
//! depend on who raised the mark how far, and the server computes it without sending a row. It finds accidents;
//! it is no proof against somebody who means to deceive.

use sqlx::mysql::MySqlConnection;

use super::EventStore;
use crate::event::Position;

const SUM: &str = "select count(*), cast(coalesce(bit_xor(cast(conv(left(sha2(concat(position, ':', event_id), 256), 16), \
                   16, 10) as unsigned)), 0) as unsigned) from events where position > ? and position <= ?";

/// Mark, count and fingerprint move together, from the mark that the sum began at: of two who raise it at once,
/// the second begins again.
const RAISE: &str = "update event_log set high_water = ?, counted = counted + ?, fingerprint = fingerprint ^ ? \
                     where high_water = ?";

const RECORDED: &str = "select high_water, counted, fingerprint from event_log";

const PRESENT: &str = "select position from events where position > ? and position <= ? order by position";

/// Positions that an audit sums up in one statement.
const AUDIT_STEP: u64 = 50_000;

/// What an audit names at the most, of one kind.
const MOST_NAMED: usize = 20;

/// Rows, and what they come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fingerprint {
    rows: u64,
    bits: u64,
}

/// What an audit of the log found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LogAudit {
    /// The mark at which it was taken.
    pub(crate) high_water: Position,
    /// Rows that stand at or below it.
    pub(crate) rows: u64,
    /// Positions at or below it that have no row: the first of them.
    pub(crate) missing: Vec<Position>,
    /// Whether the rows are, by position and event id, those over which the mark passed.
    pub(crate) is_unchanged: bool,
}

impl EventStore {
    /// Raises the mark from `from` to `to`, up to which everything is proved. Returns the mark as it stands: another
    /// process may have raised it meanwhile.
    pub(super) async fn raise(&self, from: Position, to: Position) -> Result<Position, sqlx::Error> {
        let sum = self.database.ask(async |connection| self.sum(connection, from, to).await).await?;
        if sum.rows != to.since(from) {
            // Proved a moment ago, and gone: nobody may pass over this.
            tracing::error!(
                alert = "log_fault",
                first = from.next().get(),
                last = to.get(),
                rows = sum.rows,
                "a row of the log was deleted before the high-water mark passed it; the mark stays below"
            );
            return Ok(from);
        }
        let raise = sqlx::query(RAISE).bind(to.get()).bind(sum.rows).bind(sum.bits).bind(from.get());
        let raised = self.database.ask(async |connection| raise.execute(connection).await).await?;
        match raised.rows_affected() {
            0 => Ok(self.marks().await?.high_water),
            _ => Ok(to),
        }
    }

    /// Compares the log, up to the mark as it is now, with what stood there when the mark passed. `progress` is
    /// told how far it is.
    pub(crate) async fn audit(&self, mut progress: impl FnMut(Position, Position)) -> Result<LogAudit, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let (high_water, rows, bits): (u64, u64, u64) = sqlx::query_as(RECORDED).fetch_one(&mut *connection).await?;
        let (high_water, recorded) = (Position::new(high_water), Fingerprint { rows, bits });
        let mut found = Fingerprint::default();
        let mut missing = Vec::new();
        let mut after = Position::START;
        while after < high_water {
            let through = high_water.min(Position::new(after.get() + AUDIT_STEP));
            let sum = self.sum(&mut connection, after, through).await?;
            if sum.rows != through.since(after) && missing.len() < MOST_NAMED {
                let present: Vec<u64> = sqlx::query_scalar(PRESENT)
                    .bind(after.get())
                    .bind(through.get())
                    .fetch_all(&mut *connection)
                    .await?;
                missing.extend(absent(after, through, &present).take(MOST_NAMED - missing.len()));
            }
            found = Fingerprint { rows: found.rows + sum.rows, bits: found.bits ^ sum.bits };
            after = through;
            progress(after, high_water);
        }
        Ok(LogAudit { high_water, rows: found.rows, missing, is_unchanged: found == recorded })
    }

    async fn sum(
        &self,
        connection: &mut MySqlConnection,
        after: Position,
        through: Position,
    ) -> Result<Fingerprint, sqlx::Error> {
        let sum = sqlx::query_as(SUM).bind(after.get()).bind(through.get());
        let (rows, bits): (i64, u64) = self.database.answered(sum.fetch_one(connection)).await?;
        Ok(Fingerprint { rows: rows.unsigned_abs(), bits })
    }
}

/// The positions in (`after`, `through`] that are not among those present, which are in order.
fn absent(after: Position, through: Position, present: &[u64]) -> impl Iterator<Item = Position> {
    (after.get() + 1..=through.get()).filter(|position| present.binary_search(position).is_err()).map(Position::new)
}
