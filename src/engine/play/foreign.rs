//! Foreign messages: messages that do not belong to this log. They are counted, logged and alerted,
//! but never applied and never deleted.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use tracing::{debug, error, info, warn};

use super::worker::Worker;
use crate::model::event::Position;
use crate::model::metrics;
use crate::queue::{ForeignReason, Message, parse};
use crate::store::{EventStore, LogSnapshot};

/// The minimum time between two alerts. Each alert also updates the count in the log.
const ALERT_EVERY: Duration = Duration::from_secs(300);

/// The length of the example for a message without an id, in characters.
const EXAMPLE_LENGTH: usize = 60;

/// Parses a message and compares it with the log.
///
/// The signature proves that the sender has the key, and binds all events of the message to each
/// other. The id of the last event proves that they are events of the log as it is now: a database
/// that was restored or cloned has another event at that position, or none.
pub(crate) fn verify_message(body: &str, view: &LogSnapshot) -> Message {
    let message = parse(body, &view.marks.log);
    let foreign = match &message {
        // The relay stores the mark before it sends a message, so no message of this log is beyond
        // it.
        Message::Events(run) if run.last() > view.marks.high_water => {
            Some(ForeignReason::BeyondHighWater)
        }
        Message::Reference(last) if *last > view.marks.high_water => {
            Some(ForeignReason::BeyondHighWater)
        }
        Message::Events(run) => {
            let event_id = run.above(run.prev()).last().map(|event| event.event_id());
            (view.event_ids.get(&run.last()).map(String::as_str) != event_id)
                .then_some(ForeignReason::DifferentEvent)
        }
        Message::Reference(last) => {
            (!view.event_ids.contains_key(last)).then_some(ForeignReason::DifferentEvent)
        }
        Message::Foreign(_) => None,
    };
    foreign.map_or(message, Message::Foreign)
}

/// The positions, as the messages claim them, of the rows that the messages will be compared with.
pub(crate) fn claimed_positions(bodies: &[String]) -> Vec<Position> {
    bodies.iter().filter_map(|body| crate::queue::unverified_last(body)).collect()
}

/// The foreign messages that have not been reported yet.
#[derive(Debug, Default)]
pub(super) struct ForeignWatch {
    /// The queue from which this worker receives.
    queue: Option<String>,
    /// The number of foreign messages since the last alert.
    messages: u64,
    reasons: BTreeMap<ForeignReason, u64>,
    example: String,
    /// Wall-clock time: the monotonic clock may not advance while a Lambda function is frozen.
    alerted_at: Option<SystemTime>,
    /// The number of foreign messages not yet added to the count in the log.
    uncounted: u64,
}

impl ForeignWatch {
    fn is_due(&self) -> bool {
        self.alerted_at.is_none_or(|at| at.elapsed().map_or(true, |elapsed| elapsed >= ALERT_EVERY))
    }

    fn reasons(&self) -> String {
        let reasons: Vec<String> =
            self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        reasons.join(", ")
    }
}

impl Worker {
    /// Warns if the log was last published to another queue than this worker's.
    pub(crate) async fn check_queue(&mut self, queue: Option<String>) -> Result<(), sqlx::Error> {
        if let Some(queue) = queue {
            check_queue(&self.engine.store, &queue).await?;
            self.foreign.queue = Some(queue);
        }
        Ok(())
    }

    /// Records the foreign messages among those received. Logs an alert immediately, and then at
    /// most every five minutes.
    pub(crate) async fn record_foreign(
        &mut self,
        verdicts: &[Option<ForeignReason>],
        ids: &[String],
        bodies: &[String],
    ) {
        let count = verdicts.iter().flatten().count() as u64;
        if count == 0 {
            return;
        }
        metrics::record_foreign_messages(count);
        let watch = &mut self.foreign;
        for (at, reason) in
            verdicts.iter().enumerate().filter_map(|(at, reason)| Some((at, (*reason)?)))
        {
            debug!(%reason, "received a foreign message");
            if watch.messages == 0 {
                watch.example = example(ids.get(at), &bodies[at]);
            }
            watch.messages += 1;
            *watch.reasons.entry(reason).or_default() += 1;
        }
        watch.uncounted += count;
        if !watch.is_due() {
            return;
        }
        watch.alerted_at = Some(SystemTime::now());
        error!(
            alert = "foreign_messages",
            queue = watch.queue.as_deref().unwrap_or("(it has no name)"),
            messages = watch.messages,
            reasons = watch.reasons(),
            example = watch.example,
            "the queue has messages that are not of this log: they are neither applied nor \
             deleted. Find their sender, or correct QUEUE_URL if this is the wrong queue"
        );
        (watch.messages, watch.reasons) = (0, BTreeMap::new());
        self.count_foreign().await;
    }

    /// Adds the uncounted foreign messages to the count in the log.
    pub(crate) async fn count_foreign(&mut self) {
        let uncounted = std::mem::take(&mut self.foreign.uncounted);
        if uncounted == 0 {
            return;
        }
        if let Err(error) = self.engine.store.count_foreign(uncounted).await {
            debug!(%error, "cannot count foreign messages: they are counted later");
            self.foreign.uncounted = uncounted;
        }
    }

    /// Records the log's id, and logs a change: an operator may rotate it while the worker runs.
    pub(super) fn record_log_id(&mut self, log_id: &str) {
        if self.log_id != log_id {
            info!(log_id, "the log has a new id: messages with the previous id are now foreign");
            log_id.clone_into(&mut self.log_id);
        }
    }
}

/// Warns if the log was last published to a queue other than `queue`.
pub(crate) async fn check_queue(store: &EventStore, queue: &str) -> Result<(), sqlx::Error> {
    if let Some(published_to) = store.recorded_queue().await?.filter(|recorded| recorded != queue) {
        warn!(
            alert = "queue_changed",
            queue,
            published_to,
            "this process uses another queue than the one that the log was last published to. If \
             this is not intended, correct QUEUE_URL"
        );
    }
    Ok(())
}

fn example(id: Option<&String>, body: &str) -> String {
    match id.filter(|id| !id.is_empty()) {
        Some(id) => id.clone(),
        None => body.chars().flat_map(char::escape_default).take(EXAMPLE_LENGTH).collect(),
    }
}
