//! `doctor`: whether everything is set up as it should be, and what to do where it is not.

mod database;
mod log;
mod queue;

use std::fmt;

use clap::Args;
use clap::builder::FalseyValueParser;
use serde::Serialize;

use super::print;
use crate::command::config::Config;
use crate::database::{COMMAND_PRIVILEGES, Database};
use crate::ledger::Ledger;
use crate::model::error::Error;
use crate::model::lifecycle::Status;
use crate::model::registry::Registry;
use crate::model::text::escape_control;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
Changes nothing: grants are asked of statements that are explained or prepared and not run, permissions of calls of SQS that \
could not do anything (a batch of no messages, receipts that are none). Exit codes: 0 nothing is wrong, whatever the warnings; \
2 something is; 3 database or queue are out of reach.")]
pub(super) struct DoctorCommand {
    /// The commands that this user and these credentials are for; of others, what is missing is
    /// only noted
    #[arg(long = "for", value_name = "COMMAND", env = "PROJECTIONIST_DOCTOR_FOR", value_delimiter = ',',
          default_values = ["boot", "play"], value_parser = commands())]
    commands: Vec<String>,

    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

fn commands() -> Vec<&'static str> {
    COMMAND_PRIVILEGES.iter().map(|(command, _)| *command).collect()
}

/// How well it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Ok,
    /// Nobody's fault, and worth knowing.
    Note,
    /// It works, but not as well or as safely as it could.
    Warning,
    /// It does not work.
    Error,
    Unreachable,
}

/// One line.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    level: Level,
    detail: String,
    /// What to do.
    remedy: Option<String>,
}

#[derive(Serialize)]
struct Report<'a> {
    healthy: bool,
    checks: &'a [Check],
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "warning",
            Level::Error => "ERROR",
            Level::Unreachable => "UNREACHABLE",
        })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<12}  {:<27}  {}",
            self.level.to_string(),
            self.name,
            escape_control(&self.detail)
        )?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

impl Check {
    fn ok(name: &str, detail: impl Into<String>) -> Self {
        Check { name: name.into(), level: Level::Ok, detail: detail.into(), remedy: None }
    }

    fn problem(
        level: Level,
        name: &str,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Check { name: name.into(), level, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    /// What kept a check from being made.
    fn failed(name: &str, error: &Error) -> Self {
        let level = match error {
            Error::Unreachable(_) => Level::Unreachable,
            _ => Level::Error,
        };
        Check { name: name.into(), level, detail: error.to_string(), remedy: None }
    }
}

impl DoctorCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let mut checks = Vec::new();
        let registry = config.registry(registry);
        let wants = |commands: &[&str]| {
            self.commands.iter().any(|command| commands.contains(&command.as_str()))
        };
        let mut record = None;
        match config.database().await {
            Ok(database) => {
                // Where the log cannot be read, another line says so.
                record = EventStore::new(&database).queue_record().await.ok();
                checks.push(Check::ok("database", database.address()));
                database::examine(
                    &database,
                    database.max_connections(),
                    &self.commands,
                    &mut checks,
                )
                .await;
                log::examine(&database, &mut checks).await;
                examine_projectors(&database, registry, &mut checks).await;
            }
            Err(error) => {
                checks.push(Check::failed("database", &error));
                if let Err(error) = registry {
                    checks.push(Check::failed("projectors", &error));
                }
            }
        }
        if config.has_queue() || wants(&["play", "relay", "lambda"]) {
            match config.queue().await {
                Ok(queue) => queue::examine(&queue, record.as_ref(), config, &mut checks).await,
                Err(error) => checks.push(Check::failed("queue", &error)),
            }
        }
        self.report(&checks)
    }

    fn report(&self, checks: &[Check]) -> Result<(), Error> {
        let worst = checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok);
        match self.json {
            true => {
                let report = Report { healthy: worst < Level::Error, checks };
                print(
                    serde_json::to_string(&report)
                        .unwrap_or_else(|error| unreachable!("plain strings: {error}")),
                )?;
            }
            false => {
                for check in checks {
                    print(check)?;
                }
            }
        }
        let bad: Vec<&str> = checks
            .iter()
            .filter(|check| check.level >= Level::Error)
            .map(|check| check.name.as_str())
            .collect();
        let summary = format!(
            "not as it should be: {}; each line on standard output says what to do",
            bad.join(", ")
        );
        match worst {
            Level::Unreachable => Err(Error::Unreachable(summary)),
            Level::Error => Err(Error::Input(summary)),
            _ => Ok(()),
        }
    }
}

/// Whether the files load, and who is to be booted.
async fn examine_projectors(
    database: &Database,
    registry: Result<Registry, Error>,
    checks: &mut Vec<Check>,
) {
    let registry = match registry {
        Ok(registry) if registry.is_empty() => {
            return checks.push(Check::problem(
                Level::Note,
                "projectors",
                "there are none",
                "to look at some, name their folder with --projectors DIR",
            ));
        }
        Ok(registry) => registry,
        Err(error) => return checks.push(Check::failed("projectors", &error)),
    };
    // Where the ledger cannot be read, another line has said so.
    let Ok(entries) = Ledger::new(database).entries().await else { return };
    for projector in registry.iter() {
        let check = format!("projector {}", projector.id);
        let entry = entries.iter().find(|entry| entry.id == projector.id);
        let is_changed = entry.is_some_and(|entry| !entry.matches_digest(&projector.digest));
        let status = entry.map(|entry| &entry.status);
        checks.push(match status {
            Some(Status::Live | Status::Finished) if is_changed => Check::problem(
                Level::Warning,
                &check,
                "changed since it was booted, so a worker with this set does not play it",
                "run boot",
            ),
            Some(Status::Live | Status::Finished) => {
                Check::ok(&check, status.map_or("", Status::as_str))
            }
            Some(Status::Retired) => Check::problem(
                Level::Warning,
                &check,
                "retired, and never played again",
                "take it out of this release",
            ),
            Some(Status::Broken(failure)) => {
                let remedy = match failure.rebuild_reason {
                    None => "mend it, and run boot",
                    Some(_) => "retire it and run boot again, or give it a new version",
                };
                Check::problem(Level::Warning, &check, format!("broken: {}", failure.error), remedy)
            }
            Some(status) => Check::problem(Level::Warning, &check, status.as_str(), "run boot"),
            None => {
                Check::problem(Level::Warning, &check, "not booted, and so not played", "run boot")
            }
        });
    }
}
