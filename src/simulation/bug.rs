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
    AppliesUnsigned,
    /// Play deletes what it has received, whether it is ours or not.
    DeletesForeign,
    /// Play passes events to whatever has a ledger row, and its fence lets them through.
    PlaysNonLive,
    /// Play waits for a broken projector as if it were to come back by itself.
    WaitsForBroken,
    /// Who leaves the convoy catches up with nothing.
    ForgetsBackgroundCatchUp,
    /// Who has left the convoy is in it again after one event, and what it missed is deleted.
    ReadmitsTooEarly,
    /// Nobody compares positions with the high-water mark.
    NeverReconciles,
    /// The relay notes as published what it is about to send, and nobody reconciles.
    PublishedBeforeSent,
    /// The relay publishes what is visible, and not what is proved.
    PublishesPastTheMark,
    /// A hole that is still there after the grace is taken for a rollback.
    SkipsGapsByTime,
    /// A position without a row, and without a lock on it, is taken for a rollback.
    TreatsAbsentAsRolledBack,
    /// A fill that a writer's lock has stopped is taken for one that succeeded.
    IgnoresBlockedFill,
    /// The fence does not look at the status.
    NoStatusFence,
    /// The fence does not look at the position.
    NoPositionFence,
    /// Boot claims a row for its next batch, and does not look what it has locked.
    CarriesUncheckedClaim,
    /// Projection and position are committed one after the other.
    TwoTransactions,
    /// A projector is taken past the event that it fails on.
    SkipsFailingEvent,
    /// The handoff moves the position to the mark.
    MovesPositionAtHandoff,
    /// The handoff reads the row, thinks, and writes it back.
    HandsOffWithoutLock,
    /// A new from_now projector is entered at 0.
    FromNowAtZero,
    /// A new from_now projector is entered at the last visible position.
    FromNowAtLastVisible,
    /// A projector of mode once is handed over like any other.
    HandsOffModeOnce,
    /// Boot takes a retired projector for a new one.
    BootsRetired,
    /// Boot goes on for ever with a projector that was retired under its hands.
    BootIgnoresRetirement,
    /// Boot has to come to the mark, and not to the end of the log that is visible.
    TargetsTheMark,
    /// A projector of mode once is finished at the mark, though more is visible.
    FinishesBelowTarget,
    /// A worker plays a projector that was booted with another definition than its own.
    PlaysAnotherDefinition,
    /// A batch is applied again after its handler committed a part of it.
    ReappliesPartialBatch,
    /// Boot resumes a projector that must be rebuilt.
    BootIgnoresRebuildReason,
    /// The operator leaves the tables of a projector that retire forgot without being able to tear
    /// them down.
    RetiresWithoutTeardown,
}

/// A bug with the invariants of which it violates the one or the other, by their numbers in the
/// design.
pub(super) const BUGS: &[(Bug, &[u8])] = &[
    (Bug::DeletesBeforeCommit, &[7]),
    (Bug::DeletesDespiteError, &[7]),
    (Bug::CatchesUpOneTooLate, &[1]),
    (Bug::TrustsTheQueue, &[1]),
    (Bug::AppliesUnsigned, &[15]),
    (Bug::DeletesForeign, &[7]),
    (Bug::PlaysNonLive, &[6, 10, 11]),
    (Bug::WaitsForBroken, &[9, 10]),
    (Bug::ForgetsBackgroundCatchUp, &[9]),
    (Bug::ReadmitsTooEarly, &[7]),
    (Bug::NeverReconciles, &[9]),
    (Bug::PublishedBeforeSent, &[9]),
    (Bug::PublishesPastTheMark, &[2]),
    (Bug::SkipsGapsByTime, &[3]),
    (Bug::TreatsAbsentAsRolledBack, &[3]),
    (Bug::IgnoresBlockedFill, &[3]),
    (Bug::NoStatusFence, &[6, 10, 11]),
    (Bug::NoPositionFence, &[5, 6]),
    (Bug::CarriesUncheckedClaim, &[5, 6, 10, 11]),
    (Bug::TwoTransactions, &[4, 5]),
    (Bug::SkipsFailingEvent, &[1]),
    (Bug::MovesPositionAtHandoff, &[4]),
    (Bug::HandsOffWithoutLock, &[5, 11]),
    (Bug::FromNowAtZero, &[11]),
    (Bug::FromNowAtLastVisible, &[2]),
    (Bug::HandsOffModeOnce, &[11]),
    (Bug::BootsRetired, &[11]),
    (Bug::BootIgnoresRetirement, &[9]),
    (Bug::TargetsTheMark, &[13]),
    (Bug::FinishesBelowTarget, &[13]),
    (Bug::PlaysAnotherDefinition, &[6]),
    (Bug::ReappliesPartialBatch, &[1]),
    (Bug::BootIgnoresRebuildReason, &[1, 8, 13]),
    (Bug::RetiresWithoutTeardown, &[1, 8, 13]),
];
