//! `fill`: closes a gap in the log that is too wide to be a rollback.

use clap::Args;
use clap::builder::FalseyValueParser;

use super::{confirm, say};
use crate::config::Config;
use crate::error::Error;
use crate::store::{EventStore, Held};

/// Positions that are filled between two looks.
const STEP: usize = 10_000;

#[derive(Debug, Args)]
#[command(after_help = "\
A gap of over 65,536 positions holds the high-water mark until somebody has looked: a wrong auto_increment, an explicit \
position. This puts a tombstone into each missing position; what a writer has taken is left alone.")]
pub(super) struct Fill {
    /// The first missing position
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    first: u64,

    /// The last missing position
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    last: u64,

    /// Do not ask
    #[arg(long, env = "PROJECTIONIST_YES", value_parser = FalseyValueParser::new())]
    yes: bool,
}

impl Fill {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let Fill { first, last, yes } = self;
        if first > last {
            return Err(Error::Input(format!("the first position, {first}, lies after the last, {last}")));
        }
        let store = EventStore::new(&config.database().await?);
        // Above what is visible there is no gap: those positions are still to be given out.
        let visible = store.last_visible().await?.get();
        if last > visible {
            return Err(Error::Input(format!(
                "the last position of the log is {visible}: there is no gap up to {last}"
            )));
        }
        confirm(&format!("each missing position from {first} to {last} gets a tombstone"), yes)?;
        let mut filled = Vec::with_capacity(STEP);
        let mut next = first;
        while next <= last {
            let end = last.min(next + STEP as u64 - 1);
            filled.clear();
            filled.extend(next..=end);
            if let Some(held) = store.fill(&filled).await? {
                let at = match held {
                    Held::InFlight(position) => position.get(),
                    Held::Gap(gap) => *gap.start(),
                };
                return Err(Error::Input(format!(
                    "a transaction that has not ended holds position {at}; filled up to {}. Run it again when that has ended",
                    next - 1
                )));
            }
            next = end + 1;
        }
        say(format!("positions {first} to {last} are filled"))
    }
}
