//! Runs one schedule: which process continues, which faults happen and how everything settles. The
//! seed determines the whole schedule.

use std::task::{Context, Poll, Waker};

use super::bug::Bug;
use super::fault::{FAULTS, Fault};
use super::invariants::{self, Violation};
use super::occurrence::{Occurrence, OccurrenceCounts};
use super::process::{Ended, boot, play, relay, retire, writer};
use super::projectors::{PROJECTORS, RELEASE_COUNT, Release};
use super::world::{Chances, FailureKind, Poison, Process, ProcessId, Sim, Tick, Wait, World};
use crate::model::lifecycle::Status;
use crate::model::projector::ProjectorId;
use crate::model::registry::Registry;

/// Writers stop at this number of positions. A short log is enough: faults do not need a long one.
pub(super) const MAX_LOG_EVENTS: usize = 40;

/// The largest message in bytes. It is large enough that `max_events` of the relay limits a
/// message.
pub(super) const MESSAGE_BYTES: usize = 1_100;

/// The most steps after the faults stop until everything must have settled.
const MAX_SETTLE_STEPS: u64 = 6_000;

/// The parameters of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) bug: Option<Bug>,
    /// How many steps run with faults. `None`: the seed determines it.
    pub(super) steps: Option<u64>,
    pub(super) trace: bool,
}

/// The result of a run.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) violation: Option<Violation>,
    pub(super) occurrences: OccurrenceCounts,
    /// How many steps ran with faults.
    pub(super) steps: u64,
    pub(super) trace: Vec<String>,
}

pub(super) struct Scheduler<'a> {
    pub(super) sim: Sim,
    releases: &'a [Registry],
    pub(super) slots: Vec<Slot>,
    /// The faults of this schedule, with their weights.
    faults: Vec<(Fault, u32)>,
    /// The chance of a fault per step, in thousandths.
    fault_rate: u32,
    last_number: u64,
    /// How the boot that ended last has ended.
    pub(super) last_boot: Option<Ended>,
    highest_release: Release,
}

/// A running process.
pub(super) struct Slot {
    pub(super) process_id: ProcessId,
    process: Process,
    wait: Wait,
    /// The process does not run before this tick, as after a long pause of its machine.
    pub(super) paused_until: Tick,
}

/// Runs one schedule.
pub(super) fn run(plan: Plan, releases: &[Registry]) -> Outcome {
    let sim = Sim::new(World::new(plan.seed, plan.bug, plan.trace));
    let mut scheduler = Scheduler {
        sim,
        releases,
        slots: Vec::new(),
        faults: Vec::new(),
        fault_rate: 0,
        last_number: 0,
        last_boot: None,
        highest_release: 0,
    };
    let steps = scheduler.prepare();
    let steps = plan.steps.unwrap_or(steps);
    scheduler.run_with_faults(steps);
    scheduler.settle();
    // Dropping a process may still change the world, so all end before the results are read.
    scheduler.slots.clear();
    let mut world = scheduler.sim.world();
    let (violation, trace) = (world.violation.take(), world.take_trace());
    Outcome { violation, occurrences: world.occurrences.clone(), steps, trace }
}

