//! The `conformance` command: checks a handler in another language against the protocol.

use std::collections::BTreeMap;

use clap::Args;
use clap::builder::FalseyValueParser;
use serde::Serialize;

use super::{print, print_json};
use crate::command::config::Config;
use crate::engine::error::Error;
use crate::handlers::{CASES, CommandSpec, Conformance};
use crate::model::text::escape_control;

#[derive(Debug, Args)]
#[command(after_help = "\
Makes a scratch database on the server of --database-url, and drops it at the end, so the user \
needs all privileges on databases named conformance_… The handler serves the projector \
`conformance`; docs/handlers.md says what it does. Exit code 1 means that a case does not \
hold.\n\n\
Examples:\n\
\x20 projectionist conformance -- php examples/handlers/php/conformance.php\n\
\x20 projectionist conformance --json -- python3 conformance.py")]
pub(super) struct ConformanceCommand {
    /// The variable in which the handler finds the URL of the scratch database
    #[arg(
        long,
        value_name = "NAME",
        env = "PROJECTIONIST_DATABASE_VARIABLE",
        default_value = "HANDLER_DATABASE_URL"
    )]
    database_variable: String,

    /// Print one JSON document
    #[arg(long, env = "PROJECTIONIST_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    /// The handler's program and its arguments. It inherits all variables
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// The result of one case.
#[derive(Debug, Serialize)]
struct CaseReport {
    case: &'static str,
    holds: bool,
    /// The rule that the handler breaks.
    reason: Option<String>,
}

impl ConformanceCommand {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let server = config.database().await?;
        let name = format!("conformance_{}", uuid::Uuid::now_v7().simple());
        server.create_scratch(&name).await?;
        let reports = self.run_cases(config, &name).await;
        server.drop_scratch(&name).await?;
        self.report(&reports?)
    }

    async fn run_cases(&self, config: &Config, name: &str) -> Result<Vec<CaseReport>, Error> {
        let (database, url) = config.scratch_database(name).await?;
        database.migrate().await?;
        let spec = CommandSpec {
            command: self.command.clone(),
            directory: None,
            environment: BTreeMap::from([(self.database_variable.clone(), url)]),
            pass_environment: std::env::vars().map(|(name, _)| name).collect(),
        };
        let kit = Conformance::new(database, spec).await;
        let mut kit = kit.map_err(|error| Error::Input(format!("{error:#}")))?;
        let mut reports = Vec::new();
        for (number, &case) in CASES.iter().enumerate() {
            let ended = kit.run(number).await;
            let report = CaseReport {
                case,
                holds: ended.is_ok(),
                reason: ended.err().map(|error| format!("{error:#}")),
            };
            if !self.json {
                print(&report)?;
            }
            reports.push(report);
        }
        Ok(reports)
    }

    fn report(&self, reports: &[CaseReport]) -> Result<(), Error> {
        if self.json {
            print_json(&reports)?;
        }
        let broken = reports.iter().filter(|report| !report.holds).count();
        if broken > 0 {
            return Err(Error::Projector(format!(
                "{broken} of {} cases do not hold: the handler may lose or repeat events",
                reports.len()
            )));
        }
        Ok(())
    }
}

impl std::fmt::Display for CaseReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.reason {
            None => write!(f, "ok     {}", self.case),
            Some(reason) => write!(f, "WRONG  {}: {}", self.case, escape_control(reason)),
        }
    }
}
