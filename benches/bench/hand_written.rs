//! A loop by hand from the commit of an append to the commit of the projection. It does the minimum
//! that the guarantees need:
//!
//! - It polls the log, because MySQL does not announce commits.
//! - It sends only events without a gap before them, and records how far it has sent.
//! - It commits the projection with its fence before it deletes the message.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use projectionist::sqlx::mysql::MySqlRow;
use projectionist::sqlx::{self, MySqlConnection, Row as _};
use projectionist::{PlaySettings, Queue, SqsQueue};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::sleep;

use crate::fence::Fence;
use crate::projectors::{ReadModel, WriteEvent};
use crate::world::World;

/// The poll interval of the relay while events arrive.
const POLL_INTERVAL: Duration = Duration::from_micros(2_500);

const ABOVE: &str = "select position, stream_id, event_type, recorded_at, payload from events \
                     where position > ? order by position limit 1000";

const LAST: &str = "select max(position) from events";

/// Records how far the log is proved, and how far it is sent.
const MARKS: &str = "create table if not exists marks \
    (name varchar(20) primary key, position bigint unsigned not null)";

const SET_MARK: &str = "replace into marks values (?, ?)";

#[derive(Serialize, Deserialize)]
struct Row {
    position: u64,
    stream_id: String,
    event_type: String,
    #[serde(with = "time::serde::rfc3339")]
    recorded_at: OffsetDateTime,
    payload: String,
}

impl Row {
    fn read(row: &MySqlRow) -> Result<Self, sqlx::Error> {
        Ok(Row {
            position: row.try_get(0)?,
            stream_id: row.try_get(1)?,
            event_type: row.try_get(2)?,
            recorded_at: row.try_get(3)?,
            payload: row.try_get(4)?,
        })
    }
}

/// Returns a loop that sends all events appended from now on.
pub async fn publish(
    world: &World,
    sqs: Arc<SqsQueue>,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
    world.execute(MARKS).await?;
    let mut connection = world.connection().await?;
    let last: Option<u64> = sqlx::query_scalar(LAST).fetch_one(&mut connection).await?;
    let mut last = last.unwrap_or_default();
    Ok(async move {
        loop {
            let visible = sqlx::query(ABOVE).bind(last).fetch_all(&mut connection).await?;
            let rows = visible.iter().map(Row::read).collect::<Result<Vec<_>, _>>()?;
            let follows = |(row, next): &(Row, u64)| row.position == *next;
            let proved: Vec<Row> =
                rows.into_iter().zip(last + 1..).take_while(follows).map(|(row, _)| row).collect();
            let Some(end) = proved.last().map(|row| row.position) else {
                sleep(POLL_INTERVAL).await;
                continue;
            };
            set_mark(&mut connection, "proved", end).await?;
            sqs.send(&serde_json::to_string(&proved)?, &format!("{last}-{end}")).await?;
            set_mark(&mut connection, "sent", end).await?;
            last = end;
        }
    })
}

async fn set_mark(
    connection: &mut MySqlConnection,
    name: &str,
    position: u64,
) -> Result<(), sqlx::Error> {
    sqlx::query(SET_MARK).bind(name).bind(position).execute(connection).await.map(|_| ())
}

/// Applies messages until `count` events are applied. Returns the time at which each position was
/// applied.
pub async fn apply(
    world: &World,
    sqs: &SqsQueue,
    model: &ReadModel,
    count: usize,
) -> anyhow::Result<HashMap<u64, Instant>> {
    let mut fence = Fence::new(world, 0).await?;
    let mut applied = HashMap::new();
    while applied.len() < count {
        for message in sqs.receive(PlaySettings::default().receive_wait).await? {
            let rows: Vec<Row> = serde_json::from_str(&message.body)
                .context("a message was not sent by this loop")?;
            let write = async |db: &mut MySqlConnection| {
                for Row { stream_id, event_type, recorded_at, .. } in &rows {
                    model
                        .write(WriteEvent { stream_id, event_type, recorded_at: *recorded_at }, db)
                        .await?;
                }
                Ok(())
            };
            fence.advance_with(rows.len() as u64, write).await?;
            let now = Instant::now();
            applied.extend(rows.iter().map(|row| (row.position, now)));
            sqs.delete(&[message.receipt]).await?;
        }
    }
    Ok(applied)
}
