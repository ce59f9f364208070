//! Rows 1 to 5: boot.

use projectionist::{EventTypes, Projector, Registry};

use crate::lanes::{Series, in_turn, lane, per_second};
use crate::log::RARE;
use crate::projectors::{Nothing, ReadModel, UpsertEach, UpsertRows, declared, empty};
use crate::sheet::{EquivalentLoop, Line, Sheet, Target, Unit};
use crate::world::World;
use crate::{Bench, bare};

/// The number of projectors that boot together in row 4.
const MANY: usize = 8;

/// Row 1: boot of a projector that does nothing, against the fastest way to read the same rows.
pub async fn nothing(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = booted_once(bench, events).await?;
    let (world, registry) = (&world, &only(Nothing::with_all())?);
    let pages =
        |page| async move { Ok(per_second(events, bare::read_pages(world, events, page).await?)) };
    let [ours, bare, bounds @ ..] = in_turn(
        bench.options.rounds,
        [
            lane("boot", || boot_rate(world, registry, &[], events)),
            lane("one stream, with a fenced commit every 1,000 events", || async {
                Ok(per_second(events, bare::read_and_commit(world, events, 1).await?))
            }),
            lane("read in pages of 1,000", move || pages(1_000)),
            lane("read in pages of 5,000", move || pages(5_000)),
            lane("read as one stream", || async {
                Ok(per_second(events, bare::read_stream(world, events).await?))
            }),
        ],
    )
    .await?;
    let least = EquivalentLoop {
        what: "boot, do-nothing ÷ read and commit".into(),
        bare,
        bare_bound: bounds[2].clone(),
        target: Target::AtLeast(0.8),
    };
    let what = "boot, do-nothing ÷ read".into();
    let line =
        Line::ratio(1, what, Unit::PerSecond, ours, bounds.into(), Some(Target::AtLeast(0.8)));
    sheet.add_with_equivalent(line, least);
    Ok(())
}

/// Row 2: boot of a projector with one upsert per event, written in Rust and declared in a file.
/// The baseline is the same statements by hand. A declared projector sends its statements together;
/// multi-row upserts by hand show the most that this can gain.
pub async fn upsert_each(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.fewer_events();
    let world = &booted_once(bench, events).await?;
    let model = &ReadModel::new("upserted");
    model.make(world).await?;
    let models = std::slice::from_ref(model);
    let (each, file) = (&only(UpsertEach(model.clone()))?, &declared(models, "*")?);
    let [each, file, bound, together] = in_turn(
        bench.options.rounds,
        [
            lane("boot, Rust", || boot_rate(world, each, models, events)),
            lane("boot, declared", || boot_rate(world, file, models, events)),
            lane("upserts by hand", || async {
                empty(world, models).await?;
                Ok(per_second(events, bare::upsert_each(world, events, model).await?))
            }),
            lane("multi-row upserts by hand", || async {
                empty(world, models).await?;
                Ok(per_second(events, bare::upsert_rows(world, events, model).await?))
            }),
        ],
    )
    .await?;
    let line = |what: &str, ours, least| {
        let what = format!("boot, upsert per event {what} ÷ by hand");
        Line::ratio(
            2,
            what,
            Unit::PerSecond,
            ours,
            vec![bound.clone()],
            Some(Target::AtLeast(least)),
        )
    };
    sheet.add(line("in Rust", each, 0.9));
    let least = EquivalentLoop {
        what: "boot, upsert per event declared ÷ multi-row by hand".into(),
        bare: together,
        bare_bound: bound.clone(),
        target: Target::AtLeast(0.9),
    };
    sheet.add_with_equivalent(line("declared", file, 3.0), least);
    Ok(())
}

/// Row 3: boot of a projector with one upsert for a thousand events, against the same statements by
/// hand.
pub async fn upsert_rows(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = &booted_once(bench, events).await?;
    let model = &ReadModel::new("upserted");
    model.make(world).await?;
    let models = std::slice::from_ref(model);
    let registry = &only(UpsertRows(model.clone()))?;
    let [ours, bound] = in_turn(
        bench.options.rounds,
        [
            lane("boot", || boot_rate(world, registry, models, events)),
            lane("multi-row upserts by hand", || async {
                empty(world, models).await?;
                Ok(per_second(events, bare::upsert_rows(world, events, model).await?))
            }),
        ],
    )
    .await?;
    sheet.add(Line::ratio(
        3,
        "boot, batched upsert ÷ by hand".into(),
        Unit::PerSecond,
        ours,
        vec![bound],
        Some(Target::AtLeast(0.9)),
    ));
    Ok(())
}

