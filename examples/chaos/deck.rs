//! The order of the faults.

use std::time::{Duration, Instant};

use crate::faults::{DECK, Fault};

/// The pause before a kind that has had no effect strikes again. Some faults take effect with the
/// next commit or the next message.
const AGAIN_AFTER: Duration = Duration::from_secs(10);

pub struct Deck {
    /// The next faults, the last one first.
    cards: Vec<Fault>,
    /// The faults that have struck, with the time of their ends; `None` while they strike.
    struck: Vec<(Fault, Option<Instant>)>,
}

impl Deck {
    /// A deck whose first cards are one of each kind.
    pub fn new(dice: &mut fastrand::Rng) -> Self {
        let mut cards: Vec<Fault> = DECK.iter().map(|(fault, _)| *fault).collect();
        dice.shuffle(&mut cards);
        Deck { cards, struck: Vec::new() }
    }

    /// The next fault: one that has had no effect, or the next card.
    pub fn draw(
        &mut self,
        has_happened: impl Fn(Fault) -> bool,
        dice: &mut fastrand::Rng,
    ) -> Option<Fault> {
        if let Some(fault) = self.draw_again(has_happened) {
            return Some(fault);
        }
        if self.cards.is_empty() {
            let copies = |(fault, times): &(Fault, usize)| std::iter::repeat_n(*fault, *times);
            self.cards = DECK.iter().flat_map(copies).collect();
            dice.shuffle(&mut self.cards);
        }
        let fault = self.cards.pop()?;
        self.struck.push((fault, None));
        Some(fault)
    }

    /// A fault that has struck, but has had no effect.
    pub fn draw_again(&mut self, has_happened: impl Fn(Fault) -> bool) -> Option<Fault> {
        let is_due = |ended: &Option<Instant>| ended.is_some_and(|at| at.elapsed() > AGAIN_AFTER);
        let is_striking = |kind| self.struck.contains(&(kind, None));
        let at = self.struck.iter().position(|(fault, ended)| {
            is_due(ended) && !has_happened(*fault) && !is_striking(*fault)
        })?;
        let (fault, ended) = &mut self.struck[at];
        *ended = None;
        Some(*fault)
    }

    /// Records that a fault is over.
    pub fn end(&mut self, fault: Fault) {
        if let Some((_, ended)) = self.struck.iter_mut().find(|struck| **struck == (fault, None)) {
            *ended = Some(Instant::now());
        }
    }

    /// Whether each kind has had an effect.
    pub fn is_complete(&self, has_happened: impl Fn(Fault) -> bool) -> bool {
        DECK.iter().all(|(fault, _)| has_happened(*fault))
    }
}
