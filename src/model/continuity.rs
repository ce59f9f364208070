//! Continuity: what a projector does with a run of events, decided by its position alone.

use std::collections::VecDeque;

use crate::model::event::{Event, Position};

/// Consecutive events of the log: every position after `prev`, up to and including the last event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    prev: Position,
    events: Vec<Event>,
}

impl Run {
    /// A run of the events after `prev`; `None` if `events` is empty or not consecutive from `prev`
    /// on.
    pub(crate) fn new(prev: Position, events: Vec<Event>) -> Option<Self> {
        let mut expected = prev;
        let consecutive = events.iter().all(|event| {
            expected = expected.next();
            event.position() == expected
        });
        (consecutive && !events.is_empty()).then_some(Run { prev, events })
    }

    pub(crate) fn prev(&self) -> Position {
        self.prev
    }

    /// The position of the last event.
    pub(crate) fn last(&self) -> Position {
        self.events.last().map_or(self.prev, Event::position)
    }

    /// The events above a position.
    pub(crate) fn above(&self, position: Position) -> &[Event] {
        &self.events[self.count_through(position) as usize..]
    }

    /// How many events of the run are at or below a position.
    pub(crate) fn count_through(&self, position: Position) -> u64 {
        position.since(self.prev).min(self.events.len() as u64)
    }
}

/// What to do with a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Every event of the run is applied already.
    Skip,
    /// The run reaches the position without a gap: apply the events above the position.
    Apply,
    /// Events between the position and the run are missing: catch up from the store, through the
    /// last event of the run.
    CatchUp,
}

/// Decides what a projector at `position` does with `run`.
pub(crate) fn choose_action(position: Position, run: &Run) -> Action {
    if run.last() <= position {
        Action::Skip
    } else if run.prev() <= position {
        Action::Apply
    } else {
        Action::CatchUp
    }
}

/// Sorts runs and joins those that touch or overlap. Repeated and reordered messages of one receive
/// then cost nothing.
pub(crate) fn merge(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_by_key(|run| (run.prev(), run.last()));
    let mut runs = VecDeque::from(runs);
    let mut merged: Vec<Run> = Vec::with_capacity(runs.len());
    while let Some(mut run) = runs.pop_front() {
        match merged.last_mut() {
            Some(before) if run.prev() <= before.last() => {
                let known = before.last().since(run.prev()).min(run.events.len() as u64) as usize;
                before.events.extend(run.events.drain(known..));
            }
            _ => merged.push(run),
        }
    }
    merged
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::event::RecordedEvent;

    pub(crate) fn event(position: u64) -> Event {
        recorded_event(position).into()
    }

    pub(crate) fn recorded_event(position: u64) -> RecordedEvent {
        RecordedEvent {
            position: Position::new(position),
            event_id: format!("event-{position}"),
            stream_id: "case-1".into(),
            stream_version: position,
            event_type: "Confirmation of receipt".into(),
            recorded_at: time::OffsetDateTime::UNIX_EPOCH,
            payload: "{}".into(),
            metadata: None,
        }
    }

    fn run(prev: u64, last: u64) -> Run {
        Run::new(Position::new(prev), (prev + 1..=last).map(event).collect()).expect("consecutive")
    }

    #[test]
    fn a_run_has_no_gaps_and_begins_after_its_prev() {
        assert!(Run::new(Position::new(4), vec![event(5), event(6)]).is_some());
        assert!(Run::new(Position::new(4), vec![event(5), event(7)]).is_none());
        assert!(Run::new(Position::new(4), vec![event(6)]).is_none());
        assert!(Run::new(Position::new(4), vec![event(5), event(5)]).is_none());
        assert!(Run::new(Position::new(4), vec![]).is_none());
    }

    proptest! {
        /// Runs may arrive in any order and any number of times. A projector that follows
        /// [`choose_action`] applies every position from its start to the highest one received,
        /// each once, in ascending order.
        #[test]
        fn lost_repeated_or_reordered_runs_apply_each_position_once(
            start in 0u64..30,
            deliveries in prop::collection::vec(
                prop::collection::vec((0u64..60, 1u64..8), 1..6),
                1..12,
            ),
        ) {
            let mut position = start;
            let mut applied = Vec::new();
            let mut highest = start;
            for delivery in deliveries {
                let received = delivery.iter().map(|&(prev, length)| run(prev, prev + length));
                let runs = merge(received.collect());
                for run in &runs {
                    highest = highest.max(run.last().get());
                    let at = Position::new(position);
                    match choose_action(at, run) {
                        Action::Skip => {}
                        Action::Apply => {
                            applied.extend(run.above(at).iter().map(|event| event.position().get()))
                        }
                        // The store holds every position, so catching up applies exactly these.
                        Action::CatchUp => applied.extend(position + 1..=run.last().get()),
                    }
                    position = position.max(run.last().get());
                }
            }
            prop_assert_eq!(applied, (start + 1..=highest).collect::<Vec<_>>());
        }

        #[test]
        fn merged_runs_hold_the_same_positions_and_never_touch(
            runs in prop::collection::vec((0u64..60, 1u64..8), 0..12),
        ) {
            let positions = |runs: &[Run]| -> BTreeSet<u64> {
                let events = runs.iter().flat_map(|run| &run.events);
                events.map(|event| event.position().get()).collect()
            };
            let runs: Vec<Run> =
                runs.into_iter().map(|(prev, length)| run(prev, prev + length)).collect();
            let merged = merge(runs.clone());
            prop_assert_eq!(positions(&merged), positions(&runs));
            for pair in merged.windows(2) {
                prop_assert!(pair[0].last() < pair[1].prev());
            }
            for run in &merged {
                prop_assert_eq!(Some(run.clone()), Run::new(run.prev, run.events.clone()));
            }
        }
    }
}
