//! The `fill` command: fills a gap in the log that is too wide to be a rollback.

use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::HumanCount;

use super::{confirm, print};
use crate::command::config::Config;
use crate::engine::error::Error;
use crate::model::text::count;
use crate::store::{Blocker, EventStore};

/// The widest range that is filled. A wider gap has a row with a position that nobody intended, and
/// fillers for the whole gap would fill the disk.
const MAX_POSITIONS: u64 = 100_000_000;

/// The most positions that are filled by one call of [`EventStore::fill`].
const POSITIONS_PER_BATCH: u64 = 10_000;

#[derive(Debug, Args)]
#[command(after_help = "\
A gap of over 65,536 positions blocks the high-water mark until an operator fills it. Its cause \
is a wrong auto_increment or an explicit position. This command puts a filler into each missing \
position; positions that a writer has taken are left alone. A position at or below the high-water \
mark cannot be filled: a row that is missing there was deleted, see `audit`.\n\n\
Examples:\n\
\x20 projectionist fill 10 70019\n\
\x20 projectionist fill 10 70019 --yes")]
pub(super) struct FillCommand {
    /// The first missing position
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    first: u64,

    /// The last missing position
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    last: u64,

    /// Do not ask for confirmation
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
        // Positions after the last visible one are not a gap: they are yet to be assigned.
        let visible = store.last_visible().await?.get();
        if last > visible {
            return Err(Error::Input(format!(
                "the last position of the log is {visible}: there is no gap up to {last}"
            )));
        }
        if last - first >= MAX_POSITIONS {
            return Err(Error::Input(format!(
                "the range has more than {}, each of which would get a row: delete the row after \
                 the gap and append its event again, without a position of its own",
                count(MAX_POSITIONS, "position")
            )));
        }
        let mark = store.marks().await?.high_water.get();
        if first <= mark {
            return Err(Error::Input(format!(
                "positions up to the high-water mark, {mark}, cannot be filled: a row that is \
                missing there was deleted. See `projectionist audit`, and `audit --accept`"
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
            if let Some(blocker) = step.blocked {
                let at = match blocker {
                    Blocker::InFlight(position) => position.get(),
                    Blocker::WideGap(gap) => *gap.start(),
                };
                return Err(Error::Input(format!(
                    "a transaction that has not ended holds a position from {at} on; {} filled before \
                    it. Run the command again when the transaction has ended",
                    count(filled, "position")
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
            filled => {
                let filled = count(filled, "position");
                print(format!("filled {filled} from {first} to {last}; {taken} had a row already"))
            }
        }
    }
}
