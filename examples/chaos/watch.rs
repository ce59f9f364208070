//! What must hold at every moment, looked at while everything goes on, straight at the server.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use projectionist::sqlx::{self, Connection, MySqlConnection};

use crate::figures::Figures;
use crate::parts::Parts;
use crate::process::ProcessTable;

const EVERY: Duration = Duration::from_millis(250);

/// The read model of `tally` is counted this often: it grows.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// A projector of every release may stand still below the mark for so long: the 60 s for which an
/// answer of the database is awaited, twice, and a server that is killed meanwhile.
const MAX_STANDSTILL: Duration = Duration::from_secs(180);

/// One statement, and so of one moment.
const LEDGER: &str = "select name, position, high_water, published from projectors, event_log";

/// These may be retired and booted anew, and then begin at 0.
const REBUILT: [&str; 2] = ["hostile", "dropped"];

/// In a transaction with one snapshot for all three.
const APPLIED: &str = "select count(*) from tally";
const WANTED: &str = "select count(*) from events where event_type not like '$%' and position <= \
                      (select position from projectors where name = 'tally')";

/// One projector's name and position, the mark, and what is published.
type Row = (String, u64, u64, u64);

#[derive(Default)]
pub struct Watch {
    /// By projector, its position and the mark.
    seen: HashMap<String, (u64, u64)>,
    counted: Option<Instant>,
    /// Since when `tally` has not moved; it is never broken.
    moved: Option<Instant>,
}

impl Watch {
    /// Looks until it is dropped. A server that is away is looked at later.
    pub async fn keep(
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
                    "{name} at {position}, published {published}, beyond the mark {high_water}"
                ));
            }
            // A boot may move a broken one, too; but nobody moves anyone back.
            let (before, mark_before) =
                self.seen.insert(name.clone(), (position, high_water)).unwrap_or_default();
            if name == "tally" {
                self.record_standstill(position == before && position < high_water, figures);
            }
            let goes_back = position < before && !REBUILT.contains(&name.as_str());
            if goes_back || high_water < mark_before {
                figures.add_finding(format!(
                    "{name} went from {before} to {position}, the mark from {mark_before} to {high_water}"
                ));
            }
        }
        if self.counted.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.counted = Some(Instant::now());
            let (applied, wanted) = count(connection).await?;
            if applied != wanted {
                figures.add_finding(format!(
                    "tally has {applied} rows, where its position says {wanted}"
                ));
            }
        }
        Ok(())
    }

    fn record_standstill(&mut self, still: bool, figures: &Figures) {
        let moved = *self.moved.get_or_insert_with(Instant::now);
        if !still {
            self.moved = Some(Instant::now());
            return;
        }
        figures.raise_to("longest_standstill_seconds", moved.elapsed().as_secs());
        if moved.elapsed() > MAX_STANDSTILL {
            figures.add_finding(format!(
                "tally has stood still for {} s, below the mark",
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
