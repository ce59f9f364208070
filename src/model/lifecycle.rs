//! The states of a projector's life and the steps between them: pure, and all in this one place.

use std::fmt;

use time::OffsetDateTime;

use crate::model::event::Position;
use crate::model::projector::Mode;

/// Where a projector stands in its life. A projector without a ledger row is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Set by boot at first sight. Events come from the store until the handoff.
    Booting,
    /// Set by the handoff. The live queue, repaired from the store, owns every event after the
    /// position.
    Live,
    /// Set by boot or play at the first failing event. The position stays just before it.
    Broken(Failure),
    /// Set by boot when another projector of the same boot broke.
    Stalled,
    /// Set by boot for mode `once`, at the high-water mark. It never runs again.
    Finished,
    /// Set by retire. It never runs again.
    Retired,
}

/// The event that a projector could not apply.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// What it failed on; `None` where setup failed, before any event.
    pub event: Option<FailedEvent>,
    /// The error and its causes.
    pub error: String,
    /// When, in UTC.
    pub at: OffsetDateTime,
    /// How often it was tried.
    pub attempts: u32,
    /// The release that failed on it, where it has a name.
    pub release: Option<String>,
    /// The host that did.
    pub host: String,
    /// Why the read model must be rebuilt, where the failure says so: a table that is gone, a batch
    /// of which only a part is stored. Neither boot nor play applies anything to such a projector.
    pub rebuild_reason: Option<String>,
}

/// Which event a projector failed on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailedEvent {
    /// Its position; the projector's own position stays just before it.
    pub position: Position,
    /// Its id.
    pub event_id: String,
    /// Its type.
    pub event_type: String,
}

impl Status {
    /// As it is written in the ledger.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Status::Booting => "booting",
            Status::Live => "live",
            Status::Broken(_) => "broken",
            Status::Stalled => "stalled",
            Status::Finished => "finished",
            Status::Retired => "retired",
        }
    }

    /// The failure, where it is broken.
    pub const fn failure(&self) -> Option<&Failure> {
        match self {
            Status::Broken(failure) => Some(failure),
            _ => None,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A step in a projector's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Transition {
    /// Boot: the position has reached the oldest queued event.
    HandOver,
    /// Boot, mode once: the position has reached the high-water mark.
    Finish,
    /// Boot or play: an event failed.
    Break(Failure),
    /// Boot: another projector of the same boot broke.
    Stall,
    /// Retire.
    Retire,
}

/// A step that the lifecycle does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a projector that is {from} and runs {mode} cannot {transition}")]
pub(crate) struct IllegalTransition {
    from: &'static str,
    mode: Mode,
    transition: &'static str,
}

/// Takes a step, or says that there is no such step.
pub(crate) fn apply_transition(
    from: &Status,
    mode: Mode,
    transition: Transition,
) -> Result<Status, IllegalTransition> {
    use Status::{Booting, Broken, Finished, Live, Retired, Stalled};
    let bootable = Stage::Boot.can_apply(from);
    let name = match transition {
        Transition::HandOver if bootable && mode != Mode::Once => return Ok(Live),
        Transition::Finish if bootable && mode == Mode::Once => return Ok(Finished),
        Transition::Break(failure) if bootable || *from == Live => return Ok(Broken(failure)),
        Transition::Stall if matches!(from, Booting | Stalled) => return Ok(Stalled),
        Transition::Retire if *from != Retired => return Ok(Retired),
        Transition::HandOver => "go live",
        Transition::Finish => "finish",
        Transition::Break(_) => "break",
        Transition::Stall => "stall",
        Transition::Retire => "be retired",
    };
    Err(IllegalTransition { from: from.as_str(), mode, transition: name })
}

/// Who is applying events: the fence lets each touch only its own projectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Boot plays what is booting, stalled or broken.
    Boot,
    /// Play plays what is live, and nothing that was not booted.
    Play,
}

