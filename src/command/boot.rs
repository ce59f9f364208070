//! The `boot` command: the deploy gate.

use std::time::{Duration, Instant};

use clap::Args;
use indicatif::HumanCount;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::signal::unix::SignalKind;
use tracing::info;

use super::status::FailureReport;
use super::{next_signal, print, print_json, selection};
use crate::command::config::Config;
use crate::command::output::{ProjectorRow, ProjectorTable, terminal_width};
use crate::engine::boot::{
    BootProgress, BootReport, BootSettings, BootWait, ProjectorOutcome, boot, log_boot_failure,
};
use crate::engine::error::Error;
use crate::model::projector::ProjectorId;
use crate::model::registry::Registry;
use crate::model::text::{self, escape_control};
use crate::telemetry::progress::Bar;

/// How often progress is logged if standard error is not a terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "\
Run boot as the last step before the new code goes live. It needs only the database. Exit code 0: \
every projector of the set, or every one that is named, is live or finished. Each one that was \
booted has applied all events that were visible in the log when boot began; play feeds those that \
were live before. Exit code 1: the release must not continue; \
the output says which projector failed, why, and what to do. A projector that was broken before \
and is fixed goes live even if others fail. Run boot again: it continues where it stopped.\n\n\
Examples:\n\
\x20 projectionist boot\n\
\x20 projectionist boot case_status@2 --json\n\
\x20 projectionist boot --accept case_status --wait-timeout 300")]
pub(super) struct BootCommand {
    /// Boot only these projectors; the exit code depends on them alone
    #[arg(value_name = "NAME[@VERSION]")]
    names: Vec<String>,

    /// Accept for this projector what boot otherwise refuses: rows in the tables of a new
    /// projector, more event types than it was booted with, or a table that was missing and has
    /// been restored. May be repeated
    #[arg(
        long,
        value_name = "NAME[@VERSION]",
        env = "PROJECTIONIST_ACCEPT",
        value_delimiter = ','
    )]
    accept: Vec<String>,

    /// How long to wait for a database that cannot be reached, and for a transaction that holds the
    /// high-water mark below the end of the log, in seconds
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_WAIT_TIMEOUT", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    wait_timeout: u64,

    /// Print the outcome of all projectors as one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

/// The output of `boot --json`.
#[derive(Serialize)]
struct BootJson<'a> {
    /// Whether the release may continue.
    released: bool,
    /// Why the release must not continue, if the reason is not one projector; else null.
    reason: Option<&'a str>,
    /// The last position that was visible when boot began.
    target: u64,
    projectors: Vec<ProjectorJson<'a>>,
}

#[derive(Serialize)]
struct ProjectorJson<'a> {
    name: &'a str,
    version: u32,
    mode: &'a str,
    status: &'a str,
    position: u64,
    /// The position before this boot; null if the projector was new.
    from_position: Option<u64>,
    /// Whether the definition differed from the one that was last booted.
    changed: bool,
    /// Why this projector stops the release; null if it does not.
    reason: Option<&'a str>,
    failure: Option<FailureReport>,
}

impl BootCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let release = config.release.clone().or_else(|| registry.release().map(str::to_owned));
        // A boot that cannot begin, or is terminated, stops the deploy, too. It is logged as
        // failed.
        let failed = |error: &Error| log_boot_failure(error, release.as_deref());
        let registry = config.nonempty_registry(registry).inspect_err(failed)?;
        let reporter = config.reporter();
        let mut display = ProgressDisplay::new();
        // The first process of a container has no default action for a signal. Without a listener
        // it would ignore SIGTERM, and be killed later.
        let signal = next_signal().inspect_err(failed)?;
        let booting = async {
            let settings = self.settings(config, &registry).inspect_err(failed)?;
            let database = config.database_for(&registry).await.inspect_err(failed)?;
            boot(&database, &registry, settings, |progress| display.show(progress)).await
        };
        let report = tokio::select! {
            report = booting => report,
            // With Ctrl-C, a person has ended the boot on purpose, so an alert would be useless.
            signal = signal => match Err(Error::Interrupted) {
                by_hand if signal == SignalKind::interrupt() => by_hand,
                stopped => stopped.inspect_err(failed),
            },
        };
        drop(display);
        reporter.flush();
        let report = report?;

        if self.json {
            print_json(&boot_json(&report))?;
        } else {
            let rows = report.projectors.iter().map(projector_row).collect();
            let table = ProjectorTable { figures: vec!["POSITION"], rows, is_brief: false };
            print(format!("{}\n\n{}", table.summary(), table.format(terminal_width())))?;
        }
        if report.is_released() { Ok(()) } else { Err(Error::Projector(report.explain())) }
    }

    fn settings(&self, config: &Config, registry: &Registry) -> Result<BootSettings, Error> {
        let mut settings =
            BootSettings::from(config.boot_limits(Duration::from_secs(self.wait_timeout)));
        settings.only = find_projectors(&self.names, registry)?;
        settings.accept = find_projectors(&self.accept, registry)?;
        Ok(settings)
    }
}

/// Returns the projectors of the set with these names. A name without a version stands for every
/// version of the projector.
fn find_projectors(names: &[String], registry: &Registry) -> Result<Vec<ProjectorId>, Error> {
    let mut found = Vec::new();
    for name in names {
        let known = registry.iter().map(|projector| &projector.id);
        found.extend(selection::find(name, known, "this set")?.into_iter().cloned());
    }
    Ok(found)
}

