//! What the engine counts while it works, until a command writes it down. No I/O, and one count a batch, never one an
//! event. As with the log, there is one recorder in a process; where none was started, nothing is counted.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::model::event::Position;
use crate::model::projector::ProjectorId;

/// The CloudWatch namespace of all metrics.
pub(crate) const NAMESPACE: &str = "Projectionist";

/// A metric as CloudWatch knows it. Dashboards and alarms go by these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    /// One of CloudWatch's own.
    pub(crate) unit: &'static str,
    pub(crate) of: Of,
}

/// What a metric tells of; so much are its dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    /// One projector: dimensions `Service` and `Projector`, which is `name@version`.
    Projector,
    /// The whole: dimension `Service`.
    Service,
}

impl Of {
    pub(crate) const fn dimensions(self) -> &'static [&'static str] {
        match self {
            Of::Projector => &["Service", "Projector"],
            Of::Service => &["Service"],
        }
    }
}

const fn of_projector(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, of: Of::Projector }
}

const fn of_service(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, of: Of::Service }
}

pub(crate) const LAG_EVENTS: Metric = of_projector("LagEvents", "Count");
pub(crate) const LAG_SECONDS: Metric = of_projector("LagSeconds", "Seconds");
pub(crate) const EVENTS_APPLIED: Metric = of_projector("EventsApplied", "Count");
pub(crate) const FAILURES: Metric = of_projector("Failures", "Count");
pub(crate) const FALLBACK_READS: Metric = of_projector("FallbackReads", "Count");
pub(crate) const DUPLICATES_SKIPPED: Metric = of_projector("DuplicatesSkipped", "Count");
pub(crate) const APPLY_TIME: Metric = of_projector("ApplyTime", "Milliseconds");
pub(crate) const HIGH_WATER_MARK: Metric = of_service("HighWaterMark", "None");
pub(crate) const PUBLISHED: Metric = of_service("Published", "None");
pub(crate) const GAP_AGE: Metric = of_service("GapAge", "Seconds");
pub(crate) const RELAY_BATCH_SIZE: Metric = of_service("RelayBatchSize", "Count");
pub(crate) const RECEIVE_TO_COMMIT: Metric = of_service("ReceiveToCommit", "Milliseconds");
pub(crate) const MOST_LAG_SECONDS: Metric = of_service("LagSeconds", "Seconds");
pub(crate) const HEARTBEAT: Metric = of_service("Heartbeat", "Count");
pub(crate) const FOREIGN_MESSAGES: Metric = of_service("ForeignMessages", "Count");

/// Every metric there is: what a template may name, and what `infra/cloudwatch.md` explains.
#[cfg(test)]
pub(crate) const ALL: [Metric; 15] = [
    LAG_EVENTS,
    LAG_SECONDS,
    EVENTS_APPLIED,
    FAILURES,
    FALLBACK_READS,
    DUPLICATES_SKIPPED,
    APPLY_TIME,
    HIGH_WATER_MARK,
    PUBLISHED,
    GAP_AGE,
    RELAY_BATCH_SIZE,
    RECEIVE_TO_COMMIT,
    MOST_LAG_SECONDS,
    HEARTBEAT,
    FOREIGN_MESSAGES,
];

/// What was counted since it was last taken.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Counted {
    pub(crate) projectors: BTreeMap<ProjectorId, OfProjector>,
    /// Events in each message that was sent.
    pub(crate) message_events: Samples,
    /// Milliseconds from a receive until every live projector had committed it.
    pub(crate) receive_to_commit: Samples,
    /// Messages that were received and are not of our log.
    pub(crate) foreign_messages: u64,
    /// What the relay saw when it last looked; `None` where this process has no relay at work.
    pub(crate) relay: Option<RelaySaw>,
    /// Whether the mark is held, and since when; `None` where this process has not tried to raise it.
    pub(crate) mark: Option<MarkSeen>,
}

/// What an attempt to raise the mark saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MarkSeen {
    /// Nothing keeps it from rising.
    Free,
    /// The same thing has kept it from rising since then.
    HeldSince(Instant),
}

/// What was counted of one projector.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct OfProjector {
    pub(crate) events_applied: u64,
    pub(crate) failures: u64,
    pub(crate) fallback_reads: u64,
    pub(crate) duplicates_skipped: u64,
    /// Milliseconds of each transaction with events in it, from its begin to its commit.
    pub(crate) apply_time: Samples,
}

/// What the relay saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RelaySaw {
    pub(crate) high_water: Position,
    pub(crate) published: Position,
}

/// The most values that one metric may have in one document.
pub(crate) const MOST_SAMPLES: usize = 100;

/// Values of one kind: all of them while they are few; then the largest, and as many others as fit, taken at random
/// with equal chances, so that percentiles hold.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Samples {
    seen: u64,
    values: Vec<f64>,
}

