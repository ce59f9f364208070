//! `fill`: closes a gap in the log that is too wide to be a rollback.

use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::HumanCount;

use super::{confirm, print};
use crate::command::config::Config;
use crate::model::error::Error;
use crate::store::{Blocker, EventStore};

/// Positions that are filled between two looks.
const POSITIONS_PER_BATCH: u64 = 10_000;

#[derive(Debug, Args)]
#[command(after_help = "\
A gap of over 65,536 positions holds the high-water mark until somebody has looked: a wrong auto_increment, an explicit \
position. This puts a filler into each missing position; what a writer has taken is left alone. Positions at or below the \
high-water mark are decided already: what is missing there was deleted, and is a matter for `audit`.")]
pub(super) struct FillCommand {
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

impl FillCommand {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let FillCommand { first, last, yes } = self;
        if first > last {
            return Err(Error::Input(format!(
                "the first position, {first}, lies after the last, {last}"
            )));
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
            let end = last.min(next.saturating_add(POSITIONS_PER_BATCH - 1));
            let positions: Vec<u64> = (next..=end).collect();
            let step = store.fill(&positions).await?;
            filled += step.count;
            if let Some(held) = step.blocked {
                let at = match held {
                    Blocker::InFlight(position) => position.get(),
                    Blocker::WideGap(gap) => *gap.start(),
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
            0 => print(format!("nothing to fill: each position from {first} to {last} has a row")),
            1 => print(format!(
                "filled 1 position from {first} to {last}; {taken} had a row already"
            )),
            filled => {
                let filled = HumanCount(filled);
                print(format!(
                    "filled {filled} positions from {first} to {last}; {taken} had a row already"
                ))
            }
        }
    }
}
