//! Row 8: the time from the commit of an append to the commit of the projection.
//!
//! Ours starts when the writer's commit has returned. It ends when play asks the queue to delete
//! the message: the projection was committed just before, in the same process. If the engine ever
//! defers its deletions, the measured time is too long, never too short.
//!
//! The bare loop starts when a message is due to be sent, and ends when it is received. Both run on
//! a fixed schedule, so that a delay does not hide the delays after it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::future::try_join;
use projectionist::sqlx;
use projectionist::{PlaySettings, Queue, Registry, play};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use crate::endpoint::{Endpoint, Kind};
use crate::lanes::{Quantiles, in_turn, lane};
use crate::projectors::{ReadModel, UpsertEach};
use crate::queue_probes::ObservedQueue;
use crate::sheet::{Comparison, EquivalentLoop, Line, Sheet, Target, Unit};
use crate::world::World;
use crate::{Bench, hand_written};

/// An event or message that takes longer than this fails the bench.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The queue is overloaded if the median delay of the bare loop exceeds this many milliseconds: its
/// backlog grows then.
const MAX_DELAY_MS: f64 = 500.0;

/// The number of writers, each with a connection of its own. Each appends every eighth event.
const WRITERS: u64 = 8;

const APPEND: &str = "insert into events (stream_id, stream_version, event_type, payload) \
                      values (uuid(), 1, 'Happened', ?)";

/// `count` events, `per_second` of them due each second.
#[derive(Clone, Copy)]
struct Schedule {
    per_second: u64,
    count: u64,
}

pub async fn delays(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let world = &World::new(&bench.parts).await?;
    let model = ReadModel::new("upserted");
    model.make(world).await?;
    let registry = &Registry::new().with(UpsertEach(model.clone()))?;
    let model = &model;
    world.boot(registry).await?;
    for endpoint in [bench.localstack().await, bench.stub().await?] {
        for per_second in [1, 100, 1_000] {
            let schedule =
                Schedule { per_second, count: per_second * bench.sizes().latency_seconds };
            let endpoint = &endpoint;
            let lanes = [
                lane("append to projection", || {
                    measure_projection(world, endpoint, registry, schedule)
                }),
                lane("send to receive", || measure_queue(endpoint, schedule)),
                lane("append to projection by hand", || {
                    measure_projection_by_hand(world, endpoint, model, schedule)
                }),
            ];
            let [ours, bound, by_hand] = in_turn(bench.options.rounds.min(3), lanes).await?;
            let is_overloaded = bound.of(|delays| delays.p50).median() > MAX_DELAY_MS;
            let note = format!(
                "{per_second}/s, {}: more single messages than the queue accepts",
                endpoint.name
            );
            let note = is_overloaded.then_some(note);
            for (name, figure, most) in [
                ("p50", (|delays| delays.p50) as fn(&Quantiles) -> f64, Some(1.5)),
                ("p95", |delays| delays.p95, None),
                ("p99", |delays| delays.p99, Some(3.0)),
            ] {
                let line = Line {
                    row: 8,
                    what: format!("latency at {per_second}/s, {}, {name}", endpoint.name),
                    unit: Unit::Milliseconds,
                    ours: ours.of(figure),
                    bounds: vec![bound.of(figure)],
                    compared_by: Comparison::Ratio,
                    target: most.filter(|_| per_second == 100).map(Target::AtMost),
                    note: note.clone(),
                };
                let least = EquivalentLoop {
                    what: format!("latency at {per_second}/s, {}, {name} ÷ by hand", endpoint.name),
                    bare: by_hand.of(figure),
                    bare_bound: bound.of(figure),
                    target: Target::AtMost(1.25),
                };
                match line.target {
                    Some(_) => sheet.add_with_equivalent(line, least),
                    None => sheet.add(line),
                }
            }
        }
    }
    Ok(())
}

/// Appends on schedule while a worker with default settings plays.
async fn measure_projection(
    world: &World,
    endpoint: &Endpoint,
    registry: &Registry,
    schedule: Schedule,
) -> anyhow::Result<Quantiles> {
    let queue = endpoint.make_queue(Kind::Fifo).await?;
    let observed = ObservedQueue::new(Arc::clone(&queue.sqs) as Arc<dyn Queue>);
    let (stop, stopped) = oneshot::channel::<()>();
    let (database, registry, watched) =
        (world.database.clone(), registry.clone(), Arc::clone(&observed));
    let playing = tokio::spawn(async move {
        let until = async { _ = stopped.await };
        play(&database, watched as Arc<dyn Queue>, &registry, PlaySettings::default(), until).await
    });
    // The first events are not measured: they wait for connections to open and statements to be
    // prepared.
    Schedule { per_second: 100, count: WRITERS }.append_and_wait(world, &observed).await?;
    let committed = schedule.append_and_wait(world, &observed).await?;
    let _ = stop.send(());
    playing.await??;
    queue.remove().await?;
    match_delays(&committed, &observed.applied())
}

