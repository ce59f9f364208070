//! Rows 1 to 5: boot.

use projectionist::{EventTypes, Projector, Registry};

use crate::lanes::{Series, in_turn, lane, per_second};
use crate::log::RARE;
use crate::projectors::{Nothing, ReadModel, UpsertEach, UpsertRows, declared, empty};
use crate::sheet::{EquivalentLoop, Line, Sheet, Target, Unit};
use crate::world::World;
use crate::{Bench, bare};

/// Projectors that are booted at once.
const MANY: usize = 8;

/// Boot of a projector that does nothing, and the fastest way to read the same rows.
pub async fn nothing(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = booted_once(bench, events).await?;
    let (world, registry) = (&world, &only(Nothing::with_all())?);
    let pages =
        |page| async move { Ok(per_second(events, bare::read_pages(world, events, page).await?)) };
    let [ours, bare, bounds @ ..] = in_turn(
        bench.options.rounds,
        [
            lane("boot", || boot(world, registry, &[], events)),
            lane("one stream, with a fenced commit every 1,000 events", || async {
                Ok(per_second(events, bare::read_and_commit(world, events, 1).await?))
            }),
            lane("read in pages of 1,000", move || pages(1_000)),
            lane("in pages of 5,000", move || pages(5_000)),
            lane("as one stream", || async {
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

/// Boot of a projector with one upsert an event, in Rust and declared, and the same statements by
/// hand; and, for the declared one, whose statements are sent together, a thousand at once by hand:
/// how much there is to be had by that.
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
            lane("boot, Rust", || boot(world, each, models, events)),
            lane("boot, declared", || boot(world, file, models, events)),
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

/// Boot of a projector with one upsert a thousand events, and the same statements by hand.
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
            lane("boot", || boot(world, registry, models, events)),
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

/// Boot of eight at once, and of one; and the commits that eight cannot do without.
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
            lane("boot of eight", || seconds(world, eight, &[])),
            lane("of one", || seconds(world, one, &[])),
            lane("one read, and eight fenced commits side by side per 1,000 events", || {
                commits(MANY as u32)
            }),
            lane("one read, and one such commit", || commits(1)),
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
        times("boot, do-nothing", ours, bound, Some(Target::AtMost(1.5))),
        least,
    );

    // Each of them is written eight times.
    let world = &booted_once(bench, bench.options.fewer_events() / 4).await?;
    let models: Vec<ReadModel> =
        (0..MANY).map(|number| ReadModel::new(&format!("upserted_{number}"))).collect();
    for model in &models {
        model.make(world).await?;
    }
    let (eight, one) = (&declared(&models, "*")?, &declared(&models[..1], "*")?);
    let lanes = [
        lane("boot of eight", || seconds(world, eight, &models)),
        lane("of one", || seconds(world, one, &models[..1])),
    ];
    let [ours, bound] = in_turn(bench.options.rounds, lanes).await?;
    sheet.add(times("boot, declared upsert", ours, bound, None));
    Ok(())
}

/// Eight and one, by the time that they take.
fn times(what: &str, ours: Series<f64>, bound: Series<f64>, target: Option<Target>) -> Line {
    Line::ratio(4, format!("{what}, 8 projectors ÷ 1"), Unit::Seconds, ours, vec![bound], target)
}

/// Boot of a projector that wants one event in a hundred, and of the same that wants all, by the
/// events of the log; and the read in which the server passes over the others.
pub async fn one_in_a_hundred(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = &booted_once(bench, events).await?;
    let rare = &only(Nothing { name: "rare".into(), wanted: EventTypes::only([RARE]) })?;
    let all = &only(Nothing::with_all())?;
    let [ours, bound, bare, bare_bound] = in_turn(
        bench.options.rounds,
        [
            lane(WANTS_RARE, || boot(world, rare, &[], events)),
            lane(WANTS_ALL, || boot(world, all, &[], events)),
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
    sheet.add_with_equivalent(wanted("do-nothing", ours, bound), least);

    let events = bench.options.fewer_events();
    let world = &booted_once(bench, events).await?;
    let models = &[ReadModel::new("upserted")];
    models[0].make(world).await?;
    let (rare, all) = (&declared(models, RARE)?, &declared(models, "*")?);
    let lanes = [
        lane(WANTS_RARE, || boot(world, rare, models, events)),
        lane(WANTS_ALL, || boot(world, all, models, events)),
    ];
    let [ours, bound] = in_turn(bench.options.rounds, lanes).await?;
    sheet.add(wanted("declared upsert", ours, bound));
    Ok(())
}

const WANTS_RARE: &str = "boot of who wants 1%";
const WANTS_ALL: &str = "of who wants all";

fn wanted(what: &str, ours: Series<f64>, bound: Series<f64>) -> Line {
    Line::ratio(
        5,
        format!("boot, {what}, 1% of the events ÷ all"),
        Unit::PerSecond,
        ours,
        vec![bound],
        Some(Target::AtLeast(8.0)),
    )
}

/// A world with so many events, in which the first boot has raised the mark: that is measured in
/// row 9.
async fn booted_once(bench: &Bench, events: u64) -> anyhow::Result<World> {
    let world = World::new(&bench.parts).await?;
    world.fill(&bench.sample, events).await?;
    world.boot(&only(Nothing::with_all())?).await?;
    Ok(world)
}

/// Events of the log a second.
async fn boot(
    world: &World,
    registry: &Registry,
    models: &[ReadModel],
    events: u64,
) -> anyhow::Result<f64> {
    Ok(events as f64 / seconds(world, registry, models).await?)
}

async fn seconds(world: &World, registry: &Registry, models: &[ReadModel]) -> anyhow::Result<f64> {
    empty(world, models).await?;
    Ok(world.boot(registry).await?.as_secs_f64())
}

fn only(projector: impl Projector) -> anyhow::Result<Registry> {
    Ok(Registry::new().with(projector)?)
}
