//! The state that all processes share: the clock, the random numbers, the database, the queue and
//! the record of the run.
//!
//! A process is a future. Before each statement, send and receive it yields, and the scheduler
//! chooses the process that continues. Dropping the future kills the process at that point.

use std::cell::{RefCell, RefMut};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::bug::Bug;
use super::database::Database;
use super::invariants::Violation;
use super::occurrence::{Occurrence, OccurrenceCounts};
use super::process::Ended;
use super::projectors::Release;
use super::queue::Queue;
use crate::model::event::Position;
use crate::model::projector::ProjectorId;

/// Time in ticks of about a second. Each step of a process takes one tick.
pub(super) type Tick = u64;

/// Identifies a process, and names it in the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessId {
    Scheduler,
    Writer(u64),
    Relay(u64),
    Play(u64, Release),
    /// A background catch-up of the worker with this number. It ends when the worker ends.
    Straggler(u64, Release),
    Boot(u64, Release),
    Retire(u64, Release),
}

impl ProcessId {
    /// Whether this process is a background catch-up of `worker`, and so ends with it.
    pub(super) fn belongs_to(self, worker: ProcessId) -> bool {
        match (self, worker) {
            (ProcessId::Straggler(of, _), ProcessId::Play(number, _)) => of == number,
            _ => false,
        }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProcessId::Scheduler => write!(f, "-"),
            ProcessId::Writer(number) => write!(f, "writer#{number}"),
            ProcessId::Relay(number) => write!(f, "relay#{number}"),
            ProcessId::Play(number, release) => write!(f, "play#{number} r{release}"),
            ProcessId::Straggler(number, release) => write!(f, "straggler#{number} r{release}"),
            ProcessId::Boot(number, release) => write!(f, "boot#{number} r{release}"),
            ProcessId::Retire(number, release) => write!(f, "retire#{number} r{release}"),
        }
    }
}

/// The future of a process.
pub(super) type Process = Pin<Box<dyn Future<Output = Ended>>>;

/// What a process that has yielded waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// The process can continue at once.
    Ready,
    /// A point in time.
    Until(Tick),
    /// A lock that is released, or a point in time.
    Lock { releases: u64, until: Tick },
    /// A message that becomes visible, or a point in time.
    Message { arrivals: u64, until: Tick },
}

/// The chances of random faults, in thousandths.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Chances {
    /// Per statement: the connection is cut.
    pub(super) connection_cut: u32,
    /// Per commit: the commit is not acknowledged, whether it happened or not.
    pub(super) lost_ack: u32,
    /// Per batch: the handler runs into a deadlock.
    pub(super) deadlock: u32,
    /// Per batch: the handler commits in the middle of the batch.
    pub(super) handler_commits: u32,
    /// Per call: the queue does not answer.
    pub(super) queue_unavailable: u32,
    /// Per send: the message is lost, or stored twice.
    pub(super) message_loss: u32,
    pub(super) message_repeat: u32,
    /// Per step: the projector is too slow and moves to the background.
    pub(super) slow: u32,
    /// Per append: the writer rolls back.
    pub(super) rollback: u32,
    /// Per event: the handler of some projector will fail.
    pub(super) poison: u32,
}

/// An event on which a projector fails. Position 0 means its setup.
#[derive(Debug, Clone, Copy)]
pub(super) struct Poison {
    pub(super) projector_index: usize,
    pub(super) position: u64,
    pub(super) kind: FailureKind,
    /// If set, the projector fails only in this release; it is fixed in the others.
    pub(super) release: Option<Release>,
}

