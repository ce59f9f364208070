//! The `audit` command: checks, while everything runs, that the log up to the high-water mark is
//! unchanged, and records the losses that an operator accepts.

use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::HumanCount;
use serde::Serialize;
use tracing::{error, info};

use super::{confirm, print, print_json};
use crate::command::config::Config;
use crate::engine::error::Error;
use crate::engine::retry::hostname;
use crate::ledger::Ledger;
use crate::model::event::Position;
use crate::model::text::{count, timestamp};
use crate::store::{AcceptOutcome, Acceptance, Blocker, EventStore, LogAudit, MissingPositions};

const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// The most ranges of missing positions that are listed. Further ranges are only counted.
const MAX_LISTED_FAULTS: usize = 20;

/// The most faults that are listed in the alert.
const MAX_FAULTS_IN_ALERT: usize = 3;

#[derive(Debug, Args)]
#[command(after_help = "\
Checks that every position up to the high-water mark has a row, that each row has the position \
and event id that it had when the mark passed it, and that no projector and no message is beyond \
the mark. Reads the log once and blocks no other process. Exit code 1: the audit found faults, \
which the output lists.\n\n\
--accept is for rows that were deleted on purpose, or that a restore has lost for good. Each \
missing position of the range gets a filler, and the log as it is now counts as complete from \
then on. The range, the reason and the user are recorded. It fails if rows are missing outside \
the range. It cannot check that the remaining rows are unchanged, and it does not undo what \
projectors did with the lost rows.\n\n\
Examples:\n\
\x20 projectionist audit\n\
\x20 projectionist audit --json\n\
\x20 projectionist audit --accept 120 133 --reason 'deleted by order of legal'")]
pub(super) struct AuditCommand {
    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    /// Accept that the rows of these positions are lost, and record it
    #[arg(long, num_args = 2, value_names = ["FIRST", "LAST"], requires = "reason",
          value_parser = clap::value_parser!(u64).range(1..))]
    accept: Option<Vec<u64>>,

    /// The reason, which is recorded; at most 1,000 characters
    #[arg(long, value_name = "TEXT", requires = "accept", value_parser = parse_reason)]
    reason: Option<String>,

    /// Do not ask before accepting
    #[arg(long, env = "PROJECTIONIST_YES", value_parser = FalseyValueParser::new())]
    yes: bool,
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
                "the audit found {}",
                count(faults.count, "fault")
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
        if self.json {
            print_json(&report)?;
        } else {
            if report.ok {
                print(format!(
                    "{} up to the high-water mark {}: no faults",
                    count(log.rows, "row"),
                    log.high_water
                ))?;
            }
            report.faults.iter().try_for_each(print)?;
            report.acceptances.iter().map(AcceptanceReport::line).try_for_each(print)?;
        }
        if report.ok {
            Ok(())
        } else {
            Err(Error::LogFault(format!("the audit found {}", count(faults.count, "fault"))))
        }
    }
}

fn parse_reason(text: &str) -> Result<String, String> {
    if (1..=1_000).contains(&text.trim().chars().count()) {
        Ok(text.trim().to_owned())
    } else {
        Err("it must have 1 to 1,000 characters".into())
    }
}

