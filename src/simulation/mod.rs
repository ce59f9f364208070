//! A simulation of the protocol. It runs the engine's decisions through random interleavings and
//! faults, and checks the invariants.
//!
//! One seed determines one schedule. The processes are writers, relays, boots, workers and retire
//! commands, of three releases with different projectors. Each process is a future that yields
//! before every statement, send and receive. The scheduler chooses which process continues, which
//! fault happens in between and which process is killed. After a number of steps the faults stop,
//! and the system must settle. [`invariants`] checks the invariants of docs/architecture.md from
//! the outside, most of them after every step.
//!
//! ```text
//! # 100,000 schedules
//! cargo nextest run --lib simulation
//! # a long run
//! SIMULATION_SCHEDULES=5_000_000 cargo nextest run --lib simulation::every_invariant
//! # one schedule, with its trace
//! SIMULATION_SEED=7 cargo nextest run --lib simulation::every_invariant --no-capture
//! ```
//!
//! `SIMULATION_SEED` together with `SIMULATION_SCHEDULES` sets the first seed. `SIMULATION_STEPS`
//! sets the number of steps before the faults stop.
//!
//! # Engine code and mirrored code
//!
//! The simulation calls the engine's own code for these decisions:
//!
//! - continuity ([`crate::model::continuity`]), and what a projector needs of a run
//!   ([`crate::engine::play::fan_out`]);
//! - packing and reading messages;
//! - the lifecycle and its stages, and the fence's checks of status and definition;
//! - the rest of a batch whose claim is lost, how a batch splits, and when a projector may be
//!   marked broken;
//! - the cursors of a catch-up;
//! - where a new projector starts, the oldest queued event, and when boot is done;
//! - how gaps are surveyed and closed;
//! - which projectors are overdue in reconcile.
//!
//! [`process`] mirrors the control flow around these decisions, statement by statement. A change of
//! that control flow in the engine must be repeated there.
//!
//! # Modelled
//!
//! - The database: positions are handed out before commit and may stay reserved without a row;
//!   commits out of order, rollbacks and spare reservations; unique positions and event ids; row
//!   locks with timeouts; transactions that stay open after their client is gone, until the server
//!   notices; lost connections; commits that are not acknowledged; restarts after which the counter
//!   falls back.
//! - The queue: FIFO with one group and deduplication, or standard; lost, repeated and reordered
//!   messages; purges, expired visibility, stale receipts and a dead-letter queue; foreign
//!   messages, and messages forged by a sender who knows the log's id, positions and event ids, but
//!   not its key.
//! - Processes: two of each kind, killed, terminated and paused at any step.
//! - Projectors: all three modes; definitions that differ between releases; a projector with side
//!   effects, which applies each event in a transaction of its own.
//! - Handlers: errors and panics until they are fixed, in one release or in all, at an event or in
//!   setup; failures that do not repeat; deadlocks.
//! - Slow projectors, which move to the background, catch up and are readmitted.
//! - A handler that commits in the middle of a batch and then fails, or loses its connection or its
//!   process. Its read model must be rebuilt, and an operator retires the projector.
//!
//! # Not modelled
//!
//! The log:
//!
//! - streams and their versions;
//! - gaps that are too wide for the engine to fill, and the command `fill`;
//! - rows below the mark that are deleted;
//! - the mark that `status` computes and does not store;
//! - repeated looks at a gap: here one look ends the grace period, in the engine five;
//! - the search for the lowest locked gap with few probes: here each gap is probed.
//!
//! The relay:
//!
//! - it caches the marks while it holds the lease (here each round reads them);
//! - it publishes proved events before it waits for a gap above them;
//! - it does not probe a gap again while the transaction that holds it is known to be open;
//! - it stores in the log which queue it sends to;
//! - it releases its lease when it stops.
//!
//! Play:
//!
//! - the limits after which a projector moves to the background. Here any projector may move at any
//!   step, and any number catch up at once;
//! - one statement that moves all projectors to which a batch or a page is irrelevant;
//! - receiving ahead while messages are processed or deleted, and the return of such messages;
//! - foreign messages that are set aside, so that the messages behind them become visible;
//! - the shorter poll while a projector is behind, and the comparison before the first receive;
//! - the time that a shutdown leaves to finish a batch (here the batch is rolled back), and
//!   `--until-idle`;
//! - a relay in the same process, which ends with it;
//! - functions: a deadline in the middle of a batch, and which messages were processed by then.
//!
//! Applying, in boot and in play:
//!
//! - projectors that apply a page concurrently, and reading ahead of them;
//! - handlers that continue after they commit and commit again, that roll back, that ignore a
//!   deadlock, that take too long (and are retried once), or whose statement makes the server close
//!   the connection;
//! - a ledger that refuses the engine's statements;
//! - sessions that are reused between batches, and dropped when the server is read-only;
//! - fence, position and commit that share statements and packets. Here each is a step of its own.
//!
//! Boot and retire:
//!
//! - retries after database errors (here such a boot ends, and another one starts);
//! - modes that contradict the ledger;
//! - two retire commands for one projector at once;
//! - tables, the lock under which boot checks them, and read models that must be rebuilt because a
//!   table is missing;
//! - wider subscriptions, what an operator accepts, and boots of named projectors.
//!
//! General:
//!
//! - real time (timeouts and leases are short, counted in steps);
//! - restored backups and changed passwords;
//! - limits of memory (invariant 12);
//! - logs and metrics;
//! - real SQL and real SQS.
//!
//! Tests on real servers cover these.
//!
//! # The deliberate bugs
//!
//! Each bug is switched on alone. A violation of one of its invariants must be found within 5,000
//! schedules, and the same schedule must pass without the bug ([`bug::BUGS`]):
//!
//! | bug | violates |
//! | --- | --- |
//! | Play deletes messages before it applies them | 7 |
//! | Play deletes messages after a fan-out that could not read the log | 7 |
//! | Play catches up only if `prev` > position + 1, not if `prev` > position | 1 |
//! | Play applies every run, even if the run does not continue from the position | 1 |
//! | Play accepts a message with any signature | 15 |
//! | Play deletes foreign messages | 7 |
//! | Play processes projectors of any status, and its fence does not check the status | 6 or 10 or 11 |
//! | While a projector is broken, play waits and processes no other projector | 9 or 10 |
//! | A projector that moves to the background does not catch up | 9 |
//! | A projector is readmitted after one event, and messages that it still needs are deleted | 7 |
//! | Play never compares positions with the high-water mark | 9 |
//! | The relay records events as published before it sends them, and play does not reconcile | 9 |
//! | The relay publishes visible events above the high-water mark | 2 |
//! | A gap that is still open after the grace period counts as a rollback | 3 |
//! | A position without a row and without a lock counts as a rollback | 3 |
//! | A fill that a writer's lock blocked counts as successful | 3 |
//! | The fence does not check the status | 6 or 10 or 11 |
//! | The fence does not check the position | 5 or 6 |
//! | Boot locks the row for its next batch without checking the fence | 5 or 6 or 10 or 11 |
//! | Projection and position are committed in two transactions | 4 or 5 |
//! | A projector moves past an event on which its handler failed | 1 |
//! | The handoff moves the position to the high-water mark | 4 |
//! | The handoff writes back a row that it read without a lock | 5 or 11 |
//! | A new `from_now` projector starts at position 0 | 11 |
//! | A new `from_now` projector starts at the last visible position | 2 |
//! | A projector of mode `once` is handed over instead of finished | 11 |
//! | Boot treats a retired projector as a new one | 11 |
//! | Boot never ends after a projector is retired while it boots | 9 |
//! | Boot's target is the high-water mark instead of the last visible position | 13 |
//! | A projector of mode `once` is finished at the high-water mark, below the target | 13 |
//! | A worker plays a projector that was booted with a different definition | 6 |
//! | A batch is applied again after its handler committed a part of it | 1 |
//! | Boot resumes a projector that must be rebuilt | 1 or 8 or 13 |
//! | The operator keeps the tables of a projector that retire could not tear down | 1 or 8 or 13 |
//!
//! The simulation found two of these in the engine itself: the boot that never ends, and the tables
//! of a projector that retire could not tear down. It also found a boot that released a projector
//! whose handler had just committed a part of a batch.
//!
//! `SIMULATION_SEED` sets the first of the 5,000 schedules. `SIMULATION_BUG` selects one bug by its
//! name.

