//! Messages that are not ours: counted, logged and alerted. They are never applied, and never
//! deleted.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use tracing::{debug, error, info, warn};

use super::worker::Worker;
use crate::model::event::Position;
use crate::model::metrics;
use crate::queue::{ForeignReason, Message, parse};
use crate::store::{EventStore, LogSnapshot};

/// Between two alerts. The log's own count is brought up to date with each of them.
const ALERT_EVERY: Duration = Duration::from_secs(300);

/// Of a message that has no id, in characters.
const EXAMPLE_LENGTH: usize = 60;

/// Reads a message, and compares it with the log.
///
/// A signature proves that a message is of whoever has the key. That its events are those of the
/// log as it is now is proved by the id of its last event: the signature binds the others to it,
/// and a database that was restored or cloned has another event there, or none.
pub(crate) fn verify_message(body: &str, view: &LogSnapshot) -> Message {
    let message = parse(body, &view.marks.log);
    let foreign = match &message {
        // The relay stores the mark before it sends.
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

/// Where the rows stand that messages are to be compared with, by what these claim.
pub(crate) fn claimed_positions(bodies: &[String]) -> Vec<Position> {
    bodies.iter().filter_map(|body| crate::queue::unverified_last(body)).collect()
}

/// What is known of the messages that were not ours and not told of yet.
#[derive(Debug, Default)]
pub(super) struct ForeignWatch {
    /// Which queue this worker listens to.
    queue: Option<String>,
    /// Since the last alert.
    messages: u64,
    reasons: BTreeMap<ForeignReason, u64>,
    example: String,
    /// By the host's clock: that of the process may stand still while a function is frozen.
    alerted_at: Option<SystemTime>,
    /// Not yet added to the log's own count.
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
    /// Warns where the log was last published to another queue than this worker's.
    pub(crate) async fn check_queue(&mut self, queue: Option<String>) -> Result<(), sqlx::Error> {
        if let Some(queue) = queue {
            check_queue(&self.engine.store, &queue).await?;
            self.foreign.queue = Some(queue);
        }
        Ok(())
    }

    /// Takes note of the messages that are not ours: one alert now, and one every five minutes
    /// while there are any.
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
            debug!(%reason, "a message that is not ours");
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
            "the queue has messages that are not of this log: they are not applied and not deleted; look who sends them, or \
             whether QUEUE_URL is the right queue"
        );
        (watch.messages, watch.reasons) = (0, BTreeMap::new());
        self.count_foreign().await;
    }

    /// Adds what was not counted yet to the log's own count.
    pub(crate) async fn count_foreign(&mut self) {
        let uncounted = std::mem::take(&mut self.foreign.uncounted);
        if uncounted == 0 {
            return;
        }
        if let Err(error) = self.engine.store.count_foreign(uncounted).await {
            debug!(%error, "messages that are not ours are counted later");
            self.foreign.uncounted = uncounted;
        }
    }

    /// Notes which log it is: a worker that goes on through a rotation should say so.
    pub(super) fn record_log_id(&mut self, log_id: &str) {
        if self.log_id != log_id {
            info!(log_id, "the log has a new id: messages of the one before are not ours any more");
            log_id.clone_into(&mut self.log_id);
        }
    }
}

/// Warns where the log was last published to another queue than this one.
pub(crate) async fn check_queue(store: &EventStore, queue: &str) -> Result<(), sqlx::Error> {
    if let Some(published_to) = store.recorded_queue().await?.filter(|recorded| recorded != queue) {
        warn!(
            alert = "queue_changed",
            queue,
            published_to,
            "this process uses another queue than the log was last published to; if that is not meant, correct QUEUE_URL"
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
