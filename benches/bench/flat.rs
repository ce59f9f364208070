//! Row 14: boot with up to 1,000 projectors, and with up to 1,000 `[[on]]` tables for one event.
//! The cost of a statement should not depend on their number.

use std::fmt::Write as _;

use anyhow::Context;
use projectionist::{NewEvent, Registry, load};

use crate::Bench;
use crate::lanes::{Series, in_turn, lane, per_second};
use crate::projectors::{ReadModel, UpsertEach, declared, empty, folder};
use crate::sheet::{Line, Sheet, Target, Unit};
use crate::world::World;

/// Numbers of which the first is compared with the others.
const COUNTS: [usize; 4] = [1, 10, 100, 1_000];

/// A statement may become slower by this factor at most.
const TARGET: Target = Target::AtLeast(1.0 / 1.3);

/// The fields of an event that are sometimes whole.
const FIELDS: usize = 10;

pub async fn flat(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let largest = if bench.options.quick { 10 } else { 1_000 };
    let counts: Vec<usize> = COUNTS.into_iter().filter(|count| *count <= largest).collect();
    let events = if bench.options.quick { 60 } else { 600 };
    projectors(bench, sheet, &counts, events).await?;
    statements(bench, sheet, &counts, events).await?;
    fields(bench, sheet, events * 20).await
}

/// The log, and a projector that has raised the mark.
async fn world(bench: &Bench, events: u64) -> anyhow::Result<World> {
    let world = World::new(&bench.parts).await?;
    world.fill(&bench.sample, events).await?;
    Ok(world)
}

/// Projectors of one boot, in files and in Rust. Each writes every event.
async fn projectors(
    bench: &Bench,
    sheet: &mut Sheet,
    counts: &[usize],
    events: u64,
) -> anyhow::Result<()> {
    let world = &world(bench, events).await?;
    let most = counts.last().copied().unwrap_or(1);
    let models: Vec<ReadModel> =
        (0..most).map(|number| ReadModel::new(&format!("many_{number}"))).collect();
    for model in &models {
        model.make(world).await?;
    }
    for in_rust in [false, true] {
        let mut series = Vec::new();
        for count in counts {
            let models = &models[..*count];
            let registry = &if in_rust {
                let mut registry = Registry::new();
                for model in models {
                    registry.add(UpsertEach(model.clone()))?;
                }
                registry
            } else {
                declared(models, "*")?
            };
            let [rates] = in_turn(
                bench.options.rounds,
                [lane(format!("{count} projectors"), || async {
                    empty(world, models).await?;
                    Ok(per_second(events * *count as u64, world.boot(registry).await?))
                })],
            )
            .await?;
            series.push(rates);
        }
        let how = if in_rust { "in Rust" } else { "declared" };
        compare(sheet, &format!("boot, upserts a second of projectors {how}"), counts, &series);
    }
    Ok(())
}

/// `[[on]]` tables of one file that all match each event.
async fn statements(
    bench: &Bench,
    sheet: &mut Sheet,
    counts: &[usize],
    events: u64,
) -> anyhow::Result<()> {
    let world = &world(bench, events).await?;
    world.execute("create table many_statements (n bigint primary key)").await?;
    world.execute("insert into many_statements values (1)").await?;
    let mut series = Vec::new();
    for count in counts {
        let mut text = "name = 'many'\nversion = 1\nmode = 'from_beginning'\n".to_owned();
        for number in 0..*count {
            let sql = format!("update many_statements set n = 1 where n = {number} + :position");
            write!(text, "[[on]]\nevents = ['*']\nsql = '{sql}'\n")?;
        }
        let mut registry = Registry::new();
        load(folder(&[("many", text)])?.path(), &mut registry).context("loading the file")?;
        let registry = &registry;
        let [rates] = in_turn(
            bench.options.rounds,
            [lane(format!("{count} [[on]]"), || async {
                Ok(per_second(events * *count as u64, world.boot(registry).await?))
            })],
        )
        .await?;
        series.push(rates);
    }
    compare(sheet, "boot, statements a second of [[on]] for one event", counts, &series);
    Ok(())
}

/// Ten fields that are sometimes whole numbers, against ten that never are.
async fn fields(bench: &Bench, sheet: &mut Sheet, events: u64) -> anyhow::Result<()> {
    let names: Vec<String> = (0..FIELDS).map(|field| format!("f{field}")).collect();
    let columns: Vec<String> = names.iter().map(|name| format!("{name} double")).collect();
    let values: Vec<String> = names.iter().map(|name| format!(":payload.{name}")).collect();
    let mut rates = Vec::new();
    for (name, is_mixed) in [("sometimes whole", true), ("never whole", false)] {
        let world = &World::new(&bench.parts).await?;
        let mut dice = fastrand::Rng::with_seed(1);
        let appended: Vec<NewEvent> = (0..events)
            .map(|number| {
                let fields = names.iter().map(|name| {
                    let is_whole = is_mixed && dice.bool();
                    format!("\"{name}\":{}", if is_whole { "7" } else { "7.5" })
                });
                let payload = format!("{{{}}}", fields.collect::<Vec<_>>().join(","));
                NewEvent::new(format!("case-{}", number % 100), "Measured", payload)
            })
            .collect();
        for chunk in appended.chunks(1_000) {
            world.store.append(chunk).await?;
        }
        world
            .execute(&format!(
                "create table many_fields (position bigint primary key, {})",
                columns.join(", ")
            ))
            .await?;
        let text = format!(
            "name = 'fields'\nversion = 1\nmode = 'from_beginning'\n[[on]]\nevents = ['*']\n\
             sql = 'insert into many_fields values (:position, {})'\n",
            values.join(", ")
        );
        let mut registry = Registry::new();
        load(folder(&[("fields", text)])?.path(), &mut registry).context("loading the file")?;
        let registry = &registry;
        let [rate] = in_turn(
            bench.options.rounds,
            [lane(format!("fields that are {name}"), || async {
                world.execute("truncate table many_fields").await?;
                Ok(per_second(events, world.boot(registry).await?))
            })],
        )
        .await?;
        rates.push(rate);
    }
    let what = format!("boot, {FIELDS} fields that are sometimes whole ÷ never");
    let [ours, bound] = <[Series<f64>; 2]>::try_from(rates).ok().context("two lanes")?;
    sheet.add(Line::ratio(14, what, Unit::PerSecond, ours, vec![bound], Some(TARGET)));
    Ok(())
}

/// Adds a line for each number above the second. The second is the measure, because one alone
/// leaves cores idle or needs fewer round trips.
fn compare(sheet: &mut Sheet, what: &str, counts: &[usize], series: &[Series<f64>]) {
    let Some(bound) = series.get(1) else { return };
    for (count, rates) in counts.iter().zip(series) {
        let target = (*count > counts[1]).then_some(TARGET);
        sheet.add(Line::ratio(
            14,
            format!("{what}, {count} ÷ {}", counts[1]),
            Unit::PerSecond,
            rates.clone(),
            vec![bound.clone()],
            target,
        ));
    }
}
