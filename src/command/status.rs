//! The `status` command: shows every projector, the high-water mark and the published position.

use std::sync::Arc;

use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::HumanCount;
use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::serde::rfc3339;

use super::{print, print_json, selection};
use crate::command::config::Config;
use crate::command::output::{ProjectorRow, ProjectorTable, terminal_width, wrap};
use crate::engine::error::Error;
use crate::engine::lag::{Lag, LagReport};
use crate::ledger::{Entry, Ledger};
use crate::model::event::Position;
use crate::model::lifecycle::Failure;
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::{RegisteredProjector, Registry};
use crate::model::retrying::Retrying;
use crate::model::text::{count, duration, escape_control, timestamp_with_age};
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
Lag counts the positions from the projector's own to the end of the log, including events that it \
does not subscribe to. Behind is the age of the oldest of these events. A transaction or gap that \
has blocked the high-water mark for some seconds is named. Waits for no lock, so it can run \
beside boot and play at any time.\n\n\
Examples:\n\
\x20 projectionist status\n\
\x20 projectionist status case_status\n\
\x20 projectionist status --json")]
pub(super) struct StatusCommand {
    /// Show only these projectors, with every detail
    #[arg(value_name = "NAME[@VERSION]")]
    names: Vec<String>,

    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

impl StatusCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let registry = config.registry(registry)?;
        let database = config.database().await?;
        let mut report =
            report(&Ledger::new(&database), &EventStore::new(&database), &registry).await?;
        self.select(&mut report.projectors)?;
        if self.json {
            print_json(&report)
        } else {
            let is_brief = self.names.is_empty();
            print(format_report(&report, !registry.is_empty(), is_brief, terminal_width()))
        }
    }

    /// Keeps only the projectors that the command line names, if it names any.
    fn select(&self, projectors: &mut Vec<ProjectorReport>) -> Result<(), Error> {
        if self.names.is_empty() {
            return Ok(());
        }
        let mut selected: Vec<ProjectorId> = Vec::new();
        for name in &self.names {
            let known = projectors.iter().map(|projector| &projector.id);
            selected.extend(selection::find(name, known, "the ledger")?.into_iter().cloned());
        }
        projectors.retain(|projector| selected.contains(&projector.id));
        Ok(())
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
            mode: projector.mode,
            status: "new",
            since: None,
            position: 0,
            lag_events: lag.events,
            lag_seconds: lag.seconds,
            digest: None,
            changed: Some(false),
            delivery: delivery(Some(projector)),
            failure: None,
            rebuild_reason: None,
            id: projector.id.clone(),
            retrying: None,
            is_known: true,
        });
    }
    let log_fault = store.log_fault().await?.map(|fault| fault.to_string());
    let queue = store.queue_record().await?;
    Ok(StatusReport {
        high_water: lag_report.high_water.get(),
        visible: lag_report.visible.get(),
        blocked: lag_report.blocked.map(|blocked| BlockedReport {
            position: blocked.position.get(),
            last: blocked.last.map(Position::get),
            since: blocked.since,
        }),
        published: lag_report.published.get(),
        published_by_boot: queue.published_by_boot,
        log_fault,
        foreign_messages: queue.foreign_messages,
        foreign_at: queue.foreign_at,
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
    /// Everything up to here was sent to the queue, or passed by boot.
    published: u64,
    /// Up to here, boot has moved `published`, and nothing was sent.
    published_by_boot: u64,
    /// A fault that is visible at the end of the log; `audit` checks the whole log.
    log_fault: Option<String>,
    /// How often a message that is not of this log was received.
    foreign_messages: u64,
    /// When such a message was last received.
    #[serde(with = "rfc3339::option")]
    foreign_at: Option<OffsetDateTime>,
    projectors: Vec<ProjectorReport>,
}

#[derive(Serialize)]
struct BlockedReport {
    position: u64,
    /// The last missing position of a gap that is too wide to be filled automatically; else null.
    last: Option<u64>,
    #[serde(with = "rfc3339")]
    since: OffsetDateTime,
}

#[derive(Serialize)]
struct ProjectorReport {
    name: String,
    version: u32,
    #[serde(serialize_with = "serialize_mode")]
    mode: Mode,
    status: &'static str,
    /// Since when the projector has had this status; null if it is new.
    #[serde(with = "rfc3339::option")]
    since: Option<OffsetDateTime>,
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
    /// Why the read model must be rebuilt; null if it is whole.
    rebuild_reason: Option<String>,
    #[serde(skip)]
    id: ProjectorId,
    /// Null unless the projector waits for a later retry of its next event.
    retrying: Option<RetryReport>,
    /// Whether the given set has the projector. Only the table shows this.
    #[serde(skip)]
    is_known: bool,
}

impl ProjectorReport {
    fn new(entry: &Entry, lag: Lag, known: Option<&RegisteredProjector>) -> Self {
        ProjectorReport {
            name: entry.id.name.clone(),
            version: entry.id.version,
            mode: entry.mode,
            status: entry.status.as_str(),
            since: Some(entry.status_since),
            position: entry.position.get(),
            lag_events: lag.events,
            lag_seconds: lag.seconds,
            digest: entry.digest.clone(),
            changed: known.map(|projector| !entry.matches_digest(&projector.digest)),
            delivery: delivery(known),
            failure: entry.status.failure().map(FailureReport::from),
            rebuild_reason: entry.rebuild_reason.clone(),
            id: entry.id.clone(),
            retrying: entry.retrying.as_ref().map(RetryReport::from),
            is_known: known.is_some(),
        }
    }

    fn row(&self, has_set: bool, is_brief: bool, now: OffsetDateTime) -> ProjectorRow {
        let mut notes = Vec::new();
        if self.mode != Mode::FromBeginning {
            notes.push(self.mode.to_string());
        }
        if has_set && !self.is_known {
            notes.push("not in this set".into());
        }
        if self.changed == Some(true) {
            notes.push("changed since it was booted".into());
        }
        notes.extend(self.delivery.map(str::to_owned));
        let mut details = Vec::new();
        if let Some(since) = self.since.filter(|_| !is_brief) {
            details.push(format!("{} since {}", self.status, timestamp_with_age(since, now)));
        }
        if let Some(failure) = &self.failure {
            details.extend(failure.describe(now));
        }
        details.extend(self.retrying.as_ref().map(|retrying| retrying.describe(now)));
        match (&self.rebuild_reason, &self.failure) {
            // The failure has the reason, too.
            (Some(_), Some(_)) => details.push("retire it and boot it again, or give it a new \
                 version: it must be rebuilt".into()),
            (Some(reason), None) => details.push(format!(
                "it must be rebuilt: retire it and boot it again, or give it a new version. {reason}"
            )),
            (None, Some(_)) => details.push("fix the projector and run boot: it continues at this \
                 event".into()),
            (None, None) => {}
        }
        let behind = if self.lag_events > 0 { duration(self.lag_seconds) } else { "-".to_owned() };
        ProjectorRow {
            status: self.status,
            figures: vec![
                self.position.to_string(),
                HumanCount(self.lag_events).to_string(),
                behind,
            ],
            projector: self.id.to_string(),
            notes,
            details,
        }
    }
}

fn delivery(projector: Option<&RegisteredProjector>) -> Option<&'static str> {
    Some(projector?.external.as_ref()?.delivery().as_str())
}