fn boot_json(report: &BootReport) -> BootJson<'_> {
    let projectors = report.projectors.iter().map(|booted| ProjectorJson {
        name: &booted.id.name,
        version: booted.id.version,
        mode: booted.mode.as_str(),
        status: booted.status(),
        position: booted.position().get(),
        from_position: booted.position_before.map(|position| position.get()),
        changed: booted.has_changed,
        reason: booted.reason.as_deref(),
        failure: booted
            .entry
            .as_ref()
            .and_then(|entry| entry.status.failure())
            .map(FailureReport::from),
    });
    BootJson {
        released: report.is_released(),
        reason: report.reason.as_deref(),
        target: report.target.get(),
        projectors: projectors.collect(),
    }
}

fn projector_row(booted: &ProjectorOutcome) -> ProjectorRow {
    let outcome = match (&booted.entry, booted.was_attempted, booted.position_before) {
        (None, ..) => "not registered".to_owned(),
        (_, false, _) => "nothing to boot".to_owned(),
        (_, true, None) => "new".to_owned(),
        (_, true, Some(from)) => format!("resumed from {from}"),
    };
    let mut notes = vec![outcome];
    if booted.has_changed {
        notes.push("changed since it was booted".to_owned());
    }
    let failure = booted.entry.as_ref().and_then(|entry| entry.status.failure());
    let details = match (failure, &booted.reason) {
        (Some(failure), _) => FailureReport::from(failure).describe(OffsetDateTime::now_utc()),
        (None, reason) => reason.iter().cloned().collect(),
    };
    ProjectorRow {
        status: booted.status(),
        figures: vec![booted.position().to_string()],
        projector: booted.id.to_string(),
        notes,
        details,
    }
}

/// Shows the progress of boot: as a bar on a terminal, otherwise as a log line at intervals.
struct ProgressDisplay {
    bar: Option<Bar>,
    round: Option<Round>,
}

impl ProgressDisplay {
    fn new() -> Self {
        ProgressDisplay { bar: Bar::show(), round: None }
    }

    fn show(&mut self, progress: &BootProgress) {
        let (target, lowest) = (progress.target.get(), progress.lowest_position().get());
        let now = Instant::now();
        if self.round.as_ref().is_none_or(|round| round.target != target) {
            self.round = Some(Round { target, start: lowest, began: now, last_logged: now });
        }
        let Some(round) = &mut self.round else { return };
        let projectors = progress.positions.len() as u64;
        // Most waits are over within a second, and are not news.
        let wait = progress.wait.as_ref().filter(|wait| wait.elapsed.as_secs() > 0);
        match (&self.bar, wait) {
            (Some(bar), Some(BootWait { reason, elapsed })) => {
                let seconds = elapsed.as_secs();
                bar.set_text(format!("waiting for {seconds} s: {}", escape_control(reason)));
            }
            (Some(bar), None) => {
                bar.set(lowest, target, round.describe(lowest, projectors, now));
            }
            // Boot itself logs why it waits.
            (None, Some(_)) => {}
            (None, None) => round.log_at_intervals(lowest, projectors, now),
        }
    }
}

/// A round of catching up to one target. A new target begins a new round.
struct Round {
    target: u64,
    /// The lowest position when the round began. An earlier boot may have applied the events
    /// before it, so they do not count for the speed.
    start: u64,
    began: Instant,
    last_logged: Instant,
}

impl Round {
    /// The events per second of this round, and the seconds that it still takes. `None`: no event
    /// has been applied yet.
    fn speed(&self, lowest: u64, now: Instant) -> Option<(f64, f64)> {
        let seconds = (now - self.began).as_secs_f64();
        let rate = lowest.saturating_sub(self.start) as f64 / seconds;
        let is_known = rate > 0.0 && rate.is_finite();
        is_known.then(|| (rate, self.target.saturating_sub(lowest) as f64 / rate))
    }

    fn describe(&self, lowest: u64, projectors: u64, now: Instant) -> String {
        let speed = self.speed(lowest, now).map_or_else(String::new, |(rate, left)| {
            format!("  {}/s  {} left", HumanCount(rate.round() as u64), text::duration(left))
        });
        let of = text::count(self.target, "event");
        let projectors = text::count(projectors, "projector");
        format!("{}/{of}{speed}  {projectors}", HumanCount(lowest))
    }

    fn log_at_intervals(&mut self, lowest: u64, projectors: u64, now: Instant) {
        if now - self.last_logged < PROGRESS_INTERVAL {
            return;
        }
        self.last_logged = now;
        let (rate, left) = self.speed(lowest, now).unzip();
        info!(
            position = lowest,
            through = self.target,
            events_per_second = rate.unwrap_or_default().round(),
            seconds_left = left.map(f64::round),
            projectors,
            "booting"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_of_a_resumed_boot_counts_only_the_events_of_this_run() {
        let began = Instant::now();
        let round = Round { target: 20_000, start: 15_000, began, last_logged: began };
        let after = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(round.describe(15_000, 1, began), "15,000/20,000 events  1 projector");
        assert_eq!(
            round.describe(17_000, 3, after(2)),
            "17,000/20,000 events  1,000/s  3 seconds left  3 projectors"
        );
    }
}
