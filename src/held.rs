//! What holds the high-water mark, told when it is worth somebody's while.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::store::Held;

/// A transaction may take its time. Beyond this, somebody should look: nothing after it is published or replayed.
const TOO_LONG: Duration = Duration::from_secs(10);

/// Remembers what holds the mark, and since when, so that it is told once and not with every look.
#[derive(Debug, Default)]
pub(crate) struct HeldWatch {
    held: Option<HeldSince>,
}

#[derive(Debug)]
struct HeldSince {
    held: Held,
    since: Instant,
    told: bool,
}

impl HeldWatch {
    /// Since when the mark has been held by the same thing, if anything holds it.
    pub(crate) fn since(&self) -> Option<Instant> {
        self.held.as_ref().map(|held| held.since)
    }

    /// Takes note of what holds the mark now, if anything does.
    pub(crate) fn note(&mut self, held: Option<Held>) {
        let Some(held) = held else {
            if self.held.take().is_some_and(|before| before.told) {
                info!("the high-water mark rises again");
            }
            return;
        };
        if self.held.as_ref().is_none_or(|before| before.held != held) {
            self.held = Some(HeldSince { held, since: Instant::now(), told: false });
        }
        let Some(HeldSince { held, since, told }) = self.held.as_mut().filter(|held| !held.told) else { return };
        match held {
            Held::InFlight(position) if since.elapsed() > TOO_LONG => {
                *told = true;
                warn!(
                    alert = "high_water_held",
                    position = position.get(),
                    seconds = since.elapsed().as_secs(),
                    "a transaction that holds this position has neither committed nor rolled back: \
                     nothing after it is published or replayed. Look for it in information_schema.innodb_trx"
                );
            }
            Held::InFlight(_) => {}
            Held::Gap(gap) => {
                *told = true;
                warn!(
                    alert = "high_water_held",
                    first = gap.start(),
                    last = gap.end(),
                    "so many positions are missing that no rollback explains it: nothing after them is published or \
                     replayed. If no writer can still hold them, close the gap: projectionist fill {} {}",
                    gap.start(),
                    gap.end()
                );
            }
        }
    }
}
