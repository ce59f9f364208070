//! Row 10: what the high-water mark and the table's keys cost.
//!
//! Eight writers have overlapping transactions. Ours is the relay: it raises the mark, reads up to
//! it and sends the events to a queue that only records the time. The bare loop reads the visible
//! events above the last position that it has seen. It loses events, which the mark prevents, and
//! the line shows how many. Both poll every five milliseconds while the log has no new events.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use projectionist::sqlx::{self, AssertSqlSafe, Connection};
use projectionist::{NewEvent, PlaySettings, Queue, Registry, RelaySettings, play};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::Bench;
use crate::lanes::{Quantiles, in_turn, lane, per_second};
use crate::queue_probes::{SentRecorder, positions};
use crate::sheet::{Comparison, Line, Sheet, Target, Unit};
use crate::world::World;

const TIMEOUT: Duration = Duration::from_secs(60);

const WRITERS: usize = 8;

const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The longest time that a transaction stays open. It is random, so that events become visible out
/// of order.
const OPEN_MICROS: u64 = 4_000;

/// The longest pause of a writer between two transactions.
const REST_MICROS: u64 = 20_000;

const VISIBLE: &str = "select position from events where position > ? order by position";

const LAST: &str = "select cast(coalesce(max(position), 0) as unsigned) from events";

const PUBLISHED: &str = "select published from event_log";

/// The columns of `events` without its other keys and its checks.
const BARE_TABLE: &str = "create table bare_events ( \
    position bigint unsigned not null auto_increment primary key, \
    event_id varchar(64) character set ascii collate ascii_bin not null default (uuid()), \
    stream_id varchar(200) character set utf8mb4 collate utf8mb4_bin not null, \
    stream_version bigint unsigned not null, \
    event_type varchar(200) character set utf8mb4 collate utf8mb4_bin not null, \
    recorded_at datetime(6) not null default (utc_timestamp(6)), \
    payload mediumtext character set utf8mb4 collate utf8mb4_bin not null, \
    metadata mediumtext character set utf8mb4 collate utf8mb4_bin null) engine = innodb";

/// When each position was committed.
type Committed = HashMap<u64, Instant>;

/// The delays until positions were seen, and the number of positions that were never seen.
struct MarkDelays {
    delays: Quantiles,
    lost: usize,
}

pub async fn high_water(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let world = &World::new(&bench.parts).await?;
    let duration = bench.sizes().mark_duration;
    for (what, rollbacks) in [("no rollbacks", 0.0), ("10% rollbacks", 0.1)] {
        let lanes = [
            lane("relay, by the mark", || measure_by_mark(world, duration, rollbacks)),
            lane("by the last position seen", || {
                measure_by_last_position(world, duration, rollbacks)
            }),
        ];
        let [ours, bound] = in_turn(bench.options.rounds, lanes).await?;
        let lost: usize = bound.rounds.iter().map(|seen| seen.lost).sum();
        for (name, figure, target) in [
            ("p50", (|seen| seen.delays.p50) as fn(&MarkDelays) -> f64, Some(Target::AtMost(20.0))),
            ("p99", |seen| seen.delays.p99, None),
        ] {
            sheet.add(Line {
                row: 10,
                what: format!("from commit to the relay, 8 writers, {what}, {name}"),
                unit: Unit::Milliseconds,
                ours: ours.of(figure),
                bounds: vec![bound.of(figure)],
                compared_by: Comparison::Difference,
                target: target.filter(|_| rollbacks == 0.0),
                note: Some(format!("{what}: reading by the last position lost {lost} events")),
            });
        }
    }
    measure_appends(bench, sheet, world).await
}

/// Measures appends with all keys and checks, without them, and by `EventStore::append`, which also
/// reads the stream's version.
async fn measure_appends(bench: &Bench, sheet: &mut Sheet, world: &World) -> anyhow::Result<()> {
    world.execute(BARE_TABLE).await?;
    let duration = bench.sizes().mark_duration;
    let lanes = [
        lane("insert into events", || measure_inserts(world, "events", duration)),
        lane("EventStore::append", || measure_store_appends(world, duration)),
        lane("insert into a table without our keys and checks", || {
            measure_inserts(world, "bare_events", duration)
        }),
    ];
    let [insert, append, bound] = in_turn(bench.options.rounds, lanes).await?;
    for (what, ours) in [("insert", insert), ("EventStore::append", append)] {
        sheet.add(Line::ratio(
            10,
            format!("append, 8 writers, one event a transaction, {what} ÷ bare insert"),
            Unit::PerSecond,
            ours,
            vec![bound.clone()],
            None,
        ));
    }
    Ok(())
}

async fn measure_by_mark(
    world: &World,
    duration: Duration,
    rollbacks: f64,
) -> anyhow::Result<MarkDelays> {
    let recorder = SentRecorder::new();
    let relay = RelaySettings::default().with_interval(POLL_INTERVAL);
    let settings = PlaySettings::default().with_relay(Some(relay));
    let (stop, stopped) = oneshot::channel::<()>();
    let (database, queue) = (world.database.clone(), Arc::clone(&recorder) as Arc<dyn Queue>);
    let playing = tokio::spawn(async move {
        let until = async { _ = stopped.await };
        play(&database, queue, &Registry::new(), settings, until).await
    });
    // The relay first sends what the other lanes have appended.
    let last = world.number(LAST).await?;
    timeout(TIMEOUT, async {
        while world.number(PUBLISHED).await? < last {
            sleep(POLL_INTERVAL).await;
        }
        Ok::<_, anyhow::Error>(())
    })
    .await
    .context("the relay does not reach the end of the log")??;

    let committed = write(world, duration, rollbacks).await?;
    let last = committed.keys().copied().max().unwrap_or_default();
    timeout(TIMEOUT, recorder.sent_through(last))
        .await
        .context("the relay does not reach the end of the log")?;
    let _ = stop.send(());
    playing.await??;
    let mut sent = HashMap::new();
    for (body, at) in recorder.take() {
        let (first, last) = positions(&body).context("a message has no positions")?;
        sent.extend((first..=last).map(|position| (position, at)));
    }
    Ok(mark_delays(&committed, &sent))
}

