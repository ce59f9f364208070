//! What happened: counted as it happens, and told at the end.

use std::collections::BTreeMap;
use std::sync::Mutex;

/// Every figure, in the order in which it is told, and whether a run in which it stays zero proves
/// nothing. What may stay zero is no fault, but what may come of one; but for retire, which few
/// faults find at work.
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
    ("connections_cut", true),
    ("commits_cut_before", true),
    ("commits_cut_after", true),
    ("connections_silenced", true),
    ("stalls", true),
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

/// The counters of a run, and what was found that should not be.
#[derive(Default)]
pub struct Figures {
    counts: Mutex<BTreeMap<&'static str, u64>>,
    findings: Mutex<Vec<String>>,
}

impl Figures {
    pub fn add(&self, name: &'static str, count: u64) {
        debug_assert!(FIGURES.iter().any(|(known, _)| *known == name), "{name} is told");
        *self.counts.lock().expect("no panic while counting").entry(name).or_default() += count;
    }

    /// Raises a figure to this, if it is lower.
    pub fn raise_to(&self, name: &'static str, count: u64) {
        self.add(name, count.saturating_sub(self.get(name)));
    }

    pub fn get(&self, name: &str) -> u64 {
        self.counts.lock().expect("no panic while counting").get(name).copied().unwrap_or_default()
    }

    /// Notes what must not be: each fails the run.
    pub fn add_finding(&self, finding: impl Into<String>) {
        let finding = finding.into();
        eprintln!("FOUND: {finding}");
        self.findings.lock().expect("no panic while noting").push(finding);
    }

    pub fn findings(&self) -> Vec<String> {
        self.findings.lock().expect("no panic while noting").clone()
    }

    /// All, in order.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
        FIGURES.iter().map(|(name, _)| (*name, self.get(name)))
    }

    /// What had to happen and did not.
    pub fn missing(&self) -> Vec<&'static str> {
        FIGURES
            .iter()
            .filter(|(name, must)| *must && self.get(name) == 0)
            .map(|(name, _)| *name)
            .collect()
    }
}
