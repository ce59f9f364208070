//! `audit`: proves or refutes, while everything runs, that the log is what it was; and takes note
//! of what an operator accepts.

use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::HumanCount;
use serde::Serialize;
use time::format_description::well_known::Rfc3339;
use tracing::{error, info};

use super::{confirm, print};
use crate::command::config::Config;
use crate::engine::retry::hostname;
use crate::ledger::Ledger;
use crate::model::error::Error;
use crate::model::event::Position;
use crate::store::{AcceptOutcome, Acceptance, Blocker, EventStore, LogAudit, MissingPositions};

const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Faults that are named at the most; beyond, they are counted.
const MAX_LISTED_FAULTS: usize = 20;

/// And in the alert.
const MAX_FAULTS_IN_ALERT: usize = 3;

#[derive(Debug, Args)]
#[command(after_help = "\
Checks that every position at or below the high-water mark has a row, that these are the rows, by position and event id, \
over which the mark passed, and that no projector and no message is beyond the mark. Reads the log once; blocks nobody. \
Exit code 1: it found something, and names it.\n\n\
--accept is for rows that were deleted on purpose, or lost for good by a restore: each missing position of the range gets a \
filler, the log as it is now counts as whole from then on, and the range, the reason and who accepted it are recorded. It \
refuses where rows are missing outside the range. It cannot check whether the rows that are there are those over which the \
mark passed, nor what projectors have made of the lost ones.")]
pub(super) struct AuditCommand {
    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    /// Accept that the rows of these positions are lost, and record it
    #[arg(long, num_args = 2, value_names = ["FIRST", "LAST"], value_parser = clap::value_parser!(u64).range(1..),
          requires = "reason")]
    accept: Option<Vec<u64>>,

    /// Why: it is recorded, at most 1,000 characters
    #[arg(long, value_name = "TEXT", requires = "accept", value_parser = parse_reason)]
    reason: Option<String>,

    /// Do not ask before accepting
    #[arg(long, env = "PROJECTIONIST_YES", value_parser = FalseyValueParser::new())]
    yes: bool,
}

fn parse_reason(text: &str) -> Result<String, String> {
    match (1..=1_000).contains(&text.trim().chars().count()) {
        true => Ok(text.trim().to_owned()),
        false => Err("it must have 1 to 1,000 characters".into()),
    }
}

/// `audit --json`.
#[derive(Serialize)]
struct Report {
    ok: bool,
    high_water: u64,
    rows: u64,
    faults: Vec<String>,
    /// Positions up to the mark that have no row: the first ranges of them, each with its first and
    /// its last position.
    missing_ranges: Vec<(u64, u64)>,
    /// How many there are in all.
    missing_count: u64,
    acceptances: Vec<AcceptanceReport>,
}

#[derive(Serialize)]
struct AcceptanceReport {
    first: u64,
    last: u64,
    missing: u64,
    reason: String,
    accepted_by: String,
    accepted_at: String,
}

impl From<Acceptance> for AcceptanceReport {
    fn from(acceptance: Acceptance) -> Self {
        let Acceptance {
            first,
            last,
            missing_positions: missing,
            reason,
            accepted_by,
            accepted_at,
        } = acceptance;
        let accepted_at = accepted_at.format(&Rfc3339).unwrap_or_else(|_| accepted_at.to_string());
        AcceptanceReport { first, last, missing, reason, accepted_by, accepted_at }
    }
}

impl AcceptanceReport {
    fn line(&self) -> String {
        let AcceptanceReport { first, last, reason, accepted_by, accepted_at, .. } = self;
        let missing = HumanCount(self.missing);
        format!(
            "accepted: positions {first} to {last}, {missing} without a row, by {accepted_by}, {accepted_at}: {reason}"
        )
    }
}

/// Tells at intervals how far a reading of the log is.
fn progress_logger() -> impl FnMut(Position, Position) {
    let mut last_logged = Instant::now();
    move |at, end| {
        if last_logged.elapsed() >= PROGRESS_INTERVAL {
            last_logged = Instant::now();
            info!(position = at.get(), through = end.get(), "auditing");
        }
    }
}

impl AuditCommand {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let database = config.database().await?;
        let (store, ledger) = (EventStore::new(&database), Ledger::new(&database));
        let mut log = store.audit(progress_logger()).await?;
        if let (Some(range), Some(reason)) = (self.accept.as_deref(), &self.reason) {
            let (first, last) = (range[0], range[1]);
            accept(&store, &log, Position::new(first)..=Position::new(last), reason, self.yes)
                .await?;
            log = store.audit(progress_logger()).await?;
        }
        let faults = find_faults(&store, &ledger, &log).await?;
        let acceptances =
            store.acceptances().await?.into_iter().map(AcceptanceReport::from).collect();
        if !faults.listed.is_empty() {
            let range = log.missing.ranges.first();
            error!(
                alert = "log_fault",
                first = range.map(|range| range.0),
                last = range.map(|range| range.1),
                missing = log.missing.count,
                fault = faults.summary(),
                "the audit found {} fault(s)",
                faults.count
            );
        }
        let report = Report {
            ok: faults.listed.is_empty(),
            high_water: log.high_water.get(),
            rows: log.rows,
            faults: faults.listed,
            missing_ranges: log.missing.ranges,
            missing_count: log.missing.count,
            acceptances,
        };
        match self.json {
            true => print(
                serde_json::to_string(&report)
                    .unwrap_or_else(|error| unreachable!("plain strings and numbers: {error}")),
            )?,
            false => {
                if report.ok {
                    print(format!(
                        "{} rows up to the high-water mark {}: all well",
                        log.rows, log.high_water
                    ))?;
                }
                report.faults.iter().try_for_each(print)?;
                report.acceptances.iter().map(AcceptanceReport::line).try_for_each(print)?;
            }
        }
        match report.ok {
            true => Ok(()),
            false => Err(Error::LogFault(format!("the audit found {} fault(s)", faults.count))),
        }
    }
}

