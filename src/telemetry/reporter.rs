//! When metrics are written: once a minute beside what works for long, and at the end of
//! everything.

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
use crate::engine::lag::LagReport;
use crate::ledger::Ledger;
use crate::model::lifecycle::Status;
use crate::model::metrics;
use crate::model::registry::Registry;
use crate::store::EventStore;

/// CloudWatch keeps one value a minute of such a metric.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// How long a look at the database may take that only a report needs, and how long at the end of
/// the process.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
const FINAL_QUERY_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether and how metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MetricsFormat {
    /// Not at all.
    None,
    /// As CloudWatch's embedded metric format, one JSON object a line, to standard error.
    Emf,
}

/// Writes metrics; where they are off, it does nothing.
pub(crate) struct Reporter {
    /// `None`: metrics are off.
    service: Option<String>,
    release: Option<String>,
}

/// Where the lag is read: that of every projector of a set.
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
        let projectors = lag_report.projectors.into_iter().filter(|(entry, _)| {
            self.registry.get(&entry.id).is_some()
                && !matches!(entry.status, Status::Finished | Status::Retired)
        });
        Some(Snapshot {
            high_water: lag_report.high_water,
            published: lag_report.published,
            projectors: projectors.map(|(entry, lag)| (entry.id, entry.status, lag)).collect(),
        })
    }
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

    /// Writes what was counted since the last time, and asks nobody: at the end of a short process,
    /// and of an invocation before its answer.
    pub(crate) fn flush(&self) {
        self.write(None, false);
    }

    /// The same, with the lag. Where the database does not answer, without it. A heartbeat is for
    /// who has worked for a minute, or does so by the minute: a worker that dies at its start,
    /// again and again, must be missed.
    pub(crate) async fn report(&self, lag_source: &LagSource<'_>, has_heartbeat: bool) {
        self.report_within(lag_source, QUERY_TIMEOUT, has_heartbeat).await;
    }

    /// Runs something to its end and reports meanwhile: at once, every minute with a heartbeat, and
    /// at last.
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

    /// The same for what plays nothing: only what was counted.
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
        // At once, so that no log line comes between; as with those, nobody can be told that it
        // cannot be written.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

/// Does something at once and then at every interval; it is told whether this is the first time.
async fn repeat(period: Duration, tick: impl AsyncFn(bool)) -> Infallible {
    let mut is_first = true;
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        tick(std::mem::take(&mut is_first)).await;
    }
}

/// A service's name, as CloudWatch takes it for the value of a dimension.
pub(crate) fn parse_service_name(name: &str) -> Result<String, String> {
    let is_legal = (1..=255).contains(&name.len())
        && name.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
        && !name.trim().is_empty()
        && !name.starts_with(':');
    match is_legal {
        true => Ok(name.to_owned()),
        false => Err("it must be 1 to 255 printable ASCII characters, not begin with a colon, and not be blank".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_reporter_runs_at_once_and_then_every_minute() {
        let done = RefCell::new(Vec::new());
        let doing = repeat(REPORT_INTERVAL, async |is_first| done.borrow_mut().push(is_first));
        let Err(_) = timeout(Duration::from_secs(150), doing).await;
        assert_eq!(done.take(), [true, false, false]);
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
