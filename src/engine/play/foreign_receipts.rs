//! The receipts of messages that are not ours: which stay hidden, which are given back, and how
//! long the next receive waits, so that their owner can have them.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::queue::{ForeignReason, Queue, Receipt};

/// After receives of nothing but messages that are not ours, the next one waits for so long; it
/// doubles. Meanwhile their owner can have them, and projectors are fed from the store.
pub(super) const FIRST_FOREIGN_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_FOREIGN_PAUSE: Duration = Duration::from_secs(30);

/// A receive that brings so many messages may have left some of ours behind them.
const FULL_RECEIVE: usize = 10;

/// So many messages that are not ours are taken at most, and given back together, to see what
/// stands behind them.
const MAX_SET_ASIDE: usize = 100;

/// After so many receives without a message of ours, a queue that still holds some that are not is
/// taken to hold nothing else.
const MIN_UNPRODUCTIVE_RECEIVES: u32 = 3;

/// Beyond, messages that are not ours are not told from each other, and not given back at the end:
/// they come back by themselves.
const MAX_KNOWN_FOREIGN: usize = 10_000;

/// The messages of a queue that are not ours.
#[derive(Debug, Default)]
pub(super) struct ForeignReceipts {
    /// Each once, by a hash of its id.
    known: HashSet<u64>,
    /// Those that came with messages of ours: hidden until their visibility expires, so that ours
    /// are not held up by them.
    hidden: VecDeque<(Instant, Receipt)>,
    /// Those that came without any of ours, and are given back once it is seen what stands behind
    /// them.
    set_aside: Vec<Receipt>,
    /// Pauses in a row because nothing came but messages that are not ours.
    pauses: u32,
    /// Receives in a row that brought no message of ours.
    unproductive_receives: u32,
}

impl ForeignReceipts {
    /// How many different messages were seen.
    pub(super) fn count(&self) -> u64 {
        self.known.len() as u64
    }

    /// Returns `true` if the last receive brought no message of ours.
    pub(super) fn is_unproductive(&self) -> bool {
        self.unproductive_receives > 0
    }

    /// Returns `true` if the queue is taken to hold nothing but messages that are not ours.
    pub(super) fn has_only_foreign(&self) -> bool {
        !self.known.is_empty() && self.unproductive_receives >= MIN_UNPRODUCTIVE_RECEIVES
    }

    /// The receipts of our messages, and those of the others.
    pub(super) fn split(
        &mut self,
        verdicts: &[Option<ForeignReason>],
        receipts: Vec<Receipt>,
        ids: &[String],
        bodies: &[String],
    ) -> (Vec<Receipt>, Vec<Receipt>) {
        let (mut own, mut foreign) = (Vec::with_capacity(receipts.len()), Vec::new());
        for (at, receipt) in receipts.into_iter().enumerate() {
            if verdicts[at].is_none() {
                own.push(receipt);
                continue;
            }
            foreign.push(receipt);
            if self.known.len() < MAX_KNOWN_FOREIGN {
                let mut hasher = DefaultHasher::new();
                if ids[at].is_empty() { &bodies[at] } else { &ids[at] }.hash(&mut hasher);
                self.known.insert(hasher.finish());
            }
        }
        (own, foreign)
    }

    /// Records a receive without any message. Returns `true` if messages are aside that should be
    /// given back.
    pub(super) fn record_empty_receive(&mut self) -> bool {
        self.unproductive_receives += 1;
        !self.set_aside.is_empty()
    }

    /// Puts the messages of a receive without any of ours aside. Returns `true` if ours may stand
    /// behind them.
    pub(super) fn record_foreign_receive(&mut self, foreign: Vec<Receipt>) -> bool {
        self.unproductive_receives += 1;
        let is_full = foreign.len() >= FULL_RECEIVE;
        self.set_aside.extend(foreign);
        is_full && self.set_aside.len() < MAX_SET_ASIDE
    }

    /// Records that messages of ours were received with these others, which stay hidden for
    /// `visibility`.
    pub(super) fn record_mixed_receive(&mut self, foreign: Vec<Receipt>, visibility: Duration) {
        (self.unproductive_receives, self.pauses) = (0, 0);
        let now = Instant::now();
        while self.hidden.front().is_some_and(|(since, _)| now.duration_since(*since) > visibility)
            || self.hidden.len() > MAX_KNOWN_FOREIGN
        {
            self.hidden.pop_front();
        }
        let set_aside = std::mem::take(&mut self.set_aside);
        self.hidden.extend(set_aside.into_iter().chain(foreign).map(|receipt| (now, receipt)));
    }

    /// Gives back what came without any of ours, before a pause.
    pub(super) async fn return_set_aside(&mut self, queue: &dyn Queue) {
        self.pauses += 1;
        let set_aside = std::mem::take(&mut self.set_aside);
        make_visible(queue, &set_aside).await;
    }

    /// Gives back all that is hidden.
    pub(super) async fn return_all(&mut self, queue: &dyn Queue) {
        let mut hidden: Vec<Receipt> = self.hidden.drain(..).map(|(_, receipt)| receipt).collect();
        hidden.append(&mut self.set_aside);
        make_visible(queue, &hidden).await;
    }

    /// How long the next receive waits.
    pub(super) fn pause(&self, until_idle: bool) -> Duration {
        let doubled = FIRST_FOREIGN_PAUSE * (1 << self.pauses.saturating_sub(1).min(5));
        doubled.min(if until_idle { FIRST_FOREIGN_PAUSE } else { LONGEST_FOREIGN_PAUSE })
    }
}

async fn make_visible(queue: &dyn Queue, receipts: &[Receipt]) {
    if let Err(error) = queue.change_visibility(receipts, Duration::ZERO).await {
        debug!(%error, "messages that are not ours were not given back, and come back by themselves");
    }
}
