//! `audit`: proves or refutes, while everything runs, that the log is what it was.

use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::FalseyValueParser;
use serde::Serialize;
use tracing::{error, info};

use super::say;
use crate::config::Config;
use crate::error::Error;
use crate::event::Position;
use crate::ledger::Ledger;
use crate::store::EventStore;

const TELL_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "\
Checks that every position at or below the high-water mark has a row, that these are the rows, by position and event id, \
over which the mark passed, and that no projector and no message is beyond the mark. Reads the log once; blocks nobody. \
Exit code 1: it found something, and names it.")]
pub(super) struct Audit {
    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// `audit --json`.
#[derive(Serialize)]
struct Report {
    well: bool,
    high_water: u64,
    rows: u64,
    faults: Vec<String>,
}

impl Audit {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let database = config.database().await?;
        let mut told = Instant::now();
        let progress = |at: Position, end: Position| {
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                info!(position = at.get(), through = end.get(), "auditing");
            }
        };
        let log = EventStore::new(&database).audit(progress).await?;
        // Marks never fall, so what is beyond this one now was beyond the audited one, too, or has moved since.
        let entries = Ledger::new(&database).entries().await?;
        let marks = EventStore::new(&database).marks().await?;

        let mut faults: Vec<String> =
            log.missing.iter().map(|position| format!("position {position} has no row: it was deleted")).collect();
        if log.missing.is_empty() && !log.is_unchanged {
            faults.push(format!(
                "the rows up to {} are not those over which the high-water mark passed: one was replaced, \
                 or its event id changed",
                log.high_water
            ));
        }
        for entry in entries.iter().filter(|entry| entry.position > marks.high_water) {
            faults.push(format!(
                "projector {} stands at {}, beyond the high-water mark {}",
                entry.id, entry.position, marks.high_water
            ));
        }
        if marks.published > marks.high_water {
            faults.push(format!("{} is published, beyond the high-water mark {}", marks.published, marks.high_water));
        }
        for fault in &faults {
            error!(alert = "log_fault", fault, "the audit found a fault");
        }
        let report = Report { well: faults.is_empty(), high_water: log.high_water.get(), rows: log.rows, faults };
        match self.json {
            true => say(serde_json::to_string(&report)
                .unwrap_or_else(|error| unreachable!("plain strings and numbers: {error}")))?,
            false if report.well => {
                say(format!("{} rows up to the high-water mark {}: all well", log.rows, log.high_water))?
            }
            false => report.faults.iter().try_for_each(say)?,
        }
        match report.well {
            true => Ok(()),
            false => Err(Error::Fault(format!("the audit found {} fault(s)", report.faults.len()))),
        }
    }
}
