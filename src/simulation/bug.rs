//! The deliberate bugs: each is one line somewhere in the processes, and each must be caught.

/// A bug that a run is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    /// Play deletes what it has received, and only then applies it.
    DeletesBeforeCommit,
    /// Play takes a fan-out that could not read the log for one that succeeded.
    DeletesDespiteError,
    /// Play catches up where `prev` > position + 1, and not where `prev` > position.
    CatchesUpOneTooLate,
    /// Play applies whatever it gets, as if the queue lost nothing.
    TrustsTheQueue,
    /// Play takes a message for ours whatever its signature is.
    AppliesWhatIsNotSigned,
    /// Play deletes what it has received, whether it is ours or not.
    DeletesWhatIsNotOurs,
    /// Play passes events to whatever has a ledger row, and its fence lets them through.
    PlaysWhatIsNotLive,
    /// Play waits for a broken projector as if it were to come back by itself.
    WaitsForTheBroken,
    /// Who leaves the convoy catches up with nothing.
    ForgetsWhoLeft,
    /// Who has left the convoy is in it again after one event, and what it missed is deleted.
    RejoinsTooEarly,
    /// Nobody compares positions with the high-water mark.
    NeverReconciles,
    /// The relay notes as published what it is about to send, and nobody reconciles.
    PublishedBeforeSent,
    /// The relay publishes what is visible, and not what is proved.
    PublishesPastTheMark,
    /// A hole that is still there after the grace is taken for a rollback.
    SkipsHolesByTime,
    /// A position without a row, and without a lock on it, is taken for a rollback.
    AbsentIsProof,
    /// A fill that a writer's lock has stopped is taken for one that succeeded.
    IgnoresARefusedFill,
    /// The fence does not look at the status.
    NoStatusFence,
    /// The fence does not look at the position.
    NoPositionFence,
    /// Boot claims a row for its next batch, and does not look what it has locked.
    HoldsUnseen,
    /// Projection and position are committed one after the other.
    TwoTransactions,
    /// A projector is taken past the event that it fails on.
    SkipsTheFailing,
    /// The handoff moves the position to the mark.
    MovesAtGoLive,
    /// The handoff reads the row, thinks, and writes it back.
    GoesLiveWithoutLock,
    /// A new from_now projector is entered at 0.
    FromNowAtZero,
    /// A new from_now projector is entered at the last visible position.
    FromNowAtLastVisible,
    /// A projector of mode once is handed over like any other.
    OnceGoesLive,
    /// Boot takes a retired projector for a new one.
    BootsTheRetired,
    /// Boot goes on for ever with a projector that was retired under its hands.
    BootNeverLetsGo,
    /// Boot has to come to the mark, and not to the end of the log that is visible.
    TargetIsTheMark,
    /// A projector of mode once is finished at the mark, though more is visible.
    FinishesBelowTheTarget,
    /// A worker plays a projector that was booted with another definition than its own.
    PlaysAnotherDefinition,
    /// A batch is applied again after its handler committed a part of it.
    AppliesAfterAPart,
    /// Boot resumes a projector that must be rebuilt.
    BootResumesTheIncomplete,
    /// The operator leaves the tables of a projector that retire forgot without being able to tear them down.
    ForgetsWithTables,
}

/// A bug with the invariants of which it violates the one or the other, by their numbers in the design.
pub(super) const BUGS: &[(Bug, &[u8])] = &[
    (Bug::DeletesBeforeCommit, &[7]),
    (Bug::DeletesDespiteError, &[7]),
    (Bug::CatchesUpOneTooLate, &[1]),
    (Bug::TrustsTheQueue, &[1]),
    (Bug::AppliesWhatIsNotSigned, &[15]),
    (Bug::DeletesWhatIsNotOurs, &[7]),
    (Bug::PlaysWhatIsNotLive, &[6, 10, 11]),
    (Bug::WaitsForTheBroken, &[9, 10]),
    (Bug::ForgetsWhoLeft, &[9]),
    (Bug::RejoinsTooEarly, &[7]),
    (Bug::NeverReconciles, &[9]),
    (Bug::PublishedBeforeSent, &[9]),
    (Bug::PublishesPastTheMark, &[2]),
    (Bug::SkipsHolesByTime, &[3]),
    (Bug::AbsentIsProof, &[3]),
    (Bug::IgnoresARefusedFill, &[3]),
    (Bug::NoStatusFence, &[6, 10, 11]),
    (Bug::NoPositionFence, &[5, 6]),
    (Bug::HoldsUnseen, &[5, 6, 10, 11]),
    (Bug::TwoTransactions, &[4, 5]),
    (Bug::SkipsTheFailing, &[1]),
    (Bug::MovesAtGoLive, &[4]),
    (Bug::GoesLiveWithoutLock, &[5, 11]),
    (Bug::FromNowAtZero, &[11]),
    (Bug::FromNowAtLastVisible, &[2]),
    (Bug::OnceGoesLive, &[11]),
    (Bug::BootsTheRetired, &[11]),
    (Bug::BootNeverLetsGo, &[9]),
    (Bug::TargetIsTheMark, &[13]),
    (Bug::FinishesBelowTheTarget, &[13]),
    (Bug::PlaysAnotherDefinition, &[6]),
    (Bug::AppliesAfterAPart, &[1]),
    (Bug::BootResumesTheIncomplete, &[1, 8, 13]),
    (Bug::ForgetsWithTables, &[1, 8, 13]),
];
