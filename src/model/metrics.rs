//! Counters of the engine, kept in memory until a command writes them as metrics. No I/O. The
//! counters change once a batch, never once an event. A process has one recorder, as it has one
//! log. Nothing is counted before [`start`].

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::model::event::Position;
use crate::model::projector::ProjectorId;

/// The CloudWatch namespace of all metrics.
pub(crate) const NAMESPACE: &str = "Projectionist";

/// A metric as CloudWatch knows it. Dashboards and alarms use these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    /// A unit that CloudWatch defines.
    pub(crate) unit: &'static str,
    pub(crate) scope: MetricScope,
}

/// What a metric describes. The scope decides its dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MetricScope {
    /// One projector: dimensions `Service` and `Projector`, which is `name@version`.
    Projector,
    /// The whole service: dimension `Service`.
    Service,
}

impl MetricScope {
    pub(crate) const fn dimensions(self) -> &'static [&'static str] {
        match self {
            MetricScope::Projector => &["Service", "Projector"],
            MetricScope::Service => &["Service"],
        }
    }
}

const fn projector_metric(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, scope: MetricScope::Projector }
}

const fn service_metric(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, scope: MetricScope::Service }
}

pub(crate) const LAG_EVENTS: Metric = projector_metric("LagEvents", "Count");
pub(crate) const LAG_SECONDS: Metric = projector_metric("LagSeconds", "Seconds");
pub(crate) const EVENTS_APPLIED: Metric = projector_metric("EventsApplied", "Count");
pub(crate) const FAILURES: Metric = projector_metric("Failures", "Count");
pub(crate) const FALLBACK_READS: Metric = projector_metric("FallbackReads", "Count");
pub(crate) const DUPLICATES_SKIPPED: Metric = projector_metric("DuplicatesSkipped", "Count");
pub(crate) const APPLY_TIME: Metric = projector_metric("ApplyTime", "Milliseconds");
pub(crate) const HIGH_WATER_MARK: Metric = service_metric("HighWaterMark", "None");
pub(crate) const PUBLISHED: Metric = service_metric("Published", "None");
pub(crate) const GAP_AGE: Metric = service_metric("GapAge", "Seconds");
pub(crate) const RELAY_BATCH_SIZE: Metric = service_metric("RelayBatchSize", "Count");
pub(crate) const RECEIVE_TO_COMMIT: Metric = service_metric("ReceiveToCommit", "Milliseconds");
pub(crate) const MAX_LAG_SECONDS: Metric = service_metric("LagSeconds", "Seconds");
pub(crate) const STOPPED_PROJECTORS: Metric = service_metric("StoppedProjectors", "Count");
pub(crate) const HEARTBEAT: Metric = service_metric("Heartbeat", "Count");
pub(crate) const FOREIGN_MESSAGES: Metric = service_metric("ForeignMessages", "Count");
pub(crate) const RETRYING_PROJECTORS: Metric = service_metric("RetryingProjectors", "Count");

/// Every metric: a template may name these, and `infra/cloudwatch.md` explains them.
#[cfg(test)]
pub(crate) const ALL: [Metric; 17] = [
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
    MAX_LAG_SECONDS,
    STOPPED_PROJECTORS,
    HEARTBEAT,
    FOREIGN_MESSAGES,
    RETRYING_PROJECTORS,
];

/// The counters since they were last taken.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Counters {
    pub(crate) projectors: BTreeMap<ProjectorId, ProjectorCounters>,
    /// The number of events in each sent message.
    pub(crate) message_events: Samples,
    /// Milliseconds from a receive until every live projector had committed its events.
    pub(crate) receive_to_commit: Samples,
    /// Received messages that are not from this log.
    pub(crate) foreign_messages: u64,
    /// The marks at the relay's last look; `None` if no relay runs in this process.
    pub(crate) relay: Option<RelayProgress>,
    /// Whether the high-water mark is blocked; `None` if this process has not tried to raise it.
    pub(crate) mark: Option<MarkState>,
}

/// The result of an attempt to raise the high-water mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MarkState {
    /// The mark can rise.
    Unblocked,
    /// The same cause has blocked the mark since then.
    BlockedSince(Instant),
}

/// The counters of one projector.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct ProjectorCounters {
    pub(crate) events_applied: u64,
    pub(crate) failures: u64,
    pub(crate) fallback_reads: u64,
    pub(crate) duplicates_skipped: u64,
    /// Milliseconds from begin to commit, for each transaction that applied events.
    pub(crate) apply_time: Samples,
}

/// The marks that the relay read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RelayProgress {
    pub(crate) high_water: Position,
    pub(crate) published: Position,
}

/// The maximum number of values of one metric in one document.
pub(crate) const MAX_SAMPLES: usize = 100;

/// The values of one metric. All values are kept up to [`MAX_SAMPLES`]. Beyond that, the largest is
/// kept, and a random sample of the others with equal chances, so that percentiles hold.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Samples {
    count: u64,
    values: Vec<f64>,
}

impl Samples {
    pub(crate) fn add(&mut self, value: f64) {
        self.count += 1;
        // The largest value is always first. The value that it replaces becomes a candidate for the
        // sample.
        let value = match self.values.first_mut() {
            Some(largest) if value > *largest => std::mem::replace(largest, value),
            _ => value,
        };
        if self.values.len() < MAX_SAMPLES {
            return self.values.push(value);
        }
        // Reservoir sampling, Vitter's algorithm R, over all but the largest.
        let place = fastrand::u64(1..self.count);
        if let Some(kept) = self.values.get_mut(place as usize) {
            *kept = value;
        }
    }

