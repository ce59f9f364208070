//! Metrics in CloudWatch's embedded metric format: log lines from which CloudWatch Logs extracts
//! metrics. The format is specified in the CloudWatch user guide, "Specification: Embedded metric
//! format".
//!
//! Why ours: the crates drop samples or bring 30 more crates; see `infra/cloudwatch.md`.

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::engine::lag::Lag;
use crate::model::backoff;
use crate::model::event::Position;
use crate::model::lifecycle::Status;
use crate::model::metrics::{
    self, Counters, MarkState, Metric, NAMESPACE, ProjectorCounters, Samples,
};
use crate::model::projector::ProjectorId;

/// The positions of the log and of the projectors at one time.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Snapshot {
    pub(super) high_water: Position,
    pub(super) published: Position,
    /// The projectors of this process's set that are not finished or retired.
    pub(super) projectors: Vec<(ProjectorId, Status, Lag)>,
    /// How many projectors in the ledger are broken or stalled, also those of other releases: a
    /// boot that failed leaves them, and they wait for an operator.
    pub(super) stopped: u64,
    /// How many of the projectors wait for a later retry of an event.
    pub(super) retrying: usize,
}

/// The values of one report.
pub(super) struct Report<'a> {
    pub(super) service: &'a str,
    pub(super) release: Option<&'a str>,
    pub(super) at: OffsetDateTime,
    pub(super) counted: &'a Counters,
    pub(super) snapshot: Option<&'a Snapshot>,
    pub(super) has_heartbeat: bool,
}

impl Report<'_> {
    /// Returns a line for each projector that has values, and one for the service. No line comes
    /// near a limit of the format: 100 metrics, 100 values of one metric, 1 MB.
    pub(super) fn lines(&self) -> Vec<String> {
        let nothing = ProjectorCounters::default();
        let mut documents: Vec<(Option<&ProjectorId>, Document)> = Vec::new();
        let lags = self.snapshot.map(|snapshot| snapshot.projectors.as_slice()).unwrap_or_default();
        for (id, _, lag) in lags {
            let counted = self.counted.projectors.get(id).unwrap_or(&nothing);
            documents.push((Some(id), projector_document(counted, Some(*lag))));
        }
        let is_listed = |id: &ProjectorId| lags.iter().any(|(listed, ..)| listed == id);
        for (id, counted) in self.counted.projectors.iter().filter(|(id, _)| !is_listed(id)) {
            documents.push((Some(id), projector_document(counted, None)));
        }
        documents.push((None, self.service_document()));
        documents.retain(|(_, document)| !document.0.is_empty());
        documents.into_iter().map(|(id, document)| self.line(id, document)).collect()
    }

    fn service_document(&self) -> Document {
        let mut document = Document::default();
        let relay = self.counted.relay;
        let marks = self.snapshot.map(|snapshot| (snapshot.high_water, snapshot.published));
        if let Some((high_water, published)) =
            marks.or(relay.map(|relay| (relay.high_water, relay.published)))
        {
            document.put(metrics::HIGH_WATER_MARK, high_water.get());
            document.put(metrics::PUBLISHED, published.get());
        }
        match self.counted.mark {
            Some(MarkState::BlockedSince(since)) => {
                document.put(metrics::GAP_AGE, backoff::seconds(since.elapsed()))
            }
            Some(MarkState::Unblocked) => document.put(metrics::GAP_AGE, 0.0),
            None => {}
        }
        document.put_samples(metrics::RELAY_BATCH_SIZE, &self.counted.message_events);
        document.put_samples(metrics::RECEIVE_TO_COMMIT, &self.counted.receive_to_commit);
        if let Some(snapshot) = self.snapshot {
            let live = snapshot.projectors.iter().filter(|(_, status, _)| *status == Status::Live);
            document.put(
                metrics::MAX_LAG_SECONDS,
                live.map(|(.., lag)| lag.seconds).fold(0.0, f64::max),
            );
            document.put(metrics::STOPPED_PROJECTORS, snapshot.stopped);
            // Also 0, so that an alarm on it ends.
            document.put(metrics::RETRYING_PROJECTORS, snapshot.retrying);
        }
        if self.has_heartbeat {
            document.put(metrics::HEARTBEAT, 1);
        }
        document.put_count(metrics::FOREIGN_MESSAGES, self.counted.foreign_messages);
        document
    }

    /// Formats a document as a log line, with the fields of every log line. The release is a field
    /// and not a dimension.
    fn line(&self, id: Option<&ProjectorId>, Document(metrics): Document) -> String {
        let of = metrics.first().map(|(metric, _)| metric.scope.dimensions()).unwrap_or_default();
        let definitions: Vec<Value> = metrics
            .iter()
            .map(|(metric, _)| json!({"Name": metric.name, "Unit": metric.unit}))
            .collect();
        let mut line = Map::new();
        line.insert(
            "_aws".into(),
            json!({
                "Timestamp": (self.at.unix_timestamp_nanos() / 1_000_000) as i64,
                "CloudWatchMetrics": [
                    {"Namespace": NAMESPACE, "Dimensions": [of], "Metrics": definitions}
                ],
            }),
        );
        // The precision of all other log lines.
        let to_the_microsecond =
            self.at.replace_nanosecond(self.at.microsecond() * 1_000).unwrap_or(self.at);
        line.insert(
            "timestamp".into(),
            to_the_microsecond.format(&Rfc3339).unwrap_or_default().into(),
        );
        line.insert("level".into(), "INFO".into());
        line.insert("message".into(), "metrics".into());
        line.insert("target".into(), module_path!().into());
        line.insert("Service".into(), self.service.into());
        if let Some(id) = id {
            line.insert("Projector".into(), id.to_string().into());
        }
        if let Some(release) = self.release {
            line.insert("release".into(), release.into());
        }
        line.extend(metrics.into_iter().map(|(metric, value)| (metric.name.into(), value)));
        Value::Object(line).to_string()
    }
}

