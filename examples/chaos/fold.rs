//! The oracle: compares the table of each projector with a fold of the log in Rust.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::Context;
use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use serde_json::Value;

use crate::figures::Figures;

/// The comparison of one projector's read model with the log.
#[derive(Debug, Default)]
pub struct Verdict {
    pub projector: String,
    pub status: String,
    pub applications: u64,
    pub lost: u64,
    pub repeated: u64,
    /// Applied out of order, or with the values of another event.
    pub wrong: u64,
    /// Whether a projector of the last release is neither finished nor live at the high-water mark.
    pub is_behind: bool,
}

/// A projector that was retired without a teardown, and its number of rows at that time.
pub struct Retired {
    pub name: String,
    pub mode: String,
    pub rows: usize,
}

struct LoggedEvent {
    position: u64,
    event_id: String,
    stream_id: String,
    event_type: String,
    amount: Option<i64>,
}

/// A projector in the ledger: name, mode, status, position.
type Row = (String, String, String, u64);

/// A row of an append-only read model: position, event id, and the amount if the table has one.
pub type Applied = (u64, String, Option<i64>);

impl Verdict {
    pub fn is_ok(&self) -> bool {
        self.lost == 0 && self.repeated == 0 && self.wrong == 0 && !self.is_behind
    }
}