impl Scheduler<'_> {
    /// Draws the chances and faults of the schedule, starts its first processes, and returns the
    /// number of steps with faults.
    fn prepare(&mut self) -> u64 {
        let sim = self.sim.clone();
        let writers = {
            let mut world = sim.world();
            // Each fault is switched off in half of the schedules, so that some schedules have many
            // of one kind.
            let mut chance = |most: u32| if world.rng.bool() { world.rng.u32(1..=most) } else { 0 };
            let chances = Chances {
                connection_cut: chance(20),
                lost_ack: chance(100),
                deadlock: chance(100),
                handler_commits: chance(60),
                queue_unavailable: chance(60),
                message_loss: chance(200),
                message_repeat: chance(200),
                slow: chance(30),
                rollback: chance(400),
                poison: chance(300),
            };
            world.chances = chances;
            world.queue.is_fifo = world.rng.bool();
            if chances.poison > 0 && world.rng.u32(0..4) == 0 {
                for _ in 0..world.rng.u32(1..=3) {
                    let projector_index = world.rng.usize(0..PROJECTORS.len());
                    world.poison.push(Poison {
                        projector_index,
                        position: 0,
                        kind: FailureKind::Error,
                        release: None,
                    });
                }
            }
            self.fault_rate = world.rng.u32(5..80);
            for &(fault, weight) in FAULTS {
                if world.rng.u32(0..3) > 0 {
                    self.faults.push((fault, weight));
                }
            }
            world.rng.u64(1..=3)
        };
        for _ in 0..writers {
            self.start_writer();
        }
        self.start_relay();
        let release = self.random_release();
        self.start_boot(release);
        self.start_play(release);
        let mut world = sim.world();
        let most = [100, 300, 700][world.rng.usize(0..3)];
        world.rng.u64(20..most)
    }

    /// Runs the steps of the schedule in which faults happen.
    fn run_with_faults(&mut self, steps: u64) {
        for _ in 0..steps {
            if self.sim.world().violation.is_some() {
                return;
            }
            let rate = self.fault_rate;
            if self.sim.world().roll(rate) {
                self.sim.world().process_id = ProcessId::Scheduler;
                self.inject_fault();
            }
            self.step();
        }
    }

    fn inject_fault(&mut self) {
        let total: u32 = self.faults.iter().map(|(_, weight)| weight).sum();
        if total == 0 {
            return;
        }
        let mut drawn = self.sim.world().rng.u32(0..total);
        let fault = self.faults.iter().find(|(_, weight)| {
            let found = drawn < *weight;
            drawn = drawn.saturating_sub(*weight);
            found
        });
        if let Some(&(fault, _)) = fault {
            self.apply(fault);
        }
    }

    /// Stops the faults. The running processes end, one release is deployed, and the run continues
    /// until nothing is left to do.
    fn settle(&mut self) {
        let release = self.random_release();
        let fixes_all = {
            let mut world = self.sim.world();
            world.process_id = ProcessId::Scheduler;
            world.trace(|| format!("— the faults stop; release {release} is deployed —"));
            world.chances = Chances::default();
            world.is_closing = true;
            world.database.down_until = 0;
            let fixes_all = world.rng.u32(0..4) > 0;
            if fixes_all {
                world.poison.clear();
            }
            fixes_all
        };
        // Either every process is killed, or the running ones continue to their end.
        let restarts = self.sim.world().rng.bool();
        if restarts {
            self.kill(|_| true);
        } else {
            self.slots.iter_mut().for_each(|slot| slot.paused_until = 0);
        }
        let is_transient = |slot: &Slot| {
            matches!(
                slot.process_id,
                ProcessId::Writer(_) | ProcessId::Boot(..) | ProcessId::Retire(..)
            )
        };
        if !self.run_until("writers, boots and retires end", |scheduler| {
            !scheduler.slots.iter().any(is_transient)
        }) {
            return;
        }
        self.kill(|process_id| matches!(process_id, ProcessId::Play(_, of) if *of != release));
        if fixes_all && !self.rebuild(release) {
            return;
        }
        if !self.slots.iter().any(|slot| matches!(slot.process_id, ProcessId::Relay(_))) {
            self.start_relay();
        }
        // A second boot may be needed. A worker may have met a failing event before it was fixed,
        // and may mark its projector broken only after the first boot has passed that projector.
        for _ in 0..2 {
            self.last_boot = None;
            self.start_boot(release);
            if !self.run_until("the last boot ends", |scheduler| scheduler.last_boot.is_some()) {
                return;
            }
            if self.last_boot == Some(Ended::Booted { released: true }) {
                break;
            }
        }
        self.check_boot(release, fixes_all);
        while self
            .slots
            .iter()
            .filter(|slot| matches!(slot.process_id, ProcessId::Play(..)))
            .count()
            < 2
        {
            self.start_play(release);
        }
        if self
            .run_until("everything is quiet", |scheduler| is_quiet(&scheduler.sim.world(), release))
        {
            let mut world = self.sim.world();
            world.process_id = ProcessId::Scheduler;
            invariants::at_rest(&mut world, release);
        }
    }

    /// Retires each projector that must be rebuilt, as an operator would, so that boot builds it
    /// anew. Returns `false` if that did not end.
    fn rebuild(&mut self, release: Release) -> bool {
        let is_incomplete = |row: &&super::database::LedgerRow| {
            super::projectors::is_in_release(release, row.projector_index)
                && row.must_be_rebuilt()
                && row.entry.status != Status::Retired
        };
        let incomplete: Vec<_> = self
            .sim
            .world()
            .database
            .ledger
            .iter()
            .filter(is_incomplete)
            .map(|row| row.projector_index)
            .collect();
        for projector_index in incomplete {
            self.sim.record(Occurrence::Rebuilt);
            let (number, registry) = (self.next_number(), self.releases[release].clone());
            let id = ProjectorId {
                name: PROJECTORS[projector_index].name.into(),
                version: PROJECTORS[projector_index].version,
            };
            self.start(
                ProcessId::Retire(number, release),
                Box::pin(retire::rebuild(self.sim.clone(), registry, id)),
            );
        }
        let retires = |scheduler: &Self| {
            scheduler.slots.iter().any(|slot| matches!(slot.process_id, ProcessId::Retire(..)))
        };
        self.run_until("projectors that must be rebuilt are retired", |scheduler| {
            !retires(scheduler)
        })
    }

    /// Checks 9: a boot releases if nothing prevents it.
    fn check_boot(&mut self, release: Release, fixes_all: bool) {
        let mut world = self.sim.world();
        let is_broken = |row: &super::database::LedgerRow| {
            let is_incomplete = row.must_be_rebuilt() && row.entry.status != Status::Retired;
            super::projectors::is_in_release(release, row.projector_index)
                && (row.entry.status.failure().is_some() || is_incomplete)
        };
        let some_broken = world.database.ledger.iter().any(is_broken);
        if some_broken {
            world.record(Occurrence::LeftBroken);
        }
        let ended = self.last_boot;
        let is_right = match ended {
            Some(Ended::Booted { released: true }) => true,
            Some(Ended::Booted { released: false }) => !fixes_all && some_broken,
            _ => false,
        };
        if !is_right {
            world.record_violation(9, || {
                format!("nothing prevented a release, but the last boot ended with {ended:?}")
            });
        }
    }

    fn run_until(&mut self, what: &str, is_done: impl Fn(&Self) -> bool) -> bool {
        for _ in 0..MAX_SETTLE_STEPS {
            if self.sim.world().violation.is_some() {
                return false;
            }
            if is_done(self) {
                return true;
            }
            self.step();
        }
        self.sim
            .world()
            .record_violation(9, || format!("not reached in {MAX_SETTLE_STEPS} steps: {what}"));
        false
    }

    /// Runs one step of one random process that is ready.
    fn step(&mut self) {
        let (chosen, clock) = {
            let mut world = self.sim.world();
            world.clock += 1;
            world.reap_orphans();
            let mut count = 0;
            let mut chosen = None;
            for (at, slot) in self.slots.iter().enumerate() {
                if !slot.is_ready(&world) {
                    continue;
                }
                count += 1;
                if count == 1 || world.rng.u32(0..count) == 0 {
                    chosen = Some(at);
                }
            }
            (chosen, world.clock)
        };
        let Some(at) = chosen else {
            // Every process waits, so the clock moves to the tick before the first of them
            // continues.
            let next = self.slots.iter().map(Slot::ready_at).min();
            let orphans = self.sim.world().database.next_orphan;
            let next = next.into_iter().chain(orphans).min().unwrap_or(clock);
            self.sim.world().clock = next.max(clock).saturating_sub(1).max(clock);
            return;
        };
        self.sim.world().process_id = self.slots[at].process_id;
        let polled = self.slots[at].process.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        match polled {
            Poll::Pending => self.slots[at].wait = self.sim.world().wait,
            Poll::Ready(ended) => {
                let slot = self.slots.swap_remove(at);
                if matches!(slot.process_id, ProcessId::Boot(..)) {
                    self.last_boot = Some(ended);
                }
                self.refresh_running();
            }
        }
        let spawned = std::mem::take(&mut self.sim.world().spawned);
        for (process_id, process) in spawned {
            self.start(process_id, process);
        }
        invariants::after_step(&mut self.sim.world());
    }

    /// Kills the matching processes, and the background catch-ups of their workers.
    pub(super) fn kill(&mut self, is: impl Fn(&ProcessId) -> bool) {
        self.sim.world().is_killing = true;
        let dead: Vec<ProcessId> = self
            .slots
            .iter()
            .map(|slot| slot.process_id)
            .filter(|process_id| is(process_id))
            .collect();
        self.slots.retain(|slot| {
            !is(&slot.process_id) && !dead.iter().any(|dead| slot.process_id.belongs_to(*dead))
        });
        self.sim.world().is_killing = false;
        self.refresh_running();
    }

    /// Updates what the world knows about the running processes.
    pub(super) fn refresh_running(&mut self) {
        let mut world = self.sim.world();
        let plays = |number: u64| {
            self.slots
                .iter()
                .any(|slot| matches!(slot.process_id, ProcessId::Play(of, _) if of == number))
        };
        world.in_background.retain(|&(worker, _)| plays(worker));
        let playing = self.slots.iter().filter_map(|slot| match slot.process_id {
            ProcessId::Play(_, release) => Some(release),
            _ => None,
        });
        world.playing = playing.collect();
        world.booting =
            self.slots.iter().filter(|slot| matches!(slot.process_id, ProcessId::Boot(..))).count();
    }

    pub(super) fn random_release(&mut self) -> Release {
        self.sim.world().rng.usize(0..RELEASE_COUNT)
    }

    pub(super) fn start_writer(&mut self) {
        let number = self.next_number();
        self.start(ProcessId::Writer(number), Box::pin(writer::write(self.sim.clone(), number)));
    }

    pub(super) fn start_relay(&mut self) {
        let number = self.next_number();
        self.start(ProcessId::Relay(number), Box::pin(relay::relay(self.sim.clone())));
    }

    pub(super) fn start_play(&mut self, release: Release) {
        if release < self.highest_release {
            self.sim.record(Occurrence::RolledBackRelease);
        }
        self.highest_release = self.highest_release.max(release);
        let (number, registry) = (self.next_number(), self.releases[release].clone());
        self.start(
            ProcessId::Play(number, release),
            Box::pin(play::play(self.sim.clone(), number, release, registry)),
        );
    }

    pub(super) fn start_boot(&mut self, release: Release) {
        if self.sim.world().booting > 0 {
            self.sim.record(Occurrence::TwoBoots);
        }
        let (number, registry) = (self.next_number(), self.releases[release].clone());
        self.start(
            ProcessId::Boot(number, release),
            Box::pin(boot::boot(self.sim.clone(), release, registry)),
        );
    }

    pub(super) fn start_retire(&mut self, release: Release) {
        let (number, registry) = (self.next_number(), self.releases[release].clone());
        self.start(
            ProcessId::Retire(number, release),
            Box::pin(retire::retire(self.sim.clone(), registry)),
        );
    }

    fn start(&mut self, process_id: ProcessId, process: Process) {
        self.sim.trace(|| format!("{process_id} starts"));
        self.slots.push(Slot { process_id, process, wait: Wait::Ready, paused_until: 0 });
        self.refresh_running();
    }

    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }
}

