//! Writes metrics: every minute during a long-running command, and at the end of every command that
//! counts them.

use std::convert::Infallible;
use std::future::Future;
use std::io::Write;
use std::pin::pin;
use std::time::Duration;

use clap::ValueEnum;
use time::OffsetDateTime;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::warn;

use super::emf::{Report, Snapshot};
use crate::database::Database;
use crate::engine::lag::{Lag, LagReport};
use crate::ledger::{Entry, Ledger};
use crate::model::lifecycle::Status;
use crate::model::metrics;
use crate::model::registry::Registry;
use crate::store::EventStore;

/// CloudWatch keeps one value per minute of a metric with standard resolution.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// The time limit for the database queries of a report.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// The time limit for the queries of the final report, at shutdown.
const FINAL_QUERY_TIMEOUT: Duration = Duration::from_secs(1);

/// The format of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MetricsFormat {
    /// Metrics are off.
    None,
    /// CloudWatch's embedded metric format, one JSON object per line, on standard error.
    Emf,
}

/// Writes metrics. Does nothing if metrics are off.
pub(crate) struct Reporter {
    /// `None` if metrics are off.
    service: Option<String>,
    release: Option<String>,
}

impl Reporter {
    /// Starts counting, unless metrics are off.
    pub(crate) fn new(format: MetricsFormat, service: &str, release: Option<&str>) -> Self {
        let service = match format {
            MetricsFormat::None => None,
            MetricsFormat::Emf => {
                metrics::start();
                Some(service.to_owned())
            }
        };
        Reporter { service, release: release.map(str::to_owned) }
    }

    /// Writes the counters since the last report, without a query. Used at the end of a short
    /// command, and at the end of an invocation with messages, whose response must not wait.
    pub(crate) fn flush(&self) {
        self.write(None, false);
    }

    /// Writes the counters since the last report and the lag, if the database answers in time. Set
    /// `has_heartbeat` only for a worker that has run for a minute, or for a successful scheduled
    /// invocation: a worker that dies at every start must have no heartbeat.
    pub(crate) async fn report(&self, lag_source: &LagSource<'_>, has_heartbeat: bool) {
        self.report_within(lag_source, QUERY_TIMEOUT, has_heartbeat).await;
    }

    /// Runs `work` to its end. Reports at its start, every minute with a heartbeat, and at its end.
    pub(crate) async fn report_while<T>(
        &self,
        lag_source: &LagSource<'_>,
        work: impl Future<Output = T>,
    ) -> T {
        let ended = self
            .run_with_ticks(async |is_first| self.report(lag_source, !is_first).await, work)
            .await;
        self.report_within(lag_source, FINAL_QUERY_TIMEOUT, false).await;
        ended
    }

    /// Runs `work`, which plays no projector, to its end. Writes only counters: at its start, every
    /// minute, and at its end.
    pub(crate) async fn flush_while<T>(&self, work: impl Future<Output = T>) -> T {
        let ended = self.run_with_ticks(async |_| self.flush(), work).await;
        self.flush();
        ended
    }

    async fn report_within(
        &self,
        lag_source: &LagSource<'_>,
        query_timeout: Duration,
        has_heartbeat: bool,
    ) {
        if self.service.is_some() {
            let snapshot = lag_source.read_snapshot(query_timeout).await;
            self.write(snapshot.as_ref(), has_heartbeat);
        }
    }

    async fn run_with_ticks<T>(
        &self,
        tick: impl AsyncFn(bool),
        work: impl Future<Output = T>,
    ) -> T {
        if self.service.is_none() {
            return work.await;
        }
        let mut work = pin!(work);
        tokio::select! {
            biased;
            ended = &mut work => ended,
            never = repeat(REPORT_INTERVAL, tick) => match never {},
        }
    }

    fn write(&self, snapshot: Option<&Snapshot>, has_heartbeat: bool) {
        let Some(service) = &self.service else { return };
        let (counted, at) = (metrics::take(), OffsetDateTime::now_utc());
        let release = self.release.as_deref();
        let report = Report { service, release, at, counted: &counted, snapshot, has_heartbeat };
        let text: String = report.lines().into_iter().map(|line| line + "\n").collect();
        // All lines are one write, so that no log line comes between them. A failure cannot be
        // reported, because it would go to standard error, too.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

/// Reads the lag of every projector of a set.
pub(crate) struct LagSource<'a> {
    ledger: Ledger,
    store: EventStore,
    registry: &'a Registry,
}

impl<'a> LagSource<'a> {
    pub(crate) fn new(database: &Database, registry: &'a Registry) -> Self {
        LagSource { ledger: Ledger::new(database), store: EventStore::new(database), registry }
    }

    async fn read_snapshot(&self, query_timeout: Duration) -> Option<Snapshot> {
        let lag_report =
            match timeout(query_timeout, LagReport::read(&self.ledger, &self.store)).await {
                Ok(Ok(lag_report)) => lag_report,
                Ok(Err(error)) => {
                    warn!(%error, "the lag cannot be measured now");
                    return None;
                }
                Err(_) => {
                    warn!(error = "no answer in time", "the lag cannot be measured now");
                    return None;
                }
            };
        let is_stopped = |status: &Status| matches!(status, Status::Broken(_) | Status::Stalled);
        let stopped = lag_report.projectors.iter().filter(|(entry, _)| is_stopped(&entry.status));
        let stopped = stopped.count() as u64;
        let is_played = |(entry, _): &(Entry, Lag)| {
            self.registry.get(&entry.id).is_some()
                && !matches!(entry.status, Status::Finished | Status::Retired)
        };
        let mut projectors = lag_report.projectors;
        projectors.retain(is_played);
        let retrying = projectors.iter().filter(|(entry, _)| entry.retrying.is_some()).count();
        let projectors =
            projectors.into_iter().map(|(entry, lag)| (entry.id, entry.status, lag)).collect();
        Some(Snapshot {
            high_water: lag_report.high_water,
            published: lag_report.published,
            projectors,
            stopped,
            retrying,
        })
    }
}

/// Parses a service name: it must be valid as the value of a CloudWatch dimension.
pub(crate) fn parse_service_name(name: &str) -> Result<String, String> {
    let is_valid = (1..=255).contains(&name.len())
        && name.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
        && !name.trim().is_empty()
        && !name.starts_with(':');
    if !is_valid {
        return Err("it must be 1 to 255 printable ASCII characters, not begin with a colon, and \
            not be blank"
            .into());
    }
    Ok(name.to_owned())
}

/// Calls `tick` at once and then after every period. Its argument is `true` in the first call.
async fn repeat(period: Duration, tick: impl AsyncFn(bool)) -> Infallible {
    let mut is_first = true;
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        tick(std::mem::take(&mut is_first)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_reporter_runs_at_once_and_then_every_minute() {
        let ticks = RefCell::new(Vec::new());
        let repeating = repeat(REPORT_INTERVAL, async |is_first| ticks.borrow_mut().push(is_first));
        let Err(_) = timeout(Duration::from_secs(150), repeating).await;
        assert_eq!(ticks.take(), [true, false, false]);
    }

    #[test]
    fn a_service_name_must_be_a_valid_cloudwatch_dimension() {
        for name in ["projectionist", "Shop (eu)", "a"] {
            assert_eq!(parse_service_name(name).as_deref(), Ok(name));
        }
        for name in ["", "  ", ":a", "caf\u{e9}", "a\tb", &"a".repeat(256)] {
            assert!(parse_service_name(name).is_err(), "{name:?}");
        }
    }
}
