//! The model: the engine's decisions, driven through interleavings and faults, and what must never
//! come of it.
//!
//! A schedule is one seed. Processes — writers, relays, boots, workers, retirements, of three
//! releases that know different projectors — are futures that yield before every statement, send
//! and receive; the scheduler decides who goes on, what breaks in between and who is killed. After
//! some steps nothing breaks any more, and everything has to come to rest. After every step the
//! invariants of the design are checked by an onlooker ([`invariants`]).
//!
//! ```text
//! cargo nextest run --lib simulation                                                   100,000 schedules
//! SIMULATION_SCHEDULES=5_000_000 cargo nextest run --lib simulation::every_invariant    a long run
//! SIMULATION_SEED=7 cargo nextest run --lib simulation::every_invariant --no-capture    one schedule, with its trace
//! ```
//!
//! `SIMULATION_SEED` with `SIMULATION_SCHEDULES` begins there; `SIMULATION_STEPS` fixes how many
//! steps go by until everything comes to rest.
//!
//! # What is the engine's own, and what is its mirror
//!
//! The engine's own: the chain rule ([`crate::model::continuity`]) and what a run still needs
//! ([`crate::engine::play::fan_out`]), reading and packing messages, the lifecycle and the stages,
//! the fence, the rest of a batch whose claim is lost, how a batch splits, when a projector may
//! break, the cursors of a catch-up, the oldest queued event and when boot is done, where a new
//! projector begins, how holes are surveyed and closed, who is overdue in reconcile. Mirrored in
//! [`process`] is the control flow around them, statement by statement: who changes it there has to
//! change it here.
//!
//! # What is modelled
//!
//! The database: positions that are handed out before commit and may stay reserved without a row,
//! commits out of order, rollbacks, spare reservations, unique positions and event ids, row locks
//! with time-outs, transactions that outlive their client until the server notices, lost
//! connections, commits that are not acknowledged, restarts after which the counter falls back. The
//! queue: FIFO with its group and its deduplication, or standard; loss, repetition, disorder,
//! purge, expired visibility, stale receipts, a dead-letter queue, messages that are foreign, and
//! forged ones by somebody who knows the log's id, its positions and its event ids, and not its
//! key. Processes: killed, terminated and paused anywhere; two of each. Projectors: errors and
//! panics until they are mended, in all releases or in one, at events and in setup; failures that
//! do not repeat; deadlocks; all three modes; who takes too long, leaves the convoy and catches up
//! by itself; a handler that commits in the middle of a batch, after which it fails, or its
//! connection or its process is lost: the read model must be rebuilt, and an operator retires it.
//! Definitions that differ between releases. A projector with side effects, which takes each event
//! in a transaction of its own.
//!
//! # What is not modelled
//!
//! Of the log: streams and their versions, gaps wider than the engine fills by itself and `fill`,
//! rows that are deleted below the mark, the mark that is proved for `status` and not stored. A
//! hole is looked at once in its grace, and not five times; each hole is probed, where the engine
//! finds the lowest locked one with few probes.
//!
//! Of the relay: that it keeps the marks in memory for as long as it has the lease (here they are
//! read with every look), that it publishes what is proved before it waits for a hole above, that
//! it does not probe a hole again whose holder is known to be there still, that it has the log keep
//! which queue it sends to, and that it gives its lease up when it is stopped.
//!
//! Of play:
//!
//! - the convoy's budgets: who is far behind, and for how long who is slow is waited for. Here
//!   anybody leaves at any step, and as many catch up beside it as have left;
//! - passing over: that projectors for which a batch or a page has nothing are moved together by
//!   one statement;
//! - receiving ahead, while messages are in work or are deleted, and giving back what was received
//!   so;
//! - setting messages aside that are not ours, to see what stands behind them;
//! - the poll that is cut short while somebody stands still, and the comparison before the first
//!   receive;
//! - the grace of a shutdown, in which the batch in hand may be finished: here it is rolled back;
//!   and `--until-idle`;
//! - the relay in the same process, which ends with it;
//! - functions: a deadline in the middle of a batch, and which of its messages were passed by then.
//!
//! Of applying, in boot and in play: projectors that take a page side by side, and reading ahead of
//! them; handlers that go on after they have committed, and commit once more; that roll back by
//! themselves, or do not pass a deadlock on; that take too long (and are tried once more), or on
//! which the server hangs up; a ledger that refuses our statements; sessions that are kept between
//! batches, and given up when a server turns out to be read-only; and that fence, position and
//! commit share statements and packets, each of which is a step of its own here.
//!
//! Of boot and retire: that what the database fails at is tried again (here such a boot ends, and
//! another is run), modes that contradict the ledger, two retirements of one projector at once;
//! tables, and so the lock under which boot looks at them, read models that must be rebuilt because
//! a table is gone, widened subscriptions, what an operator accepts, and boots of named projectors.
//!
//! Of everything: time as such (patience and leases are short, in steps), backups that are
//! restored, passwords that change, the bounds of memory (invariant 12), what is logged and
//! measured, and what SQL and SQS really do. All that is for the tests on real parts.
//!
//! # The deliberate bugs
//!
//! Each is switched on by itself, and has to be found within 5,000 schedules, by the invariant that
//! it violates; the schedule that finds it passes without it ([`bug::BUGS`]):
//!
//! | bug | violates |
//! | --- | --- |
//! | Play deletes what it has received, and only then applies it | 7 |
//! | Play takes a fan-out that could not read the log for one that succeeded | 7 |
//! | Play catches up where `prev` > position + 1, and not where `prev` > position | 1 |
//! | Play applies whatever it gets, as if the queue lost nothing | 1 |
//! | Play takes a message for ours whatever its signature is | 15 |
//! | Play deletes what it has received, whether it is ours or not | 7 |
//! | Play passes events to whatever has a ledger row, and its fence lets them through | 6 or 10 or 11 |
//! | Play waits for a broken projector as if it were to come back by itself | 9 or 10 |
//! | Who leaves the convoy catches up with nothing | 9 |
//! | Who has left the convoy is in it again after one event, and what it missed is deleted | 7 |
//! | Nobody compares positions with the high-water mark | 9 |
//! | The relay notes as published what it is about to send, and nobody reconciles | 9 |
//! | The relay publishes what is visible, and not what is proved | 2 |
//! | A hole that is still there after the grace is taken for a rollback | 3 |
//! | A position without a row, and without a lock on it, is taken for a rollback | 3 |
//! | A fill that a writer's lock has stopped is taken for one that succeeded | 3 |
//! | The fence does not look at the status | 6 or 10 or 11 |
//! | The fence does not look at the position | 5 or 6 |
//! | Boot claims a row for its next batch, and does not look what it has locked | 5 or 6 or 10 or 11 |
//! | Projection and position are committed one after the other | 4 or 5 |
//! | A projector is taken past the event that it fails on | 1 |
//! | The handoff moves the position to the mark | 4 |
//! | The handoff reads the row, thinks, and writes it back | 5 or 11 |
//! | A new from_now projector is entered at 0 | 11 |
//! | A new from_now projector is entered at the last visible position | 2 |
//! | A projector of mode once is handed over like any other | 11 |
//! | Boot takes a retired projector for a new one | 11 |
//! | Boot goes on for ever with a projector that was retired under its hands | 9 |
//! | Boot has to come to the mark, and not to the end of the log that is visible | 13 |
//! | A projector of mode once is finished at the mark, though more is visible | 13 |
//! | A worker plays a projector that was booted with another definition than its own | 6 |
//! | A batch is applied again after its handler committed a part of it | 1 |
//! | Boot resumes a projector that must be rebuilt | 1 or 8 or 13 |
//! | The operator leaves the tables of a projector that retire forgot without being able to tear them down | 1 or 8 or 13 |
//!
//! The last one, and the boot that goes on for ever, were the engine's own, and found here. So was
//! a boot that released a projector whose handler had just committed a part of a batch.
//!
//! `SIMULATION_SEED` says where the 5,000 schedules begin, `SIMULATION_BUG` names one of the bugs.

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

