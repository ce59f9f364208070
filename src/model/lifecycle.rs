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
    /// Set by the handoff. The live queue, repaired from the store, owns every event after the position.
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
    /// Why the read model must be rebuilt, where the failure says so: a table that is gone, a batch of which only a
    /// part is stored. Neither boot nor play applies anything to such a projector.
    pub rebuild: Option<String>,
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
pub(crate) enum Step {
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
#[error("a projector that is {from} and runs {mode} cannot {step}")]
pub(crate) struct IllegalStep {
    from: &'static str,
    mode: Mode,
    step: &'static str,
}

/// Takes a step, or says that there is no such step.
pub(crate) fn take(from: &Status, mode: Mode, step: Step) -> Result<Status, IllegalStep> {
    use Status::{Booting, Broken, Finished, Live, Retired, Stalled};
    let bootable = Stage::Boot.plays(from);
    let name = match step {
        Step::HandOver if bootable && mode != Mode::Once => return Ok(Live),
        Step::Finish if bootable && mode == Mode::Once => return Ok(Finished),
        Step::Break(failure) if bootable || *from == Live => return Ok(Broken(failure)),
        Step::Stall if matches!(from, Booting | Stalled) => return Ok(Stalled),
        Step::Retire if *from != Retired => return Ok(Retired),
        Step::HandOver => "go live",
        Step::Finish => "finish",
        Step::Break(_) => "break",
        Step::Stall => "stall",
        Step::Retire => "be retired",
    };
    Err(IllegalStep { from: from.as_str(), mode, step: name })
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
    pub(crate) const fn plays(self, status: &Status) -> bool {
        match self {
            Stage::Boot => match status {
                Status::Booting | Status::Stalled => true,
                // Its read model is not whole: what is applied to it only hides that.
                Status::Broken(failure) => failure.rebuild.is_none(),
                Status::Live | Status::Finished | Status::Retired => false,
            },
            Stage::Play => matches!(status, Status::Live),
        }
    }

    /// The same statuses as a list in SQL. A statement that uses it asks for `rebuild_reason is null`, too.
    pub(crate) const fn statuses(self) -> &'static str {
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
            rebuild: None,
        }
    }

    #[test]
    fn a_projector_that_must_be_rebuilt_is_played_by_no_stage_and_only_retired() {
        let must_be_rebuilt = Status::Broken(Failure { rebuild: Some("its table is gone".into()), ..failure() });
        assert!(!Stage::Boot.plays(&must_be_rebuilt) && !Stage::Play.plays(&must_be_rebuilt));
        for mode in [Mode::FromBeginning, Mode::FromNow, Mode::Once] {
            for step in [Step::HandOver, Step::Finish, Step::Break(failure()), Step::Stall] {
                assert!(take(&must_be_rebuilt, mode, step.clone()).is_err(), "{mode} {step:?}");
            }
            assert_eq!(take(&must_be_rebuilt, mode, Step::Retire), Ok(Status::Retired));
        }
    }

    fn every_status() -> [Status; 6] {
        [Status::Booting, Status::Live, Status::Broken(failure()), Status::Stalled, Status::Finished, Status::Retired]
    }

    /// The design's table, written out: every pair that is not in it is an error.
    #[test]
    fn only_the_documented_transitions_exist() {
        let legal = |from: &str, step: &Step, mode: Mode| match step {
            Step::HandOver => ["booting", "stalled", "broken"].contains(&from) && mode != Mode::Once,
            Step::Finish => ["booting", "stalled", "broken"].contains(&from) && mode == Mode::Once,
            Step::Break(_) => ["booting", "stalled", "broken", "live"].contains(&from),
            Step::Stall => ["booting", "stalled"].contains(&from),
            Step::Retire => from != "retired",
        };
        for mode in [Mode::FromBeginning, Mode::FromNow, Mode::Once] {
            for from in every_status() {
                for step in [Step::HandOver, Step::Finish, Step::Break(failure()), Step::Stall, Step::Retire] {
                    let expected = legal(from.as_str(), &step, mode);
                    assert_eq!(take(&from, mode, step.clone()).is_ok(), expected, "{from} {mode} {step:?}");
                }
            }
        }
    }

    #[test]
    fn no_status_is_played_by_both_stages_and_the_dead_by_none() {
        for status in every_status() {
            let stages = [Stage::Boot, Stage::Play].iter().filter(|stage| stage.plays(&status)).count();
            let expected = usize::from(!matches!(status, Status::Finished | Status::Retired));
            assert_eq!(stages, expected, "{status}");
            for stage in [Stage::Boot, Stage::Play] {
                let is_listed = stage.statuses().split(", ").any(|listed| listed == format!("'{}'", status.as_str()));
                assert_eq!(is_listed, stage.plays(&status), "{status}");
            }
        }
    }
}
