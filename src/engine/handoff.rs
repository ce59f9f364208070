//! The handoff of a projector from booting to live, that is, from the event store to the queue.

use tracing::info;

use crate::engine::catch_up::Cursor;
use crate::engine::retry::Engine;
use crate::ledger::{Entry, LedgerError};
use crate::model::backoff;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status, Transition};
use crate::model::registry::Registry;

/// A lower bound for the events that are still in the queue: the lowest position of this release's
/// live projectors. If none is live, no worker has deleted messages, and the bound is the
/// high-water mark.
pub(crate) fn oldest_queued(
    registry: &Registry,
    ledger: &[Entry],
    high_water: Position,
) -> Position {
    let live = ledger
        .iter()
        .filter(|entry| entry.status == Status::Live && registry.get(&entry.id).is_some());
    live.map(|entry| entry.position).min().unwrap_or(high_water)
}

/// Whether boot is done with a projector: it is still in boot, does not need a rebuild, and has
/// reached `position`.
pub(crate) fn has_reached(entry: &Entry, position: Position) -> bool {
    Stage::Boot.can_apply(&entry.status)
        && entry.rebuild_reason.is_none()
        && entry.position >= position
}

impl Engine {
    /// Makes a projector live if its position is still at or beyond `oldest_queued`, checked under
    /// its row's lock. Returns the resulting row, if any.
    ///
    /// `oldest_queued` decides only when boot may stop. It is not a safety condition: a worker of
    /// an old release may have deleted messages that this projector has not seen. When play
    /// receives a message that does not continue the projector's position, it reads the missing
    /// events from the store.
    pub(crate) async fn hand_over(
        &self,
        cursor: &Cursor,
        oldest_queued: Position,
    ) -> Result<Option<Entry>, LedgerError> {
        let id = &cursor.projector.id;
        let still = |entry: &Entry| {
            has_reached(entry, oldest_queued) && entry.matches_digest(&cursor.projector.digest)
        };
        let step = || self.ledger.transition(id, Transition::HandOver, still);
        let entry = self.retry_transient("hand over", step).await?;
        if let Some(entry) = entry.as_ref().filter(|entry| entry.status == Status::Live) {
            let (from, began) = cursor.start;
            info!(
                projector = %id, status = %entry.status, position = entry.position.get(),
                oldest_queued = oldest_queued.get(), events = entry.position.since(from),
                seconds = backoff::seconds(began.elapsed()), release = self.release,
                "handed over: live"
            );
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::projector::{Mode, ProjectorId};

    struct Idle(&'static str);

    #[crate::async_trait]
    impl crate::Projector for Idle {
        fn name(&self) -> &str {
            self.0
        }

        async fn handle(
            &self,
            _: &crate::Event,
            _: &mut sqlx::MySqlConnection,
        ) -> anyhow::Result<()> {
            Ok(())
        }
    }

    fn entry(name: &str, status: Status, position: u64) -> Entry {
        let id = ProjectorId { name: name.into(), version: 1 };
        Entry {
            id,
            mode: Mode::FromBeginning,
            status,
            status_since: time::OffsetDateTime::UNIX_EPOCH,
            position: Position::new(position),
            has_side_effects: false,
            start_position: Some(Position::START),
            digest: None,
            event_types: None,
            owned_tables: None,
            rebuild_reason: None,
            retrying: None,
        }
    }

    /// The case: another boot ran this projector, and its handler committed a part of the next
    /// batch.
    #[test]
    fn a_projector_that_must_be_rebuilt_never_counts_as_caught_up() {
        let whole = entry("a", Status::Booting, 70);
        let incomplete =
            Entry { rebuild_reason: Some("a part of a batch is stored".into()), ..whole.clone() };
        assert!(
            has_reached(&whole, Position::new(70)) && !has_reached(&incomplete, Position::new(70))
        );
    }

    #[test]
    fn the_oldest_queued_event_is_the_lowest_a_live_projector_of_this_release_needs() {
        let registry =
            Registry::new().with(Idle("a")).and_then(|r| r.with(Idle("b"))).expect("two names");
        let mark = Position::new(90);
        let ledger = [
            entry("a", Status::Live, 70),
            entry("b", Status::Live, 60),
            entry("of_another_release", Status::Live, 10),
        ];
        assert_eq!(oldest_queued(&registry, &ledger, mark), Position::new(60));
        let ledger = [entry("a", Status::Stalled, 20), entry("b", Status::Finished, 30)];
        assert_eq!(oldest_queued(&registry, &ledger, mark), mark);
    }
}
