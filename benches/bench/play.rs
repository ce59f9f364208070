//! Rows 6 and 7: play from a queue that is already full.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use projectionist::{Database, EventTypes, PlaySettings, Queue, Registry, RelaySettings, play};

use crate::Bench;
use crate::endpoint::{Endpoint, Kind};
use crate::fence::Fence;
use crate::lanes::{in_turn, lane, per_second};
use crate::projectors::Nothing;
use crate::queue_probes::{ObservedQueue, SentRecorder, positions};
use crate::sheet::{Comparison, EquivalentLoop, Line, Sheet, Target, Unit};
use crate::world::World;

/// A measurement that takes longer fails. Even single messages through LocalStack take less.
const TIMEOUT: Duration = Duration::from_secs(600);

const ONE_AT_A_TIME: usize = 1;

/// The messages that the relay makes of the first events of the log.
pub struct Backlog {
    pub bodies: Vec<String>,
    pub events: u64,
}

/// Row 6: play of messages with one event each, with one projector and with ten. The bare loop only
/// receives and deletes the same messages. The loop by hand also reads which projectors are live
/// and commits a position before it deletes, as the guarantees need.
pub async fn one_event_per_message(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let (world, registries) = set_up(bench, bench.sizes().stub_messages).await?;
    let (world, [one, ten]) = (&world, &registries);
    let all = record_messages(world, bench.sizes().stub_messages, ONE_AT_A_TIME).await?;
    let few = all.first(bench.sizes().localstack_messages as usize);
    for (endpoint, kind, backlog) in [
        (bench.localstack().await, Kind::Fifo, &few),
        (bench.stub().await?, Kind::Fifo, &all),
        (bench.stub().await?, Kind::Standard, &all),
    ] {
        let endpoint = &endpoint;
        let committing = match kind {
            Kind::Fifo => "receive, read positions, commit, delete, one after the other",
            Kind::Standard => {
                "receive, read positions, commit, delete, with the next receive meanwhile"
            }
        };
        let [one, ten, bound, bare] = in_turn(
            bench.options.rounds,
            [
                lane("play, 1 projector", || measure_play(world, endpoint, kind, one, backlog)),
                lane("play, 10 projectors", || measure_play(world, endpoint, kind, ten, backlog)),
                lane("receive and delete", || measure_drain(endpoint, kind, backlog)),
                lane(committing, || measure_drain_with_commits(world, endpoint, kind, backlog)),
            ],
        )
        .await?;
        let what =
            |projectors| format!("play {projectors} from {} ({})", endpoint.name, kind.as_str());
        let line = |projectors, ours, target| Line {
            row: 6,
            what: format!("{} ÷ receive and delete", what(projectors)),
            unit: Unit::PerSecond,
            ours,
            bounds: vec![bound.clone()],
            compared_by: Comparison::Ratio,
            target,
            note: Some(format!("{}: {} messages of one event", endpoint.name, backlog.events)),
        };
        let least = EquivalentLoop {
            what: format!("{} ÷ the same with a commit", what(1)),
            bare,
            bare_bound: bound.clone(),
            target: Target::AtLeast(0.9),
        };
        sheet.add_with_equivalent(line(1, one, Some(Target::AtLeast(0.9))), least);
        sheet.add(line(10, ten, None));
    }
    Ok(())
}

