//! Row 9: what a longer log costs. It runs real processes, because peak memory is a property of a
//! process.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio::process::Command;

use crate::lanes::{Series, median, per_second};
use crate::projectors::{ReadModel, empty, folder};
use crate::sheet::{Comparison, EquivalentLoop, Line, Sheet, Target, Unit, grouped};
use crate::world::World;
use crate::{Bench, WORKER, bare};

/// How often the peak memory is read. The peak only grows, so only the growth of the last interval
/// can be missed.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// At this length and above, the declared upsert is measured once only, because it takes minutes.
const LONG: u64 = 2_000_000;

/// The process that boots.
enum Worker<'a> {
    /// This program with a projector in Rust that does nothing. It runs the same `boot`.
    Nothing,
    /// The released binary with a projector file, and the read model that it writes.
    Declared(&'a Path, &'a ReadModel),
}

struct BootRun {
    took: Duration,
    peak_mib: f64,
}

/// The rounds at one length of the log.
struct Size {
    events: u64,
    rates: Vec<f64>,
    /// The rates of the bare loop over the same rows: the log's length slows it down, too.
    bare_rates: Vec<f64>,
    peaks: Vec<f64>,
}

/// Boots at each length of the log: a projector that does nothing, and a declared one with an
/// upsert for each event.
pub async fn growth(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    let world = World::new(&bench.parts).await?;
    let model = ReadModel::new("upserted");
    model.make(&world).await?;
    let files = folder(&[("upserted", model.declaration("*"))])?;
    let (mut nothing, mut upserts) = (Vec::new(), Vec::new());
    for &events in &bench.options.sizes {
        let began = Instant::now();
        world.fill(&bench.sample, events).await?;
        eprintln!(
            "  {} events after {:.1} s",
            grouped(events as f64),
            began.elapsed().as_secs_f32()
        );
        let first = world.boot_process(&Worker::Nothing).await?;
        sheet.add(Line {
            row: 9,
            what: format!(
                "first boot at {} events, the mark raised over all new ones",
                grouped(events as f64)
            ),
            unit: Unit::Seconds,
            ours: Series { name: "boot".into(), rounds: vec![first.took.as_secs_f64()] },
            bounds: vec![],
            compared_by: Comparison::Absolute,
            target: None,
            note: None,
        });
        let rounds = bench.options.rounds;
        nothing.push(world.measure(&Worker::Nothing, events, rounds).await?);
        let rounds = if events < LONG { rounds } else { 1 };
        upserts.push(world.measure(&Worker::Declared(files.path(), &model), events, rounds).await?);
    }
    add_lines(sheet, "do-nothing", &nothing, "read and commit", 0.8);
    // By hand, a statement has a thousand rows. The statements of a file are combined only if the
    // effect stays the same.
    add_lines(sheet, "declared upsert", &upserts, "multi-row upserts", 0.75);
    Ok(())
}

impl World {
    /// Measures boots after the mark was raised. The time of a boot with nothing to do is
    /// subtracted: it is the start of a process and its connections, and does not depend on the
    /// log.
    async fn measure(
        &self,
        worker: &Worker<'_>,
        events: u64,
        rounds: usize,
    ) -> anyhow::Result<Size> {
        let mut size =
            Size { events, rates: Vec::new(), bare_rates: Vec::new(), peaks: Vec::new() };
        for _ in 0..rounds {
            self.execute("delete from projectors").await?;
            if let Worker::Declared(_, model) = worker {
                empty(self, std::slice::from_ref(model)).await?;
            }
            let ran = self.boot_process(worker).await?;
            let idle = self.boot_process(worker).await?;
            size.rates.push(per_second(events, ran.took.saturating_sub(idle.took)));
            size.peaks.push(ran.peak_mib);
            let bare = match worker {
                Worker::Nothing => bare::read_and_commit(self, events, 1).await?,
                Worker::Declared(_, model) => {
                    empty(self, std::slice::from_ref(model)).await?;
                    bare::upsert_rows(self, events, model).await?
                }
            };
            size.bare_rates.push(per_second(events, bare));
        }
        Ok(size)
    }

    async fn boot_process(&self, worker: &Worker<'_>) -> anyhow::Result<BootRun> {
        let mut command = match worker {
            Worker::Nothing => {
                let mut command = Command::new(std::env::current_exe()?);
                command.env(WORKER, "1");
                command
            }
            Worker::Declared(folder, _) => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_projectionist"));
                command.env("PROJECTORS", folder);
                command
            }
        };
        command
            .arg("boot")
            .env("DATABASE_URL", &self.url)
            .env("PROJECTIONIST_LOG", "warn")
            .kill_on_drop(true);
        let began = Instant::now();
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let pid = process.id().context("the process has ended already")?;
        let mut peak_mib = 0.0;
        let ended = loop {
            tokio::select! {
                ended = process.wait() => break ended?,
                () = tokio::time::sleep(POLL_INTERVAL) => peak_mib = peak(pid).unwrap_or(peak_mib),
            }
        };
        ensure!(ended.success(), "boot ended with {ended}");
        Ok(BootRun { took: began.elapsed(), peak_mib })
    }
}

/// Returns the peak resident memory of a process in MiB; `None` if the process has ended.
fn peak(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(peak.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

/// Compares each size with the smallest, and with the bare loop over as many events. `near` is the
/// least ratio to that loop.
fn add_lines(sheet: &mut Sheet, what: &str, sizes: &[Size], bare: &str, near: f64) {
    let Some(smallest) = sizes.first() else { return };
    let name = |size: &Size| format!("at {} events", grouped(size.events as f64));
    for size in sizes {
        let is_longer = size.events > smallest.events;
        // The smallest size was measured at another time, so its rounds are not pairs. Its median
        // is used for each round.
        let first = |rates: &[f64]| Series {
            name: name(smallest),
            rounds: vec![median(rates); size.rates.len()],
        };
        let line = Line {
            row: 9,
            what: format!("boot process, {what}, rate {}", name(size)),
            unit: Unit::PerSecond,
            ours: Series { name: name(size), rounds: size.rates.clone() },
            bounds: Vec::from_iter(is_longer.then(|| first(&smallest.rates))),
            compared_by: Comparison::Ratio,
            target: is_longer.then_some(Target::Within(0.85, 1.15)),
            note: None,
        };
        if is_longer {
            let least = EquivalentLoop {
                what: format!("boot process, {what} {} ÷ bare {bare} of as many", name(size)),
                bare: Series {
                    name: format!("bare {bare} {}", name(size)),
                    rounds: size.bare_rates.clone(),
                },
                bare_bound: first(&smallest.bare_rates),
                target: Target::AtLeast(near),
            };
            sheet.add_with_equivalent(line, least);
        } else {
            sheet.add(line);
        }
        sheet.add(Line {
            row: 9,
            what: format!("boot process, {what}, peak memory {}", name(size)),
            unit: Unit::Mebibytes,
            ours: Series { name: name(size), rounds: size.peaks.clone() },
            bounds: vec![],
            compared_by: Comparison::Absolute,
            target: Some(Target::AtMost(64.0)),
            note: None,
        });
    }
}