impl Stage {
    /// Whether this stage may apply events to a projector of that status.
    pub(crate) const fn can_apply(self, status: &Status) -> bool {
        match self {
            Stage::Boot => match status {
                Status::Booting | Status::Stalled => true,
                // Its read model is not whole: what is applied to it only hides that.
                Status::Broken(failure) => failure.rebuild_reason.is_none(),
                Status::Live | Status::Finished | Status::Retired => false,
            },
            Stage::Play => matches!(status, Status::Live),
        }
    }

    /// The same statuses as a list in SQL. A statement that uses it asks for `rebuild_reason is
    /// null`, too.
    pub(crate) const fn statuses_sql(self) -> &'static str {
        match self {
            Stage::Boot => "'booting', 'stalled', 'broken'",
            Stage::Play => "'live'",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> Failure {
        Failure {
            event: None,
            error: "no such column".into(),
            at: OffsetDateTime::UNIX_EPOCH,
            attempts: 1,
            release: None,
            host: "here".into(),
            rebuild_reason: None,
        }
    }

    #[test]
    fn a_projector_that_must_be_rebuilt_is_never_played_and_can_only_be_retired() {
        let must_be_rebuilt = Status::Broken(Failure {
            rebuild_reason: Some("its table is gone".into()),
            ..failure()
        });
        assert!(
            !Stage::Boot.can_apply(&must_be_rebuilt) && !Stage::Play.can_apply(&must_be_rebuilt)
        );
        for mode in [Mode::FromBeginning, Mode::FromNow, Mode::Once] {
            for transition in [
                Transition::HandOver,
                Transition::Finish,
                Transition::Break(failure()),
                Transition::Stall,
            ] {
                assert!(
                    apply_transition(&must_be_rebuilt, mode, transition.clone()).is_err(),
                    "{mode} {transition:?}"
                );
            }
            assert_eq!(
                apply_transition(&must_be_rebuilt, mode, Transition::Retire),
                Ok(Status::Retired)
            );
        }
    }

    fn every_status() -> [Status; 6] {
        [
            Status::Booting,
            Status::Live,
            Status::Broken(failure()),
            Status::Stalled,
            Status::Finished,
            Status::Retired,
        ]
    }

    /// The design's table, written out: every pair that is not in it is an error.
    #[test]
    fn only_the_documented_transitions_exist() {
        let legal = |from: &str, transition: &Transition, mode: Mode| match transition {
            Transition::HandOver => {
                ["booting", "stalled", "broken"].contains(&from) && mode != Mode::Once
            }
            Transition::Finish => {
                ["booting", "stalled", "broken"].contains(&from) && mode == Mode::Once
            }
            Transition::Break(_) => ["booting", "stalled", "broken", "live"].contains(&from),
            Transition::Stall => ["booting", "stalled"].contains(&from),
            Transition::Retire => from != "retired",
        };
        for mode in [Mode::FromBeginning, Mode::FromNow, Mode::Once] {
            for from in every_status() {
                for transition in [
                    Transition::HandOver,
                    Transition::Finish,
                    Transition::Break(failure()),
                    Transition::Stall,
                    Transition::Retire,
                ] {
                    let expected = legal(from.as_str(), &transition, mode);
                    assert_eq!(
                        apply_transition(&from, mode, transition.clone()).is_ok(),
                        expected,
                        "{from} {mode} {transition:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_status_is_played_by_at_most_one_stage_and_a_dead_one_by_neither() {
        for status in every_status() {
            let stages =
                [Stage::Boot, Stage::Play].iter().filter(|stage| stage.can_apply(&status)).count();
            let expected = usize::from(!matches!(status, Status::Finished | Status::Retired));
            assert_eq!(stages, expected, "{status}");
            for stage in [Stage::Boot, Stage::Play] {
                let is_listed = stage
                    .statuses_sql()
                    .split(", ")
                    .any(|listed| listed == format!("'{}'", status.as_str()));
                assert_eq!(is_listed, stage.can_apply(&status), "{status}");
            }
        }
    }
}