impl Slot {
    fn is_ready(&self, world: &World) -> bool {
        self.paused_until <= world.clock
            && match self.wait {
                Wait::Ready => true,
                Wait::Until(until) => until <= world.clock,
                Wait::Lock { releases, until } => {
                    releases != world.releases || until <= world.clock
                }
                Wait::Message { arrivals, until } => {
                    arrivals != world.arrivals || until <= world.clock
                }
            }
    }

    /// The tick at which the process continues if no lock is released and no message arrives.
    fn ready_at(&self) -> Tick {
        let wait = match self.wait {
            Wait::Ready => 0,
            Wait::Until(until) | Wait::Lock { until, .. } | Wait::Message { until, .. } => until,
        };
        wait.max(self.paused_until)
    }
}

/// Whether nothing is left to do: all events are published and played, all messages are deleted,
/// and no transaction is open.
fn is_quiet(world: &World, release: Release) -> bool {
    let database = &world.database;
    let mark = database.high_water;
    let awaits = |row: &super::database::LedgerRow| {
        row.entry.status == Status::Live
            && invariants::is_played_by(row, release)
            && row.entry.position < mark
    };
    database.open.is_empty()
        && world.queue.messages.is_empty()
        && mark.get() == database.last_visible()
        && database.published == mark
        && !database.ledger.iter().any(awaits)
}
