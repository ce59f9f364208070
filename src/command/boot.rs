//! `boot`: the deploy gate.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tracing::info;

use super::status::FailureReport;
use super::{say, shutdown_signal};
use crate::boot::{BootProgress, BootReport, Booted, NOT_AT_ITS_END, boot, tell_failed};
use crate::config::Config;
use crate::error::Error;
use crate::registry::Registry;
use crate::text::printable;

/// How often progress is told where there is no terminal.
const TELL_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "\
Run it as the last step before the new code goes live. It needs the database only. Exit code 1: a projector is broken, \
the others are stalled, and the release must not go on; mend it and run boot again, it goes on where it stopped.")]
pub(super) struct Boot {
    /// Print the outcome of each projector as one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

/// `boot --json`.
#[derive(Serialize)]
struct Outcome<'a> {
    /// Whether the release may go on.
    released: bool,
    projectors: Vec<ProjectorOutcome<'a>>,
}

#[derive(Serialize)]
struct ProjectorOutcome<'a> {
    name: &'a str,
    version: u32,
    mode: &'a str,
    status: &'a str,
    position: u64,
    /// Where it stood before this boot; null if it was new.
    from: Option<u64>,
    failure: Option<FailureReport>,
}

impl Boot {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let release = config.release.clone().or_else(|| registry.release().map(str::to_owned));
        // A deploy stands, too, where boot cannot begin, or is stopped.
        let failed = |error: &Error| tell_failed(error, release.as_deref());
        let registry = config.some_registry(registry).inspect_err(failed)?;
        let reporter = config.reporter();
        let mut display = Display::new();
        // The first process of a container has no default for a signal: it has to listen, or be killed.
        let shutdown = shutdown_signal().inspect_err(failed)?;
        let booting = async {
            let database = config.database().await.inspect_err(failed)?;
            boot(&database, &registry, config.boot_limits(), |progress| display.show(progress)).await
        };
        let report = tokio::select! {
            report = booting => report,
            () = shutdown => Err(Error::Interrupted).inspect_err(failed),
        };
        display.end();
        reporter.flush();
        let report = report?;

        match self.json {
            true => say(outcome_json(&report))?,
            false => report.projectors.iter().try_for_each(|booted| say(line(booted)))?,
        }
        if report.is_released() {
            return Ok(());
        }
        let broken: Vec<String> = report.broken().map(|booted| booted.entry.id.to_string()).collect();
        Err(Error::Projector(match broken.is_empty() {
            true => NOT_AT_ITS_END.into(),
            false => format!("broken: {}; mend it and run boot again, it goes on where it stopped", broken.join(", ")),
        }))
    }
}

fn outcome_json(report: &BootReport) -> String {
    let projectors = report.projectors.iter().map(|booted| ProjectorOutcome {
        name: &booted.entry.id.name,
        version: booted.entry.id.version,
        mode: booted.entry.mode.as_str(),
        status: booted.entry.status.as_str(),
        position: booted.entry.position.get(),
        from: booted.from.map(|position| position.get()),
        failure: booted.entry.status.failure().map(FailureReport::from),
    });
    let outcome = Outcome { released: report.is_released(), projectors: projectors.collect() };
    serde_json::to_string(&outcome).unwrap_or_else(|error| unreachable!("plain strings and numbers: {error}"))
}

fn line(booted: &Booted) -> String {
    let Booted { entry, from, attempted } = booted;
    let outcome = match (attempted, from) {
        (false, _) => "nothing to boot".to_owned(),
        (true, None) => "new".to_owned(),
        (true, Some(from)) => format!("resumed from {from}"),
    };
    let mut line =
        format!("{:<40} {:<9} position {:>10}  {outcome}", entry.id.to_string(), entry.status, entry.position);
    if let Some(failure) = entry.status.failure() {
        let event = failure.event.as_ref().map(|event| format!(" at {} ({})", event.position, event.event_type));
        let told = format!("failed{}: {}", event.unwrap_or_default(), failure.error);
        line.push_str(&format!("\n  {}", printable(&told)));
    }
    line
}

/// A bar on a terminal, a log line now and then elsewhere.
struct Display {
    bar: Option<ProgressBar>,
    round: Option<Round>,
}

/// A round ends where the next begins: its target is fixed when it starts.
struct Round {
    target: u64,
    start: u64,
    began: Instant,
    told: Instant,
}

impl Display {
    fn new() -> Self {
        let style = "{bar:40} {pos}/{len} events  {per_sec}  {eta} left  {msg}";
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            ProgressStyle::with_template(style).map(|style| bar.set_style(style)).ok();
            bar
        });
        Display { bar, round: None }
    }

    fn show(&mut self, progress: &BootProgress) {
        let (target, lowest) = (progress.target.get(), progress.lowest().get());
        let now = Instant::now();
        let is_new = self.round.as_ref().is_none_or(|round| round.target != target);
        if is_new {
            self.round = Some(Round { target, start: lowest, began: now, told: now });
        }
        if let Some(bar) = &self.bar {
            if is_new {
                bar.set_length(target);
                bar.set_position(lowest);
                bar.reset_eta();
            }
            bar.set_position(lowest);
            bar.set_message(format!("{} projectors", progress.positions.len()));
            return;
        }
        let Some(round) = self.round.as_mut().filter(|round| now - round.told >= TELL_EVERY) else { return };
        round.told = now;
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
