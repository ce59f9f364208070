//! The `status` command: shows every projector, the high-water mark and the published position.

use std::sync::Arc;

use clap::Args;
use clap::builder::FalseyValueParser;
use comfy_table::{Table, TableStyle};
use serde::Serialize;
use time::format_description::well_known::Rfc3339;

use super::{print, print_json};
use crate::command::config::Config;
use crate::engine::error::Error;
use crate::engine::lag::{Lag, LagReport};
use crate::ledger::{Entry, Ledger};
use crate::model::event::Position;
use crate::model::lifecycle::Failure;
use crate::model::projector::Mode;
use crate::model::registry::{RegisteredProjector, Registry};
use crate::model::text::escape_control;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
Lag in events counts the positions from the projector's own to the end of the log, including \
events that it does not subscribe to. Lag in seconds is the age of the oldest of these events. A \
transaction or gap that has blocked the high-water mark for some seconds is named. Waits for no \
lock, so it can run beside boot and play at any time.")]
pub(super) struct StatusCommand {
    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

impl StatusCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let registry = config.registry(registry)?;
        let database = config.database().await?;
        let report =
            report(&Ledger::new(&database), &EventStore::new(&database), &registry).await?;
        if self.json {
            print_json(&report)
        } else {
            print(format_table(&report, !registry.is_empty()))
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
            delivery: delivery(Some(projector)),
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
        blocked: lag_report.blocked.map(|blocked| BlockedReport {
            position: blocked.position.get(),
            last: blocked.last.map(Position::get),
            since: blocked.since.format(&Rfc3339).unwrap_or_else(|_| blocked.since.to_string()),
        }),
        published: lag_report.published.get(),
        log_fault,
        foreign_messages: queue.foreign_messages,
        foreign_at,
        projectors,
    })
}

/// The output of `status --json`.
#[derive(Serialize)]
struct StatusReport {
    high_water: u64,
    /// The last visible position. It is below the high-water mark if the log was truncated or
    /// restored.
    visible: u64,
    /// The transaction or gap that has blocked the mark for some seconds; null if the mark is not
    /// blocked.
    #[serde(rename = "held")]
    blocked: Option<BlockedReport>,
    published: u64,
    /// A fault that is visible at the end of the log; `audit` checks the whole log.
    log_fault: Option<String>,
    /// How often a message that is not of this log was received.
    foreign_messages: u64,
    /// When such a message was last received.
    foreign_at: Option<String>,
    projectors: Vec<ProjectorReport>,
}

#[derive(Serialize)]
struct BlockedReport {
    position: u64,
    /// The last missing position of a gap that is too wide to be filled automatically; else null.
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
    /// The digest of the definition that was last booted; null if the projector is new, or was
    /// booted by a release without digests.
    digest: Option<String>,
    /// Whether the definition in the given set differs; null if no set is given, or if the set does
    /// not have the projector.
    changed: Option<bool>,
    /// The delivery of a projector with a command; null for the others, and if the set does not
    /// have the projector.
    delivery: Option<&'static str>,
    failure: Option<FailureReport>,
    /// Whether the given set has the projector. Only the table shows this.
    #[serde(skip)]
    is_known: bool,
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
            delivery: delivery(known),
            failure: entry.status.failure().map(FailureReport::from),
            is_known: known.is_some(),
        }
    }
}

fn delivery(projector: Option<&RegisteredProjector>) -> Option<&'static str> {
    Some(projector?.external.as_ref()?.delivery().as_str())
}

/// The failure of a projector. Position and type are null if its setup failed, before any event.
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

fn format_table(report: &StatusReport, has_set: bool) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new());
    let has_delivery = report.projectors.iter().any(|projector| projector.delivery.is_some());
    let delivery = has_delivery.then_some("DELIVERY");
    table.set_header(
        ["PROJECTOR", "VERSION", "MODE", "STATUS", "POSITION", "LAG", "LAG SECONDS"]
            .into_iter()
            .chain(delivery)
            .chain(["FAILURE"]),
    );
    for projector in &report.projectors {
        let note = match &projector.failure {
            Some(failure) => failure.summary(),
            None if has_set && !projector.is_known => "(not in this set)".into(),
            None if projector.changed == Some(true) => "(changed since it was booted)".into(),
            None => String::new(),
        };
        let delivery = has_delivery.then(|| projector.delivery.unwrap_or_default().to_owned());
        let cells = [
            projector.name.clone(),
            projector.version.to_string(),
            projector.mode.into(),
            projector.status.into(),
            projector.position.to_string(),
            projector.lag_events.to_string(),
            format!("{:.1}", projector.lag_seconds),
        ];
        let note = escape_control(&note).into_owned();
        table.add_row(cells.into_iter().chain(delivery).chain([note]));
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
            "\nthe mark has been blocked since {since}: a transaction is open at {position}, and \
            no event after it is played"
        )),
        Some(BlockedReport { position, last: Some(last), since }) => marks.push_str(&format!(
            "\nthe mark has been blocked since {since}: {position} to {last} are missing; if no \
            writer still uses them: projectionist fill {position} {last}"
        )),
        None => {}
    }
    if let Some(at) = &report.foreign_at {
        marks.push_str(&format!(
            "\nmessages that are not of this log were received {} times, last at {at}: they stay \
            in the queue; see doctor",
            report.foreign_messages
        ));
    }
    if report.projectors.is_empty() {
        format!("{marks}\nno projector has been booted yet")
    } else {
        format!("{marks}\n\n{}", table.trim_fmt())
    }
}
