//! The `retire` command: tears a projector down.

use std::pin::pin;
use std::time::Duration;

use clap::Args;
use clap::builder::FalseyValueParser;

use super::{confirm, print, selection};
use crate::command::config::Config;
use crate::database::error::format_chain;
use crate::engine::apply;
use crate::engine::error::Error;
use crate::ledger::{Entry, Ledger};
use crate::model::backoff::retry_transient;
use crate::model::lifecycle::{Status, Transition};
use crate::model::registry::Registry;
use crate::model::wait_log::log_wait;

/// How long to wait until a worker releases the projector's row.
const LOCK_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
#[command(after_help = "\
Runs the projector's teardown, if the given set still has the projector, and deletes its ledger \
row. If the set does not have it, drop its tables yourself. A projector with side effects keeps \
its row, as retired, so that no later release can play it again. Wait some days after the release \
that removed the projector: a rollback would have to boot it again.\n\n\
Examples:\n\
\x20 projectionist retire case_status@1\n\
\x20 projectionist retire case_status@1 --yes")]
pub(super) struct RetireCommand {
    /// The projector, with its version if there are several
    #[arg(value_name = "NAME[@VERSION]")]
    projector: String,

    /// Do not ask for confirmation
    #[arg(long, env = "PROJECTIONIST_YES", value_parser = FalseyValueParser::new())]
    yes: bool,

    /// Retire it although it is live in the given set
    #[arg(long, env = "PROJECTIONIST_FORCE", value_parser = FalseyValueParser::new())]
    force: bool,
}

impl RetireCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let registry = config.registry(registry)?;
        let database = config.database().await?;
        let ledger = Ledger::new(&database);
        let entry = self.find(&ledger.entries().await?)?;
        let id = &entry.id;
        let projector = registry.get(id);

        if entry.status == Status::Live && projector.is_some() && !self.force {
            return Err(Error::Input(format!(
                "{id} is live in this set: remove it from the set and release that first, or add \
                --force"
            )));
        }
        if entry.status == Status::Retired && entry.has_side_effects {
            return print(format!(
                "{id} is retired already; its row is kept, so that it is never played again"
            ));
        }
        let fate = match (projector.is_some(), entry.has_side_effects) {
            (true, false) => "its tables are torn down and its ledger row is deleted",
            (false, false) => {
                "its ledger row is deleted; this set does not have it, so its tables stay: drop \
                them before a release has this name and version again, because it would be built \
                on them"
            }
            (true, true) => {
                "its tables are torn down; it has side effects, so its row stays, as retired, permanently"
            }
            (false, true) => {
                "it has side effects, so its row stays, as retired, permanently; its tables stay, too"
            }
        };
        confirm(
            &format!(
                "{id} ({}, position {}) will be retired: {fate}",
                entry.status, entry.position
            ),
            self.yes,
        )?;

        // The status changes first, so that no worker plays the projector while its tables are
        // dropped. If retire is interrupted, the next run continues here.
        if entry.status != Status::Retired {
            // A worker's handler may hold the row.
            let retire = || {
                ledger.transition(id, Transition::Retire, |entry| entry.status != Status::Retired)
            };
            let retiring = pin!(retry_transient(Some(LOCK_WAIT), "retire the projector", retire));
            log_wait("the projector's row, which a running batch has locked", retiring).await?;
        }
        if let Some(projector) = projector {
            let tearing_down = pin!(apply::tear_down(&database, projector));
            let torn_down = log_wait("the projector's teardown", tearing_down).await;
            registry.stop_processes().await;
            torn_down.map_err(|error| {
                Error::Projector(format!(
                    "{id}: its teardown failed: {}; it is retired, and retire can be run again",
                    format_chain(&error)
                ))
            })?;
        }
        if !entry.has_side_effects {
            ledger.remove(id).await?;
        }
        print(format!("{id} is retired: {fate}"))
    }

    fn find(&self, entries: &[Entry]) -> Result<Entry, Error> {
        let ids = entries.iter().map(|entry| &entry.id);
        let ids = selection::find(&self.projector, ids, "the ledger")?;
        let found: Vec<&Entry> = entries.iter().filter(|entry| ids.contains(&&entry.id)).collect();
        match found[..] {
            [entry] => Ok(entry.clone()),
            _ => {
                let versions: Vec<String> = ids.iter().map(|id| id.to_string()).collect();
                Err(Error::Input(format!("name one of its versions: {}", versions.join(", "))))
            }
        }
    }
}
