//! The player receives messages, passes them to the worker, and deletes those that every live
//! projector has processed.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::PlaySettings;
use super::foreign_receipts::{FIRST_FOREIGN_PAUSE, ForeignReceipts};
use super::receiver::QueueReceiver;
use super::worker::Worker;
use crate::model::wait_log::{OutageLog, Reminder};
use crate::queue::{Queue, Receipt, ReceivedMessage};
use crate::store::LogFault;

/// A worker that is fed from the queue.
pub(super) struct Player {
    pub(super) worker: Worker,
    pub(super) queue: Arc<dyn Queue>,
    pub(super) settings: PlaySettings,
    /// The number of messages that were received and deleted.
    pub(super) messages: u64,
    outage_log: OutageLog,
    /// Set if the end of the log was lost, so that play can never be idle.
    pub(super) fault: Option<LogFault>,
    /// The receipts of foreign messages.
    pub(super) foreign_receipts: ForeignReceipts,
    /// With `until_idle`: what play waits for.
    idle_wait: Option<IdleWait>,
}

/// What keeps play from ending, and since when.
#[derive(Debug)]
struct IdleWait {
    reason: String,
    since: Instant,
    reminder: Reminder,
}

/// How long the same reason may keep play from ending before it is logged.
const LOG_IDLE_WAIT_AFTER: Duration = Duration::from_secs(5);

/// The next step after a receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Receive,
    /// Pause, because the receive brought only foreign messages.
    Pause,
    /// End: `until_idle` is set and everything is idle.
    End,
}

impl Player {
    pub(super) fn new(worker: Worker, queue: Arc<dyn Queue>, settings: PlaySettings) -> Self {
        Player {
            worker,
            queue,
            settings,
            messages: 0,
            outage_log: OutageLog::default(),
            fault: None,
            foreign_receipts: ForeignReceipts::default(),
            idle_wait: None,
        }
    }

    /// Plays until `shutdown`, or until everything is idle if `until_idle` is set.
    pub(super) async fn run(
        &mut self,
        receiver: &mut QueueReceiver,
        shutdown: impl Future<Output = ()>,
    ) {
        let mut shutdown = pin!(shutdown);
        // Records the positions, so that a projector that is already behind is noticed early.
        tokio::select! {
            biased;
            () = &mut shutdown => return,
            () = self.worker.reconcile() => {}
        }
        loop {
            let received = tokio::select! {
                biased;
                () = &mut shutdown => return,
                received = receiver.receive(self.receive_wait()) => received,
            };
            let received = match received {
                Ok(received) => {
                    self.outage_log.record_recovery("the queue answers again");
                    received
                }
                Err(error) => {
                    // Meanwhile, new events are applied from the store.
                    let pause = self
                        .outage_log
                        .record_failure("cannot receive from the queue, trying again", &error);
                    tokio::select! {
                        biased;
                        () = &mut shutdown => return,
                        () = tokio::time::sleep(pause) => {}
                    }
                    tokio::select! {
                        biased;
                        () = &mut shutdown => return,
                        () = self.worker.reconcile() => continue,
                    }
                }
            };
            let receipts: Vec<Receipt> =
                received.iter().map(|message| message.receipt.clone()).collect();
            let grace = self.settings.grace_period;
            let is_shutting_down = AtomicBool::new(false);
            let ended = {
                let mut work = pin!(self.process_received(received, receiver, &is_shutting_down));
                tokio::select! {
                    biased;
                    ended = &mut work => Some(ended),
                    () = &mut shutdown => {
                        info!("shutting down: finishing the current batch");
                        is_shutting_down.store(true, Ordering::Relaxed);
                        match timeout(grace, work).await {
                            Ok(_) => return,
                            Err(_) => None,
                        }
                    }
                }
            };
            match ended {
                Some(Next::Receive) => {}
                Some(Next::Pause) => {
                    tokio::select! {
                        biased;
                        () = &mut shutdown => return,
                        () = self.pause_receiving() => {}
                    }
                }
                Some(Next::End) => return,
                None => {
                    warn!(
                        "the current batch took too long: it is rolled back, and its messages are \
                         returned to the queue"
                    );
                    if let Err(error) =
                        self.queue.change_visibility(&receipts, Duration::ZERO).await
                    {
                        debug!(
                            %error,
                            "cannot return messages: they reappear after their visibility timeout"
                        );
                    }
                    return;
                }
            }
        }
    }

