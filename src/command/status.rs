//! `status`: every projector, the high-water mark and the published position.

use std::sync::Arc;

use clap::Args;
use clap::builder::FalseyValueParser;
use comfy_table::{Table, TableStyle};
use serde::Serialize;
use time::format_description::well_known::Rfc3339;

use super::print;
use crate::command::config::Config;
use crate::engine::lag::{Lag, LagReport};
use crate::ledger::{Entry, Ledger};
use crate::model::error::Error;
use crate::model::event::Position;
use crate::model::lifecycle::Failure;
use crate::model::projector::Mode;
use crate::model::registry::{RegisteredProjector, Registry};
use crate::model::text::escape_control;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
Lag in events counts positions up to the end of the log, whether or not the projector wants them; lag in seconds is the \
age of the oldest event there. What has held the high-water mark below the end of the log for some seconds is named. Waits for no lock: it may be run beside boot and play at any time.")]
pub(super) struct StatusCommand {
    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// `status --json`.
#[derive(Serialize)]
struct StatusReport {
    high_water: u64,
    /// The last position that is visible, above the mark or, where the log was truncated or
    /// restored, below it.
    visible: u64,
    /// What has held the mark below the end of the log for some seconds; null if nothing has.
    #[serde(rename = "held")]
    blocked: Option<BlockedReport>,
    published: u64,
    /// What is wrong with the log, as far as a look at its end tells; `audit` tells more.
    log_fault: Option<String>,
    /// How often a message was received that is not of this log, and when last.
    foreign_messages: u64,
    foreign_at: Option<String>,
    projectors: Vec<ProjectorReport>,
}

#[derive(Serialize)]
struct BlockedReport {
    position: u64,
    /// The last missing position of a gap that is too wide to be filled unasked; else null.
    last: Option<u64>,
    since: String,
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
    /// The digest of the definition with which it was last booted; null if it is new, or was booted
    /// before there were any.
    digest: Option<String>,
    /// Whether the given set has another definition; null where no set is given, or not with this
    /// projector.
    changed: Option<bool>,
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
        let report =
            report(&Ledger::new(&database), &EventStore::new(&database), &registry).await?;
        match self.json {
            true => print(
                serde_json::to_string(&report)
                    .unwrap_or_else(|error| unreachable!("plain strings and numbers: {error}")),
            ),
            false => print(format_table(&report, !registry.is_empty())),
        }
    }
}

async fn report(
    ledger: &Ledger,
    store: &EventStore,
    registry: &Registry,
) -> Result<StatusReport, Error> {
    let lag_report = LagReport::read(ledger, store).await?;
    let mut projectors: Vec<ProjectorReport> = lag_report
        .projectors
        .iter()
        .map(|(entry, lag)| {
            ProjectorReport::new(entry, *lag, registry.get(&entry.id).map(Arc::as_ref))
        })
        .collect();
    let is_new = |projector: &&Arc<RegisteredProjector>| {
        lag_report.projectors.iter().all(|(entry, _)| entry.id != projector.id)
    };
    for projector in registry.iter().filter(is_new) {
        let lag = match projector.mode {
            Mode::FromNow => Lag::default(),
            Mode::FromBeginning | Mode::Once => lag_report.lag(store, Position::START).await?,
        };
        projectors.push(ProjectorReport {
            name: projector.id.name.clone(),
            version: projector.id.version,
            mode: projector.mode.as_str(),
            status: "new",
            position: 0,
            lag_events: lag.events,
            lag_seconds: lag.seconds,
            digest: None,
            changed: Some(false),
            failure: None,
            is_known: true,
        });
    }
    let log_fault = store.log_fault().await?.map(|fault| fault.to_string());
    let queue = store.queue_record().await?;
    let foreign_at =
        queue.foreign_at.map(|at| at.format(&Rfc3339).unwrap_or_else(|_| at.to_string()));
    Ok(StatusReport {
        high_water: lag_report.high_water.get(),
        visible: lag_report.visible.get(),
        blocked: lag_report.blocked.map(|held| BlockedReport {
            position: held.position.get(),
            last: held.last.map(Position::get),
            since: held.since.format(&Rfc3339).unwrap_or_else(|_| held.since.to_string()),
        }),
        published: lag_report.published.get(),
        log_fault,
        foreign_messages: queue.foreign_messages,
        foreign_at,
        projectors,
    })
}

impl ProjectorReport {
    fn new(entry: &Entry, lag: Lag, known: Option<&RegisteredProjector>) -> Self {
        ProjectorReport {
            name: entry.id.name.clone(),
            version: entry.id.version,
            mode: entry.mode.as_str(),
            status: entry.status.as_str(),
            position: entry.position.get(),
            lag_events: lag.events,
            lag_seconds: lag.seconds,
            digest: entry.digest.clone(),
            changed: known.map(|projector| !entry.matches_digest(&projector.digest)),
            failure: entry.status.failure().map(FailureReport::from),
            is_known: known.is_some(),
        }
    }
}

fn format_table(report: &StatusReport, has_set: bool) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new());
    table.set_header([
        "PROJECTOR",
        "VERSION",
        "MODE",
        "STATUS",
        "POSITION",
        "LAG",
        "LAG SECONDS",
        "FAILURE",
    ]);
    for projector in &report.projectors {
        let note = match &projector.failure {
            Some(failure) => failure.summary(),
            None if has_set && !projector.is_known => "(not in this set)".into(),
            None if projector.changed == Some(true) => "(changed since it was booted)".into(),
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
            escape_control(&note).into_owned(),
        ]);
    }
    let mut marks = format!(
        "high-water mark {}   end of the log {}   published {}",
        report.high_water, report.visible, report.published
    );
    if let Some(fault) = &report.log_fault {
        marks.push_str(&format!("\nlog fault: {fault}"));
    }
    match &report.blocked {
        Some(BlockedReport { position, last: None, since }) => marks.push_str(&format!(
            "\nthe mark is held since {since}: at {position} a transaction is open, and nothing after it is played"
        )),
        Some(BlockedReport { position, last: Some(last), since }) => marks.push_str(&format!(
            "\nthe mark is held since {since}: {position} to {last} are missing; if nobody still writes there: \
             projectionist fill {position} {last}"
        )),
        None => {}
    }
    if let Some(at) = &report.foreign_at {
        marks.push_str(&format!(
            "\nmessages that are not of this log were received {} times, last at {at}: they stay in the queue; see doctor",
            report.foreign_messages
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
            (Some(position), Some(event_type)) => {
                format!("at {position}, {event_type}: {} ({})", self.error, self.at)
            }
            _ => format!("{} ({})", self.error, self.at),
        }
    }
}
