//! The states of a projector and the transitions between them, as pure functions.

use std::fmt;

use time::OffsetDateTime;

use crate::model::event::Position;
use crate::model::projector::Mode;

/// The status of a projector in the ledger. A new projector has no ledger row yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Set by boot when it first sees the projector. Events come from the store until the handoff.
    Booting,
    /// Set by the handoff. Events after the position come from the queue; missing ones are read
    /// from the store.
    Live,
    /// Set by boot or play when an event fails. The position stays just before that event.
    Broken(Failure),
    /// Set by boot when another projector of the same boot broke.
    Stalled,
    /// Set by boot for mode `once`, when the position reaches the high-water mark. The projector
    /// never runs again.
    Finished,
    /// Set by retire. The projector never runs again.
    Retired,
}

/// Why a projector is broken.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// The event that failed; `None` if setup failed, before any event.
    pub event: Option<FailedEvent>,
    /// The error and its causes.
    pub error: String,
    /// The time of the failure, in UTC.
    pub at: OffsetDateTime,
    /// How often the event was tried.
    pub attempts: u32,
    /// The release that ran the projector; `None` if the release has no name.
    pub release: Option<String>,
    /// The host that ran the projector.
    pub host: String,
    /// Why the read model must be rebuilt, if the failure requires that: a table is missing, or
    /// only a part of a batch is stored. Neither boot nor play applies events to such a projector.
    pub rebuild_reason: Option<String>,
}

/// The event that a projector failed on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailedEvent {
    /// The event's position. The projector's own position stays just before it.
    pub position: Position,
    /// The event's id.
    pub event_id: String,
    /// The event's type.
    pub event_type: String,
}

impl Status {
    /// The status as the ledger stores it.
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

    /// Whether a projector of this status can wait for a retry: boot or play may still apply events
    /// to it. Each transition ends the wait.
    pub(crate) fn can_retry(&self) -> bool {
        Stage::Boot.can_apply(self) || Stage::Play.can_apply(self)
    }

    /// The failure; `None` if the projector is not broken.
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

/// A change of a projector's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Transition {
    /// Boot: the position has reached the oldest event in the queue.
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

/// A transition that the lifecycle does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a projector that is {from} and runs {mode} cannot {transition}")]
pub(crate) struct IllegalTransition {
    from: &'static str,
    mode: Mode,
    transition: &'static str,
}

/// The status after a transition.
///
/// # Errors
/// If the transition is illegal for that status and mode.
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

/// The command that applies events. The fence restricts each command to its own projectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Boot: projectors that are booting, stalled or broken.
    Boot,
    /// Play: projectors that are live.
    Play,
}

impl Stage {
    /// Whether this stage may apply events to a projector of that status.
    pub(crate) const fn can_apply(self, status: &Status) -> bool {
        match self {
            Stage::Boot => match status {
                Status::Booting | Status::Stalled => true,
                // A read model that must be rebuilt is incomplete. More events would only hide
                // that.
                Status::Broken(failure) => failure.rebuild_reason.is_none(),
                Status::Live | Status::Finished | Status::Retired => false,
            },
            Stage::Play => matches!(status, Status::Live),
        }
    }

    /// The statuses of [`Stage::can_apply`], as a list for SQL. A statement that uses it must also
    /// check `rebuild_reason is null`.
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

    fn every_transition() -> [Transition; 5] {
        [
            Transition::HandOver,
            Transition::Finish,
            Transition::Break(failure()),
            Transition::Stall,
            Transition::Retire,
        ]
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
            let other_than_retire =
                every_transition().into_iter().filter(|other| *other != Transition::Retire);
            for transition in other_than_retire {
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

    /// Every pair that is not in this table is an error.
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
                for transition in every_transition() {
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
    fn a_status_is_played_by_at_most_one_stage_and_a_final_one_by_none() {
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