/// Row 7: play of a backlog with packed messages, against one event in each message. The backlog is
/// either in the queue, or the relay in the worker sends it.
pub async fn packed(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let (world, registries) = set_up(bench, bench.sizes().packed_events).await?;
    let (world, [one, _]) = (&world, &registries);
    let packed =
        record_messages(world, bench.sizes().packed_events, RelaySettings::default().max_events)
            .await?;
    let required = Some(Target::AtLeast(20.0));
    for (endpoint, messages, from_queue) in [
        (bench.localstack().await, bench.sizes().localstack_messages, required),
        // The stub makes single messages cheap, so packing gains less there.
        (bench.stub().await?, bench.sizes().stub_messages, None),
    ] {
        let (endpoint, packed) = (&endpoint, &packed);
        let single = &record_messages(world, messages, ONE_AT_A_TIME).await?;
        let relayed =
            |max_events, events| measure_relayed_play(world, endpoint, one, max_events, events);
        let [ours, bound, ours_relayed, bound_relayed] = in_turn(
            bench.options.rounds,
            [
                lane("packed", || measure_play(world, endpoint, Kind::Fifo, one, packed)),
                lane("one event a message", || {
                    measure_play(world, endpoint, Kind::Fifo, one, single)
                }),
                lane("packed, with relay", || {
                    relayed(RelaySettings::default().max_events, packed.events)
                }),
                lane("one event a message, with relay", || {
                    relayed(ONE_AT_A_TIME, bench.sizes().relayed_messages)
                }),
            ],
        )
        .await?;
        let packed_note = format!(
            "{}: {} events in {} messages",
            endpoint.name,
            packed.events,
            packed.bodies.len()
        );
        for (what, ours, bound, singles, target) in [
            ("from the queue", ours, bound, messages, from_queue),
            (
                "through relay and queue",
                ours_relayed,
                bound_relayed,
                bench.sizes().relayed_messages,
                required,
            ),
        ] {
            sheet.add(Line {
                row: 7,
                what: format!(
                    "play a backlog {what}, {}, packed ÷ one event a message",
                    endpoint.name
                ),
                unit: Unit::PerSecond,
                ours,
                bounds: vec![bound],
                compared_by: Comparison::Ratio,
                target,
                note: Some(format!("{packed_note}, {singles} one by one")),
            });
        }
    }
    Ok(())
}

/// Makes a log of `events` events and two sets of live projectors that do nothing: one projector,
/// and ten.
async fn set_up(bench: &Bench, events: u64) -> anyhow::Result<(World, [Registry; 2])> {
    let world = World::new(&bench.parts).await?;
    world.fill(&bench.sample, events).await?;
    let nothing = |number| Nothing { name: format!("nothing_{number}"), wanted: EventTypes::All };
    let one = Registry::new().with(nothing(0))?;
    let mut ten = Registry::new();
    for number in 0..10 {
        ten.add(nothing(number))?;
    }
    world.boot(&ten).await?;
    Ok((world, [one, ten]))
}

impl Backlog {
    /// The first messages of this backlog, which has one event in each message.
    fn first(&self, messages: usize) -> Self {
        let bodies: Vec<String> = self.bodies.iter().take(messages).cloned().collect();
        Backlog { events: bodies.len() as u64, bodies }
    }
}

/// Records the messages that the relay makes of the first events of the log.
pub async fn record_messages(
    world: &World,
    events: u64,
    max_events: usize,
) -> anyhow::Result<Backlog> {
    world.rewind_relay().await?;
    let recorder = SentRecorder::new();
    let queue = Arc::clone(&recorder) as Arc<dyn Queue>;
    let settings = PlaySettings::default()
        .with_relay(Some(RelaySettings::default().with_max_events(max_events)));
    let no_projectors = Registry::new();
    let recording =
        play(&world.database, queue, &no_projectors, settings, recorder.sent_through(events));
    tokio::time::timeout(TIMEOUT, recording)
        .await
        .context("the relay does not reach the end of the log")??;
    let of_these = |body: &String| positions(body).is_some_and(|(_, last)| last <= events);
    let bodies: Vec<String> =
        recorder.take().into_iter().map(|(body, _)| body).filter(of_these).collect();
    Ok(Backlog { bodies, events })
}

/// Plays from a full queue until the last message is deleted. Returns events per second.
async fn measure_play(
    world: &World,
    endpoint: &Endpoint,
    kind: Kind,
    registry: &Registry,
    backlog: &Backlog,
) -> anyhow::Result<f64> {
    world.rewind().await?;
    let queue = endpoint.make_queue(kind).await?;
    queue.fill(&backlog.bodies).await?;
    let observed = ObservedQueue::new(Arc::clone(&queue.sqs) as Arc<dyn Queue>);
    let took =
        play_through(world, &world.database, observed, registry, None, backlog.events).await?;
    queue.remove().await?;
    Ok(per_second(backlog.events, took))
}