mod bug;
mod database;
mod fault;
mod invariants;
mod occurrence;
mod process;
mod projectors;
mod queue;
mod schedule;
mod statements;
mod transaction;
mod world;

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bug::{BUGS, Bug};
use occurrence::OccurrenceCounts;
use schedule::{Outcome, Plan, run};

/// The number of schedules, unless `SIMULATION_SCHEDULES` sets another.
const SCHEDULES: u64 = 100_000;

/// Each deliberate bug must be found within this number of schedules.
const SCHEDULES_PER_BUG: u64 = 5_000;

/// How many lines of the trace a failure prints, counted from its end.
const MAX_TRACE_LINES: usize = 120;

fn env_number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.replace('_', "")
            .parse()
            .unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")),
    )
}

/// Runs `schedules` seeds from `first` on, on all cores. Returns the lowest seed that violates an
/// invariant, and the counts of all occurrences.
fn run_seeds(first: u64, schedules: u64, plan: Plan) -> (Option<u64>, OccurrenceCounts) {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64);
    let (failed, occurrences) = (AtomicU64::new(u64::MAX), Mutex::new(OccurrenceCounts::new()));
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (failed, occurrences) = (&failed, &occurrences);
            scope.spawn(move || {
                let releases = projectors::releases();
                let mut counts = OccurrenceCounts::new();
                for seed in (first + thread..first + schedules).step_by(threads as usize) {
                    if seed > failed.load(Ordering::Relaxed) {
                        break;
                    }
                    let outcome = run(Plan { seed, ..plan }, &releases);
                    counts.add(&outcome.occurrences);
                    if outcome.violation.is_some() {
                        failed.fetch_min(seed, Ordering::Relaxed);
                    }
                }
                occurrences.lock().expect("no thread panics while it holds the lock").add(&counts);
            });
        }
    });
    let failed = failed.into_inner();
    (
        (failed != u64::MAX).then_some(failed),
        occurrences.into_inner().expect("no thread panics while it holds the lock"),
    )
}