/// Accepts that rows of a range are lost.
///
/// # Errors
/// [`Error::Input`] if there is nothing to accept, or if rows are missing outside the range.
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
            "positions {first} to {last} are not a range up to the high-water mark {}",
            log.high_water
        )));
    }
    if log.missing.count == 0 && log.is_unchanged {
        return Err(Error::Input("there is nothing to accept: the log is unchanged".into()));
    }
    let missing = store.missing_between(first, last).await?;
    if missing != log.missing.count {
        return Err(Error::Input(format!(
            "up to the high-water mark, {} without a row, of which {} between {first} and {last}: \
            nothing was accepted. Accept a range that contains all of them\n{}",
            count(log.missing.count, "position"),
            HumanCount(missing),
            describe_missing(&log.missing).join("\n")
        )));
    }
    confirm(
        &format!(
            "from {first} to {last}, {} without a row: each gets a filler, and the log as it is \
            now counts as complete. It cannot be checked that the other {} up to {} are unchanged, \
            and what projectors did with the lost rows cannot be undone",
            count(missing, "position"),
            count(log.rows, "row"),
            log.high_water
        ),
        yes,
    )?;
    let user = std::env::var("USER").unwrap_or_else(|_| "unknown user".into());
    let by: String = format!("{user} on {}", hostname()).chars().take(200).collect();
    match store.accept(first, last, reason, &by, progress_logger()).await? {
        AcceptOutcome::Accepted { missing } => {
            info!(
                first = first.get(),
                last = last.get(),
                missing,
                "the log is accepted as it is now"
            );
            Ok(())
        }
        AcceptOutcome::Blocked(blocker) => {
            let at = match blocker {
                Blocker::InFlight(position) => position.get(),
                Blocker::WideGap(gap) => *gap.start(),
            };
            Err(Error::Input(format!(
                "a transaction that has not ended holds a position from {at} on: nothing was \
                accepted. Run the command again when the transaction has ended"
            )))
        }
        AcceptOutcome::MissingElsewhere(lost) => Err(Error::Input(format!(
            "outside the range, {} lost rows meanwhile: nothing was accepted",
            count(lost, "position")
        ))),
    }
}

/// The output of `audit --json`.
#[derive(Serialize)]
struct Report {
    ok: bool,
    high_water: u64,
    rows: u64,
    faults: Vec<String>,
    /// The first ranges of positions up to the mark that have no row, each with its first and its
    /// last position.
    missing_ranges: Vec<(u64, u64)>,
    /// How many positions up to the mark have no row.
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
        let accepted_at = timestamp(accepted_at);
        AcceptanceReport { first, last, missing, reason, accepted_by, accepted_at }
    }
}

impl AcceptanceReport {
    fn line(&self) -> String {
        let AcceptanceReport { first, last, reason, accepted_by, accepted_at, .. } = self;
        let missing = HumanCount(self.missing);
        format!(
            "accepted: positions {first} to {last}, {missing} without a row, by {accepted_by}, \
            {accepted_at}: {reason}"
        )
    }
}

/// The faults of a log. `listed` describes the first faults, a sentence each; `count` counts all.
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
    // The marks are read after the entries and never fall. An entry that is beyond this high-water
    // mark was therefore beyond the mark when the entry was read.
    let entries = ledger.entries().await?;
    let marks = store.marks().await?;
    let mut listed = describe_missing(&log.missing);
    let mut count = log.missing.range_count;
    let mut other = Vec::new();
    if log.missing.count == 0 && !log.is_unchanged {
        other.push(format!(
            "the rows up to {} are not those that the high-water mark passed: a row was replaced, \
            or its event id changed",
            log.high_water
        ));
    }
    other.extend(log.out_of_bounds.iter().map(|position| match position {
        0 => "position 0 is never read: no projector gets this row".to_owned(),
        last => format!(
            "position {last} ends the log: nothing can be appended after it. Delete this row, and \
            set auto_increment of the table events to the position after the last event"
        ),
    }));
    for entry in entries.iter().filter(|entry| entry.position > marks.high_water) {
        other.push(format!(
            "projector {} is at {}, beyond the high-water mark {}",
            entry.id, entry.position, marks.high_water
        ));
    }
    if marks.published > marks.high_water {
        other.push(format!(
            "the published position {} is beyond the high-water mark {}",
            marks.published, marks.high_water
        ));
    }
    count += other.len() as u64;
    listed.extend(other);
    Ok(Faults { listed, count })
}

/// Describes the ranges of positions that have no row, a sentence each.
fn describe_missing(missing: &MissingPositions) -> Vec<String> {
    let range = |(first, last): &(u64, u64)| {
        if first == last {
            format!("position {first} has no row: it was deleted")
        } else {
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
            "also {} without rows; in all {} deleted",
            count(unnamed, "range"),
            count(missing.count, "position")
        ));
    }
    listed
}

/// Returns a callback that logs at intervals how far the log has been read.
fn progress_logger() -> impl FnMut(Position, Position) {
    let mut last_logged = Instant::now();
    move |at, end| {
        if last_logged.elapsed() >= PROGRESS_INTERVAL {
            last_logged = Instant::now();
            info!(position = at.get(), through = end.get(), "auditing");
        }
    }
}
