//! The receipts of messages that are not ours: which stay hidden, which are given back, and how long the next receive waits, so
//! that their owner can have them.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::queue::{Foreign, Queue, Receipt};

/// After receives of nothing but messages that are not ours, the next one waits for so long; it doubles. Meanwhile their owner
/// can have them, and projectors are fed from the store.
pub(super) const FIRST_FOREIGN_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_FOREIGN_PAUSE: Duration = Duration::from_secs(30);

/// A receive that brings so many messages may have left some of ours behind them.
const FULL_RECEIVE: usize = 10;

/// So many messages that are not ours are taken at most, and given back together, to see what stands behind them.
const MOST_SET_ASIDE: usize = 100;

/// After so many receives without a message of ours, a queue that still holds some that are not is taken to hold nothing else.
const BARREN_RECEIVES: u32 = 3;

/// Beyond, messages that are not ours are not told from each other, and not given back at the end: they come back by themselves.
const MOST_FOREIGN_KNOWN: usize = 10_000;

/// The messages of a queue that are not ours.
#[derive(Debug, Default)]
pub(super) struct SetAside {
    /// Each once, by a hash of its id.
    known: HashSet<u64>,
    /// Those that came with messages of ours: hidden until their visibility expires, so that ours are not held up by them.
    hidden: VecDeque<(Instant, Receipt)>,
    /// Those that came without any of ours, and are given back once it is seen what stands behind them.
    aside: Vec<Receipt>,
    /// Pauses in a row because nothing came but messages that are not ours.
    pauses: u32,
    /// Receives in a row that brought no message of ours.
    barren_receives: u32,
}

impl SetAside {
    /// How many different messages were seen.
    pub(super) fn seen(&self) -> u64 {
        self.known.len() as u64
    }

    /// Returns `true` if the last receive brought no message of ours.
    pub(super) fn is_barren(&self) -> bool {
        self.barren_receives > 0
    }

    /// Returns `true` if the queue is taken to hold nothing but messages that are not ours.
    pub(super) fn fills_the_queue(&self) -> bool {
        !self.known.is_empty() && self.barren_receives >= BARREN_RECEIVES
    }

    /// The receipts of our messages, and those of the others.
    pub(super) fn tell_apart(
        &mut self,
        verdicts: &[Option<Foreign>],
        receipts: Vec<Receipt>,
        ids: &[String],
        bodies: &[String],
    ) -> (Vec<Receipt>, Vec<Receipt>) {
        let (mut ours, mut foreign) = (Vec::with_capacity(receipts.len()), Vec::new());
        for (at, receipt) in receipts.into_iter().enumerate() {
            if verdicts[at].is_none() {
                ours.push(receipt);
                continue;
            }
            foreign.push(receipt);
            if self.known.len() < MOST_FOREIGN_KNOWN {
                let mut hasher = DefaultHasher::new();
                if ids[at].is_empty() { &bodies[at] } else { &ids[at] }.hash(&mut hasher);
                self.known.insert(hasher.finish());
            }
        }
        (ours, foreign)
    }

    /// Records a receive without any message. Returns `true` if messages are aside that should be given back.
    pub(super) fn received_nothing(&mut self) -> bool {
        self.barren_receives += 1;
        !self.aside.is_empty()
    }

    /// Puts the messages of a receive without any of ours aside. Returns `true` if ours may stand behind them.
    pub(super) fn received_only(&mut self, foreign: Vec<Receipt>) -> bool {
        self.barren_receives += 1;
        let is_full = foreign.len() >= FULL_RECEIVE;
        self.aside.extend(foreign);
        is_full && self.aside.len() < MOST_SET_ASIDE
    }

    /// Records that messages of ours were received with these others, which stay hidden for `visibility`.
    pub(super) fn received_with_ours(&mut self, foreign: Vec<Receipt>, visibility: Duration) {
        (self.barren_receives, self.pauses) = (0, 0);
        let now = Instant::now();
        while self.hidden.front().is_some_and(|(since, _)| now.duration_since(*since) > visibility)
            || self.hidden.len() > MOST_FOREIGN_KNOWN
        {
            self.hidden.pop_front();
        }
        let aside = std::mem::take(&mut self.aside);
        self.hidden.extend(aside.into_iter().chain(foreign).map(|receipt| (now, receipt)));
    }

    /// Gives back what came without any of ours, before a pause.
    pub(super) async fn give_back_aside(&mut self, queue: &dyn Queue) {
        self.pauses += 1;
        let aside = std::mem::take(&mut self.aside);
        show(queue, &aside).await;
    }

    /// Gives back all that is hidden.
    pub(super) async fn give_back(&mut self, queue: &dyn Queue) {
        let mut hidden: Vec<Receipt> = self.hidden.drain(..).map(|(_, receipt)| receipt).collect();
        hidden.append(&mut self.aside);
        show(queue, &hidden).await;
    }

    /// How long the next receive waits.
    pub(super) fn pause(&self, until_idle: bool) -> Duration {
        let doubled = FIRST_FOREIGN_PAUSE * (1 << self.pauses.saturating_sub(1).min(5));
        doubled.min(if until_idle { FIRST_FOREIGN_PAUSE } else { LONGEST_FOREIGN_PAUSE })
    }
}

async fn show(queue: &dyn Queue, receipts: &[Receipt]) {
    if let Err(error) = queue.hide(receipts, Duration::ZERO).await {
        debug!(%error, "messages that are not ours were not given back, and come back by themselves");
    }
}