fn serialize_mode<S: Serializer>(mode: &Mode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(mode.as_str())
}

/// The failure of a projector. Position, event type and event id are null if its setup failed,
/// before any event.
#[derive(Serialize)]
pub(super) struct FailureReport {
    position: Option<u64>,
    event_type: Option<String>,
    event_id: Option<String>,
    error: String,
    #[serde(with = "rfc3339")]
    at: OffsetDateTime,
    /// How often the event was tried.
    attempts: u32,
    /// The release that ran the projector; null if it has no name.
    release: Option<String>,
    /// The host that ran the projector, and has its logs.
    host: String,
}

impl From<&Failure> for FailureReport {
    fn from(failure: &Failure) -> Self {
        let event = failure.event.as_ref();
        FailureReport {
            position: event.map(|event| event.position.get()),
            event_type: event.map(|event| event.event_type.clone()),
            event_id: event.map(|event| event.event_id.clone()),
            error: failure.error.clone(),
            at: failure.at,
            attempts: failure.attempts,
            release: failure.release.clone(),
            host: failure.host.clone(),
        }
    }
}

impl FailureReport {
    /// Describes the failure for people: where and when, and the error.
    pub(super) fn describe(&self, now: OffsetDateTime) -> Vec<String> {
        let mut place = match (self.position, &self.event_type, &self.event_id) {
            (Some(position), Some(event_type), Some(event_id)) => {
                format!("failed at {position}, {event_type}, event {event_id}")
            }
            _ => "failed in its setup".to_owned(),
        };
        place.push_str(&format!(
            "; {}, {}",
            count(u64::from(self.attempts), "attempt"),
            timestamp_with_age(self.at, now)
        ));
        if let Some(release) = &self.release {
            place.push_str(&format!(", release {release}"));
        }
        place.push_str(&format!(", host {}", self.host));
        vec![escape_control(&place).into_owned(), self.error.clone()]
    }
}

