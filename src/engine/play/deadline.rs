//! Fan-out with a deadline, for an invocation of Lambda: the process is frozen afterwards.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, warn};

use super::foreign::{claimed_positions, verify_message};
use super::worker::Worker;
use crate::model::event::Position;
use crate::model::projector::ProjectorId;
use crate::queue::Message;

/// The moment at which work is interrupted: a fixed time, or the shutdown if that comes first.
#[derive(Debug, Clone)]
pub(crate) struct Deadline {
    at: Instant,
    /// The time left after the deadline, for the rollback and for reading the positions.
    margin: Duration,
    shutdown: watch::Receiver<bool>,
}

impl Deadline {
    /// Creates a deadline `margin` before the end of the `remaining` time. The margin is at most
    /// half of that time.
    pub(crate) fn after(
        remaining: Duration,
        margin: Duration,
        shutdown: watch::Receiver<bool>,
    ) -> Self {
        let margin = margin.min(remaining / 2);
        Deadline { at: Instant::now() + (remaining - margin), margin, shutdown }
    }

    /// Resolves at the deadline.
    pub(crate) async fn reached(&self) {
        let mut shutdown = self.shutdown.clone();
        let stopped = async {
            if shutdown.wait_for(|stop| *stop).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = sleep_until(self.at) => {}
            () = stopped => {}
        }
    }

    /// The timeout for each query that is made after the deadline.
    pub(crate) fn query_timeout(&self) -> Duration {
        self.margin / 4
    }

    /// The time left until the deadline.
    pub(crate) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

impl Worker {
    /// Passes messages to every live projector of the fan-out group. For each message, returns
    /// whether it was processed and may be deleted. These are all messages of this log, unless the
    /// deadline was reached. When this returns, no work is running.
    ///
    /// Projectors in the background continue for at most `background_after.time` and then finish
    /// their current page. As after a shutdown of play, uncommitted work is repeated later from the
    /// store.
    pub(crate) async fn fan_out_until(
        &mut self,
        ids: &[String],
        bodies: &[String],
        deadline: &Deadline,
    ) -> Vec<bool> {
        self.engine.retries.forget_all();
        let verdicts = tokio::select! {
            biased;
            verdicts = self.fan_out_with_retry(bodies) => Some(verdicts),
            () = deadline.reached() => None,
        };
        let in_background = self.stragglers.in_background();
        self.shut_down_stragglers(
            if verdicts.is_some() { self.background_after.time } else { Duration::ZERO },
            deadline,
        )
        .await;
        if let Some(verdicts) = verdicts {
            // Best effort: this only logs and counts.
            let _ = timeout(deadline.query_timeout(), self.record_foreign(&verdicts, ids, bodies))
                .await;
            return verdicts.iter().map(Option::is_none).collect();
        }
        warn!(messages = bodies.len(), "the deadline was reached: uncommitted work is rolled back");
        match timeout(deadline.query_timeout(), self.find_processed(bodies, &in_background)).await {
            Ok(Ok(processed)) => processed,
            Ok(Err(error)) => {
                debug!(
                    %error,
                    "cannot determine which messages were processed: all are delivered again"
                );
                vec![false; bodies.len()]
            }
            Err(_) => vec![false; bodies.len()],
        }
    }

    /// Ends the background tasks and waits until all interrupted work is rolled back.
    pub(crate) async fn shut_down_stragglers(&mut self, grace: Duration, deadline: &Deadline) {
        self.broken +=
            self.stragglers.shut_down(tokio::time::sleep(grace), deadline.reached()).await;
        // A process that is frozen with an open transaction would keep its projector's row locked.
        if !self.engine.database.wait_until_idle(deadline.margin / 2).await {
            debug!("not all connections are idle");
        }
    }

    /// Determines from the ledger which messages every live projector has processed. Projectors in
    /// the background are ignored, because they read the store instead. A reference counts as
    /// unprocessed, because the ledger does not show whether its events were applied.
    async fn find_processed(
        &self,
        bodies: &[String],
        in_background: &HashSet<ProjectorId>,
    ) -> Result<Vec<bool>, sqlx::Error> {
        let positions = claimed_positions(bodies);
        let (live, view) =
            tokio::try_join!(self.live_positions(), self.engine.store.snapshot(&positions))?;
        let in_group = live.into_iter().filter(|(id, _)| !in_background.contains(id));
        let slowest = in_group.map(|(_, position)| position).min();
        let high_water = view.marks.high_water;
        let limit = slowest.map_or(high_water, |slowest: Position| slowest.min(high_water));
        let is_processed = |body: &String| match verify_message(body, &view) {
            Message::Events(run) => run.last() <= limit,
            Message::Reference(_) | Message::Foreign(_) => false,
        };
        Ok(bodies.iter().map(is_processed).collect())
    }
}