/// Describes a failed schedule, shortened: its trace, its violation and the command that repeats
/// it.
fn report(plan: Plan) -> String {
    let releases = projectors::releases();
    let plan = shrink(plan, &releases);
    let Outcome { violation, trace, steps, .. } = run(Plan { trace: true, ..plan }, &releases);
    let mut text = String::new();
    for line in &trace[trace.len().saturating_sub(MAX_TRACE_LINES)..] {
        let _ = writeln!(text, "{line}");
    }
    let what = violation.map_or_else(|| "no violation".into(), |violation| violation.to_string());
    let seed = plan.seed;
    let _ = writeln!(text, "\nseed {seed}, faults for {steps} steps: {what}");
    let _ = writeln!(
        text,
        "SIMULATION_SEED={seed} SIMULATION_STEPS={steps} \
         cargo nextest run --lib simulation::every_invariant --no-capture"
    );
    text
}

/// Searches for the fewest steps with faults in which this seed violates the same invariant.
fn shrink(plan: Plan, releases: &[crate::Registry]) -> Plan {
    let first = run(plan, releases);
    let Some(wanted) = first.violation.map(|violation| violation.invariant) else { return plan };
    let (mut low, mut high) = (0, first.steps);
    while low < high {
        let middle = (low + high) / 2;
        let outcome = run(Plan { steps: Some(middle), ..plan }, releases);
        if outcome.violation.is_some_and(|violation| violation.invariant == wanted) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Plan { steps: Some(high), ..plan }
}

#[test]
fn every_invariant_holds_in_every_schedule() {
    let seed = env_number("SIMULATION_SEED");
    let schedules =
        env_number("SIMULATION_SCHEDULES").unwrap_or(if seed.is_some() { 1 } else { SCHEDULES });
    let plan = Plan { seed: 0, bug: None, steps: env_number("SIMULATION_STEPS"), trace: false };
    let began = std::time::Instant::now();
    let (failed, occurrences) = run_seeds(seed.unwrap_or(0), schedules, plan);
    println!("{schedules} schedules in {:.1} s", began.elapsed().as_secs_f32());
    for (occurrence, count) in occurrences.iter() {
        println!("{count:>10} {occurrence:?}");
    }
    if let Some(seed) = failed {
        panic!("{}", report(Plan { seed, ..plan }));
    }
    if let (Some(seed), 1) = (seed, schedules) {
        println!("{}", report(Plan { seed, ..plan }));
    }
    if schedules >= SCHEDULES {
        let rare: Vec<_> = occurrences.iter().filter(|(_, count)| *count < 100).collect();
        assert!(rare.is_empty(), "fewer than 100 times: {rare:?}");
    }
}

#[test]
fn every_deliberate_bug_is_found() {
    let mut missed = Vec::new();
    let first = env_number("SIMULATION_SEED").unwrap_or(0);
    let only = std::env::var("SIMULATION_BUG").ok();
    let chosen = |bug: &Bug| only.as_ref().is_none_or(|name| *name == format!("{bug:?}"));
    for &(bug, invariants) in BUGS.iter().filter(|(bug, _)| chosen(bug)) {
        let plan = Plan { seed: 0, bug: Some(bug), steps: None, trace: false };
        let (Some(seed), _) = run_seeds(first, SCHEDULES_PER_BUG, plan) else {
            missed.push(format!("{bug:?} is not found"));
            continue;
        };
        let releases = projectors::releases();
        let violation =
            run(Plan { seed, ..plan }, &releases).violation.expect("this seed failed above");
        println!("{bug:?}: found by schedule {seed}: {violation}");
        if !invariants.contains(&violation.invariant) {
            missed.push(format!("{bug:?} violates {violation}\n{}", report(Plan { seed, ..plan })));
        }
        let without_bug = run(Plan { seed, bug: None, ..plan }, &releases);
        if let Some(violation) = without_bug.violation {
            missed.push(format!("without {bug:?}, schedule {seed} violates {violation}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn the_documentation_lists_and_counts_the_deliberate_bugs() {
    let rows =
        include_str!("mod.rs").lines().skip_while(|line| *line != "//! | bug | violates |").skip(2);
    assert_eq!(rows.take_while(|line| line.starts_with("//! | ")).count(), BUGS.len());
    let guarantees = include_str!("../../docs/guarantees.md");
    let count = BUGS.len();
    assert!(
        guarantees.contains(&format!("{count} deliberate bugs")),
        "docs/guarantees.md does not count {count}"
    );
}

#[test]
fn a_seed_reproduces_the_whole_schedule() {
    let releases = projectors::releases();
    for seed in 0..20 {
        let plan = Plan { seed, bug: None, steps: None, trace: true };
        let (one, other) = (run(plan, &releases), run(plan, &releases));
        assert_eq!((one.trace, one.occurrences), (other.trace, other.occurrences), "seed {seed}");
    }
}