/// The wait of a projector for a later retry of its next event.
#[derive(Serialize)]
struct RetryReport {
    #[serde(with = "rfc3339")]
    since: OffsetDateTime,
    attempts: u32,
    error: String,
    #[serde(with = "rfc3339")]
    next_attempt: OffsetDateTime,
}

impl From<&Retrying> for RetryReport {
    fn from(retrying: &Retrying) -> Self {
        RetryReport {
            since: retrying.since,
            attempts: retrying.attempts,
            error: retrying.reason.clone(),
            next_attempt: retrying.next_attempt,
        }
    }
}

impl RetryReport {
    fn describe(&self, now: OffsetDateTime) -> String {
        let (since, attempts) = (timestamp_with_age(self.since, now), self.attempts);
        let error = escape_control(&self.error);
        format!("retrying since {since}, {}: {error}", count(attempts.into(), "attempt"))
    }
}

fn format_report(
    report: &StatusReport,
    has_set: bool,
    is_brief: bool,
    width: Option<usize>,
) -> String {
    let now = OffsetDateTime::now_utc();
    let rows =
        report.projectors.iter().map(|projector| projector.row(has_set, is_brief, now)).collect();
    let table = ProjectorTable { figures: vec!["POSITION", "LAG", "BEHIND"], rows, is_brief };
    let summary = if report.projectors.is_empty() {
        "no projector has been booted yet".to_owned()
    } else {
        table.summary()
    };
    let mut lines = vec![summary];
    lines.extend(wrap(&report.marks(), "", width));
    lines.extend(report.problems(now).iter().flat_map(|problem| wrap(problem, "", width)));
    if !report.projectors.is_empty() {
        lines.push(String::new());
        lines.push(table.format(width));
    }
    lines.join("\n")
}

impl StatusReport {
    fn marks(&self) -> String {
        let StatusReport { high_water, visible, published, published_by_boot, .. } = self;
        let by_boot = if *published > 0 && published == published_by_boot {
            " (by boot, nothing sent)"
        } else {
            ""
        };
        format!(
            "high-water mark {high_water}   end of the log {visible}   published \
             {published}{by_boot}"
        )
    }

    /// The problems of the log and the queue, a sentence each.
    fn problems(&self, now: OffsetDateTime) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(fault) = &self.log_fault {
            problems.push(format!("log fault: {fault}"));
        }
        if let Some(BlockedReport { position, last, since }) = &self.blocked {
            let since = timestamp_with_age(*since, now);
            problems.push(match last {
                None => format!(
                    "the mark has been blocked since {since}: a transaction is open at {position}, \
                     and no event after it is played"
                ),
                Some(last) => format!(
                    "the mark has been blocked since {since}: {position} to {last} are missing; \
                     if no writer still uses them: projectionist fill {position} {last}"
                ),
            });
        }
        if let Some(at) = self.foreign_at {
            problems.push(format!(
                "messages that are not of this log were received {}, last at {}: they stay in the \
                 queue; see doctor",
                count(self.foreign_messages, "time"),
                timestamp_with_age(at, now)
            ));
        }
        problems
    }
}
