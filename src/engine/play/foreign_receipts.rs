//! The receipts of foreign messages. This module decides which of them stay hidden, which are
//! returned to the queue, and how long the next receive waits so that their owner can receive them.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::queue::{ForeignReason, Queue, Receipt};

/// The first pause after receives that brought only foreign messages. The pause doubles each time.
/// Meanwhile their owner can receive them, and projectors are fed from the store.
pub(super) const FIRST_FOREIGN_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_FOREIGN_PAUSE: Duration = Duration::from_secs(30);

/// A receive with this many messages may have left messages of this log behind them in the queue.
const FULL_RECEIVE: usize = 10;

/// The maximum number of foreign messages that are set aside, to reach the messages behind them,
/// before they are returned together.
const MAX_SET_ASIDE: usize = 100;

/// After this many receives without a message of this log, a queue with known foreign messages is
/// assumed to hold only foreign ones.
const MIN_UNPRODUCTIVE_RECEIVES: u32 = 3;

/// The maximum number of foreign messages that are remembered. Beyond this, they are neither
/// counted separately nor returned at the end; they reappear when their visibility timeout ends.
const MAX_KNOWN_FOREIGN: usize = 10_000;

/// The foreign messages of a queue.
#[derive(Debug, Default)]
pub(super) struct ForeignReceipts {
    /// The distinct foreign messages, as hashes of their ids.
    known: HashSet<u64>,
    /// Foreign messages that arrived together with messages of this log. They stay hidden until
    /// their visibility timeout ends, so that they do not delay other messages.
    hidden: VecDeque<(Instant, Receipt)>,
    /// Foreign messages that arrived alone. They are returned once the messages behind them have
    /// been received.
    set_aside: Vec<Receipt>,
    /// Consecutive pauses because only foreign messages arrived.
    pauses: u32,
    /// Consecutive receives without a message of this log.
    unproductive_receives: u32,
}

impl ForeignReceipts {
    /// The number of distinct foreign messages.
    pub(super) fn count(&self) -> u64 {
        self.known.len() as u64
    }

    /// Returns `true` if the last receive brought no message of this log.
    pub(super) fn is_unproductive(&self) -> bool {
        self.unproductive_receives > 0
    }

    /// Returns `true` if the queue is assumed to hold only foreign messages.
    pub(super) fn has_only_foreign(&self) -> bool {
        !self.known.is_empty() && self.unproductive_receives >= MIN_UNPRODUCTIVE_RECEIVES
    }

    /// Splits receipts into those of this log's messages and those of foreign messages.
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

    /// Records a receive without messages. Returns `true` if there are set-aside messages to
    /// return.
    pub(super) fn record_empty_receive(&mut self) -> bool {
        self.unproductive_receives += 1;
        !self.set_aside.is_empty()
    }

    /// Sets the messages of a receive aside that brought only foreign ones. Returns `true` if there
    /// may be messages of this log behind them.
    pub(super) fn record_foreign_receive(&mut self, foreign: Vec<Receipt>) -> bool {
        self.unproductive_receives += 1;
        let is_full = foreign.len() >= FULL_RECEIVE;
        self.set_aside.extend(foreign);
        is_full && self.set_aside.len() < MAX_SET_ASIDE
    }

    /// Records a receive with messages of this log. The foreign messages stay hidden for
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

    /// Returns the set-aside messages to the queue, before a pause.
    pub(super) async fn return_set_aside(&mut self, queue: &dyn Queue) {
        self.pauses += 1;
        let set_aside = std::mem::take(&mut self.set_aside);
        make_visible(queue, &set_aside).await;
    }

    /// Returns all hidden and set-aside messages to the queue.
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
        debug!(
            %error,
            "cannot return foreign messages: they reappear after their visibility timeout"
        );
    }
}
