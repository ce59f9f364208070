//! Rows 1 to 5: boot.

use projectionist::{EventTypes, Projector, Registry};

use crate::lanes::{in_turn, lane, per_second};
use crate::log::RARE;
use crate::projectors::{Nothing, ReadModel, UpsertEach, UpsertRows, declared, empty};
use crate::sheet::{By, Line, Sheet, Target, Unit};
use crate::world::World;
use crate::{Bench, bare};

/// Projectors that are booted at once.
const MANY: usize = 8;

/// Boot of a projector that does nothing, and the fastest way to read the same rows.
pub async fn nothing(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.events;
    let world = booted_once(bench, events).await?;
    let (world, registry) = (&world, &only(Nothing::with_all())?);
    let pages = |page| async move { Ok(per_second(events, bare::read_pages(world, events, page).await?)) };
    let [ours, bounds @ ..] = in_turn(
        bench.options.rounds,
        [
            lane("boot", || boot(world, registry, &[], events)),
            lane("read in pages of 1,000", move || pages(1_000)),
            lane("in pages of 5,000", move || pages(5_000)),
            lane("as one stream", || async { Ok(per_second(events, bare::read_stream(world, events).await?)) }),
        ],
    )
    .await?;
    sheet.add(Line {
        row: 1,
        what: "boot, do-nothing ÷ read".into(),
        unit: Unit::PerSecond,
        ours,
        bounds: bounds.into(),
        judged_by: By::Ratio,
        target: Some(Target::AtLeast(0.8)),
        note: None,
    });
    Ok(())
}

/// Boot of a projector with one upsert an event, in Rust and declared, and the same statements by hand.
pub async fn upsert_each(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let events = bench.options.fewer_events();
    let world = &booted_once(bench, events).await?;
    let model = &ReadModel::new("upserted");
    model.make(world).await?;
    let models = std::slice::from_ref(model);
    let (each, file) = (&only(UpsertEach(model.clone()))?, &declared(models, "*")?);
    let [each, file, bound] = in_turn(
        bench.options.rounds,
        [
            lane("boot, Rust", || boot(world, each, models, events)),
            lane("boot, declared", || boot(world, file, models, events)),
            lane("upserts by hand", || async {
                empty(world, models).await?;
                Ok(per_second(events, bare::upsert_each(world, events, model).await?))
            }),
        ],
    )
    .await?;
    for (what, ours, least) in [("in Rust", each, 0.9), ("declared", file, 3.0)] {
        sheet.add(Line {
            row: 2,
            what: format!("boot, upsert per event {what} ÷ by hand"),
            unit: Unit::PerSecond,
            ours,
            bounds: vec![bound.clone()],
            judged_by: By::Ratio,
            target: Some(Target::AtLeast(least)),
            note: None,
        });
    }
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
    sheet.add(Line {
        row: 3,
        what: "boot, batched upsert ÷ by hand".into(),
        unit: Unit::PerSecond,
        ours,
        bounds: vec![bound],
        judged_by: By::Ratio,
        target: Some(Target::AtLeast(0.9)),
        note: None,
    });
    Ok(())
}

/// Boot of eight at once, and of one.
pub async fn eight_at_once(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let world = &booted_once(bench, bench.options.events).await?;
    let mut eight = Registry::new();
    for number in 0..MANY {
        eight.add(Nothing { name: format!("nothing_{number}"), wanted: EventTypes::All })?;
    }
    let times = Times { what: "do-nothing", target: Some(Target::AtMost(1.5)) };
    times.compare(bench, sheet, world, [(&eight, &[]), (&only(Nothing::with_all())?, &[])]).await?;

    // Each of them is written eight times.
    let world = &booted_once(bench, bench.options.fewer_events() / 4).await?;
    let models: Vec<ReadModel> = (0..MANY).map(|number| ReadModel::new(&format!("upserted_{number}"))).collect();
    for model in &models {
        model.make(world).await?;
    }
    let (eight, one) = (declared(&models, "*")?, declared(&models[..1], "*")?);
    let times = Times { what: "declared upsert", target: None };
    times.compare(bench, sheet, world, [(&eight, &models), (&one, &models[..1])]).await
}

/// Eight and one, by the time that they take.
struct Times {
    what: &'static str,
    target: Option<Target>,
}

impl Times {
    async fn compare(
        self,
        bench: &Bench,
        sheet: &mut Sheet,
        world: &World,
        [eight, one]: [(&Registry, &[ReadModel]); 2],
    ) -> anyhow::Result<()> {
        let seconds = |(registry, models)| async move {
            empty(world, models).await?;
            Ok(world.boot(registry).await?.as_secs_f64())
        };
        let lanes = [lane("boot of eight", move || seconds(eight)), lane("of one", move || seconds(one))];
        let [ours, bound] = in_turn(bench.options.rounds, lanes).await?;
        sheet.add(Line {
            row: 4,
            what: format!("boot, {}, 8 projectors ÷ 1", self.what),
            unit: Unit::Seconds,
            ours,
            bounds: vec![bound],
            judged_by: By::Ratio,
            target: self.target,
            note: None,
        });
        Ok(())
    }
}

/// Boot of a projector that wants one event in a hundred, and of the same that wants all; by the events of the log.
pub async fn one_in_a_hundred(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let rare = Nothing { name: "rare".into(), wanted: EventTypes::only([RARE]) };
    compare_wanted(bench, sheet, "do-nothing", bench.options.events, [only(rare)?, only(Nothing::with_all())?], &[])
        .await?;
    let models = [ReadModel::new("upserted")];
    let registries = [declared(&models, RARE)?, declared(&models, "*")?];
    compare_wanted(bench, sheet, "declared upsert", bench.options.fewer_events(), registries, &models).await
}

async fn compare_wanted(
    bench: &Bench,
    sheet: &mut Sheet,
    what: &str,
    events: u64,
    [rare, all]: [Registry; 2],
    models: &[ReadModel],
) -> anyhow::Result<()> {
    let world = &booted_once(bench, events).await?;
    for model in models {
        model.make(world).await?;
    }
    let lanes = [
        lane("boot of who wants 1%", || boot(world, &rare, models, events)),
        lane("of who wants all", || boot(world, &all, models, events)),
    ];
    let [ours, bound] = in_turn(bench.options.rounds, lanes).await?;
    sheet.add(Line {
        row: 5,
        what: format!("boot, {what}, 1% of the events ÷ all"),
        unit: Unit::PerSecond,
        ours,
        bounds: vec![bound],
        judged_by: By::Ratio,
        target: Some(Target::AtLeast(8.0)),
        note: None,
    });
    Ok(())
}

/// A world with so many events, in which the first boot has raised the mark: that is measured in row 9.
async fn booted_once(bench: &Bench, events: u64) -> anyhow::Result<World> {
    let world = World::new(&bench.parts).await?;
    world.fill(&bench.sample, events).await?;
    world.boot(&only(Nothing::with_all())?).await?;
    Ok(world)
}

/// Events of the log a second.
async fn boot(world: &World, registry: &Registry, models: &[ReadModel], events: u64) -> anyhow::Result<f64> {
    empty(world, models).await?;
    Ok(per_second(events, world.boot(registry).await?))
}

fn only(projector: impl Projector) -> anyhow::Result<Registry> {
    Ok(Registry::new().with(projector)?)
}
