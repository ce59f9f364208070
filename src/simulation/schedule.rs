//! One schedule: which process goes on next, what breaks in between, and how all comes to rest.
//! Everything follows from the seed.

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

/// Writers stop at so many positions: what can go wrong goes wrong in a short log.
pub(super) const MAX_LOG_EVENTS: usize = 40;

/// The largest message. What a message holds is bounded by the number of events here.
pub(super) const MESSAGE_BYTES: usize = 1_100;

/// Within so many steps everything has to come to rest, once nothing breaks any more.
const MAX_SETTLE_STEPS: u64 = 6_000;

/// What is to be run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) bug: Option<Bug>,
    /// How many steps until everything comes to rest, where the seed is not to decide it.
    pub(super) steps: Option<u64>,
    pub(super) trace: bool,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) violation: Option<Violation>,
    pub(super) occurrences: OccurrenceCounts,
    /// The steps until everything came to rest.
    pub(super) steps: u64,
    pub(super) trace: Vec<String>,
}

pub(super) struct Scheduler<'a> {
    pub(super) sim: Sim,
    releases: &'a [Registry],
    pub(super) slots: Vec<Slot>,
    /// What breaks in this schedule, each as often as its weight says.
    faults: Vec<(Fault, u32)>,
    /// How often something does, in thousandths of the steps.
    fault_rate: u32,
    last_number: u64,
    /// The last boot that came to its end, as it ended.
    pub(super) last_boot: Option<Ended>,
    highest_release: Release,
}

/// A process that runs.
pub(super) struct Slot {
    pub(super) process_id: ProcessId,
    process: Process,
    wait: Wait,
    /// It gets no time until then: a stopped machine, a long collection of garbage.
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
    // A killed process gives back what it holds of the world.
    scheduler.slots.clear();
    let mut world = scheduler.sim.world();
    let (violation, trace) = (world.violation.take(), world.take_trace());
    Outcome { violation, occurrences: world.occurrences.clone(), steps, trace }
}

impl Scheduler<'_> {
    /// Draws what kind of schedule it is, and says how many steps it has until everything comes to
    /// rest.
    fn prepare(&mut self) -> u64 {
        let sim = self.sim.clone();
        let writers = {
            let mut world = sim.world();
            // Each kind of trouble is there or not, so that some schedules have much of one.
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

    /// Steps and faults, in any order.
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

    /// Nothing breaks any more: what runs comes to its end, one release is deployed, and all is
    /// quiet.
    fn settle(&mut self) {
        let release = self.random_release();
        let mends = {
            let mut world = self.sim.world();
            world.process_id = ProcessId::Scheduler;
            world.trace(|| format!("— nothing breaks any more; release {release} comes to rest —"));
            world.chances = Chances::default();
            world.is_closing = true;
            world.database.down_until = 0;
            let mends = world.rng.u32(0..4) > 0;
            if mends {
                world.poison.clear();
            }
            mends
        };
        // Everything starts anew, or what runs comes to its end.
        let restarts = self.sim.world().rng.bool();
        match restarts {
            true => self.kill(|_| true),
            false => self.slots.iter_mut().for_each(|slot| slot.paused_until = 0),
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
        if mends && !self.rebuild(release) {
            return;
        }
        if !self.slots.iter().any(|slot| matches!(slot.process_id, ProcessId::Relay(_))) {
            self.start_relay();
        }
        // Twice, if need be: a worker may have met its poison before it was mended, and break its
        // projector only when the first boot has passed that by.
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
        self.check_boot(release, mends);
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

    /// An operator retires what must be rebuilt, so that it is booted anew. `false`: it came to no
    /// end.
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
        self.run_until("what must be rebuilt is retired", |scheduler| !retires(scheduler))
    }

    /// 9: with nothing in its way, a boot releases.
    fn check_boot(&mut self, release: Release, mends: bool) {
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
            Some(Ended::Booted { released: false }) => !mends && some_broken,
            _ => false,
        };
        if !is_right {
            world.record_violation(9, || {
                format!("nothing was in its way, and the last boot ended with {ended:?}")
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
            .record_violation(9, || format!("after {MAX_SETTLE_STEPS} steps still not: {what}"));
        false
    }

    /// One process goes on for one step.
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
            // All of them wait: so does the clock, for the first of them.
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

    /// Kills all of these processes, and what they have sent off.
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

    /// What the world knows of who runs.
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

    /// When it goes on if nothing else happens.
    fn ready_at(&self) -> Tick {
        let wait = match self.wait {
            Wait::Ready => 0,
            Wait::Until(until) | Wait::Lock { until, .. } | Wait::Message { until, .. } => until,
        };
        wait.max(self.paused_until)
    }
}

/// Whether all is done that there is to do: what is committed is published, played and deleted.
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
