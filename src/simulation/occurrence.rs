//! Counts what happens in a run. A test requires that each occurrence is frequent, so that the
//! simulation cannot become trivial without notice.

macro_rules! occurrences {
    ($($name:ident),* $(,)?) => {
        /// A counted occurrence.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Occurrence { $($name),* }

        impl Occurrence {
            pub(super) const ALL: &[Occurrence] = &[$(Occurrence::$name),*];
        }
    };
}

occurrences! {
    // the log
    Appended, RolledBack, VisibleOutOfOrder, ReservedNotInserted, FillerInserted,
    WriterMetFiller, FillMetWriter, FillMetCommitted, MarkBlockedByWriter,
    AppendRepeatedAfterLostAck,
    // the database
    LockWait, LockWaitTimeout, OrphanHeldLock, CommitLost, AckLost, ConnectionCut,
    DatabaseRestart, CounterFellBack,
    // the queue
    MessageSent, MessageLost, MessageRepeated, MessageDeduplicated, MessagesReordered,
    VisibilityExpired, TwoWorkersOneMessage, QueuePurged, DeadLettered, StaleReceipt,
    ForeignMessage, ForgedMessage, ReferenceSent, QueueUnavailable,
    // play
    AppliedFromQueue, RunSkipped, CaughtUp, ReadReference, OnlyForeign, Reconciled,
    JoinedWithoutRestart, OutdatedDefinition, MovedToBackground, Readmitted,
    // the engine
    StalePosition, StaleStatus, StaleDefinition, RowGone, Deadlock, HandlerCommitted,
    MustBeRebuilt, Isolated, FlakyPassedAlone, Panicked, BrokeInPlay, BrokeInBoot, BrokeAtSetup,
    BrokeForRebuild, ProjectorFixed, ClaimCarried, EventByEvent,
    // boot
    TwoBoots, HandedOver, HandedOverBesideOldRelease, HandedOverFromBroken, TargetNotReached,
    Stalled, Finished, GaveUp, BootRepeated, RetiredDuringBoot, WaitedForMark, GaveUpWaiting,
    Redefined, RepairedBesideFailure, RefusedToBoot,
    // retire
    Retired, Forgotten, BootedAgain, RetiredMetBoot, Rebuilt,
    // the relay
    LeaseTaken, LeaseHeldElsewhere, TwoRelays,
    // the scheduler
    CrashedPlay, CrashedBoot, CrashedRelay, CrashedWriter, CrashedRetire, ProcessTerminated,
    ProcessPaused, RolledBackRelease, LeftBroken, BrokenStayedOthersMoved,
}

/// How often each occurrence was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OccurrenceCounts([u64; Occurrence::ALL.len()]);

impl OccurrenceCounts {
    pub(super) const fn new() -> Self {
        OccurrenceCounts([0; Occurrence::ALL.len()])
    }

    pub(super) fn record(&mut self, occurrence: Occurrence) {
        self.0[occurrence as usize] += 1;
    }

    pub(super) fn add(&mut self, others: &OccurrenceCounts) {
        for (count, more) in self.0.iter_mut().zip(others.0) {
            *count += more;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Occurrence, u64)> {
        Occurrence::ALL.iter().copied().zip(self.0)
    }
}
