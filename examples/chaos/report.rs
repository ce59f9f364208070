//! The report of a run: a table for people, or one JSON object for programs.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::figures::Figures;
use crate::fold::Verdict;

pub struct Report {
    pub seed: u64,
    pub server: String,
    pub version: String,
    pub queue: &'static str,
    pub seconds: u64,
    pub took: Duration,
    /// The memory peak of each kind of process, in MiB.
    pub memory_peaks: Vec<(&'static str, u64)>,
    pub verdicts: Vec<Verdict>,
    pub figures: Arc<Figures>,
}

impl Report {
    pub fn is_ok(&self) -> bool {
        self.verdicts.iter().all(Verdict::is_ok)
            && self.findings().is_empty()
            && self.figures.missing().is_empty()
    }

    fn findings(&self) -> Vec<String> {
        self.figures.findings()
    }

    fn sum(&self, of: impl Fn(&Verdict) -> u64) -> u64 {
        self.verdicts.iter().map(of).sum()
    }

    pub fn json(&self) -> Value {
        let mut object = Map::new();
        let peaks: Map<String, Value> = self
            .memory_peaks
            .iter()
            .map(|(kind, peak)| ((*kind).to_owned(), json!(peak)))
            .collect();
        for (key, value) in [
            ("seed", json!(self.seed)),
            ("server", json!(self.server)),
            ("version", json!(self.version)),
            ("queue", json!(self.queue)),
            ("seconds", json!(self.seconds)),
            ("took_seconds", json!(self.took.as_secs())),
            ("ok", json!(self.is_ok())),
            ("projectors", json!(self.verdicts.len())),
            ("applications", json!(self.sum(|verdict| verdict.applications))),
            ("lost_applications", json!(self.sum(|verdict| verdict.lost))),
            ("repeated_applications", json!(self.sum(|verdict| verdict.repeated))),
            ("wrong_applications", json!(self.sum(|verdict| verdict.wrong))),
            ("memory_peak_mib", Value::Object(peaks)),
            ("did_not_happen", json!(self.figures.missing())),
            ("findings", json!(self.findings())),
            ("server_death_reasons", json!(self.figures.server_deaths())),
        ] {
            object.insert(key.to_owned(), value);
        }
        object.extend(self.figures.all().map(|(name, count)| (name.to_owned(), json!(count))));
        Value::Object(object)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { seed, server, version, queue, seconds, .. } = self;
        writeln!(
            f,
            "\nchaos on {server} {version} and a {queue} queue: seed {seed}, \
             {seconds} s of faults, {} s in all\n",
            self.took.as_secs()
        )?;
        for (name, count) in self.figures.all() {
            writeln!(f, "  {:<24}{count:>10}", name.replace('_', " "))?;
        }
        for (kind, peak) in &self.memory_peaks {
            writeln!(f, "  {:<24}{peak:>6} MiB", format!("memory peak of {kind}"))?;
        }
        writeln!(
            f,
            "\n  {:<16}{:<10}{:>12}{:>8}{:>10}{:>8}",
            "projector", "status", "applications", "lost", "repeated", "wrong"
        )?;
        for verdict in &self.verdicts {
            let Verdict { projector, status, applications, lost, repeated, wrong, is_behind } =
                verdict;
            let behind = if *is_behind { "  NOT AT THE END" } else { "" };
            writeln!(
                f,
                "  {projector:<16}{status:<10}{applications:>12}{lost:>8}{repeated:>10}{wrong:>8}\
                 {behind}"
            )?;
        }
        for reason in self.figures.server_deaths() {
            writeln!(f, "\nTHE SERVER DIED BY ITSELF: {reason}")?;
        }
        for finding in self.findings() {
            writeln!(f, "\nFOUND: {finding}")?;
        }
        for missing in self.figures.missing() {
            writeln!(f, "\nDID NOT HAPPEN: {missing}, so this run proves nothing about it")?;
        }
        if self.is_ok() {
            write!(f, "\nNo event was lost, and none was applied twice.")
        } else {
            write!(f, "\nFAILED.")
        }
    }
}
