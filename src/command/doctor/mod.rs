//! The `doctor` command: checks the set-up of database, queue and projectors, and says how to fix
//! problems.

mod database;
mod log;
mod queue;

use std::cmp::Reverse;
use std::fmt;

use clap::Args;
use clap::builder::FalseyValueParser;
use serde::Serialize;

use super::{print, print_json};
use crate::command::config::Config;
use crate::command::output::{terminal_width, wrap};
use crate::database::{COMMAND_PRIVILEGES, Database, handler_connections};
use crate::engine::apply;
use crate::engine::error::Error;
use crate::ledger::Ledger;
use crate::model::backoff::Transient;
use crate::model::lifecycle::Status;
use crate::model::registry::Registry;
use crate::model::text::{count, escape_control};
use crate::queue::Action;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
Changes nothing: grants are checked by statements that are explained or prepared but not run, \
permissions by SQS calls that cannot have an effect (an empty batch, invalid receipts). Exit \
codes: 0 no errors, but possibly warnings; 2 at least one error; 3 the database or the queue \
cannot be reached.\n\n\
Examples:\n\
\x20 projectionist doctor\n\
\x20 projectionist doctor --for relay\n\
\x20 projectionist doctor --json")]
pub(super) struct DoctorCommand {
    /// The commands for which grants and permissions are required. A missing grant for another
    /// command is only a note. The queue is checked for play, lambda and relay
    #[arg(long = "for", value_name = "COMMAND", env = "PROJECTIONIST_DOCTOR_FOR",
          value_delimiter = ',', default_values = ["boot", "play"], value_parser = commands())]
    commands: Vec<String>,

    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

impl DoctorCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let mut checks = Vec::new();
        let registry = config.registry(registry);
        let mut record = None;
        match config.database().await {
            Ok(database) => {
                // If the log cannot be read, another check reports it.
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
                if let Ok(registry) = &registry {
                    let sessions = handler_connections(config.connections_for(registry));
                    checks.push(check_sessions(registry.dedicated_session_count(), sessions));
                }
                examine_projectors(&database, registry, &mut checks).await;
            }
            Err(error) => {
                checks.push(Check::failed("database", &error));
                if let Err(error) = registry {
                    checks.push(Check::failed("projectors", &error));
                }
            }
        }
        if let Some(actions) = Action::of_commands(&self.commands) {
            match config.queue().await {
                Ok(queue) => {
                    queue::examine(&queue, &actions, record.as_ref(), config, &mut checks).await;
                }
                Err(error) => checks.push(Check::failed("queue", &error)),
            }
        }
        self.report(&checks)
    }

    fn report(&self, checks: &[Check]) -> Result<(), Error> {
        let worst = checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok);
        if self.json {
            print_json(&Report { healthy: worst < Level::Error, checks })?;
        } else {
            print(summarize(checks))?;
            let width = terminal_width();
            let mut checks: Vec<&Check> = checks.iter().collect();
            checks.sort_by_key(|check| Reverse(check.level));
            checks.iter().flat_map(|check| check.lines(width)).try_for_each(print)?;
        }
        let bad: Vec<&str> = checks
            .iter()
            .filter(|check| check.level >= Level::Error)
            .map(|check| check.name.as_str())
            .collect();
        let summary =
            format!("problems: {}; each line on standard output says what to do", bad.join(", "));
        match worst {
            Level::Unreachable => Err(Error::Unreachable(summary)),
            Level::Error => Err(Error::Input(summary)),
            _ => Ok(()),
        }
    }
}

fn commands() -> Vec<&'static str> {
    COMMAND_PRIVILEGES.iter().map(|(command, _)| *command).collect()
}

/// Whether each projector that keeps a session of its own can have one.
fn check_sessions(projectors: u32, sessions: u32) -> Check {
    let detail = format!(
        "{projectors} projector(s) keep their own; boot and play have {sessions} for handlers"
    );
    if projectors <= sessions {
        return Check::ok("sessions", detail);
    }
    Check::problem(
        Level::Warning,
        "sessions",
        format!("{detail}, so some open a new one for each message"),
        "raise --connections, or use SessionUse::Shared for projectors that leave nothing in a \
         session",
    )
}