    /// How long to wait for a message. While a projector is below the mark without moving, the wait
    /// is at most `reconcile_after`. A worker that was stopped during a receive may have taken
    /// messages with it, so an empty receive must lead to a reconciliation soon.
    fn receive_wait(&self) -> Duration {
        let PlaySettings { receive_wait, reconcile_after, .. } = self.settings;
        if self.worker.reconciler.has_stationary() {
            receive_wait.min(reconcile_after)
        } else {
            receive_wait
        }
    }

    /// Processes the messages of one receive. Also starts the next receive, unless
    /// `is_shutting_down` is set.
    async fn process_received(
        &mut self,
        received: Vec<ReceivedMessage>,
        receiver: &mut QueueReceiver,
        is_shutting_down: &AtomicBool,
    ) -> Next {
        if received.is_empty() {
            let has_set_aside = self.foreign_receipts.record_empty_receive();
            self.worker.reconcile().await;
            let next = if has_set_aside { self.return_foreign().await } else { Next::Receive };
            return self.next_unless_idle(next).await;
        }
        let mut receipts = Vec::with_capacity(received.len());
        let (mut ids, mut bodies) =
            (Vec::with_capacity(received.len()), Vec::with_capacity(received.len()));
        for ReceivedMessage { receipt, id, body } in received {
            receipts.push(receipt);
            ids.push(id);
            bodies.push(body);
        }

        let (queue, visibility) = (Arc::clone(&self.queue), self.queue.visibility_timeout());
        // Not after a receive with only foreign messages: prefetched messages are hidden from their
        // owner.
        if !queue.is_ordered() && !self.foreign_receipts.is_unproductive() {
            receiver.prefetch(self.receive_wait());
        }
        let verdicts = tokio::select! {
            biased;
            verdicts = self.worker.fan_out_with_retry(&bodies) => verdicts,
            never = extend_visibility(queue.as_ref(), &receipts, visibility) => match never {},
        };
        self.worker.record_foreign(&verdicts, &ids, &bodies).await;
        let (own, foreign) = self.foreign_receipts.split(&verdicts, receipts, &ids, &bodies);
        if own.is_empty() {
            if self.foreign_receipts.record_foreign_receive(foreign)
                && !is_shutting_down.load(Ordering::Relaxed)
            {
                return Next::Receive;
            }
            let next = self.return_foreign().await;
            return self.next_unless_idle(next).await;
        }
        self.foreign_receipts.record_mixed_receive(foreign, visibility);
        // A receive without a wait would still find the message group locked.
        if queue.is_ordered()
            && !self.receive_wait().is_zero()
            && !is_shutting_down.load(Ordering::Relaxed)
        {
            receiver.prefetch(self.receive_wait());
        }
        // Every live projector has committed past these messages or is broken.
        match self.queue.delete(&own).await {
            Ok(()) => self.messages += own.len() as u64,
            Err(error) => {
                warn!(
                    %error,
                    "cannot delete messages: they are delivered again and skipped by their \
                     positions"
                )
            }
        }
        if self.worker.reconciler.is_due(Instant::now()) {
            self.worker.reconcile().await;
        }
        Next::Receive
    }

    /// Returns the set-aside messages.
    async fn return_foreign(&mut self) -> Next {
        self.foreign_receipts.return_set_aside(self.queue.as_ref()).await;
        Next::Pause
    }

    /// Returns the hidden foreign messages to the queue and updates the count in the log. Best
    /// effort.
    pub(super) async fn return_all_foreign(&mut self) {
        let return_all = async {
            self.foreign_receipts.return_all(self.queue.as_ref()).await;
            self.worker.count_foreign().await;
        };
        let _ = timeout(self.settings.grace_period, return_all).await;
    }

