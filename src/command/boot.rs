//! The `boot` command: the deploy gate.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tracing::info;

use super::status::FailureReport;
use super::{parse_projector, print, print_json, shutdown_signal};
use crate::command::config::Config;
use crate::engine::boot::{
    BootProgress, BootReport, BootSettings, ProjectorOutcome, boot, log_boot_failure,
};
use crate::engine::error::Error;
use crate::model::projector::ProjectorId;
use crate::model::registry::Registry;
use crate::model::text::escape_control;

/// How often progress is logged if standard error is not a terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "\
Run boot as the last step before the new code goes live. It needs only the database. Exit code 0: \
every projector of the set, or every one that is named, is live or finished. Each one that was \
booted has applied all events that were visible in the log when boot began; play feeds those that \
were live before. Exit code 1: the release must not continue; \
the output says which projector failed, why, and what to do. A projector that was broken before \
and is fixed goes live even if others fail. Run boot again: it continues where it stopped.")]
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
        // A boot that cannot begin, or is interrupted, stops the deploy, too: it is logged as
        // failed.
        let failed = |error: &Error| log_boot_failure(error, release.as_deref());
        let registry = config.nonempty_registry(registry).inspect_err(failed)?;
        let reporter = config.reporter();
        let mut display = ProgressDisplay::new();
        // The first process of a container has no default action for a signal. Without a listener
        // it would ignore SIGTERM, and be killed later.
        let shutdown = shutdown_signal().inspect_err(failed)?;
        let booting = async {
            let settings = self.settings(config, &registry).inspect_err(failed)?;
            let database = config.database_for(&registry).await.inspect_err(failed)?;
            boot(&database, &registry, settings, |progress| display.show(progress)).await
        };
        let report = tokio::select! {
            report = booting => report,
            () = shutdown => Err(Error::Interrupted).inspect_err(failed),
        };
        display.end();
        reporter.flush();
        let report = report?;

        if self.json {
            print_json(&boot_json(&report))?;
        } else {
            report.projectors.iter().try_for_each(|booted| print(format_line(booted)))?;
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
    for text in names {
        let (name, version) = parse_projector(text)?;
        let matches = |id: &&ProjectorId| {
            id.name == name && version.is_none_or(|version| version == id.version)
        };
        let before = found.len();
        found.extend(registry.iter().map(|projector| &projector.id).filter(matches).cloned());
        if found.len() == before {
            let known: Vec<String> =
                registry.iter().map(|projector| projector.id.to_string()).collect();
            return Err(Error::Input(format!(
                "this set has no projector {text:?}; it has: {}",
                known.join(", ")
            )));
        }
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

fn format_line(booted: &ProjectorOutcome) -> String {
    let mut outcome = match (&booted.entry, booted.was_attempted, booted.position_before) {
        (None, ..) => "not registered".to_owned(),
        (_, false, _) => "nothing to boot".to_owned(),
        (_, true, None) => "new".to_owned(),
        (_, true, Some(from)) => format!("resumed from {from}"),
    };
    if booted.has_changed {
        outcome.push_str("; changed since it was booted");
    }
    let (id, status, position) = (booted.id.to_string(), booted.status(), booted.position());
    let mut line = format!("{id:<40} {status:<9} position {position:>10}  {outcome}");
    let failure = booted.entry.as_ref().and_then(|entry| entry.status.failure());
    match (failure, &booted.reason) {
        (Some(failure), _) => {
            let event = failure
                .event
                .as_ref()
                .map(|event| format!(" at {} ({})", event.position, event.event_type));
            let failed = format!("failed{}: {}", event.unwrap_or_default(), failure.error);
            line.push_str(&format!("\n  {}", escape_control(&failed)));
        }
        (None, Some(reason)) => line.push_str(&format!("\n  {}", escape_control(reason))),
        (None, None) => {}
    }
    line
}

/// Shows the progress of boot: as a bar on a terminal, otherwise as a log line at intervals.
struct ProgressDisplay {
    bar: Option<ProgressBar>,
    round: Option<Round>,
}

impl ProgressDisplay {
    fn new() -> Self {
        let style = "{bar:40} {pos}/{len} events  {per_sec}  {eta} left  {msg}";
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            ProgressStyle::with_template(style).map(|style| bar.set_style(style)).ok();
            bar
        });
        ProgressDisplay { bar, round: None }
    }

    fn show(&mut self, progress: &BootProgress) {
        let (target, lowest) = (progress.target.get(), progress.lowest_position().get());
        let now = Instant::now();
        let is_new = self.round.as_ref().is_none_or(|round| round.target != target);
        if is_new {
            self.round = Some(Round { target, start: lowest, began: now, last_logged: now });
        }
        if let Some(bar) = &self.bar {
            if is_new {
                bar.set_length(target);
                bar.set_position(lowest);
                bar.reset_eta();
            }
            bar.set_position(lowest);
            bar.set_message(match &progress.wait {
                None => format!("{} projectors", progress.positions.len()),
                Some(waiting) => {
                    format!("waiting for {} s: {}", waiting.elapsed.as_secs(), waiting.reason)
                }
            });
            return;
        }
        if progress.wait.is_some() {
            // Boot itself logs why it waits.
            return;
        }
        let Some(round) =
            self.round.as_mut().filter(|round| now - round.last_logged >= PROGRESS_INTERVAL)
        else {
            return;
        };
        round.last_logged = now;
        let seconds = (now - round.began).as_secs_f64();
        let rate = (lowest - round.start.min(lowest)) as f64 / seconds;
        let left = (rate > 0.0).then(|| ((target - lowest.min(target)) as f64 / rate).round());
        info!(
            position = lowest,
            through = target,
            events_per_second = rate.round(),
            seconds_left = left,
            projectors = progress.positions.len(),
            "booting"
        );
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A round of catching up to one target. A new target begins a new round.
struct Round {
    target: u64,
    start: u64,
    began: Instant,
    last_logged: Instant,
}