/// Checks that the projectors' files load, and which projectors must be booted.
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
                "to check projectors, name their folder with --projectors DIR",
            ));
        }
        Ok(registry) => registry,
        Err(error) => return checks.push(Check::failed("projectors", &error)),
    };
    // If the ledger cannot be read, an earlier check has reported it.
    let Ok(entries) = Ledger::new(database).entries().await else { return };
    let sample = EventStore::new(database).sample_types().await.ok();
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
                "remove it from this release",
            ),
            Some(Status::Broken(failure)) => {
                let remedy = match failure.rebuild_reason {
                    None => "fix it, and run boot",
                    Some(_) => "retire it and run boot again, or give it a new version",
                };
                Check::problem(Level::Warning, &check, format!("broken: {}", failure.error), remedy)
            }
            Some(status) => Check::problem(Level::Warning, &check, status.as_str(), "run boot"),
            None => Check::problem(
                Level::Warning,
                &check,
                "not booted, so it is not played",
                "run boot",
            ),
        });
        // Before its first boot, a projector's tables may be missing.
        let row_by_row = match entry {
            Some(_) => apply::find_row_by_row(database, projector).await.unwrap_or_default(),
            None => Vec::new(),
        };
        for description in row_by_row {
            checks.push(Check::problem(
                Level::Note,
                &check,
                format!("rows are written one by one, which makes boot slower: {description}"),
                "see `batch` in docs/projector-files.md",
            ));
        }
        let missing = projector
            .event_types()
            .zip(sample.as_ref())
            .and_then(|(types, sample)| sample.describe_missing(types.iter()));
        if let Some(missing) = missing {
            checks.push(Check::problem(
                Level::Warning,
                &check,
                missing,
                "correct the names, unless their first event is yet to come",
            ));
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    healthy: bool,
    checks: &'a [Check],
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    level: Level,
    detail: String,
    /// How to fix the problem.
    remedy: Option<String>,
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

    /// A check that could not be made because of an error.
    fn failed(name: &str, error: &Error) -> Self {
        let level = if error.is_transient() { Level::Unreachable } else { Level::Error };
        Check { name: name.into(), level, detail: error.to_string(), remedy: None }
    }
}

impl Check {
    /// The check for people: on one line if it fits. Otherwise the detail is below its name.
    fn lines(&self, width: Option<usize>) -> Vec<String> {
        let start = format!("{:<12}  {:<27}", self.level.to_string(), self.name);
        let remedy = self.remedy.as_ref().map_or_else(String::new, |remedy| format!("; {remedy}"));
        let detail = format!("{}{remedy}", escape_control(&self.detail));
        if width.is_some_and(|width| start.len() + 2 + detail.len() > width) {
            let mut lines = vec![start.trim_end().to_owned()];
            lines.extend(wrap(&detail, "    ", width));
            lines
        } else {
            vec![format!("{start}  {detail}")]
        }
    }
}

/// How many checks have which result: `40 checks: 1 error, 2 warnings, 37 ok`.
fn summarize(checks: &[Check]) -> String {
    let levels = [Level::Unreachable, Level::Error, Level::Warning, Level::Note, Level::Ok];
    let counts: Vec<String> = levels
        .into_iter()
        .filter_map(|level| {
            let number = checks.iter().filter(|check| check.level == level).count() as u64;
            (number > 0).then(|| match level {
                Level::Unreachable => format!("{number} unreachable"),
                Level::Error => count(number, "error"),
                Level::Warning => count(number, "warning"),
                Level::Note => count(number, "note"),
                Level::Ok => format!("{number} ok"),
            })
        })
        .collect();
    format!("{}: {}\n", count(checks.len() as u64, "check"), counts.join(", "))
}

/// The result of a check, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Ok,
    /// Not a problem, but worth knowing.
    Note,
    /// Works, but not as well or as safely as it could.
    Warning,
    /// Does not work.
    Error,
    /// The database or the queue cannot be reached.
    Unreachable,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_sessions_than_connections_are_a_warning() {
        assert_eq!(check_sessions(40, 40).level, Level::Ok);
        let check = check_sessions(41, 40);
        assert_eq!(check.level, Level::Warning);
        assert!(check.detail.contains("41 projector(s)"), "{}", check.detail);
    }
}