/// How many schedules are run where nobody says otherwise.
const SCHEDULES: u64 = 100_000;

/// Within so many schedules each deliberate bug is caught.
const SCHEDULES_PER_BUG: u64 = 5_000;

/// Lines of the trace that a failure shows.
const MAX_TRACE_LINES: usize = 120;

fn env_number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.replace('_', "")
            .parse()
            .unwrap_or_else(|_| panic!("{name} must be a number, and is {text:?}")),
    )
}

/// Runs so many seeds from `first` on, on all cores; the lowest that fails, and what was seen.
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
                occurrences.lock().expect("nobody panics with it").add(&counts);
            });
        }
    });
    let failed = failed.into_inner();
    (
        (failed != u64::MAX).then_some(failed),
        occurrences.into_inner().expect("nobody panics with it"),
    )
}

/// What a person needs who has to find the cause.
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
    let _ = writeln!(text, "\nseed {seed}, {steps} steps and then rest: {what}");
    let _ = writeln!(
        text,
        "SIMULATION_SEED={seed} SIMULATION_STEPS={steps} cargo nextest run --lib simulation::every_invariant --no-capture"
    );
    text
}

/// The same seed, disturbed for fewer steps, if that violates the same invariant.
fn shrink(plan: Plan, releases: &[crate::Registry]) -> Plan {
    let first = run(plan, releases);
    let Some(wanted) = first.violation.map(|violation| violation.invariant) else { return plan };
    let (mut low, mut high) = (0, first.steps);
    while low < high {
        let middle = (low + high) / 2;
        let outcome = run(Plan { steps: Some(middle), ..plan }, releases);
        match outcome.violation.is_some_and(|violation| violation.invariant == wanted) {
            true => high = middle,
            false => low = middle + 1,
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
        assert!(rare.is_empty(), "hardly ever happened: {rare:?}");
    }
}

#[test]
fn every_deliberate_bug_is_caught() {
    let mut missed = Vec::new();
    let first = env_number("SIMULATION_SEED").unwrap_or(0);
    let only = std::env::var("SIMULATION_BUG").ok();
    let chosen = |bug: &Bug| only.as_ref().is_none_or(|name| *name == format!("{bug:?}"));
    for &(bug, invariants) in BUGS.iter().filter(|(bug, _)| chosen(bug)) {
        let plan = Plan { seed: 0, bug: Some(bug), steps: None, trace: false };
        let (Some(seed), _) = run_seeds(first, SCHEDULES_PER_BUG, plan) else {
            missed.push(format!("{bug:?} is not caught"));
            continue;
        };
        let releases = projectors::releases();
        let violation = run(Plan { seed, ..plan }, &releases).violation.expect("it failed before");
        println!("{bug:?}: caught by schedule {seed}: {violation}");
        if !invariants.contains(&violation.invariant) {
            missed.push(format!("{bug:?} violates {violation}\n{}", report(Plan { seed, ..plan })));
        }
        let sound = run(Plan { seed, bug: None, ..plan }, &releases);
        if let Some(violation) = sound.violation {
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