/// Compares all read models with the log. `starts` has the first positions of the projectors with
/// mode `from_now`. `last` names the projectors of the last release, which must be at the end.
pub async fn compare(
    connection: &mut MySqlConnection,
    starts: &HashMap<String, u64>,
    last: &[String],
) -> anyhow::Result<Vec<Verdict>> {
    let log = read_log(connection).await?;
    let high_water: u64 =
        sqlx::query_scalar("select high_water from event_log").fetch_one(&mut *connection).await?;
    let ledger: Vec<Row> = sqlx::query_as(
        "select name, mode, status, position from projectors order by created_at, name",
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut verdicts = Vec::new();
    for (name, mode, status, position) in ledger {
        let start = start(&name, &mode, starts)?;
        let mut verdict = match name.as_str() {
            "counters" => compare_counters(&log, position, counters(connection).await?),
            _ => {
                compare_rows(&wanted(&log, &name, start, position), &rows(connection, &name).await?)
            }
        };
        // Projectors that only older releases have stay at their positions.
        verdict.is_behind = last.contains(&name)
            && match mode.as_str() {
                "once" => status != "finished",
                _ => status != "live" || position != high_water,
            };
        verdicts.push(Verdict { projector: name, status, ..verdict });
    }
    Ok(verdicts)
}

/// Compares the read models of retired projectors. Each must be a fold of the log up to its last
/// row, and must not have changed since it was retired.
pub async fn compare_retired(
    connection: &mut MySqlConnection,
    starts: &HashMap<String, u64>,
    retired: &[Retired],
    figures: &Figures,
) -> anyhow::Result<Vec<Verdict>> {
    let log = read_log(connection).await?;
    let mut verdicts = Vec::new();
    for Retired { name, mode, rows: had } in retired {
        let found = rows(connection, name).await?;
        if is_in_ledger(connection, name).await? || found.len() != *had {
            figures.add_finding(format!(
                "{name} was retired with {had} rows, and has changed since: {} rows",
                found.len()
            ));
        }
        let last = found.iter().map(|(position, ..)| *position).max().unwrap_or_default();
        let verdict = compare_rows(&wanted(&log, name, start(name, mode, starts)?, last), &found);
        verdicts.push(Verdict { projector: name.clone(), status: "retired".into(), ..verdict });
    }
    Ok(verdicts)
}

pub async fn is_in_ledger(connection: &mut MySqlConnection, name: &str) -> anyhow::Result<bool> {
    let count = sqlx::query_scalar::<_, i64>("select count(*) from projectors where name = ?");
    Ok(count.bind(name).fetch_one(connection).await? > 0)
}

/// The position after which a projector began.
fn start(name: &str, mode: &str, starts: &HashMap<String, u64>) -> anyhow::Result<u64> {
    if mode != "from_now" {
        return Ok(0);
    }
    starts.get(name).copied().with_context(|| format!("no log shows the first position of {name}"))
}

async fn read_log(connection: &mut MySqlConnection) -> anyhow::Result<Vec<LoggedEvent>> {
    let rows: Vec<(u64, String, String, String, String)> = sqlx::query_as(
        "select position, event_id, stream_id, event_type, payload from events \
         where event_type not like '$%' order by position",
    )
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(|(position, event_id, stream_id, event_type, payload)| {
            let amount = serde_json::from_str::<Value>(&payload)?["amount"].as_i64();
            Ok(LoggedEvent { position, event_id, stream_id, event_type, amount })
        })
        .collect()
}

/// The rows that an append-only projector should have.
fn wanted(log: &[LoggedEvent], projector: &str, start: u64, position: u64) -> Vec<Applied> {
    let wants = |event: &&LoggedEvent| match projector {
        "tally" | "dropped" => true,
        "hostile" => event.event_type == "Provoked",
        "fragile" => event.event_type == "Amended",
        _ => event.event_type == "Closed",
    };
    let within = log.iter().filter(|event| event.position > start && event.position <= position);
    let amount = |event: &LoggedEvent| if projector == "fragile" { event.amount } else { None };
    within
        .filter(wants)
        .map(|event| (event.position, event.event_id.clone(), amount(event)))
        .collect()
}

/// The rows of an append-only read model, in the order in which they were written.
pub async fn rows(connection: &mut MySqlConnection, table: &str) -> anyhow::Result<Vec<Applied>> {
    let amount = if table == "fragile" { "amount" } else { "cast(null as signed)" };
    let exists: i64 = sqlx::query_scalar(
        "select count(*) from information_schema.tables \
         where table_schema = database() and table_name = ?",
    )
    .bind(table)
    .fetch_one(&mut *connection)
    .await?;
    if exists == 0 {
        // Its boot was killed before the setup, and no later boot included it.
        return Ok(Vec::new());
    }
    let sql = format!("select position, event_id, {amount} from {table} order by seq");
    Ok(sqlx::query_as(AssertSqlSafe(sql)).fetch_all(connection).await?)
}

fn compare_rows(expected: &[Applied], found: &[Applied]) -> Verdict {
    let mut times: HashMap<u64, u64> = HashMap::new();
    for (position, ..) in found {
        *times.entry(*position).or_default() += 1;
    }
    let positions: HashSet<u64> = expected.iter().map(|(position, ..)| *position).collect();
    let lost = positions.iter().filter(|position| !times.contains_key(position)).count() as u64;
    let repeated =
        times.iter().map(|(position, times)| times - u64::from(positions.contains(position))).sum();
    let by_position: HashMap<u64, &Applied> = expected.iter().map(|row| (row.0, row)).collect();
    let differing = found
        .iter()
        .filter(|row| by_position.get(&row.0).is_some_and(|expected| *expected != *row))
        .count();
    let disordered = found.windows(2).filter(|pair| pair[0].0 > pair[1].0).count();
    Verdict {
        applications: found.len() as u64,
        lost,
        repeated,
        wrong: (differing + disordered) as u64,
        ..Verdict::default()
    }
}

/// The number of events, and the sum of their amounts, by name.
type Counters = BTreeMap<String, (i64, i64)>;

async fn counters(connection: &mut MySqlConnection) -> anyhow::Result<Counters> {
    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as("select name, events, amount from counters").fetch_all(connection).await?;
    Ok(rows.into_iter().map(|(name, events, amount)| (name, (events, amount))).collect())
}

fn compare_counters(log: &[LoggedEvent], position: u64, found: Counters) -> Verdict {
    let mut expected = Counters::new();
    for event in log.iter().filter(|event| event.position <= position) {
        for name in [&event.stream_id, &event.event_type] {
            let counter = expected.entry(name.clone()).or_default();
            *counter = (counter.0 + 1, counter.1 + event.amount.unwrap_or_default());
        }
    }
    let mut verdict = Verdict {
        applications: found.values().map(|(events, _)| *events as u64).sum(),
        ..Verdict::default()
    };
    for name in expected.keys().chain(found.keys().filter(|name| !expected.contains_key(*name))) {
        let (should, has) = (
            expected.get(name).copied().unwrap_or_default(),
            found.get(name).copied().unwrap_or_default(),
        );
        verdict.lost += (should.0 - has.0).max(0) as u64;
        verdict.repeated += (has.0 - should.0).max(0) as u64;
        verdict.wrong += u64::from(should.0 == has.0 && should.1 != has.1);
    }
    verdict
}

/// Checks that the log has every event whose commit was acknowledged, and no event that was rolled
/// back.
pub async fn check_records(
    connection: &mut MySqlConnection,
    records: &Path,
    figures: &Figures,
) -> anyhow::Result<()> {
    let stored: HashSet<String> = sqlx::query_scalar("select event_id from events")
        .fetch_all(connection)
        .await?
        .into_iter()
        .collect();
    for record in fs::read_dir(records)? {
        // A killed writer may leave an incomplete last line, which is ignored.
        let text = fs::read_to_string(record?.path())?;
        for (sign, id) in text.lines().filter(|line| line.len() == 37).map(|line| line.split_at(1))
        {
            match sign {
                "+" => figures.add("appends_acknowledged", 1),
                _ => figures.add("rollbacks", 1),
            }
            if (sign == "+") != stored.contains(id) {
                let problem = if sign == "+" {
                    "acknowledged, but is not in the log"
                } else {
                    "rolled back, but is in the log"
                };
                figures.add_finding(format!("event {id} was {problem}"));
            }
        }
    }
    Ok(())
}
