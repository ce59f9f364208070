//! `status`: every projector, the high-water mark and the published position.

use clap::Args;
use clap::builder::FalseyValueParser;
use comfy_table::{Table, TableStyle};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::say;
use crate::config::Config;
use crate::error::Error;
use crate::event::Position;
use crate::ledger::{Entry, Ledger};
use crate::lifecycle::{Failure, Status};
use crate::projector::Mode;
use crate::registry::Registry;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
Lag in events counts positions up to the high-water mark, whether or not the projector wants them; lag in seconds is the \
age of the oldest of them. Waits for no lock: it may be run beside boot and play at any time.")]
pub(super) struct StatusCommand {
    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// `status --json`.
#[derive(Serialize)]
struct StatusReport {
    high_water: u64,
    published: u64,
    projectors: Vec<ProjectorReport>,
    /// The last position that is visible, below the mark or above; shown in the table.
    #[serde(skip)]
    visible: u64,
}

#[derive(Serialize)]
struct ProjectorReport {
    name: String,
    version: u32,
    mode: &'static str,
    status: &'static str,
    position: u64,
    lag_events: u64,
    lag_seconds: f64,
    failure: Option<FailureReport>,
    /// Whether the given set has it; shown in the table.
    #[serde(skip)]
    is_known: bool,
}

/// What a projector failed on; position and type are null where setup failed, before any event.
#[derive(Serialize)]
pub(super) struct FailureReport {
    position: Option<u64>,
    event_type: Option<String>,
    error: String,
    at: String,
}

impl From<&Failure> for FailureReport {
    fn from(failure: &Failure) -> Self {
        FailureReport {
            position: failure.event.as_ref().map(|event| event.position.get()),
            event_type: failure.event.as_ref().map(|event| event.event_type.clone()),
            error: failure.error.clone(),
            at: failure.at.format(&Rfc3339).unwrap_or_else(|_| failure.at.to_string()),
        }
    }
}

impl StatusCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let registry = config.registry(registry)?;
        let database = config.database().await?;
        let report = report(&Ledger::new(&database), &EventStore::new(&database), &registry).await?;
        match self.json {
            true => say(serde_json::to_string(&report)
                .unwrap_or_else(|error| unreachable!("plain strings and numbers: {error}"))),
            false => say(table(&report, !registry.is_empty())),
        }
    }
}

async fn report(ledger: &Ledger, store: &EventStore, registry: &Registry) -> Result<StatusReport, Error> {
    let entries = ledger.entries().await?;
    let published = store.marks().await?.published;
    // Proved anew, and not as last stored: with no relay running, the stored mark would hide the lag.
    let high_water = store.provable_high_water().await?;
    let visible = store.last_visible().await?.max(high_water).get();
    let now = OffsetDateTime::now_utc();
    let mut projectors = Vec::new();
    for entry in &entries {
        let lag_events = match entry.status {
            Status::Finished | Status::Retired => 0,
            _ => high_water.since(entry.position),
        };
        let lag_seconds = lag_seconds(store, entry.position, lag_events, now).await?;
        projectors.push(ProjectorReport::of(entry, lag_events, lag_seconds, registry.get(&entry.id).is_some()));
    }
    for projector in registry.iter().filter(|projector| entries.iter().all(|entry| entry.id != projector.id)) {
        let lag_events = if projector.mode == Mode::FromNow { 0 } else { high_water.get() };
        projectors.push(ProjectorReport {
            name: projector.id.name.clone(),
            version: projector.id.version,
            mode: projector.mode.as_str(),
            status: "new",
            position: 0,
            lag_events,
            lag_seconds: lag_seconds(store, Position::START, lag_events, now).await?,
            failure: None,
            is_known: true,
        });
    }
    Ok(StatusReport { high_water: high_water.get(), published: published.get(), projectors, visible })
}

/// The age of the oldest event above a position, to the millisecond.
async fn lag_seconds(
    store: &EventStore,
    position: Position,
    lag_events: u64,
    now: OffsetDateTime,
) -> Result<f64, sqlx::Error> {
    let oldest = match lag_events {
        0 => None,
        _ => store.recorded_at(position.next()).await?,
    };
    let lag = oldest.map_or(0.0, |oldest| (now - oldest).as_seconds_f64().max(0.0));
    Ok((lag * 1000.0).round() / 1000.0)
}

impl ProjectorReport {
    fn of(entry: &Entry, lag_events: u64, lag_seconds: f64, is_known: bool) -> Self {
        ProjectorReport {
            name: entry.id.name.clone(),
            version: entry.id.version,
            mode: entry.mode.as_str(),
            status: entry.status.as_str(),
            position: entry.position.get(),
            lag_events,
            lag_seconds,
            failure: entry.status.failure().map(FailureReport::from),
            is_known,
        }
    }
}

fn table(report: &StatusReport, has_set: bool) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new());
    table.set_header(["PROJECTOR", "VERSION", "MODE", "STATUS", "POSITION", "LAG", "LAG SECONDS", "FAILURE"]);
    for projector in &report.projectors {
        let note = match &projector.failure {
            Some(failure) => failure.summary(),
            None if has_set && !projector.is_known => "(not in this set)".into(),
            None => String::new(),
        };
        table.add_row([
            projector.name.clone(),
            projector.version.to_string(),
            projector.mode.into(),
            projector.status.into(),
            projector.position.to_string(),
            projector.lag_events.to_string(),
            format!("{:.1}", projector.lag_seconds),
            note,
        ]);
    }
    let mut marks = format!("high-water mark {}   published {}", report.high_water, report.published);
    if report.visible > report.high_water {
        // A lag of zero says nothing about what stands above the mark.
        marks.push_str(&format!(
            "\nthe mark is held: the log goes on to {}, but at {} a transaction is open, or a position is missing",
            report.visible,
            report.high_water + 1
        ));
    }
    match report.projectors.is_empty() {
        true => format!("{marks}\nno projector was booted yet"),
        false => format!("{marks}\n\n{}", table.trim_fmt()),
    }
}

impl FailureReport {
    fn summary(&self) -> String {
        match (self.position, &self.event_type) {
            (Some(position), Some(event_type)) => format!("at {position}, {event_type}: {} ({})", self.error, self.at),
            _ => format!("{} ({})", self.error, self.at),
        }
    }
}
