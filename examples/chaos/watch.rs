//! Checks of the database during the run: conditions that hold at every moment.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use projectionist::sqlx::{self, Connection, MySqlConnection};

use crate::figures::Figures;
use crate::parts::Parts;
use crate::process::ProcessTable;

/// The pause between two checks of the ledger.
const EVERY: Duration = Duration::from_millis(250);

/// The pause between two counts of the table `tally`, which grows.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// The longest time that `tally` may stay below the mark without moving: twice the 60 s for which a
/// response of the database is awaited, and a kill of the server in between.
const MAX_STANDSTILL: Duration = Duration::from_secs(180);

/// The ledger and the mark, in one statement and therefore at one moment.
const LEDGER: &str = "select name, position, high_water, published from projectors, event_log";

/// Projectors that may be retired and booted again, and then start again at 0.
const REBUILT: [&str; 2] = ["hostile", "dropped"];

/// The applied and the expected number of rows of `tally`. Both are read in one snapshot.
const APPLIED: &str = "select count(*) from tally";
const WANTED: &str = "select count(*) from events where event_type not like '$%' and position <= \
                      (select position from projectors where name = 'tally')";

/// The name and the position of a projector, the high-water mark, and the published position.
type Row = (String, u64, u64, u64);

#[derive(Default)]
pub struct Watch {
    /// The position of each projector and the mark, at the last check.
    seen: HashMap<String, (u64, u64)>,
    /// The time of the last count.
    counted: Option<Instant>,
    /// The last time when `tally`, which never breaks, moved or was at the mark.
    moved: Option<Instant>,
}

impl Watch {
    /// Checks until it is dropped. Retries while the server is unreachable.
    pub async fn run(
        mut self,
        parts: Arc<Parts>,
        processes: Arc<ProcessTable>,
        figures: Arc<Figures>,
    ) {
        loop {
            processes.sample_memory();
            if let Ok(mut connection) = parts.connect().await {
                while self.check(&mut connection, &figures).await.is_ok() {
                    figures.add("ledger_checks", 1);
                    processes.sample_memory();
                    tokio::time::sleep(EVERY).await;
                }
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    async fn check(
        &mut self,
        connection: &mut MySqlConnection,
        figures: &Figures,
    ) -> Result<(), sqlx::Error> {
        for (name, position, high_water, published) in
            sqlx::query_as::<_, Row>(LEDGER).fetch_all(&mut *connection).await?
        {
            if position > high_water || published > high_water {
                figures.add_finding(format!(
                    "{name} is at {position} and {published} is published, \
                     beyond the mark {high_water}"
                ));
            }
            // A boot may also move a broken projector. Only a rebuild moves a projector back.
            let (before, mark_before) =
                self.seen.insert(name.clone(), (position, high_water)).unwrap_or_default();
            if name == "tally" {
                self.record_standstill(position == before && position < high_water, figures);
            }
            let goes_back = position < before && !REBUILT.contains(&name.as_str());
            if goes_back || high_water < mark_before {
                figures.add_finding(format!(
                    "{name} went from {before} to {position}, \
                     the mark from {mark_before} to {high_water}"
                ));
            }
        }
        if self.counted.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.counted = Some(Instant::now());
            let (applied, wanted) = count(connection).await?;
            if applied != wanted {
                figures.add_finding(format!(
                    "tally has {applied} rows, but its position requires {wanted}"
                ));
            }
        }
        Ok(())
    }

    fn record_standstill(&mut self, is_standing_still: bool, figures: &Figures) {
        let moved = *self.moved.get_or_insert_with(Instant::now);
        if !is_standing_still {
            self.moved = Some(Instant::now());
            return;
        }
        figures.raise_to("longest_standstill_seconds", moved.elapsed().as_secs());
        if moved.elapsed() > MAX_STANDSTILL {
            figures.add_finding(format!(
                "tally has not moved for {} s, below the mark",
                moved.elapsed().as_secs()
            ));
            self.moved = None;
        }
    }
}

async fn count(connection: &mut MySqlConnection) -> Result<(i64, i64), sqlx::Error> {
    sqlx::raw_sql("set session transaction isolation level repeatable read")
        .execute(&mut *connection)
        .await?;
    let mut transaction =
        connection.begin_with("start transaction with consistent snapshot").await?;
    let applied = sqlx::query_scalar(APPLIED).fetch_one(&mut *transaction).await?;
    let wanted = sqlx::query_scalar(WANTED).fetch_one(&mut *transaction).await?;
    transaction.rollback().await?;
    Ok((applied, wanted))
}
