//! What happened in a run: counted, so that the simulation cannot silently become trivial.

macro_rules! seen {
    ($($name:ident),* $(,)?) => {
        /// Something worth counting.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Seen { $($name),* }

        impl Seen {
            pub(super) const ALL: &[Seen] = &[$(Seen::$name),*];
        }
    };
}

seen! {
    // the log
    Appended, RolledBack, VisibleOutOfOrder, ReservedNotInserted, TombstoneFilled, WriterMetTombstone,
    FillMetWriter, FillMetCommitted, MarkHeldByWriter, AppendRepeatedAfterLostAck,
    // the database
    LockWait, LockWaitTimeout, OrphanHeldLock, CommitLost, AckLost, ConnectionCut, DatabaseRestart, CounterFellBack,
    // the queue
    Sent, MessageLost, MessageRepeated, MessageDeduplicated, Reordered, VisibilityExpired, TwoWorkersOneMessage,
    Purged, DeadLettered, StaleReceipt, Foreign, Forged, Reference, QueueAway,
    // play
    AppliedFromQueue, Skipped, CaughtUp, ReadReference, OnlyForeign, Reconciled, JoinedWithoutRestart, Outdated, LeftConvoy, Rejoined,
    // the engine
    StalePosition, StaleStatus, StaleDefinition, RowGone, Deadlock, HandlerCommitted, MustBeRebuilt, Isolated, FlakyPassedAlone, Panicked, BrokeInPlay, BrokeInBoot,
    BrokeAtSetup, BrokeForRebuild, Mended, HeldOn, EventByEvent,
    // boot
    TwoBoots, HandedOver, HandedOverBesideOldRelease, HandedOverFromBroken, NotYetThere, Stalled, Finished, GaveUp,
    BootRepeated, LetGo, WaitedForMark, GaveUpWaiting, Redefined, RepairedBesideFailure, RefusedToBoot,
    // retire
    Retired, Forgotten, BootedAnew, RetiredMetBoot, Rebuilt,
    // the relay
    LeaseTaken, LeaseHeldElsewhere, TwoRelays,
    // the scheduler
    CrashedPlay, CrashedBoot, CrashedRelay, CrashedWriter, CrashedRetire, Terminated, Paused, RolledBackRelease,
    LeftBroken, BrokenStayedOthersMoved,
}

/// How often each of them was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Counts([u64; Seen::ALL.len()]);

impl Counts {
    pub(super) const fn new() -> Self {
        Counts([0; Seen::ALL.len()])
    }

    pub(super) fn note(&mut self, seen: Seen) {
        self.0[seen as usize] += 1;
    }

    pub(super) fn add(&mut self, others: &Counts) {
        for (count, more) in self.0.iter_mut().zip(others.0) {
            *count += more;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Seen, u64)> {
        Seen::ALL.iter().copied().zip(self.0)
    }
}
