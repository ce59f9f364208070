//! Work that has to end by a given moment, wherever it is then: an invocation of Lambda, after
//! which the process is frozen.

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

/// When work is cut off: at a moment, or at the shutdown if that comes first.
#[derive(Debug, Clone)]
pub(crate) struct Deadline {
    at: Instant,
    /// What is left after it: to roll back, and to look how far everybody has come.
    margin: Duration,
    shutdown: watch::Receiver<bool>,
}

impl Deadline {
    /// So long from now, less a margin; of what is very short, half is margin.
    pub(crate) fn after(
        remaining: Duration,
        margin: Duration,
        shutdown: watch::Receiver<bool>,
    ) -> Self {
        let margin = margin.min(remaining / 2);
        Deadline { at: Instant::now() + (remaining - margin), margin, shutdown }
    }

    /// Resolves when it is reached.
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

    /// How long a look at the database may take after it.
    pub(crate) fn query_timeout(&self) -> Duration {
        self.margin / 4
    }

    /// Time to work.
    pub(crate) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

impl Worker {
    /// Passes messages to every live projector of the convoy, and says which of them were passed:
    /// all that are ours, unless the deadline was reached. Those may be deleted. Nothing runs on
    /// afterwards.
    ///
    /// Stragglers may go on for as long as one projector may hold up the convoy, and then finish
    /// the page in hand. What they have not committed is done again later, as in play when its
    /// process ends: the store has it.
    pub(crate) async fn fan_out_until(
        &mut self,
        ids: &[String],
        bodies: &[String],
        deadline: &Deadline,
    ) -> Vec<bool> {
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
            // Best effort, as all that only tells of something.
            let _ = timeout(deadline.query_timeout(), self.record_foreign(&verdicts, ids, bodies))
                .await;
            return verdicts.iter().map(Option::is_none).collect();
        }
        warn!(messages = bodies.len(), "time is over: what is not committed is rolled back");
        match timeout(deadline.query_timeout(), self.find_processed(bodies, &in_background)).await {
            Ok(Ok(processed)) => processed,
            Ok(Err(error)) => {
                debug!(%error, "cannot tell who has passed which messages: all come again");
                vec![false; bodies.len()]
            }
            Err(_) => vec![false; bodies.len()],
        }
    }

    /// Ends what goes on outside the convoy, and waits until all that was cut off is rolled back.
    pub(crate) async fn shut_down_stragglers(&mut self, grace: Duration, deadline: &Deadline) {
        self.broken +=
            self.stragglers.shut_down(tokio::time::sleep(grace), deadline.reached()).await;
        // Who is frozen with a transaction open would hold its projector's row.
        if !self.engine.database.wait_until_idle(deadline.margin / 2).await {
            debug!("not all connections are at rest");
        }
    }

    /// Which messages every live projector has passed, by the ledger, but for those that are
    /// outside the convoy: they read the store instead. Of a reference nobody can tell.
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
