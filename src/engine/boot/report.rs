//! The report of boot: its results, and why a release may not proceed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::engine::catch_up::Cursor;
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status};
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::RegisteredProjector;

/// The reason for a projector that is still booting when no other reason is known.
const NOT_ALL_LIVE: &str = "boot did not finish: not every projector is live";

/// The reason for a projector without a row, although boot has inserted one.
const ROW_MISSING: &str = "the ledger has no row for it after boot: it was retired \
                           meanwhile, or boot's insert was not stored; run doctor";

const MUST_BE_REBUILT: &str = "it must be rebuilt: retire it and run boot again";

const ANOTHER_PROJECTOR_FAILED: &str =
    "another projector of this boot failed first; fix it and run boot again";

/// The result of a boot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootReport {
    /// The selected projectors with their state in the ledger after boot, in registry order.
    pub projectors: Vec<ProjectorOutcome>,
    /// The last visible position when boot began. Every booted projector has reached at least this
    /// position.
    pub target: Position,
    /// Why the release may not proceed, if the reason does not concern a single projector.
    pub reason: Option<String>,
    /// The projectors that caused the failure, with the reason. Projectors that only broke at an
    /// event or at their setup are not included.
    causes: Vec<(ProjectorId, String)>,
}

/// The result of a boot for one projector.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectorOutcome {
    /// The projector's id.
    pub id: ProjectorId,
    /// The projector's mode.
    pub mode: Mode,
    /// The ledger row after boot. `None`: the projector is still new, because boot did not register
    /// it.
    pub entry: Option<Entry>,
    /// The position before boot. `None`: the projector was new.
    pub position_before: Option<Position>,
    /// Whether this boot tried to boot the projector: it was not live, finished or retired already.
    pub was_attempted: bool,
    /// Whether the definition has changed since the last boot before this one.
    pub has_changed: bool,
    /// Why this projector keeps the release from proceeding. `None`: it does not.
    pub reason: Option<String>,
}

impl ProjectorOutcome {
    /// The status as a word. `new` if the ledger does not have the projector.
    pub fn status(&self) -> &'static str {
        self.entry.as_ref().map_or("new", |entry| entry.status.as_str())
    }

    /// The position in the ledger, or the start of the log for a new projector.
    pub fn position(&self) -> Position {
        self.entry.as_ref().map_or(Position::START, |entry| entry.position)
    }
}

impl BootReport {
    /// The broken projectors. If there are any, the deploy must not proceed.
    pub fn broken(&self) -> impl Iterator<Item = &ProjectorOutcome> {
        let is_broken = |entry: &Entry| matches!(entry.status, Status::Broken(_));
        self.projectors.iter().filter(move |booted| booted.entry.as_ref().is_some_and(is_broken))
    }

    /// Whether the release may proceed: every projector is live, finished or retired, and nothing
    /// else prevents it.
    pub fn is_released(&self) -> bool {
        self.reason.is_none() && self.projectors.iter().all(|booted| booted.reason.is_none())
    }

    /// Whether the only reason against the release is that projectors broke at an event or at their
    /// setup.
    pub(super) fn is_only_broken(&self) -> bool {
        self.reason.is_none() && self.causes.is_empty() && self.broken().next().is_some()
    }

    /// Explains in one sentence why the release may not proceed and what to do.
    pub fn explain(&self) -> String {
        let is_cause =
            |booted: &&ProjectorOutcome| !self.causes.iter().any(|(id, _)| *id == booted.id);
        let broken: Vec<String> =
            self.broken().filter(is_cause).map(|booted| booted.id.to_string()).collect();
        let broken = (!broken.is_empty()).then(|| {
            let it = if broken.len() == 1 { "it" } else { "them" };
            format!(
                "broken: {}; fix {it} and run boot again, it continues where it stopped",
                broken.join(", ")
            )
        });
        let causes = self.causes.iter().map(|(id, reason)| format!("{id}: {reason}"));
        let parts: Vec<String> =
            self.reason.clone().into_iter().chain(broken).chain(causes).collect();
        if !parts.is_empty() {
            return parts.join("; ");
        }
        let waits =
            |booted: &ProjectorOutcome| Some(format!("{}: {}", booted.id, booted.reason.as_ref()?));
        let waiting: Vec<String> = self.projectors.iter().filter_map(waits).collect();
        waiting.join("; ")
    }
}

/// Facts that boot found out and that the ledger does not contain.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Why the release may not proceed, if the reason does not concern a single projector.
    pub(super) reason: Option<String>,
    /// The refused projectors, with the reason.
    pub(super) refused: BTreeMap<ProjectorId, String>,
    pub(super) changed: BTreeSet<ProjectorId>,
    /// Whether a projector failed that was not broken when boot began. Then only repairs continue.
    pub(super) is_stopped: bool,
}

