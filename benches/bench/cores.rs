//! Row 11: boot of projectors that compute, on all cores.

use std::hint::black_box;
use std::time::{Duration, Instant};

use projectionist::sqlx::MySqlConnection;
use projectionist::{Event, Projector, Registry, async_trait};
use tokio::task::JoinSet;

use crate::Bench;
use crate::lanes::{in_turn, lane};
use crate::projectors::Nothing;
use crate::sheet::{Line, Sheet, Target, Unit};
use crate::world::World;

/// What a handler computes for one batch.
const PER_BATCH: Duration = Duration::from_millis(5);

/// The batch size of the engine.
const BATCH_EVENTS: u64 = 1_000;

/// Computes for [`PER_BATCH`] with each batch, and writes nothing.
struct Computes {
    name: String,
    work: Work,
}

/// An amount of computation that takes the same number of instructions each time.
#[derive(Clone, Copy)]
struct Work {
    steps: u64,
}

impl Work {
    /// The work that takes [`PER_BATCH`] on one core of this machine. The fastest of several
    /// attempts counts, because other processes delay the others.
    fn measure() -> Self {
        const STEPS: u64 = 1_000_000;
        let attempt = |_| {
            let began = Instant::now();
            Work { steps: STEPS }.run();
            began.elapsed().as_secs_f64()
        };
        let fastest = (0..20).map(attempt).fold(f64::INFINITY, f64::min);
        Work { steps: (STEPS as f64 * PER_BATCH.as_secs_f64() / fastest) as u64 }
    }

    fn run(self) {
        let mut value = black_box(1_u64);
        for step in 0..self.steps {
            value = black_box(value.rotate_left(5) ^ step);
        }
    }
}

#[async_trait]
impl Projector for Computes {
    fn name(&self) -> &str {
        &self.name
    }

    async fn handle(&self, _: &Event, _: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(())
    }

    async fn handle_batch(&self, _: &[&Event], _: &mut MySqlConnection) -> anyhow::Result<()> {
        self.work.run();
        Ok(())
    }
}

/// Row 11: boot of one, two and four projectors that compute. The bare loop does only their
/// computation, with a task for each projector.
pub async fn computing(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = World::new(&bench.parts).await?;
    world.fill(&bench.sample, events).await?;
    world.boot(&Registry::new().with(Nothing::with_all())?).await?;
    let (world, work) = (&world, Work::measure());
    for count in [1, 2, 4] {
        let mut registry = Registry::new();
        for number in 0..count {
            registry.add(Computes { name: format!("computes_{number}"), work })?;
        }
        let registry = &registry;
        let [ours, bound] = in_turn(
            bench.options.rounds,
            [
                lane("boot", || async { Ok(world.boot(registry).await?.as_secs_f64()) }),
                lane("the computation alone, on all cores", || async move {
                    Ok(compute(work, count, events.div_ceil(BATCH_EVENTS)).await?.as_secs_f64())
                }),
            ],
        )
        .await?;
        let what = format!("boot, {count} × 5 ms of computation a batch ÷ the computation");
        let target = Some(Target::AtMost(1.5));
        sheet.add(Line::ratio(11, what, Unit::Seconds, ours, vec![bound], target));
    }
    Ok(())
}

/// Runs the work of `count` projectors for `batches` batches.
async fn compute(work: Work, count: u64, batches: u64) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        tasks.spawn(async move {
            for _ in 0..batches {
                work.run();
                tokio::task::yield_now().await;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended?;
    }
    Ok(began.elapsed())
}