async fn measure_by_last_position(
    world: &World,
    duration: Duration,
    rollbacks: f64,
) -> anyhow::Result<MarkDelays> {
    let mut connection = world.connection().await?;
    let mut after: u64 = world.number(LAST).await?;
    let (stop, mut stopped) = oneshot::channel::<()>();
    let reading = tokio::spawn(async move {
        let mut visible = HashMap::new();
        // Reads once more after the writers have ended.
        let mut is_last = false;
        loop {
            let found: Vec<u64> =
                sqlx::query_scalar(VISIBLE).bind(after).fetch_all(&mut connection).await?;
            let now = Instant::now();
            visible.extend(found.iter().map(|position| (*position, now)));
            if is_last {
                return Ok::<_, sqlx::Error>(visible);
            }
            match found.last() {
                Some(last) => after = *last,
                None => sleep(POLL_INTERVAL).await,
            }
            is_last = !matches!(stopped.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        }
    });
    let committed = write(world, duration, rollbacks).await?;
    drop(stop);
    Ok(mark_delays(&committed, &reading.await??))
}

fn mark_delays(committed: &Committed, seen: &HashMap<u64, Instant>) -> MarkDelays {
    let delays: Vec<Duration> = committed
        .iter()
        .filter_map(|(position, at)| Some(seen.get(position)?.saturating_duration_since(*at)))
        .collect();
    MarkDelays { lost: committed.len() - delays.len(), delays: Quantiles::of(&delays) }
}

/// Appends with eight writers for `duration`, one event in each transaction. Returns the commit
/// times.
async fn write(world: &World, duration: Duration, rollbacks: f64) -> anyhow::Result<Committed> {
    let statement = insert_into("events");
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (mut connection, statement) = (world.connection().await?, statement.clone());
        writers.spawn(async move {
            let (mut committed, began) = (Vec::new(), Instant::now());
            while began.elapsed() < duration {
                let mut transaction = connection.begin().await?;
                let insert = sqlx::query(AssertSqlSafe(statement.clone()))
                    .execute(&mut *transaction)
                    .await?;
                sleep(Duration::from_micros(fastrand::u64(..OPEN_MICROS))).await;
                if fastrand::f64() < rollbacks {
                    transaction.rollback().await?;
                } else {
                    transaction.commit().await?;
                    committed.push((insert.last_insert_id(), Instant::now()));
                }
                sleep(Duration::from_micros(fastrand::u64(..REST_MICROS))).await;
            }
            Ok::<_, sqlx::Error>(committed)
        });
    }
    let mut committed = HashMap::new();
    while let Some(of_one) = writers.join_next().await {
        committed.extend(of_one??);
    }
    Ok(committed)
}

/// The rate of eight writers that insert without pauses, in events per second.
async fn measure_inserts(world: &World, table: &str, duration: Duration) -> anyhow::Result<f64> {
    let (mut writers, began) = (JoinSet::new(), Instant::now());
    for _ in 0..WRITERS {
        let (mut connection, statement) = (world.connection().await?, insert_into(table));
        writers.spawn(async move {
            let mut count = 0;
            while began.elapsed() < duration {
                sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut connection).await?;
                count += 1;
            }
            Ok::<u64, anyhow::Error>(count)
        });
    }
    total_rate(writers, began).await
}

async fn measure_store_appends(world: &World, duration: Duration) -> anyhow::Result<f64> {
    let (mut writers, began) = (JoinSet::new(), Instant::now());
    for writer in 0..WRITERS {
        let (store, stream) = (world.store.clone(), format!("{writer}-{}", fastrand::u64(..)));
        writers.spawn(async move {
            let mut count = 0;
            while began.elapsed() < duration {
                let event = NewEvent {
                    event_id: None,
                    stream_id: format!("{stream}-{count}"),
                    stream_version: None,
                    event_type: "Happened".into(),
                    recorded_at: None,
                    payload: payload(),
                    metadata: None,
                };
                store.append(&[event]).await?;
                count += 1;
            }
            Ok::<u64, anyhow::Error>(count)
        });
    }
    total_rate(writers, began).await
}

async fn total_rate(
    mut writers: JoinSet<anyhow::Result<u64>>,
    began: Instant,
) -> anyhow::Result<f64> {
    let mut count = 0;
    while let Some(of_one) = writers.join_next().await {
        count += of_one??;
    }
    Ok(per_second(count, began.elapsed()))
}

fn insert_into(table: &str) -> String {
    format!(
        "insert into {table} (stream_id, stream_version, event_type, payload) \
         values (uuid(), 1, 'Happened', '{}')",
        payload()
    )
}

/// A payload of about 300 bytes.
fn payload() -> String {
    format!(r#"{{"note":"{}"}}"#, "x".repeat(288))
}