/// How a handler fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// With its own error, until it is fixed.
    Error,
    /// With a panic, until it is fixed.
    Panic,
    /// With its own error, once.
    Flaky,
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) clock: Tick,
    pub(super) bug: Option<Bug>,
    pub(super) chances: Chances,
    pub(super) database: Database,
    pub(super) queue: Queue,
    pub(super) poison: Vec<Poison>,
    /// The highest mark whose positions were checked against invariant 3.
    pub(super) proved: Position,
    /// The ids of the events whose append was acknowledged.
    pub(super) acknowledged: Vec<String>,
    /// The releases of the running workers, and the number of running boots.
    pub(super) playing: Vec<Release>,
    pub(super) booting: usize,
    /// The projectors in the background, each with the number of its worker.
    pub(super) in_background: Vec<(u64, ProjectorId)>,
    /// The processes that the scheduler starts after this step.
    pub(super) spawned: Vec<(ProcessId, Process)>,
    /// The readmitted projectors: number of the worker, projector, tick of the readmission, and the
    /// mark when the catch-up began.
    pub(super) readmitted: Vec<(u64, ProjectorId, Tick, Position)>,
    /// Whether each projector was retired and removed from the ledger.
    pub(super) forgotten: [bool; super::projectors::PROJECTORS.len()],
    /// Tick 0 as an `Instant`. Its value is arbitrary: the engine uses only differences.
    origin: Instant,
    /// The run is settling: writers append no more events.
    pub(super) is_closing: bool,
    pub(super) occurrences: OccurrenceCounts,
    pub(super) violation: Option<Violation>,
    /// The process that runs now, and the reason for which it yields.
    pub(super) process_id: ProcessId,
    pub(super) wait: Wait,
    /// A process is being killed, so the server may notice its open transactions much later.
    pub(super) is_killing: bool,
    /// How often a lock was released, and how often a message became visible.
    pub(super) releases: u64,
    pub(super) arrivals: u64,
    trace: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(seed: u64, bug: Option<Bug>, trace: bool) -> Self {
        World {
            rng: Rng::with_seed(seed),
            clock: 0,
            bug,
            chances: Chances::default(),
            database: Database::default(),
            queue: Queue::default(),
            poison: Vec::new(),
            proved: Position::START,
            acknowledged: Vec::new(),
            playing: Vec::new(),
            booting: 0,
            in_background: Vec::new(),
            spawned: Vec::new(),
            readmitted: Vec::new(),
            forgotten: Default::default(),
            origin: Instant::now(),
            is_closing: false,
            occurrences: OccurrenceCounts::new(),
            violation: None,
            process_id: ProcessId::Scheduler,
            wait: Wait::Ready,
            is_killing: false,
            releases: 0,
            arrivals: 0,
            trace: trace.then(Vec::new),
        }
    }

    /// The time in the form that the engine takes.
    pub(super) fn instant(&self) -> Instant {
        self.origin + Duration::from_secs(self.clock)
    }

    /// Whether a worker of another release plays.
    pub(super) fn is_played_by_another(&self, release: Release) -> bool {
        self.playing.iter().any(|&playing| playing != release)
    }

    /// Returns `true` with a probability of `per_mille` thousandths.
    pub(super) fn roll(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.rng.u32(0..1000) < per_mille
    }

    pub(super) fn record(&mut self, occurrence: Occurrence) {
        self.occurrences.record(occurrence);
    }

    /// Adds a line to the trace if the run is traced.
    pub(super) fn trace(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!(
                "{:>5}  {:<14} {}",
                self.clock,
                self.process_id.to_string(),
                what()
            ));
        }
    }

    pub(super) fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }

    /// Records a violation. Later violations may follow from the first one, so they are ignored.
    pub(super) fn record_violation(&mut self, invariant: u8, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let what = what();
            self.trace(|| format!("VIOLATES invariant {invariant}: {what}"));
            self.violation = Some(Violation { invariant, description: what });
        }
    }
}

/// A handle of a process to the shared world.
#[derive(Clone)]
pub(super) struct Sim(Rc<RefCell<World>>);

impl Sim {
    pub(super) fn new(world: World) -> Self {
        Sim(Rc::new(RefCell::new(world)))
    }

    /// Borrows the world. The borrow must end before the next await.
    pub(super) fn world(&self) -> RefMut<'_, World> {
        self.0.borrow_mut()
    }

    pub(super) fn has(&self, bug: Bug) -> bool {
        self.world().bug == Some(bug)
    }

    pub(super) fn record(&self, occurrence: Occurrence) {
        self.world().record(occurrence);
    }

    pub(super) fn trace(&self, what: impl FnOnce() -> String) {
        self.world().trace(what);
    }

    pub(super) fn now(&self) -> Tick {
        self.world().clock
    }

    /// Yields, so that other processes can run first.
    pub(super) async fn step(&self) {
        self.wait(Wait::Ready).await;
    }

    pub(super) async fn sleep(&self, ticks: Tick) {
        let until = self.now() + ticks;
        self.wait(Wait::Until(until)).await;
    }

    /// Sleeps for about as long as the engine's jittered backoff does.
    pub(super) async fn back_off(&self) {
        let ticks = self.world().rng.u64(1..6);
        self.sleep(ticks).await;
    }

    /// Waits for a lock to be released.
    pub(super) async fn wait_for_release(&self, until: Tick) {
        let releases = self.world().releases;
        self.wait(Wait::Lock { releases, until }).await;
    }

    /// Waits for a message to become visible.
    pub(super) async fn wait_for_arrival(&self, until: Tick) {
        let arrivals = self.world().arrivals;
        self.wait(Wait::Message { arrivals, until }).await;
    }

    async fn wait(&self, wait: Wait) {
        self.world().wait = wait;
        Yield { has_yielded: false }.await;
    }
}

struct Yield {
    has_yielded: bool,
}

impl Future for Yield {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.has_yielded, true) { Poll::Ready(()) } else { Poll::Pending }
    }
}
