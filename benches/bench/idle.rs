//! Row 13: what a worker asks of an idle database.

use std::sync::Arc;
use std::time::Duration;

use projectionist::sqlx::{self, MySqlConnection, Row};
use projectionist::{EventTypes, PlaySettings, Queue, Registry, play};

use crate::Bench;
use crate::endpoint::Kind;
use crate::lanes::{Series, in_turn, lane};
use crate::projectors::Nothing;
use crate::sheet::{Comparison, Line, Sheet, Target, Unit};
use crate::world::World;

/// How long an idle worker runs before its statements are counted.
const WARM_UP: Duration = Duration::from_secs(40);
const QUICK_WARM_UP: Duration = Duration::from_millis(500);

/// How long they are counted.
const COUNTED: Duration = Duration::from_secs(30);
const QUICK_COUNTED: Duration = Duration::from_millis(500);

const COUNTERS: &str = "show global status where variable_name in \
    ('Questions', 'Com_update', 'Com_insert', 'Com_delete', 'Com_replace')";

/// The statements and the writes in one interval, per second.
struct Rates {
    statements: f64,
    writes: f64,
}

/// Row 13: an idle worker with one projector, ten, a hundred and a thousand. The server counts the
/// statements of all its clients, so nothing else may use it.
pub async fn worker(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let world = &World::new(&bench.parts).await?;
    world.fill(&bench.sample, 100).await?;
    let counts: &[u64] = if bench.options.quick { &[1, 10] } else { &[1, 10, 100, 1_000] };
    for &count in counts {
        let mut registry = Registry::new();
        for number in 0..count {
            registry.add(Nothing { name: format!("nothing_{number}"), wanted: EventTypes::All })?;
        }
        world.boot(&registry).await?;
        let registry = &registry;
        let lanes = [lane("an idle worker", || count_statements(bench, world, registry))];
        let [rates] = in_turn(1, lanes).await?;
        for (what, rounds, most) in [
            ("statements", rates.of(|rates| rates.statements), 3.0),
            ("writes", rates.of(|rates| rates.writes), 0.1),
        ] {
            sheet.add(Line {
                row: 13,
                what: format!("an idle worker, {count} projectors, {what}"),
                unit: Unit::PerSecond,
                ours: Series { name: format!("{what} of an idle worker"), ..rounds },
                bounds: vec![],
                compared_by: Comparison::Absolute,
                target: (!bench.options.quick).then_some(Target::AtMost(most)),
                note: Some("as the server counts them, without those of this bench".into()),
            });
        }
    }
    Ok(())
}

async fn count_statements(
    bench: &Bench,
    world: &World,
    registry: &Registry,
) -> anyhow::Result<Rates> {
    let (warm_up, counted) =
        if bench.options.quick { (QUICK_WARM_UP, QUICK_COUNTED) } else { (WARM_UP, COUNTED) };
    let queue = bench.stub().await?.make_queue(Kind::Fifo).await?;
    let mut connection = world.connection().await?;
    let mut rates = Ok(Rates { statements: f64::NAN, writes: f64::NAN });
    let counting = async {
        tokio::time::sleep(warm_up).await;
        rates = async {
            let before = read_counters(&mut connection).await?;
            tokio::time::sleep(counted).await;
            let after = read_counters(&mut connection).await?;
            let rate = |count: u64| count as f64 / counted.as_secs_f64();
            // One statement is the second reading itself.
            Ok(Rates {
                statements: rate(after.statements - before.statements - 1),
                writes: rate(after.writes - before.writes),
            })
        }
        .await;
    };
    let sqs = Arc::clone(&queue.sqs) as Arc<dyn Queue>;
    play(&world.database, sqs, registry, PlaySettings::default(), counting).await?;
    queue.remove().await?;
    rates
}

/// The server's counters.
struct Counters {
    statements: u64,
    writes: u64,
}

async fn read_counters(connection: &mut MySqlConnection) -> anyhow::Result<Counters> {
    let mut counters = Counters { statements: 0, writes: 0 };
    for row in sqlx::raw_sql(COUNTERS).fetch_all(connection).await? {
        let (name, value): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        match name.as_str() {
            "Questions" => counters.statements += value.parse::<u64>()?,
            _ => counters.writes += value.parse::<u64>()?,
        }
    }
    Ok(counters)
}