fn projector_document(counted: &ProjectorCounters, lag: Option<Lag>) -> Document {
    let mut document = Document::default();
    if let Some(lag) = lag {
        document.put(metrics::LAG_EVENTS, lag.events);
        document.put(metrics::LAG_SECONDS, lag.seconds);
    }
    document.put_count(metrics::EVENTS_APPLIED, counted.events_applied);
    document.put_count(metrics::FAILURES, counted.failures);
    document.put_count(metrics::FALLBACK_READS, counted.fallback_reads);
    document.put_count(metrics::DUPLICATES_SKIPPED, counted.duplicates_skipped);
    document.put_samples(metrics::APPLY_TIME, &counted.apply_time);
    document
}

/// Metrics with the same dimensions.
#[derive(Default)]
struct Document(Vec<(Metric, Value)>);

impl Document {
    fn put(&mut self, metric: Metric, value: impl Into<Value>) {
        self.0.push((metric, value.into()));
    }

    /// Adds a count, unless it is zero: a metric is billed for every hour in which it has a value.
    fn put_count(&mut self, metric: Metric, count: u64) {
        if count > 0 {
            self.put(metric, count);
        }
    }

    fn put_samples(&mut self, metric: Metric, samples: &Samples) {
        if !samples.values().is_empty() {
            self.put(metric, samples.values().to_vec());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::model::metrics::{ALL, MetricScope, RelayProgress};

    fn id(name: &str) -> ProjectorId {
        ProjectorId { name: name.into(), version: 2 }
    }

    fn report(counted: &Counters, snapshot: Option<&Snapshot>) -> Vec<Value> {
        let at = OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(1_750_000_000_123);
        let report = Report {
            service: "shop",
            release: Some("v7"),
            at,
            counted,
            snapshot,
            has_heartbeat: snapshot.is_some(),
        };
        report.lines().iter().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    fn full_report() -> (Counters, Snapshot) {
        let mut counted = Counters::default();
        let samples = |values: &[f64]| {
            let mut samples = Samples::default();
            values.iter().for_each(|value| samples.add(*value));
            samples
        };
        let of = ProjectorCounters {
            events_applied: 5,
            failures: 1,
            fallback_reads: 2,
            duplicates_skipped: 3,
            apply_time: samples(&[1.5, 2.5]),
        };
        counted.projectors.insert(id("a"), of);
        counted.projectors.insert(
            id("retired"),
            ProjectorCounters { events_applied: 1, ..ProjectorCounters::default() },
        );
        counted.message_events = samples(&[10.0]);
        counted.foreign_messages = 2;
        counted.receive_to_commit = samples(&[7.25]);
        let (high_water, published) = (Position::new(90), Position::new(80));
        counted.relay = Some(RelayProgress { high_water, published });
        counted.mark = Some(MarkState::BlockedSince(Instant::now() - Duration::from_secs(3)));
        let failure = crate::model::lifecycle::Failure {
            event: None,
            error: "the handler failed".into(),
            at: OffsetDateTime::UNIX_EPOCH,
            attempts: 1,
            release: None,
            host: "here".into(),
            rebuild_reason: None,
        };
        let projectors = vec![
            (id("a"), Status::Live, Lag { events: 4, seconds: 1.5 }),
            (id("b"), Status::Broken(failure), Lag { events: 70, seconds: 99.0 }),
        ];
        (counted, Snapshot { high_water, published, projectors, stopped: 1, retrying: 1 })
    }

    #[test]
    fn every_metric_is_written_with_its_unit_and_its_dimensions() {
        let (counted, snapshot) = full_report();
        let lines = report(&counted, Some(&snapshot));
        let mut written = Vec::new();
        for line in &lines {
            let directive = &line["_aws"]["CloudWatchMetrics"][0];
            assert_eq!(
                (&directive["Namespace"], &line["_aws"]["Timestamp"]),
                (&json!(NAMESPACE), &json!(1_750_000_000_123_i64))
            );
            let of = if line["Projector"].is_null() {
                MetricScope::Service
            } else {
                MetricScope::Projector
            };
            assert_eq!(directive["Dimensions"], json!([of.dimensions()]));
            for definition in directive["Metrics"].as_array().expect("an array") {
                let is_it = |metric: &&Metric| {
                    (metric.name, metric.scope)
                        == (definition["Name"].as_str().expect("a name"), of)
                };
                let metric = ALL
                    .iter()
                    .find(is_it)
                    .unwrap_or_else(|| panic!("{definition} is not one of {of:?}"));
                assert_eq!(definition["Unit"], metric.unit);
                assert!(!line[metric.name].is_null(), "{} has no value in {line}", metric.name);
                written.push(*metric);
            }
        }
        for metric in ALL {
            assert!(written.contains(&metric), "{metric:?} is not written");
        }
        let of = |id: &str| lines.iter().find(|line| line["Projector"] == id).expect("a line");
        assert_eq!(
            (&of("a@2")["EventsApplied"], &of("a@2")["ApplyTime"]),
            (&json!(5), &json!([2.5, 1.5]))
        );
        assert_eq!((&of("b@2")["LagEvents"], of("b@2").get("Failures")), (&json!(70), None));
        assert_eq!(
            (&of("retired@2")["EventsApplied"], of("retired@2").get("LagEvents")),
            (&json!(1), None)
        );
        let whole = lines.last().expect("a line");
        assert_eq!(
            (&whole["LagSeconds"], &whole["Heartbeat"]),
            (&json!(1.5), &json!(1)),
            "of the live ones only"
        );
        assert!(whole["GapAge"].as_f64().is_some_and(|age| age >= 3.0), "{whole}");
        assert_eq!((&whole["Service"], &whole["release"]), (&json!("shop"), &json!("v7")));
    }

    #[test]
    fn nothing_is_written_if_nothing_was_counted() {
        assert_eq!(report(&Counters::default(), None), Vec::<Value>::new());
        let (counted, _) = full_report();
        let lines = report(&counted, None);
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(
            lines
                .iter()
                .all(|line| line.get("LagSeconds").is_none() && line.get("Heartbeat").is_none())
        );
    }
}