    pub(crate) fn values(&self) -> &[f64] {
        &self.values
    }
}

/// The counters of one process.
#[derive(Debug, Default)]
struct Recorder(Mutex<Counters>);

impl Recorder {
    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

static RECORDER: OnceLock<Recorder> = OnceLock::new();

/// Starts counting, until the process ends.
pub(crate) fn start() {
    RECORDER.get_or_init(Recorder::default);
}

/// Returns the counters since the last call, and resets them.
pub(crate) fn take() -> Counters {
    RECORDER.get().map(|recorder| std::mem::take(&mut *recorder.counters())).unwrap_or_default()
}

/// Records a transaction that applied `events` events to a projector and lasted `took`. With 0
/// events, the transaction only moved the position, and nothing is recorded.
pub(crate) fn record_applied(id: &ProjectorId, events: usize, took: Duration) {
    if events > 0 {
        record_for(id, |counters| {
            counters.events_applied += events as u64;
            counters.apply_time.add(millis(took));
        });
    }
}

/// Records a failed attempt to apply events to a projector or to run its setup.
pub(crate) fn record_failure(id: &ProjectorId) {
    record_for(id, |counters| counters.failures += 1);
}

/// Records that play reads events from the store that the queue did not deliver to this projector.
pub(crate) fn record_fallback_read(id: &ProjectorId) {
    record_for(id, |counters| counters.fallback_reads += 1);
}

/// Records received events that this projector had applied or skipped before.
pub(crate) fn record_duplicates(id: &ProjectorId, events: u64) {
    if events > 0 {
        record_for(id, |counters| counters.duplicates_skipped += events);
    }
}

/// Records the time from a receive until every live projector had committed its events.
pub(crate) fn record_receive_to_commit(took: Duration) {
    record(|counters| counters.receive_to_commit.add(millis(took)));
}

/// Records received messages that are not from this log.
pub(crate) fn record_foreign_messages(messages: u64) {
    record(|counters| counters.foreign_messages += messages);
}

/// Records a message that the relay sent, by its number of events.
pub(crate) fn record_sent_message(events: usize) {
    record(|counters| counters.message_events.add(events as f64));
}

/// Records the marks after the relay has read the log and sent the new events.
pub(crate) fn record_relay_progress(progress: RelayProgress) {
    record(|counters| counters.relay = Some(progress));
}

/// Records an attempt to raise the high-water mark. `since` is the time from which on the same
/// cause has blocked it; `None` if the mark can rise.
pub(crate) fn record_mark_state(since: Option<Instant>) {
    record(|counters| {
        counters.mark = Some(since.map_or(MarkState::Unblocked, MarkState::BlockedSince))
    });
}

fn record(update: impl FnOnce(&mut Counters)) {
    if let Some(recorder) = RECORDER.get() {
        update(&mut recorder.counters());
    }
}

fn record_for(id: &ProjectorId, update: impl FnOnce(&mut ProjectorCounters)) {
    record(|counters| match counters.projectors.get_mut(id) {
        Some(projector) => update(projector),
        None => update(counters.projectors.entry(id.clone()).or_default()),
    });
}

/// Milliseconds with the precision of a microsecond. More digits would only make the metrics
/// larger.
fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_samples_are_all_kept_and_many_are_sampled_with_the_largest() {
        let mut few = Samples::default();
        (0..100).rev().for_each(|value| few.add(f64::from(value)));
        let mut kept = few.values().to_vec();
        kept.sort_by(f64::total_cmp);
        assert_eq!(kept, (0..100).map(f64::from).collect::<Vec<_>>());

        let mut mean = 0.0;
        for _ in 0..200 {
            let mut many = Samples::default();
            (1..=10_000).chain([500]).for_each(|value| many.add(f64::from(value)));
            assert_eq!((many.values().len(), many.values()[0]), (MAX_SAMPLES, 10_000.0));
            mean += many.values()[1..].iter().sum::<f64>() / 99.0 / 200.0;
        }
        // The mean of 19,800 values of a uniform distribution has a standard deviation of 20.5. The
        // bound is ten standard deviations.
        assert!((mean - 5_000.0).abs() < 205.0, "{mean}");
    }

    #[test]
    fn the_cloudwatch_page_lists_every_metric_with_unit_and_dimensions() {
        let page = include_str!("../../infra/cloudwatch.md");
        let rows = page
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .map(|row| row.split(" | ").collect::<Vec<_>>());
        let listed: Vec<String> = rows
            .filter(|cells| cells.len() >= 6)
            .map(|cells| format!("{} {} {}", cells[0].trim_end_matches('`'), cells[1], cells[2]))
            .collect();
        let metric = |metric: &Metric| {
            format!("{} {} {}", metric.name, metric.unit, metric.scope.dimensions().join(", "))
        };
        assert_eq!(listed, ALL.iter().map(metric).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_counted_before_metrics_are_started() {
        let id = ProjectorId { name: "a".into(), version: 1 };
        record_applied(&id, 3, Duration::from_millis(2));
        assert_eq!(take(), Counters::default());
    }
}
