//! What all processes share: time, chance, the database, the queue, and the record of what
//! happened.
//!
//! A process is a future. Each of its statements, sends and receives first yields; the scheduler
//! decides who goes on, so that everything else can happen in between. To drop the future is to
//! kill the process at that point.

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

/// Time, in ticks of about a second. Each step of a process takes one.
pub(super) type Tick = u64;

/// A process, as the trace names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessId {
    Scheduler,
    Writer(u64),
    Relay(u64),
    Play(u64, Release),
    /// What a worker of that number has sent off, to catch up by itself: it lives and dies with the
    /// worker.
    Straggler(u64, Release),
    Boot(u64, Release),
    Retire(u64, Release),
}

impl ProcessId {
    /// Whether it ends when the worker of that number does.
    pub(super) fn belongs_to(self, worker: ProcessId) -> bool {
        matches!((self, worker), (ProcessId::Straggler(of, _), ProcessId::Play(number, _)) if of == number)
    }
}

/// A process that runs, or is to.
pub(super) type Process = Pin<Box<dyn Future<Output = Ended>>>;

/// What a process that has yielded waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Nothing: it may go on at once.
    Ready,
    /// A point in time.
    Until(Tick),
    /// A lock that is released, or a point in time.
    Lock { releases: u64, until: Tick },
    /// A message that becomes visible, or a point in time.
    Message { arrivals: u64, until: Tick },
}

/// How often what goes wrong, in thousandths of the occasions.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Chances {
    /// A connection is cut, by statement.
    pub(super) connection_cut: u32,
    /// A commit is not acknowledged, carried out or not.
    pub(super) lost_ack: u32,
    /// A handler runs into a deadlock, by batch.
    pub(super) deadlock: u32,
    /// A handler commits by itself, in the middle of a batch, by batch.
    pub(super) handler_commits: u32,
    /// The queue does not answer, by call.
    pub(super) queue_unavailable: u32,
    /// A message is lost, or sent twice, by send.
    pub(super) message_loss: u32,
    pub(super) message_repeat: u32,
    /// A projector takes too long, by step: it leaves the convoy.
    pub(super) slow: u32,
    /// A writer rolls back.
    pub(super) rollback: u32,
    /// A projector cannot take an event, by event.
    pub(super) poison: u32,
}

/// An event that a projector cannot take. Position 0 stands for its setup.
#[derive(Debug, Clone, Copy)]
pub(super) struct Poison {
    pub(super) projector_index: usize,
    pub(super) position: u64,
    pub(super) kind: FailureKind,
    /// Only in this release; the others have mended it.
    pub(super) release: Option<Release>,
}

/// How a handler fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// With an error of its own, until it is mended.
    Error,
    /// With a panic, until it is mended.
    Panic,
    /// Once.
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
    /// How far the mark has been looked after.
    pub(super) proved: Position,
    /// The ids of the events that a writer was told are stored.
    pub(super) acknowledged: Vec<String>,
    /// The releases of the workers that run, and how many boots do.
    pub(super) playing: Vec<Release>,
    pub(super) booting: usize,
    /// Who has left the convoy of which worker, and what is to be started for them.
    pub(super) in_background: Vec<(u64, ProjectorId)>,
    pub(super) spawned: Vec<(ProcessId, Process)>,
    /// Who is in the convoy of which worker again, since when, and where the mark stood when it
    /// began to catch up.
    pub(super) readmitted: Vec<(u64, ProjectorId, Tick, Position)>,
    /// Who was retired and forgotten.
    pub(super) forgotten: [bool; super::projectors::PROJECTORS.len()],
    /// Only differences matter.
    origin: Instant,
    /// Writers append no more.
    pub(super) is_closing: bool,
    pub(super) occurrences: OccurrenceCounts,
    pub(super) violation: Option<Violation>,
    /// Who is at it now, and what it waits for when it yields.
    pub(super) process_id: ProcessId,
    pub(super) wait: Wait,
    /// The process at hand is being killed: the server learns of it late.
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

    /// The time, as the engine's own code takes it.
    pub(super) fn instant(&self) -> Instant {
        self.origin + Duration::from_secs(self.clock)
    }

    /// Whether a worker of another release plays.
    pub(super) fn is_played_by_another(&self, release: Release) -> bool {
        self.playing.iter().any(|&playing| playing != release)
    }

    /// True in so many of a thousand cases.
    pub(super) fn roll(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.rng.u32(0..1000) < per_mille
    }

    pub(super) fn record(&mut self, occurrence: Occurrence) {
        self.occurrences.record(occurrence);
    }

    /// Writes a line of the trace, if there is one.
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

    /// Only the first violation counts: what follows from it says nothing.
    pub(super) fn record_violation(&mut self, invariant: u8, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let what = what();
            self.trace(|| format!("VIOLATES invariant {invariant}: {what}"));
            self.violation = Some(Violation { invariant, description: what });
        }
    }
}

/// A process's hand on the world.
#[derive(Clone)]
pub(super) struct Sim(Rc<RefCell<World>>);

impl Sim {
    pub(super) fn new(world: World) -> Self {
        Sim(Rc::new(RefCell::new(world)))
    }

    /// The world, for as long as nothing is awaited.
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

    /// Lets others go first.
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
        match std::mem::replace(&mut self.has_yielded, true) {
            true => Poll::Ready(()),
            false => Poll::Pending,
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
            ProcessId::Straggler(number, release) => write!(f, "apart#{number} r{release}"),
            ProcessId::Boot(number, release) => write!(f, "boot#{number} r{release}"),
            ProcessId::Retire(number, release) => write!(f, "retire#{number} r{release}"),
        }
    }
}
