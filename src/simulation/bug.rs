//! The deliberate bugs. Each one changes a line of the simulated processes, and the invariants must
//! detect each one.

/// A deliberate bug, switched on for a whole run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    /// Play deletes messages before it applies them.
    DeletesBeforeCommit,
    /// Play deletes messages after a fan-out that could not read the log.
    DeletesDespiteError,
    /// Play catches up only if `prev` > position + 1, not if `prev` > position.
    CatchesUpOneTooLate,
    /// Play applies every run, even if the run does not continue from the position.
    TrustsTheQueue,
    /// Play accepts a message with any signature.
    AppliesUnsigned,
    /// Play deletes foreign messages.
    DeletesForeign,
    /// Play processes projectors of any status, and its fence does not check the status.
    PlaysNonLive,
    /// While a projector is broken, play waits and processes no other projector.
    WaitsForBroken,
    /// A projector that moves to the background does not catch up.
    ForgetsBackgroundCatchUp,
    /// A projector is readmitted after one event, and messages that it still needs are deleted.
    ReadmitsTooEarly,
    /// Play never compares positions with the high-water mark.
    NeverReconciles,
    /// The relay records events as published before it sends them, and play does not reconcile.
    PublishedBeforeSent,
    /// The relay publishes visible events above the high-water mark.
    PublishesPastTheMark,
    /// A gap that is still open after the grace period counts as a rollback.
    SkipsGapsByTime,
    /// A position without a row and without a lock counts as a rollback.
    TreatsAbsentAsRolledBack,
    /// A fill that a writer's lock blocked counts as successful.
    IgnoresBlockedFill,
    /// The fence does not check the status.
    NoStatusFence,
    /// The fence does not check the position.
    NoPositionFence,
    /// Boot locks the row for its next batch without checking the fence.
    CarriesUncheckedClaim,
    /// Projection and position are committed in two transactions.
    TwoTransactions,
    /// A projector moves past an event on which its handler failed.
    SkipsFailingEvent,
    /// The handoff moves the position to the high-water mark.
    MovesPositionAtHandoff,
    /// The handoff writes back a row that it read without a lock.
    HandsOffWithoutLock,
    /// A new `from_now` projector starts at position 0.
    FromNowAtZero,
    /// A new `from_now` projector starts at the last visible position.
    FromNowAtLastVisible,
    /// A projector of mode `once` is handed over instead of finished.
    HandsOffModeOnce,
    /// Boot treats a retired projector as a new one.
    BootsRetired,
    /// Boot never ends after a projector is retired while it boots.
    BootIgnoresRetirement,
    /// Boot's target is the high-water mark instead of the last visible position.
    TargetsTheMark,
    /// A projector of mode `once` is finished at the high-water mark, below the target.
    FinishesBelowTarget,
    /// A worker plays a projector that was booted with a different definition.
    PlaysAnotherDefinition,
    /// A batch is applied again after its handler committed a part of it.
    ReappliesPartialBatch,
    /// Boot resumes a projector that must be rebuilt.
    BootIgnoresRebuildReason,
    /// The operator keeps the tables of a projector that retire could not tear down.
    RetiresWithoutTeardown,
}

/// Each bug with the invariants that it can violate, by their numbers in docs/architecture.md. A
/// run must violate one of them.
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