/// Appends on the same schedule, while the loop by hand publishes and applies.
async fn measure_projection_by_hand(
    world: &World,
    endpoint: &Endpoint,
    model: &ReadModel,
    schedule: Schedule,
) -> anyhow::Result<Quantiles> {
    let queue = endpoint.make_queue(Kind::Fifo).await?;
    let publishing = tokio::spawn(hand_written::publish(world, Arc::clone(&queue.sqs)).await?);
    let count = WRITERS + schedule.count;
    let applying = hand_written::apply(world, &queue.sqs, model, count as usize);
    let appending = async {
        Schedule { per_second: 100, count: WRITERS }.append(world).await?;
        schedule.append(world).await
    };
    let (applied, committed) = timeout(TIMEOUT, try_join(applying, appending))
        .await
        .context("an event is not projected")??;
    publishing.abort();
    queue.remove().await?;
    match_delays(&committed, &applied)
}

fn match_delays(
    committed: &HashMap<u64, Instant>,
    applied: &HashMap<u64, Instant>,
) -> anyhow::Result<Quantiles> {
    let delay = |(position, at): (&u64, &Instant)| {
        let applied = applied
            .get(position)
            .with_context(|| format!("position {position} was in no message"))?;
        // The event may be applied before the writer has the answer to its commit.
        Ok(applied.saturating_duration_since(*at))
    };
    let delays = committed.iter().map(delay).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Quantiles::of(&delays))
}

impl Schedule {
    fn due(self, began: Instant, number: u64) -> tokio::time::Instant {
        (began + Duration::from_secs(number) / self.per_second as u32).into()
    }

    async fn append_and_wait(
        self,
        world: &World,
        observed: &ObservedQueue,
    ) -> anyhow::Result<HashMap<u64, Instant>> {
        let committed = self.append(world).await?;
        let last = committed.keys().copied().max().unwrap_or_default();
        timeout(TIMEOUT, observed.deleted_through(last))
            .await
            .context("an event is not projected")?;
        Ok(committed)
    }

    /// Appends each event when it is due, in a transaction of its own. Returns the commit time of
    /// each position.
    async fn append(self, world: &World) -> anyhow::Result<HashMap<u64, Instant>> {
        let payload = format!(r#"{{"note":"{}"}}"#, "x".repeat(288));
        let mut connections = Vec::new();
        for _ in 0..WRITERS {
            connections.push(world.connection().await?);
        }
        let (mut writers, began) = (JoinSet::new(), Instant::now());
        for (writer, mut connection) in (0..).zip(connections) {
            let payload = payload.clone();
            writers.spawn(async move {
                let mut committed = Vec::new();
                for number in (writer..self.count).step_by(WRITERS as usize) {
                    sleep_until(self.due(began, number)).await;
                    let appended =
                        sqlx::query(APPEND).bind(&payload).execute(&mut connection).await?;
                    committed.push((appended.last_insert_id(), Instant::now()));
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
}

/// Sends messages on schedule, one after the other as the relay does, and receives them
/// concurrently.
async fn measure_queue(endpoint: &Endpoint, schedule: Schedule) -> anyhow::Result<Quantiles> {
    let queue = endpoint.make_queue(Kind::Fifo).await?;
    let (due_sender, mut due_receiver) = mpsc::unbounded_channel();
    let began = Instant::now();
    let clock = tokio::spawn(async move {
        for number in 0..schedule.count {
            sleep_until(schedule.due(began, number)).await;
            let _ = due_sender.send((number, Instant::now()));
        }
    });
    let sqs = Arc::clone(&queue.sqs);
    let sender = tokio::spawn(async move {
        let mut due = HashMap::new();
        while let Some((number, at)) = due_receiver.recv().await {
            sqs.send(&format!("{number} {}", "x".repeat(500)), &number.to_string()).await?;
            due.insert(number, at);
        }
        Ok::<_, anyhow::Error>(due)
    });
    let mut arrived = HashMap::new();
    timeout(TIMEOUT, async {
        while (arrived.len() as u64) < schedule.count {
            let messages = queue.sqs.receive(PlaySettings::default().receive_wait).await?;
            let now = Instant::now();
            let number =
                |body: &str| body.split_once(' ').and_then(|(number, _)| number.parse().ok());
            arrived
                .extend(messages.iter().filter_map(|message| Some((number(&message.body)?, now))));
            let receipts: Vec<_> = messages.into_iter().map(|message| message.receipt).collect();
            queue.sqs.delete(&receipts).await?;
        }
        Ok::<_, anyhow::Error>(())
    })
    .await
    .context("a message does not arrive")??;
    clock.await?;
    let due: HashMap<u64, Instant> = sender.await??;
    queue.remove().await?;
    match_delays(&due, &arrived)
}
