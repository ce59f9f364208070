//! `rotate`: a new id and a new key for the log.

use clap::Args;
use clap::builder::FalseyValueParser;

use super::{confirm, print};
use crate::command::config::Config;
use crate::model::error::Error;
use crate::model::signature::random_key;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
For a database that was restored from a backup, or is a clone of another: messages of the log that was, or of the other one, may \
still come from the queue. And for a key that may be known to somebody: with it, messages can be forged.

Harmless while workers, functions and relays run: they go on with the new id and key within seconds, and no event is lost or \
applied twice. Messages that were sent before are not of this log any more: they are not applied, and not deleted either. Purge \
the queue, or let its redrive policy take them.")]
pub(super) struct RotateCommand {
    /// Do not ask
    #[arg(long, env = "PROJECTIONIST_YES", value_parser = FalseyValueParser::new())]
    yes: bool,
}

impl RotateCommand {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let store = EventStore::new(&config.database().await?);
        confirm(
            "the log gets a new id and a new key, and messages that were sent before are not ours any more",
            self.yes,
        )?;
        let id = store.rotate(&random_key()?).await?;
        print(format!(
            "the log is {id} now, and has a new key; messages that were sent before are neither applied nor deleted: purge the \
             queue, or let its redrive policy take them"
        ))
    }
}