impl Samples {
    pub(crate) fn add(&mut self, value: f64) {
        self.seen += 1;
        // The largest stands first; the one that it was takes its chance with the others.
        let value = match self.values.first_mut() {
            Some(largest) if value > *largest => std::mem::replace(largest, value),
            _ => value,
        };
        if self.values.len() < MOST_SAMPLES {
            return self.values.push(value);
        }
        // Reservoir sampling, Vitter's algorithm R, over all but the largest.
        let place = fastrand::u64(1..self.seen);
        if let Some(kept) = self.values.get_mut(place as usize) {
            *kept = value;
        }
    }

    pub(crate) fn values(&self) -> &[f64] {
        &self.values
    }
}

/// Counts, for one process.
#[derive(Debug, Default)]
struct Recorder(Mutex<Counted>);

static RECORDER: OnceLock<Recorder> = OnceLock::new();

/// Starts counting, for good.
pub(crate) fn start() {
    RECORDER.get_or_init(Recorder::default);
}

/// What was counted since the last time.
pub(crate) fn take() -> Counted {
    RECORDER.get().map(|recorder| std::mem::take(&mut *recorder.counted())).unwrap_or_default()
}

/// So many events were applied to a projector, in a transaction that took so long. None: it was only moved over events that
/// it does not want.
pub(crate) fn applied(id: &ProjectorId, events: usize, took: Duration) {
    if events > 0 {
        count_for(id, |of| {
            of.events_applied += events as u64;
            of.apply_time.add(millis(took));
        });
    }
}

/// An attempt to apply something to a projector, or to set it up, has failed.
pub(crate) fn failed(id: &ProjectorId) {
    count_for(id, |of| of.failures += 1);
}

/// Play reads from the store what the queue did not bring to this projector.
pub(crate) fn fell_back(id: &ProjectorId) {
    count_for(id, |of| of.fallback_reads += 1);
}

/// So many events of messages had been applied or passed over by this projector before.
pub(crate) fn skipped(id: &ProjectorId, events: u64) {
    if events > 0 {
        count_for(id, |of| of.duplicates_skipped += events);
    }
}

/// All live projectors have committed what was received.
pub(crate) fn committed(took: Duration) {
    count(|counted| counted.receive_to_commit.add(millis(took)));
}

/// So many messages were received that are not of our log.
pub(crate) fn foreign(messages: u64) {
    count(|counted| counted.foreign_messages += messages);
}

/// The relay sent a message with so many events.
pub(crate) fn sent(events: usize) {
    count(|counted| counted.message_events.add(events as f64));
}

/// The relay has looked at the log, and sent what is new.
pub(crate) fn looked(saw: RelaySaw) {
    count(|counted| counted.relay = Some(saw));
}

/// Somebody has tried to raise the mark, which the same thing has held since then, if anything does.
pub(crate) fn mark_held(since: Option<Instant>) {
    count(|counted| counted.mark = Some(since.map_or(MarkSeen::Free, MarkSeen::HeldSince)));
}

impl Recorder {
    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(count: impl FnOnce(&mut Counted)) {
    if let Some(recorder) = RECORDER.get() {
        count(&mut recorder.counted());
    }
}

fn count_for(id: &ProjectorId, note: impl FnOnce(&mut OfProjector)) {
    count(|counted| match counted.projectors.get_mut(id) {
        Some(of) => note(of),
        None => note(counted.projectors.entry(id.clone()).or_default()),
    });
}

/// To the microsecond: more digits would only be paid for.
fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_samples_are_all_kept_and_of_many_the_largest_and_a_fair_choice() {
        let mut few = Samples::default();
        (0..100).rev().for_each(|value| few.add(f64::from(value)));
        let mut kept = few.values().to_vec();
        kept.sort_by(f64::total_cmp);
        assert_eq!(kept, (0..100).map(f64::from).collect::<Vec<_>>());

        let mut mean = 0.0;
        for _ in 0..200 {
            let mut many = Samples::default();
            (1..=10_000).chain([500]).for_each(|value| many.add(f64::from(value)));
            assert_eq!((many.values().len(), many.values()[0]), (MOST_SAMPLES, 10_000.0));
            mean += many.values()[1..].iter().sum::<f64>() / 99.0 / 200.0;
        }
        // Of 19,800 values out of a uniform distribution the mean is within 20.5 of 5,000, by one deviation; this is ten.
        assert!((mean - 5_000.0).abs() < 205.0, "{mean}");
    }

    #[test]
    fn the_page_on_cloudwatch_lists_every_metric_with_its_unit_and_dimensions() {
        let page = include_str!("../../infra/cloudwatch.md");
        let rows =
            page.lines().filter_map(|line| line.strip_prefix("| `")).map(|row| row.split(" | ").collect::<Vec<_>>());
        let listed: Vec<String> = rows
            .filter(|cells| cells.len() >= 6)
            .map(|cells| format!("{} {} {}", cells[0].trim_end_matches('`'), cells[1], cells[2]))
            .collect();
        let metric = |metric: &Metric| format!("{} {} {}", metric.name, metric.unit, metric.of.dimensions().join(", "));
        assert_eq!(listed, ALL.iter().map(metric).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_counted_where_nothing_was_started() {
        let id = ProjectorId { name: "a".into(), version: 1 };
        applied(&id, 3, Duration::from_millis(2));
        assert_eq!(take(), Counted::default());
    }
}
