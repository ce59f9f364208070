//! The bare loops: what a team would write by hand with sqlx, and nothing around it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::ensure;
use futures_util::TryStreamExt;
use projectionist::sqlx::mysql::MySqlRow;
use projectionist::sqlx::{self, Connection, MySqlConnection, Row};
use time::OffsetDateTime;

use crate::projectors::{ROWS, ReadModel, Written};
use crate::world::World;

const PAGE: &str = "select position, event_id, stream_id, stream_version, event_type, recorded_at, payload, metadata \
                    from events where position > ? and position <= ? order by position";

const ALL: &str = "select position, event_id, stream_id, stream_version, event_type, recorded_at, payload, metadata \
                   from events order by position";

/// Reads a log of so many events in pages, and does nothing.
pub async fn read_pages(world: &World, events: u64, page: u64) -> anyhow::Result<Duration> {
    let mut connection = world.connection().await?;
    let began = Instant::now();
    let mut count = 0;
    for after in (0..events).step_by(page as usize) {
        let mut rows = sqlx::query(PAGE).bind(after).bind(after + page).fetch(&mut connection);
        while let Some(row) = rows.try_next().await? {
            touch(&row)?;
            count += 1;
        }
    }
    finished(began, count, events)
}

/// Reads a log of so many events in one statement, and does nothing.
pub async fn read_stream(world: &World, events: u64) -> anyhow::Result<Duration> {
    let mut connection = world.connection().await?;
    let began = Instant::now();
    let mut count = 0;
    let mut rows = sqlx::query(ALL).fetch(&mut connection);
    while let Some(row) = rows.try_next().await? {
        touch(&row)?;
        count += 1;
    }
    finished(began, count, events)
}

/// A page, a transaction; in it, one upsert an event.
pub async fn upsert_each(world: &World, events: u64, model: &ReadModel) -> anyhow::Result<Duration> {
    upsert(world, events, async |rows, db| {
        for row in rows {
            model.write(written(row)?, db).await?;
        }
        Ok(())
    })
    .await
}

/// A page, a transaction; in it, one upsert.
pub async fn upsert_rows(world: &World, events: u64, model: &ReadModel) -> anyhow::Result<Duration> {
    upsert(world, events, async |rows, db| {
        let rows = rows.iter().map(written).collect::<Result<Vec<_>, _>>()?;
        model.write_rows(rows.into_iter(), db).await
    })
    .await
}

async fn upsert(
    world: &World,
    events: u64,
    mut write: impl AsyncFnMut(&[MySqlRow], &mut MySqlConnection) -> Result<(), sqlx::Error>,
) -> anyhow::Result<Duration> {
    let mut connection = world.connection().await?;
    let began = Instant::now();
    let mut count = 0;
    for after in (0..events).step_by(ROWS) {
        let page = sqlx::query(PAGE).bind(after).bind(after + ROWS as u64).fetch_all(&mut connection).await?;
        let mut transaction = connection.begin().await?;
        write(&page, &mut transaction).await?;
        transaction.commit().await?;
        count += page.len() as u64;
    }
    finished(began, count, events)
}

fn finished(began: Instant, count: u64, events: u64) -> anyhow::Result<Duration> {
    let took = began.elapsed();
    ensure!(count == events, "{count} of {events} events were read");
    Ok(took)
}

/// All eight columns, decoded but not copied: no loop can do with less.
fn touch(row: &MySqlRow) -> Result<(), sqlx::Error> {
    black_box::<(u64, &str, &str, u64)>((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?));
    black_box::<(&str, OffsetDateTime, &str, Option<&str>)>((
        row.try_get(4)?,
        row.try_get(5)?,
        row.try_get(6)?,
        row.try_get(7)?,
    ));
    Ok(())
}

fn written(row: &MySqlRow) -> Result<Written<'_>, sqlx::Error> {
    Ok(Written { stream_id: row.try_get(2)?, event_type: row.try_get(4)?, recorded_at: row.try_get(5)? })
}
