//! Fills a log inside the server, from a sample of events.

use std::path::Path;

use anyhow::{Context, ensure};
use projectionist::sqlx::{self, MySqlConnection, QueryBuilder};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::world::{World, execute};

/// One event in [`ONE_IN`] is of this type.
pub const RARE: &str = "Case archived";
pub const ONE_IN: u64 = 100;

/// The number of event types in [`Sample::with_types`].
pub const TYPES: u64 = ONE_IN;

/// The number of events that one statement inserts.
const CHUNK: u64 = 50_000;

/// Inserts events with explicit positions, because the server would leave gaps between bulk
/// inserts. 250 streams grow at a time, each to eight events. A batch of a thousand events has four
/// events of each of them.
const FILL: &str = "insert into events (position, event_id, stream_id, stream_version, event_type, \
    recorded_at, payload) \
    select p, concat('00000000-0000-7000-8000-', lpad(hex(p), 12, '0')), \
    concat('case-', lpad(p div 2000 * 250 + p mod 250, 10, '0')), p mod 2000 div 250 + 1, \
    if(p mod 100 = 0, ?, event_type), timestamp('2020-01-01') + interval p second, payload \
    from (select thousands.n * 1000 + ones.n + ? as p \
    from numbers thousands, numbers ones where thousands.n < ?) positions \
    join sample on sample.n = p mod ? where p <= ? order by p";

/// The event types and payloads from which events are made.
pub struct Sample(Vec<(String, String)>);

#[derive(Deserialize)]
struct AppendLine<'a> {
    event_type: String,
    #[serde(borrow)]
    payload: &'a RawValue,
}

impl Sample {
    /// Reads a file with one event a line, in the format of `projectionist append`.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let lines = text.lines().map(|line| {
            let event: AppendLine = serde_json::from_str(line)?;
            Ok((event.event_type, event.payload.get().to_owned()))
        });
        let sample = lines
            .collect::<anyhow::Result<Vec<_>>>()
            .with_context(|| file.display().to_string())?;
        ensure!(!sample.is_empty(), "{} has no events", file.display());
        Ok(Sample(sample))
    }

    /// Generates events of about 300 bytes, the same in every run.
    pub fn generated() -> Self {
        let mut rng = fastrand::Rng::with_seed(4);
        let types = [
            "Confirmation of receipt",
            "Check confirmation",
            "Determine necessity of advice",
            "Draft decision",
        ];
        let event = |_| {
            let event_type = rng.choice(types).unwrap_or_default().to_owned();
            let payload = format!(
                concat!(
                    r#"{{"channel":"{}","deadline":"2026-{:02}-{:02}T00:00:00Z","#,
                    r#""department":"General","responsible":"Resource {}","amount":{}.{:02},"#,
                    r#""concept_instance":"task-{}","lifecycle_transition":"complete","#,
                    r#""org_group":"Group {}","note":"{}"}}"#,
                ),
                ["Internet", "Desk", "Post", "E-mail"][rng.usize(..4)],
                rng.u8(1..=12),
                rng.u8(1..=28),
                rng.u8(1..60),
                rng.u16(..),
                rng.u8(..100),
                rng.u32(1000..99_999),
                rng.u8(1..9),
                "Sent on to the responsible department for assessment. ".repeat(rng.usize(1..=2)),
            );
            (event_type, payload)
        };
        Sample((0..1_000).map(event).collect())
    }

    /// [`Sample::generated`] with a hundred event types that follow each other.
    pub fn with_types() -> Self {
        let Sample(events) = Sample::generated();
        let renamed = events.into_iter().zip(0..);
        Sample(renamed.map(|((_, payload), n)| (event_type(n % TYPES), payload)).collect())
    }
}

/// The type of the events whose positions, divided by [`TYPES`], leave this remainder.
pub fn event_type(remainder: u64) -> String {
    if remainder == 0 { RARE.to_owned() } else { format!("Type {remainder}") }
}

impl World {
    /// Appends to the log until it has `events` events.
    pub async fn fill(&self, sample: &Sample, events: u64) -> anyhow::Result<()> {
        let mut connection = self.connection().await?;
        prepare(&mut connection, sample).await?;
        let mut after =
            self.number("select cast(coalesce(max(position), 0) as unsigned) from events").await?;
        while after < events {
            let end = events.min(after + CHUNK);
            let (thousands, size) = ((end - after).div_ceil(1_000), sample.0.len() as u64);
            let fill =
                sqlx::query(FILL).bind(RARE).bind(after + 1).bind(thousands).bind(size).bind(end);
            fill.execute(&mut connection).await.context("filling the log")?;
            after = end;
        }
        Ok(())
    }
}

/// Makes the tables from which `FILL` selects.
async fn prepare(connection: &mut MySqlConnection, sample: &Sample) -> anyhow::Result<()> {
    for table in [
        "drop table if exists numbers, sample",
        "create table numbers (n bigint unsigned primary key)",
        "create table sample (n bigint unsigned primary key, \
         event_type varchar(200) not null, payload mediumtext not null)",
    ] {
        execute(connection, table).await?;
    }
    let mut insert = QueryBuilder::new("insert into numbers ");
    insert.push_values(0..1_000u64, |mut row, n| {
        row.push_bind(n);
    });
    insert.build().execute(&mut *connection).await?;
    for (chunk, first) in sample.0.chunks(1_000).zip((0u64..).step_by(1_000)) {
        let mut insert = QueryBuilder::new("insert into sample ");
        insert.push_values(chunk.iter().zip(first..), |mut row, ((event_type, payload), n)| {
            row.push_bind(n).push_bind(event_type).push_bind(payload);
        });
        insert.build().execute(&mut *connection).await?;
    }
    Ok(())
}