/// Row 4: boot of eight projectors, against boot of one. The loop by hand makes the commits that
/// eight projectors need.
pub async fn eight_at_once(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = &booted_once(bench, events).await?;
    let mut eight = Registry::new();
    for number in 0..MANY {
        eight.add(Nothing { name: format!("nothing_{number}"), wanted: EventTypes::All })?;
    }
    let (eight, one) = (&eight, &only(Nothing::with_all())?);
    let commits = |positions| async move {
        Ok(bare::read_and_commit(world, events, positions).await?.as_secs_f64())
    };
    let [ours, bound, eight_commits, one_commit] = in_turn(
        bench.options.rounds,
        [
            lane("boot of eight projectors", || boot_seconds(world, eight, &[])),
            lane("boot of one", || boot_seconds(world, one, &[])),
            lane("one read, and eight concurrent fenced commits per 1,000 events", || {
                commits(MANY as u32)
            }),
            lane("one read, and one fenced commit per 1,000 events", || commits(1)),
        ],
    )
    .await?;
    let least = EquivalentLoop {
        what: "boot, do-nothing, 8 projectors ÷ read and 8 commits".into(),
        bare: eight_commits,
        bare_bound: one_commit,
        target: Target::AtMost(1.25),
    };
    sheet.add_with_equivalent(
        compare_times("boot, do-nothing", ours, bound, Some(Target::AtMost(1.5))),
        least,
    );

    // Fewer events, because each one is written eight times.
    let world = &booted_once(bench, bench.options.fewer_events() / 4).await?;
    let models: Vec<ReadModel> =
        (0..MANY).map(|number| ReadModel::new(&format!("upserted_{number}"))).collect();
    for model in &models {
        model.make(world).await?;
    }
    let (eight, one) = (&declared(&models, "*")?, &declared(&models[..1], "*")?);
    let lanes = [
        lane("boot of eight projectors", || boot_seconds(world, eight, &models)),
        lane("boot of one", || boot_seconds(world, one, &models[..1])),
    ];
    let [ours, bound] = in_turn(bench.options.rounds, lanes).await?;
    sheet.add(compare_times("boot, declared upsert", ours, bound, None));
    Ok(())
}

/// A line that compares the times of eight projectors and of one.
fn compare_times(
    what: &str,
    ours: Series<f64>,
    bound: Series<f64>,
    target: Option<Target>,
) -> Line {
    Line::ratio(4, format!("{what}, 8 projectors ÷ 1"), Unit::Seconds, ours, vec![bound], target)
}

/// Row 5: boot of a projector that subscribes to one event in a hundred, against one that
/// subscribes to all. Both rates count the events of the log. The loop by hand is a read in which
/// the server skips the other events.
pub async fn one_in_a_hundred(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = &booted_once(bench, events).await?;
    let rare = &only(Nothing { name: "rare".into(), wanted: EventTypes::only([RARE]) })?;
    let all = &only(Nothing::with_all())?;
    let [ours, bound, bare, bare_bound] = in_turn(
        bench.options.rounds,
        [
            lane(WANTS_RARE, || boot_rate(world, rare, &[], events)),
            lane(WANTS_ALL, || boot_rate(world, all, &[], events)),
            lane("read of 1% by type", || async {
                Ok(per_second(events, bare::read_rare(world, events).await?))
            }),
            lane("read of all", || async {
                Ok(per_second(events, bare::read_stream(world, events).await?))
            }),
        ],
    )
    .await?;
    let least = EquivalentLoop {
        what: "boot, do-nothing, 1% of the events ÷ read of 1%".into(),
        bare,
        bare_bound,
        target: Target::AtLeast(0.8),
    };
    sheet.add_with_equivalent(compare_subscriptions("do-nothing", ours, bound), least);

    let events = bench.options.fewer_events();
    let world = &booted_once(bench, events).await?;
    let models = &[ReadModel::new("upserted")];
    models[0].make(world).await?;
    let (rare, all) = (&declared(models, RARE)?, &declared(models, "*")?);
    let lanes = [
        lane(WANTS_RARE, || boot_rate(world, rare, models, events)),
        lane(WANTS_ALL, || boot_rate(world, all, models, events)),
    ];
    let [ours, bound] = in_turn(bench.options.rounds, lanes).await?;
    sheet.add(compare_subscriptions("declared upsert", ours, bound));
    Ok(())
}

const WANTS_RARE: &str = "boot, subscribes to 1%";
const WANTS_ALL: &str = "subscribes to all";

fn compare_subscriptions(what: &str, ours: Series<f64>, bound: Series<f64>) -> Line {
    Line::ratio(
        5,
        format!("boot, {what}, 1% of the events ÷ all"),
        Unit::PerSecond,
        ours,
        vec![bound],
        Some(Target::AtLeast(8.0)),
    )
}

/// Makes a world with `events` events and boots it once. That boot raises the mark, which row 9
/// measures.
async fn booted_once(bench: &Bench, events: u64) -> anyhow::Result<World> {
    let world = World::new(&bench.parts).await?;
    world.fill(&bench.sample, events).await?;
    world.boot(&only(Nothing::with_all())?).await?;
    Ok(world)
}

/// Boots the registry. Returns the events of the log per second.
async fn boot_rate(
    world: &World,
    registry: &Registry,
    models: &[ReadModel],
    events: u64,
) -> anyhow::Result<f64> {
    Ok(events as f64 / boot_seconds(world, registry, models).await?)
}

async fn boot_seconds(
    world: &World,
    registry: &Registry,
    models: &[ReadModel],
) -> anyhow::Result<f64> {
    empty(world, models).await?;
    Ok(world.boot(registry).await?.as_secs_f64())
}

fn only(projector: impl Projector) -> anyhow::Result<Registry> {
    Ok(Registry::new().with(projector)?)
}