/// What is wrong: a sentence each for the first, and how many there are in all.
struct Faults {
    listed: Vec<String>,
    count: u64,
}

impl Faults {
    fn summary(&self) -> String {
        let shown = self.listed.len().min(MAX_FAULTS_IN_ALERT);
        let mut text = self.listed[..shown].join("; ");
        if self.count > shown as u64 {
            text.push_str(&format!("; and {} more", HumanCount(self.count - shown as u64)));
        }
        text
    }
}

async fn find_faults(store: &EventStore, ledger: &Ledger, log: &LogAudit) -> Result<Faults, Error> {
    // Marks never fall, so what is beyond this one now was beyond the audited one, too, or has
    // moved since.
    let entries = ledger.entries().await?;
    let marks = store.marks().await?;
    let mut listed = describe_missing(&log.missing);
    let mut count = log.missing.range_count;
    let mut other = Vec::new();
    if log.missing.count == 0 && !log.is_unchanged {
        other.push(format!(
            "the rows up to {} are not those over which the high-water mark passed: one was replaced, \
             or its event id changed",
            log.high_water
        ));
    }
    other.extend(log.out_of_bounds.iter().map(|position| match position {
        0 => "position 0 is never read: no projector gets this row".to_owned(),
        last => format!(
            "position {last} ends the log: nothing can be appended after it. Delete this row, and set auto_increment of the \
             table events to the position after the last event"
        ),
    }));
    for entry in entries.iter().filter(|entry| entry.position > marks.high_water) {
        other.push(format!(
            "projector {} stands at {}, beyond the high-water mark {}",
            entry.id, entry.position, marks.high_water
        ));
    }
    if marks.published > marks.high_water {
        other.push(format!(
            "{} is published, beyond the high-water mark {}",
            marks.published, marks.high_water
        ));
    }
    count += other.len() as u64;
    listed.extend(other);
    Ok(Faults { listed, count })
}

/// The positions that have no row, by ranges.
fn describe_missing(missing: &MissingPositions) -> Vec<String> {
    let range = |(first, last): &(u64, u64)| match first == last {
        true => format!("position {first} has no row: it was deleted"),
        false => {
            format!(
                "positions {first} to {last} have no row: {} deleted",
                HumanCount((last - first).saturating_add(1))
            )
        }
    };
    let mut listed: Vec<String> =
        missing.ranges.iter().take(MAX_LISTED_FAULTS).map(range).collect();
    let unnamed = missing.range_count - listed.len() as u64;
    if unnamed > 0 {
        listed.push(format!(
            "{} more ranges have no rows; in all {} positions were deleted",
            HumanCount(unnamed),
            HumanCount(missing.count)
        ));
    }
    listed
}

/// Accepts a range, unless there is nothing to accept, or more is missing.
async fn accept(
    store: &EventStore,
    log: &LogAudit,
    range: std::ops::RangeInclusive<Position>,
    reason: &str,
    yes: bool,
) -> Result<(), Error> {
    let (first, last) = range.into_inner();
    if first > last || last > log.high_water {
        return Err(Error::Input(format!(
            "positions {first} to {last} are no range up to the high-water mark {}",
            log.high_water
        )));
    }
    if log.missing.count == 0 && log.is_unchanged {
        return Err(Error::Input("there is nothing to accept: the log is what it was".into()));
    }
    let missing = store.missing_between(first, last).await?;
    if missing != log.missing.count {
        return Err(Error::Input(format!(
            "{} positions up to the high-water mark have no row, and {} of them lie between {first} and {last}: nothing was \
             accepted. Accept a range that holds all of them\n{}",
            HumanCount(log.missing.count),
            HumanCount(missing),
            describe_missing(&log.missing).join("\n")
        )));
    }
    confirm(
        &format!(
            "{} positions from {first} to {last} have no row: each gets a filler, and the log as it is now counts as whole. \
             Nobody can check whether the other {} rows up to {} are those over which the mark passed, nor undo what \
             projectors have made of the lost ones",
            HumanCount(missing),
            HumanCount(log.rows),
            log.high_water
        ),
        yes,
    )?;
    let user = std::env::var("USER").unwrap_or_else(|_| "unknown user".into());
    let by: String = format!("{user} on {}", hostname()).chars().take(200).collect();
    match store.accept(first, last, reason, &by, progress_logger()).await? {
        AcceptOutcome::Accepted { missing } => {
            info!(first = first.get(), last = last.get(), missing, "accepted as it is now");
            Ok(())
        }
        AcceptOutcome::Blocked(held) => {
            let at = match held {
                Blocker::InFlight(position) => position.get(),
                Blocker::WideGap(gap) => *gap.start(),
            };
            Err(Error::Input(format!(
                "a transaction that has not ended holds a position from {at} on: nothing was accepted. Run it again when that \
                 has ended"
            )))
        }
        AcceptOutcome::MissingElsewhere(count) => Err(Error::Input(format!(
            "{} positions outside the range lost their rows meanwhile: nothing was accepted",
            HumanCount(count)
        ))),
    }
}
