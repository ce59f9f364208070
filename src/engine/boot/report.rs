//! What boot did, and why a release may not go on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::engine::catch_up::Cursor;
use crate::ledger::Entry;
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status};
use crate::model::projector::{Mode, ProjectorId};
use crate::model::registry::RegisteredProjector;

/// Why a release may not go on though nothing of it broke.
const NOT_ALL_LIVE: &str = "boot did not come to its end: not every projector is live";

/// A row that boot has inserted is not there.
const ROW_MISSING: &str = "the ledger has no row of it after boot: it was retired meanwhile, or what boot wrote was not stored; \
                          run doctor";

const MUST_BE_REBUILT: &str = "it must be rebuilt: retire it and run boot again";

const ANOTHER_PROJECTOR_FAILED: &str =
    "another projector of this boot failed first; mend that, and run boot again";

/// What boot did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootReport {
    /// Each projector of the set, or each that was named, in registry order, as the ledger has it
    /// afterwards.
    pub projectors: Vec<ProjectorOutcome>,
    /// The end of the log that was visible when boot began: what was booted has come this far, at
    /// least.
    pub target: Position,
    /// Why the release may not go on, if that is not the matter of one projector.
    pub reason: Option<String>,
    /// The projectors that are the cause, but for those that only broke at an event or at their
    /// setup.
    causes: Vec<(ProjectorId, String)>,
}

/// What boot did with one projector.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectorOutcome {
    /// Which projector.
    pub id: ProjectorId,
    /// Its mode.
    pub mode: Mode,
    /// As the ledger has it afterwards; `None`: it is new still, because boot did not enter it.
    pub entry: Option<Entry>,
    /// Where it stood before; `None`: it was new.
    pub position_before: Option<Position>,
    /// Whether this boot had anything to do with it: it was not live, finished or retired already.
    pub was_attempted: bool,
    /// Whether its definition is another than the one with which it was last booted, before this
    /// boot.
    pub has_changed: bool,
    /// Why it keeps the release from going on; `None`: it does not.
    pub reason: Option<String>,
}

impl ProjectorOutcome {
    /// Its status, as a word; `new` where the ledger does not have it.
    pub fn status(&self) -> &'static str {
        self.entry.as_ref().map_or("new", |entry| entry.status.as_str())
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        self.entry.as_ref().map_or(Position::START, |entry| entry.position)
    }
}

impl BootReport {
    /// The projectors that are broken: the deploy must not go on.
    pub fn broken(&self) -> impl Iterator<Item = &ProjectorOutcome> {
        let is_broken = |entry: &Entry| matches!(entry.status, Status::Broken(_));
        self.projectors.iter().filter(move |booted| booted.entry.as_ref().is_some_and(is_broken))
    }

    /// Whether the release may go on: every projector of it is live, finished or retired, and
    /// nothing else is in the way.
    pub fn is_released(&self) -> bool {
        self.reason.is_none() && self.projectors.iter().all(|booted| booted.reason.is_none())
    }

    /// Whether nothing is in the way but projectors that broke at an event or at their setup.
    pub(super) fn is_only_broken(&self) -> bool {
        self.reason.is_none() && self.causes.is_empty() && self.broken().next().is_some()
    }

    /// Why it may not go on, and what to do, in a sentence.
    pub fn explain(&self) -> String {
        let is_cause =
            |booted: &&ProjectorOutcome| !self.causes.iter().any(|(id, _)| *id == booted.id);
        let broken: Vec<String> =
            self.broken().filter(is_cause).map(|booted| booted.id.to_string()).collect();
        let broken = (!broken.is_empty()).then(|| {
            format!(
                "broken: {}; mend it and run boot again, it goes on where it stopped",
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

/// What boot learned that the ledger does not say.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Why the release may not go on, if that is not the matter of one projector.
    pub(super) reason: Option<String>,
    /// Why a projector was refused.
    pub(super) refused: BTreeMap<ProjectorId, String>,
    pub(super) changed: BTreeSet<ProjectorId>,
    /// Whether a projector failed that was not broken when boot began: then only repairs go on.
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
            // Its handler has committed a part of a batch since this boot looked at it.
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

/// How far boot is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootProgress {
    /// Where each projector stands that is being booted.
    pub positions: Vec<(ProjectorId, Position)>,
    /// Where this round ends.
    pub target: Position,
    /// What boot waits for, if it has to wait.
    pub wait: Option<BootWait>,
}

/// The high-water mark is held below the end of the log, and boot waits.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootWait {
    /// Why, and what to do.
    pub reason: String,
    /// For how long so far.
    pub elapsed: Duration,
}

impl BootProgress {
    /// The position of the one that is furthest behind.
    pub fn lowest_position(&self) -> Position {
        self.positions.iter().map(|&(_, position)| position).min().unwrap_or(self.target)
    }

    pub(super) fn new(cursors: &[Cursor], target: Position, wait: Option<BootWait>) -> Self {
        let running = cursors.iter().filter(|cursor| cursor.is_running());
        let positions =
            running.map(|cursor| (cursor.projector.id.clone(), cursor.position)).collect();
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

    /// As where `autocommit` is 0: the insert succeeded, and nothing is there.
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
                position: Position::new(5),
                has_side_effects: false,
                start_position: Some(Position::START),
                digest: None,
                event_types: None,
                owned_tables: None,
                rebuild_reason,
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
