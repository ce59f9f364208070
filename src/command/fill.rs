//! `fill`: closes a gap in the log that is too wide to be a rollback.

use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::HumanCount;

use super::{confirm, say};
use crate::command::config::Config;
use crate::model::error::Error;
use crate::store::{EventStore, Held};

/// Positions that are filled between two looks.
const STEP: u64 = 10_000;

#[derive(Debug, Args)]
#[command(after_help = "\
A gap of over 65,536 positions holds the high-water mark until somebody has looked: a wrong auto_increment, an explicit \
position. This puts a filler into each missing position; what a writer has taken is left alone. Positions at or below the \
high-water mark are decided already: what is missing there was deleted, and is a matter for `audit`.")]
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
        let mark = store.marks().await?.high_water.get();
        if first <= mark {
            return Err(Error::Input(format!(
                "the positions up to the high-water mark, {mark}, are decided already: what is missing there was deleted. \
                 See `projectionist audit`, and `audit --accept`"
            )));
        }
        confirm(&format!("each missing position from {first} to {last} gets a filler"), yes)?;
        let mut filled = 0;
        let mut next = first;
        loop {
            let end = last.min(next.saturating_add(STEP - 1));
            let positions: Vec<u64> = (next..=end).collect();
            let step = store.fill(&positions).await?;
            filled += step.count;
            if let Some(held) = step.held {
                let at = match held {
                    Held::InFlight(position) => position.get(),
                    Held::Gap(gap) => *gap.start(),
                };
                return Err(Error::Input(format!(
                    "a transaction that has not ended holds a position from {at} on; {filled} positions were filled before it. \
                     Run it again when that has ended"
                )));
            }
            if end == last {
                break;
            }
            next = end + 1;
        }
        let taken = HumanCount((last - first).saturating_add(1) - filled);
        match filled {
            0 => say(format!("nothing to fill: each position from {first} to {last} has a row")),
            1 => say(format!("filled 1 position from {first} to {last}; {taken} had a row already")),
            filled => {
                let filled = HumanCount(filled);
                say(format!("filled {filled} positions from {first} to {last}; {taken} had a row already"))
            }
        }
    }
}
