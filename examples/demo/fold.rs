//! The oracle: compares the table of each projector with a fold of the log in Rust.

use std::collections::BTreeMap;
use std::fmt;

use projectionist::sqlx::{self, AssertSqlSafe};
use serde_json::Value;

use crate::demo::Demo;

/// A read model as text: the key of each row, and the rest of the row.
type Model = BTreeMap<String, String>;

/// The results of all comparisons.
pub struct Verdicts(Vec<Verdict>);

/// The comparison of one table with the log.
struct Verdict {
    table: &'static str,
    rows: usize,
    differences: Vec<String>,
}

struct LoggedEvent {
    position: u64,
    stream_id: String,
    event_type: String,
    recorded_at: String,
    payload: Value,
}

/// Compares all read models with the log. `before` is the high-water mark before release 2.
pub async fn check(demo: &Demo, before: u64) -> anyhow::Result<Verdicts> {
    let log = read_log(demo).await?;
    let finished_at = demo.position("release-3", "first_orders").await?;
    let placed = |event: &&LoggedEvent| event.event_type == "OrderPlaced";
    let text =
        |event: &LoggedEvent, key: &str| event.payload[key].as_str().unwrap_or_default().to_owned();

    let mut order_status = Model::new();
    let mut revenue: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut customers: BTreeMap<String, u64> = BTreeMap::new();
    let mut first_orders = Model::new();
    for event in &log {
        let status = event.event_type.trim_start_matches("Order").to_lowercase();
        order_status.insert(event.stream_id.clone(), format!("{status} {}", event.recorded_at));
    }
    for event in log.iter().filter(placed) {
        let country = revenue.entry(text(event, "country")).or_default();
        country.0 += 1;
        country.1 += event.payload["cents"].as_u64().unwrap_or_default();
        *customers.entry(text(event, "customer")).or_default() += 1;
        if event.position <= finished_at {
            first_orders
                .entry(text(event, "customer"))
                .or_insert_with(|| event.position.to_string());
        }
    }
    // The outbox is "from now": it has all events since its first boot, and no earlier event.
    let outbox = demo.model("select cast(position as char), customer from outbox").await?;
    let start =
        outbox.keys().filter_map(|position| position.parse::<u64>().ok()).min().unwrap_or(u64::MAX);
    let welcomed =
        log.iter().filter(placed).filter(|event| event.position >= start.max(before + 1));
    let welcomed: Model =
        welcomed.map(|event| (event.position.to_string(), text(event, "customer"))).collect();

    let revenue = revenue
        .into_iter()
        .map(|(country, (orders, cents))| (country, format!("{orders} {cents}")))
        .collect();
    let customers =
        customers.into_iter().map(|(customer, orders)| (customer, orders.to_string())).collect();
    let status = "select order_id, concat(status, ' ', changed_at) from order_status";
    Ok(Verdicts(vec![
        Verdict::of("order_status", &order_status, &demo.model(status).await?),
        Verdict::of(
            "revenue",
            &revenue,
            &demo.model("select country, concat(orders, ' ', cents) from revenue").await?,
        ),
        Verdict::of(
            "customers",
            &customers,
            &demo.model("select customer, cast(orders as char) from customers").await?,
        ),
        Verdict::of(
            "first_orders",
            &first_orders,
            &demo.model("select customer, cast(position as char) from first_orders").await?,
        ),
        Verdict::of("outbox", &welcomed, &outbox),
    ]))
}

async fn read_log(demo: &Demo) -> anyhow::Result<Vec<LoggedEvent>> {
    let rows: Vec<(u64, String, String, String, String)> = sqlx::query_as(
        "select position, stream_id, event_type, cast(recorded_at as char), payload from events \
         where event_type not like '$%' order by position",
    )
    .fetch_all(&demo.pool)
    .await?;
    rows.into_iter()
        .map(|(position, stream_id, event_type, recorded_at, payload)| {
            Ok(LoggedEvent {
                position,
                stream_id,
                event_type,
                recorded_at,
                payload: serde_json::from_str(&payload)?,
            })
        })
        .collect()
}

impl Demo {
    /// Reads a read model as two columns of text.
    async fn model(&self, sql: &str) -> anyhow::Result<Model> {
        let rows: Vec<(String, String)> =
            sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().collect())
    }
}

impl Verdict {
    fn of(table: &'static str, expected: &Model, found: &Model) -> Self {
        let missing = expected
            .iter()
            .filter(|(key, _)| !found.contains_key(*key))
            .map(|(key, row)| format!("missing: {key} {row}"));
        let wrong =
            found.iter().filter(|(key, row)| expected.get(*key) != Some(row)).map(|(key, row)| {
                format!(
                    "{key}: has {row}, should have {}",
                    expected.get(key).map_or("no row", String::as_str)
                )
            });
        Verdict { table, rows: found.len(), differences: missing.chain(wrong).collect() }
    }
}

impl Verdicts {
    pub fn all_ok(&self) -> bool {
        self.0.iter().all(|verdict| verdict.differences.is_empty() && verdict.rows > 0)
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Verdict { table, rows, differences } in &self.0 {
            let verdict = if differences.is_empty() && *rows > 0 { "equal" } else { "DIFFERENT" };
            write!(f, "\n  {table:<14} {rows:>6} rows   {verdict}")?;
            for difference in differences.iter().take(3) {
                write!(f, "\n    {difference}")?;
            }
        }
        Ok(())
    }
}