    /// Receives nothing for a while, so that the owner of the foreign messages can receive them.
    /// Meanwhile projectors are fed from the store.
    async fn pause_receiving(&mut self) {
        let until =
            tokio::time::Instant::now() + self.foreign_receipts.pause(self.settings.until_idle);
        let step =
            self.settings.reconcile_after.clamp(Duration::from_millis(100), FIRST_FOREIGN_PAUSE);
        while tokio::time::Instant::now() < until {
            self.worker.reconcile().await;
            tokio::time::sleep_until(until.min(tokio::time::Instant::now() + step)).await;
        }
    }

    /// [`Next::End`] if `until_idle` is set and everything is idle, otherwise `next`.
    async fn next_unless_idle(&mut self, next: Next) -> Next {
        if !self.settings.until_idle || !self.is_idle().await {
            return next;
        }
        // Every event of the log is applied here. Messages of unknown content may still be in the
        // queue: in flight at another worker, or blocked behind invisible ones.
        if self.fault.is_some() {
            return Next::End;
        }
        let is_quiet = self.foreign_receipts.has_only_foreign()
            || next == Next::Receive && self.queue.depth().await.is_ok_and(|depth| depth == 0);
        if is_quiet {
            return Next::End;
        }
        self.log_idle_wait("the queue to be empty".into());
        next
    }

    /// Logs what keeps play from ending, at growing intervals.
    fn log_idle_wait(&mut self, reason: String) {
        let now = Instant::now();
        match self.idle_wait.as_mut().filter(|wait| wait.reason == reason) {
            Some(wait) => {
                if wait.reminder.is_due(now) {
                    let seconds = now.duration_since(wait.since).as_secs();
                    info!(seconds, "not idle: waiting for {}", wait.reason);
                }
            }
            None => {
                let reminder = Reminder::new(now + LOG_IDLE_WAIT_AFTER);
                self.idle_wait = Some(IdleWait { reason, since: now, reminder });
            }
        }
    }

    /// Whether the log is idle and every live projector is at the high-water mark. Also `true` if
    /// the log has a fault, because then this never happens.
    async fn is_idle(&mut self) -> bool {
        let store = &self.worker.engine.store;
        let quiet = async {
            let high_water = store.raise_high_water().await?;
            if high_water.fault.is_some() {
                return Ok((None, high_water.fault));
            }
            let mark = high_water.mark;
            let visible = store.last_visible().await?;
            if high_water.blocked.is_some() || visible != mark {
                let reason = format!(
                    "the high-water mark to rise from {mark} to the end of the log {visible}"
                );
                return Ok((Some(reason), None));
            }
            let published = store.marks().await?.published;
            if self.settings.relay.is_some() && published < mark {
                let reason = format!("the relay to publish the events from {published} to {mark}");
                return Ok((Some(reason), None));
            }
            let live = self.worker.live_positions().await?;
            let behind = live.into_iter().find(|(_, position)| *position < mark);
            let reason = behind.map(|(id, position)| {
                let wait = self.worker.engine.retries.wait_at(&id, position);
                let why = wait.map(|wait| format!(" (it is retrying an event: {})", wait.reason));
                format!("{id} to move from {position} to {mark}{}", why.unwrap_or_default())
            });
            Ok::<_, sqlx::Error>((reason, None))
        };
        match quiet.await {
            Ok((_, Some(fault))) => {
                self.fault = Some(fault);
                true
            }
            Ok((None, None)) => true,
            Ok((Some(reason), None)) => {
                self.log_idle_wait(reason);
                false
            }
            Err(error) => {
                debug!(%error, "cannot check whether play is idle");
                false
            }
        }
    }
}

/// Extends the visibility timeout of messages for as long as the future is polled.
async fn extend_visibility(
    queue: &dyn Queue,
    receipts: &[Receipt],
    visibility: Duration,
) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(visibility / 3).await;
        if let Err(error) = queue.change_visibility(receipts, visibility).await {
            debug!(
                %error,
                "cannot extend the visibility timeout: another worker may receive the messages \
                 too, which is harmless"
            );
        }
    }
}