impl Findings {
    pub(super) fn into_report<'a>(
        self,
        selected: impl Iterator<Item = &'a RegisteredProjector>,
        before: &[Entry],
        after: &[Entry],
        target: Position,
    ) -> BootReport {
        let of = |entries: &[Entry], id: &ProjectorId| {
            entries.iter().find(|entry| entry.id == *id).cloned()
        };
        let projectors = selected.map(|projector| {
            let id = &projector.id;
            let (before, entry) = (of(before, id), of(after, id));
            ProjectorOutcome {
                id: id.clone(),
                mode: projector.mode,
                reason: self.reason_for(id, entry.as_ref()),
                was_attempted: before
                    .as_ref()
                    .is_none_or(|before| Stage::Boot.can_apply(&before.status)),
                has_changed: self.changed.contains(id),
                position_before: before.map(|before| before.position),
                entry,
            }
        });
        let projectors = projectors.collect();
        BootReport {
            projectors,
            target,
            reason: self.reason,
            causes: self.refused.into_iter().collect(),
        }
    }

    fn reason_for(&self, id: &ProjectorId, entry: Option<&Entry>) -> Option<String> {
        if let Some(refused) = self.refused.get(id) {
            return Some(refused.clone());
        }
        let unfinished =
            |otherwise: &str| Some(self.reason.clone().unwrap_or_else(|| otherwise.to_owned()));
        let Some(entry) = entry else {
            let was_stopped = !self.refused.is_empty() || self.reason.is_some() || self.is_stopped;
            return unfinished(if was_stopped { ANOTHER_PROJECTOR_FAILED } else { ROW_MISSING });
        };
        match &entry.status {
            Status::Retired => None,
            Status::Broken(failure) => Some(format!("broken: {}", failure.error)),
            // The handler committed a part of a batch after this boot had checked the row.
            Status::Live | Status::Finished | Status::Booting | Status::Stalled
                if entry.rebuild_reason.is_some() =>
            {
                entry.rebuild_reason.as_ref().map(|reason| format!("{MUST_BE_REBUILT}: {reason}"))
            }
            Status::Live | Status::Finished => None,
            Status::Stalled => unfinished(ANOTHER_PROJECTOR_FAILED),
            Status::Booting => unfinished(NOT_ALL_LIVE),
        }
    }
}

/// The progress of a boot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootProgress {
    /// The current position of each projector that is being booted.
    pub positions: Vec<(ProjectorId, Position)>,
    /// The position at which this round ends.
    pub target: Position,
    /// What boot is waiting for, if it is waiting.
    pub wait: Option<BootWait>,
}

/// A wait of boot: the high-water mark is blocked below the end of the log, or a projector retries
/// an event later.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootWait {
    /// What boot waits for, and why.
    pub reason: String,
    /// The duration of the wait so far.
    pub elapsed: Duration,
}

impl BootProgress {
    /// The lowest position of all projectors that are being booted.
    pub fn lowest_position(&self) -> Position {
        self.positions.iter().map(|&(_, position)| position).min().unwrap_or(self.target)
    }

    pub(super) fn new(cursors: &[Cursor], target: Position, wait: Option<BootWait>) -> Self {
        let active = cursors.iter().filter(|cursor| cursor.is_active());
        let positions =
            active.map(|cursor| (cursor.projector.id.clone(), cursor.position)).collect();
        BootProgress { positions, target, wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::registry::Registry;

    struct Idle;

    #[crate::async_trait]
    impl crate::Projector for Idle {
        fn name(&self) -> &str {
            "idle"
        }

        async fn handle(
            &self,
            _: &crate::Event,
            _: &mut sqlx::MySqlConnection,
        ) -> anyhow::Result<()> {
            Ok(())
        }
    }

    /// This happens if `autocommit` is 0: the insert succeeds, but the row is not stored.
    #[test]
    fn a_projector_in_the_set_without_a_row_is_never_released() {
        let registry = Registry::new().with(Idle).expect("a name");
        let selected = || registry.iter().map(std::sync::Arc::as_ref);
        let report = Findings::default().into_report(selected(), &[], &[], Position::new(5));
        assert!(!report.is_released());
        assert_eq!((report.projectors.len(), report.projectors[0].status()), (1, "new"));
        assert!(
            report.explain().contains("idle@1") && report.explain().contains("not stored"),
            "{}",
            report.explain()
        );
    }

    #[test]
    fn a_live_projector_that_must_be_rebuilt_is_never_released() {
        let registry = Registry::new().with(Idle).expect("a name");
        let projector = registry.iter().next().expect("one");
        let reported = |status: Status, rebuild_reason: Option<String>| {
            let entry = Entry {
                id: projector.id.clone(),
                mode: Mode::FromBeginning,
                status,
                status_since: time::OffsetDateTime::UNIX_EPOCH,
                position: Position::new(5),
                has_side_effects: false,
                start_position: Some(Position::START),
                digest: None,
                event_types: None,
                owned_tables: None,
                rebuild_reason,
                retrying: None,
            };
            Findings::default().into_report(
                [projector.as_ref()].into_iter(),
                &[],
                &[entry],
                Position::new(5),
            )
        };
        let reason = || Some("a part of a batch is stored".to_owned());
        assert!(reported(Status::Live, None).is_released());
        assert!(reported(Status::Retired, reason()).is_released());
        for status in [Status::Live, Status::Booting] {
            let report = reported(status, reason());
            assert!(!report.is_released());
            assert!(
                report.explain().contains("a part of a batch is stored"),
                "{}",
                report.explain()
            );
        }
    }
}
