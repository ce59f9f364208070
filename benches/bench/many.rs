//! Row 12: play with many projectors, each of which wants one event type of a hundred.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use projectionist::sqlx::{self, MySqlConnection};
use projectionist::{
    Database, Event, EventTypes, Projector, Queue, Registry, SessionUse, async_trait,
};

use crate::Bench;
use crate::endpoint::Kind;
use crate::fence::Fence;
use crate::lanes::{in_turn, lane, per_second};
use crate::log::{Sample, TYPES, event_type};
use crate::play::{Backlog, play_through, record_messages};
use crate::queue_probes::ObservedQueue;
use crate::sheet::{Comparison, Line, Sheet, Target, Unit};
use crate::world::World;

/// Events in the log. Each message has one.
const EVENTS: u64 = 1_000;
const QUICK_EVENTS: u64 = 50;

/// The events a second that play must keep up with.
const TARGET: f64 = 100.0;

/// The most messages of one receive.
const MESSAGES_PER_RECEIVE: u64 = 10;

/// The connections of the commands by default: eight of the engine and one for each session of a
/// projector, at least 16 and at most 48.
fn default_connections(sessions: u64) -> u32 {
    (8 + sessions).clamp(16, 48) as u32
}

const TABLE: &str =
    "create table if not exists counts (number int unsigned primary key, events bigint not null)";

const COUNT: &str = "insert into counts values (?, 1) on duplicate key update events = events + 1";

/// Counts the events of one type.
struct CountsType {
    name: String,
    number: u64,
    session: SessionUse,
}

impl CountsType {
    fn new(number: u64, session: SessionUse) -> Self {
        CountsType { name: format!("nothing_{number}"), number, session }
    }
}

#[async_trait]
impl Projector for CountsType {
    fn name(&self) -> &str {
        &self.name
    }

    fn event_types(&self) -> EventTypes {
        EventTypes::only([event_type(self.number % TYPES)])
    }

    fn session(&self) -> SessionUse {
        self.session
    }

    async fn handle(&self, _: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(count(self.number, db).await?)
    }
}

async fn count(number: u64, db: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    sqlx::query(COUNT).bind(number).execute(db).await.map(|_| ())
}

/// Row 12: events a second, with projectors that share sessions and with projectors that keep a
/// session of their own. The bare loop fences and commits the same upserts.
pub async fn one_type_each(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = if bench.options.quick { QUICK_EVENTS } else { EVENTS };
    let world = &World::new(&bench.parts).await?;
    world.fill(&Sample::with_types(), events).await?;
    world.execute(TABLE).await?;
    let backlog = &record_messages(world, events, 1).await?;
    let (shared, dedicated): (&[u64], &[u64]) = if bench.options.quick {
        (&[1, 10], &[10])
    } else {
        (&[1, 10, 100, 1_000], &[10, 50, 100])
    };
    let counts = shared.iter().map(|&count| (count, SessionUse::Shared));
    let with_sessions = dedicated.iter().map(|&count| (count, SessionUse::Dedicated));
    for (projectors, session) in counts.chain(with_sessions) {
        let mut registry = Registry::new();
        for number in 0..projectors {
            registry.add(CountsType::new(number, session))?;
        }
        let registry = &registry;
        world.boot(registry).await?;
        let sessions = if session == SessionUse::Dedicated { projectors } else { 0 };
        let database =
            &Database::connect(&world.url, default_connections(sessions), Duration::from_secs(60))
                .await?;
        let [ours, bound] = in_turn(
            bench.options.rounds,
            [
                lane("play", || measure(bench, world, database, registry, backlog)),
                lane("upserts with a fenced commit, one after the other", || {
                    upsert_by_hand(world, projectors, events)
                }),
            ],
        )
        .await?;
        let sharing = match session {
            SessionUse::Shared => "sharing sessions",
            _ => "each with its own session",
        };
        sheet.add(Line {
            row: 12,
            what: format!("play, {projectors} projectors of 1% each, {sharing}"),
            unit: Unit::PerSecond,
            ours,
            bounds: vec![bound],
            compared_by: Comparison::Absolute,
            target: Some(Target::AtLeast(TARGET)),
            note: Some(format!("stub: {events} messages of one event")),
        });
    }
    Ok(())
}

/// Plays from a full queue until the last message is deleted. Returns events per second.
async fn measure(
    bench: &Bench,
    world: &World,
    database: &Database,
    registry: &Registry,
    backlog: &Backlog,
) -> anyhow::Result<f64> {
    world.rewind().await?;
    let queue = bench.stub().await?.make_queue(Kind::Fifo).await?;
    queue.fill(&backlog.bodies).await?;
    let observed = ObservedQueue::new(Arc::clone(&queue.sqs) as Arc<dyn Queue>);
    let took = play_through(world, database, observed, registry, None, backlog.events).await?;
    queue.remove().await?;
    let slowest = world.number("select min(position) from projectors").await?;
    ensure!(slowest >= backlog.events, "a projector is at {slowest}");
    Ok(per_second(backlog.events, took))
}

/// Upserts as many rows as the projectors do, each in a transaction that also moves a position.
/// Each receive has ten events of ten types.
async fn upsert_by_hand(world: &World, projectors: u64, events: u64) -> anyhow::Result<f64> {
    let mut fence = Fence::new(world, 0).await?;
    let began = Instant::now();
    for first in (1..=events).step_by(MESSAGES_PER_RECEIVE as usize) {
        let types: Vec<u64> =
            (first..first + MESSAGES_PER_RECEIVE).map(|position| position % TYPES).collect();
        let wanting = (0..projectors).filter(|number| types.contains(&(number % TYPES)));
        for number in wanting {
            fence.advance_with(1, async |db: &mut MySqlConnection| count(number, db).await).await?;
        }
    }
    Ok(per_second(events, began.elapsed()))
}
