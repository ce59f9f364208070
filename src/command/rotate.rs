//! The `rotate` command: gives the log a new id and a new signing key.

use clap::Args;
use clap::builder::FalseyValueParser;

use super::{confirm, print};
use crate::command::config::Config;
use crate::engine::error::Error;
use crate::model::signature::random_key;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
Use it for a database that was restored from a backup, or that is a clone of another: the queue \
may still have messages of the former log, or of the other one. Also use it if the key may have \
leaked: with the key, messages can be forged.

Safe while workers, functions and relays run: they use the new id and key within seconds, and no \
event is lost or applied twice. Messages that were sent before do not belong to this log any \
more: they are neither applied nor deleted. Purge the queue, or let its redrive policy move them.\n\n\
Examples:\n\
\x20 projectionist rotate\n\
\x20 projectionist rotate --yes")]
pub(super) struct RotateCommand {
    /// Do not ask for confirmation
    #[arg(long, env = "PROJECTIONIST_YES", value_parser = FalseyValueParser::new())]
    yes: bool,
}

impl RotateCommand {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let store = EventStore::new(&config.database().await?);
        confirm(
            "the log gets a new id and a new key, and messages that were sent before do not belong \
            to it any more",
            self.yes,
        )?;
        let key = random_key().ok_or_else(|| {
            let reason = "the operating system provides no random numbers for a signing key";
            Error::Input(reason.into())
        })?;
        let id = store.rotate(&key).await?;
        print(format!(
            "the log is {id} now, and has a new key; messages that were sent before are neither \
            applied nor deleted: purge the queue, or let its redrive policy move them"
        ))
    }
}