/// Plays a log of which nothing is published yet, with a relay. Returns events per second.
async fn measure_relayed_play(
    world: &World,
    endpoint: &Endpoint,
    registry: &Registry,
    max_events: usize,
    events: u64,
) -> anyhow::Result<f64> {
    world.rewind().await?;
    world.rewind_relay().await?;
    let queue = endpoint.make_queue(Kind::Fifo).await?;
    let observed = ObservedQueue::new(Arc::clone(&queue.sqs) as Arc<dyn Queue>);
    let relay = RelaySettings::default().with_max_events(max_events);
    let took =
        play_through(world, &world.database, observed, registry, Some(relay), events).await?;
    queue.remove().await?;
    Ok(per_second(events, took))
}

/// Plays until every projector has applied a position and its message is deleted.
pub async fn play_through(
    world: &World,
    database: &Database,
    observed: Arc<ObservedQueue>,
    registry: &Registry,
    relay: Option<RelaySettings>,
    position: u64,
) -> anyhow::Result<Duration> {
    let queue = Arc::clone(&observed) as Arc<dyn Queue>;
    let settings = PlaySettings::default().with_relay(relay);
    let (mut ended, began) = (None, Instant::now());
    let until = async { ended = Some(observed.deleted_through(position).await) };
    let playing = play(database, queue, registry, settings, until);
    tokio::time::timeout(TIMEOUT, playing)
        .await
        .context("play does not reach the end of the log")??;
    let took = ended.context("play ended by itself")?.duration_since(began);
    let reached = world.number("select position from projectors where name = 'nothing_0'").await?;
    ensure!(
        reached >= position,
        "play deleted messages through {position}, but applied only through {reached}"
    );
    Ok(took)
}

/// Receives and deletes the messages without reading them. Returns events per second.
async fn measure_drain(endpoint: &Endpoint, kind: Kind, backlog: &Backlog) -> anyhow::Result<f64> {
    drain(endpoint, kind, backlog, None).await
}

/// Receives the messages, reads the positions, commits a position past them and deletes them.
/// Returns events per second.
async fn measure_drain_with_commits(
    world: &World,
    endpoint: &Endpoint,
    kind: Kind,
    backlog: &Backlog,
) -> anyhow::Result<f64> {
    drain(endpoint, kind, backlog, Some(Fence::new(world, 0).await?)).await
}

async fn drain(
    endpoint: &Endpoint,
    kind: Kind,
    backlog: &Backlog,
    mut fence: Option<Fence>,
) -> anyhow::Result<f64> {
    let queue = endpoint.make_queue(kind).await?;
    queue.fill(&backlog.bodies).await?;
    // Only the loop on a standard queue that commits receives ahead. A FIFO queue returns no
    // message before the last ones are deleted, and a loop that commits nothing has no work to
    // overlap with a receive.
    let is_ahead = kind == Kind::Standard && fence.is_some();
    let (began, mut left) = (Instant::now(), backlog.bodies.len());
    let wait = PlaySettings::default().receive_wait;
    let mut received = queue.sqs.receive(wait).await?;
    while left > 0 {
        let receipts: Vec<_> = received.into_iter().map(|message| message.receipt).collect();
        left -= receipts.len();
        ensure!(began.elapsed() < TIMEOUT, "{left} messages do not arrive");
        let work = async {
            if let Some(fence) = &mut fence {
                fence.read_all().await?;
                fence.advance(receipts.len() as u64).await?;
            }
            anyhow::Ok(queue.sqs.delete(&receipts).await?)
        };
        let next =
            async { if left > 0 { Ok(queue.sqs.receive(wait).await?) } else { Ok(Vec::new()) } };
        received = if is_ahead {
            tokio::try_join!(next, work)?.0
        } else {
            work.await?;
            next.await?
        };
    }
    let took = began.elapsed();
    queue.remove().await?;
    Ok(per_second(backlog.events, took))
}
