//! The bare loops: plain sqlx code without any of the guarantees.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::ensure;
use futures_util::TryStreamExt;
use futures_util::future::try_join_all;
use projectionist::sqlx::mysql::MySqlRow;
use projectionist::sqlx::{self, Connection, MySqlConnection, Row};
use time::OffsetDateTime;
use tokio::sync::mpsc;

use crate::fence::Fence;
use crate::log::{ONE_IN, RARE};
use crate::projectors::{ROWS, ReadModel, WriteEvent};
use crate::world::World;

macro_rules! events {
    ($which:literal) => {
        concat!(
            "select position, event_id, stream_id, stream_version, event_type, recorded_at, \
             payload, metadata from events ",
            $which,
            " order by position"
        )
    };
}

const PAGE: &str = events!("where position > ? and position <= ?");

const RARE_PAGE: &str = events!("where position > ? and position <= ? and event_type in (?)");

const ALL: &str = events!("");

/// The number of positions that boot reads in one statement.
const RANGE: u64 = 65_536;

/// The number of pages that are read ahead, as in boot.
const PAGES_AHEAD: usize = 2;

/// Reads a log of `events` events in pages, and does nothing with them.
pub async fn read_pages(world: &World, events: u64, page: u64) -> anyhow::Result<Duration> {
    read_ranges(world, events, page, None).await
}

/// Reads the rare events in a log of `events` events, and does nothing with them.
pub async fn read_rare(world: &World, events: u64) -> anyhow::Result<Duration> {
    read_ranges(world, events, RANGE, Some(RARE)).await
}

async fn read_ranges(
    world: &World,
    events: u64,
    length: u64,
    only: Option<&str>,
) -> anyhow::Result<Duration> {
    let (page, expected) =
        if only.is_some() { (RARE_PAGE, events / ONE_IN) } else { (PAGE, events) };
    let mut connection = world.connection().await?;
    let began = Instant::now();
    let mut count = 0;
    for after in (0..events).step_by(length as usize) {
        let range = sqlx::query(page).bind(after).bind(after + length);
        let mut rows =
            only.into_iter().fold(range, |range, only| range.bind(only)).fetch(&mut connection);
        while let Some(row) = rows.try_next().await? {
            touch(&row)?;
            count += 1;
        }
    }
    check_count(began, count, expected)
}

/// Reads a log of `events` events in one statement, pages ahead. For each page, advances
/// `positions` fences concurrently.
pub async fn read_and_commit(
    world: &World,
    events: u64,
    positions: u32,
) -> anyhow::Result<Duration> {
    let mut fences = Vec::new();
    for number in 0..positions {
        fences.push(Fence::new(world, number).await?);
    }
    let mut connection = world.connection().await?;
    let began = Instant::now();
    let (sender, mut pages) = mpsc::channel(PAGES_AHEAD);
    let reading = tokio::spawn(async move {
        let mut pages = sqlx::query(ALL).fetch(&mut connection).try_chunks(ROWS);
        while let Some(page) = pages.try_next().await? {
            page.iter().try_for_each(touch)?;
            sender.send(page).await?;
        }
        anyhow::Ok(())
    });
    let mut count = 0;
    while let Some(page) = pages.recv().await {
        let length = page.len() as u64;
        try_join_all(fences.iter_mut().map(|fence| fence.advance(length))).await?;
        count += length;
    }
    reading.await??;
    check_count(began, count, events)
}

/// Reads a log of `events` events in one statement, and does nothing with them.
pub async fn read_stream(world: &World, events: u64) -> anyhow::Result<Duration> {
    let mut connection = world.connection().await?;
    let began = Instant::now();
    let mut count = 0;
    let mut rows = sqlx::query(ALL).fetch(&mut connection);
    while let Some(row) = rows.try_next().await? {
        touch(&row)?;
        count += 1;
    }
    check_count(began, count, events)
}

/// Applies each page in a transaction, with one upsert for each event.
pub async fn upsert_each(
    world: &World,
    events: u64,
    model: &ReadModel,
) -> anyhow::Result<Duration> {
    upsert(world, events, async |rows, db| {
        for row in rows {
            model.write(decode(row)?, db).await?;
        }
        Ok(())
    })
    .await
}

/// Applies each page in a transaction, with one upsert for the whole page.
pub async fn upsert_rows(
    world: &World,
    events: u64,
    model: &ReadModel,
) -> anyhow::Result<Duration> {
    upsert(world, events, async |rows, db| {
        let rows = rows.iter().map(decode).collect::<Result<Vec<_>, _>>()?;
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
        let page = sqlx::query(PAGE)
            .bind(after)
            .bind(after + ROWS as u64)
            .fetch_all(&mut connection)
            .await?;
        let mut transaction = connection.begin().await?;
        write(&page, &mut transaction).await?;
        transaction.commit().await?;
        count += page.len() as u64;
    }
    check_count(began, count, events)
}

fn check_count(began: Instant, count: u64, events: u64) -> anyhow::Result<Duration> {
    let took = began.elapsed();
    ensure!(count == events, "{count} events were read instead of {events}");
    Ok(took)
}

/// Decodes all eight columns without copying them. Every loop must do this much.
fn touch(row: &MySqlRow) -> Result<(), sqlx::Error> {
    black_box::<(u64, &str, &str, u64)>((
        row.try_get(0)?,
        row.try_get(1)?,
        row.try_get(2)?,
        row.try_get(3)?,
    ));
    black_box::<(&str, OffsetDateTime, &str, Option<&str>)>((
        row.try_get(4)?,
        row.try_get(5)?,
        row.try_get(6)?,
        row.try_get(7)?,
    ));
    Ok(())
}

fn decode(row: &MySqlRow) -> Result<WriteEvent<'_>, sqlx::Error> {
    Ok(WriteEvent {
        stream_id: row.try_get(2)?,
        event_type: row.try_get(4)?,
        recorded_at: row.try_get(5)?,
    })
}
