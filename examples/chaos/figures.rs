//! The figures of a run: counted during the run, and printed at the end.

use std::collections::BTreeMap;
use std::sync::Mutex;

/// Every figure, in the order of the report, and whether it must be above zero. A run in which such
/// a figure is zero proves nothing about that kind of event. Figures that may be zero count
/// possible consequences of faults. An exception is `sigkills_of_retire`: few faults strike while a
/// retire runs.
const FIGURES: &[(&str, bool)] = &[
    ("events", true),
    ("appends_acknowledged", true),
    ("rollbacks", true),
    ("gap_fillers", true),
    ("sigkills", true),
    ("sigkills_of_play", true),
    ("sigkills_of_relay", true),
    ("sigkills_of_boot", true),
    ("sigkills_of_writer", true),
    ("sigkills_of_append", true),
    ("sigkills_of_retire", false),
    ("sigterms", true),
    ("sigstops", true),
    ("server_kills", true),
    ("server_restarts", true),
    ("server_deaths", false),
    ("connections_cut", true),
    ("queue_connections_cut", true),
    ("commits_cut_before", true),
    ("commits_cut_after", true),
    ("connections_silenced", true),
    ("stalls", true),
    ("queue_stalls", true),
    ("localstack_stops", true),
    ("purges", true),
    ("messages_lost", true),
    ("messages_repeated", true),
    ("messages_delayed", true),
    ("messages_foreign", true),
    ("messages_malformed", true),
    ("messages_forged", true),
    ("boots", true),
    ("boots_failed", false),
    ("boots_at_once", true),
    ("deploys", true),
    ("deploys_abandoned", false),
    ("deploys_rolled_back", true),
    ("retired", true),
    ("bad_events", true),
    ("harmful_events", true),
    ("tables_dropped", true),
    ("rebuilt", true),
    ("definitions_changed", true),
    ("widenings_refused", true),
    ("projectors_broken", true),
    ("audits", true),
    ("refused_by_increment", true),
    ("ledger_checks", true),
    ("starts", true),
    ("starts_failed_unreachable", false),
    ("longest_standstill_seconds", false),
    ("survivor_recovered_in_seconds", false),
];

/// The counters of a run, and its findings: violations, each of which fails the run.
#[derive(Default)]
pub struct Figures {
    counts: Mutex<BTreeMap<&'static str, u64>>,
    findings: Mutex<Vec<String>>,
    server_deaths: Mutex<Vec<String>>,
}

impl Figures {
    pub fn add(&self, name: &'static str, count: u64) {
        debug_assert!(FIGURES.iter().any(|(known, _)| *known == name), "{name} is not in FIGURES");
        *self.counts.lock().expect("the lock is not poisoned").entry(name).or_default() += count;
    }

    /// Raises a figure to `count`, if it is lower.
    pub fn raise_to(&self, name: &'static str, count: u64) {
        self.add(name, count.saturating_sub(self.get(name)));
    }

    pub fn get(&self, name: &str) -> u64 {
        self.counts.lock().expect("the lock is not poisoned").get(name).copied().unwrap_or_default()
    }

    /// Adds a violation, which fails the run.
    pub fn add_finding(&self, finding: impl Into<String>) {
        let finding = finding.into();
        eprintln!("FOUND: {finding}");
        self.findings.lock().expect("the lock is not poisoned").push(finding);
    }

    pub fn findings(&self) -> Vec<String> {
        self.findings.lock().expect("the lock is not poisoned").clone()
    }

    /// Records that the server has ended by itself, with the reason. This does not fail the run,
    /// because everything must survive it.
    pub fn add_server_death(&self, reason: String) {
        eprintln!("THE SERVER DIED BY ITSELF: {reason}");
        self.add("server_deaths", 1);
        self.server_deaths.lock().expect("the lock is not poisoned").push(reason);
    }

    pub fn server_deaths(&self) -> Vec<String> {
        self.server_deaths.lock().expect("the lock is not poisoned").clone()
    }

    /// All figures, in the order of the report.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
        FIGURES.iter().map(|(name, _)| (*name, self.get(name)))
    }

    /// The figures that must be above zero and are zero.
    pub fn missing(&self) -> Vec<&'static str> {
        FIGURES
            .iter()
            .filter(|(name, must)| *must && self.get(name) == 0)
            .map(|(name, _)| *name)
            .collect()
    }
}
