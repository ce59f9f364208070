//! The player: receives, passes the messages to the worker, and deletes those that every live projector is past.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::PlaySettings;
use super::intake::Intake;
use super::quarrel::Quarrel;
use super::set_aside::{FIRST_FOREIGN_PAUSE, SetAside};
use super::worker::Worker;
use crate::queue::{Queue, Receipt, Received};
use crate::store::LogFault;

/// A worker that the queue feeds.
pub(super) struct Player {
    pub(super) worker: Worker,
    pub(super) queue: Arc<dyn Queue>,
    pub(super) settings: PlaySettings,
    /// How many were taken from the queue and deleted.
    pub(super) messages: u64,
    quarrel: Quarrel,
    /// Why it can never be idle: the log has lost its end.
    pub(super) fault: Option<LogFault>,
    /// The messages that are not ours.
    pub(super) set_aside: SetAside,
}

/// What is next after a receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Receive,
    /// A pause, because it brought nothing but messages that are not ours.
    Pause,
    /// The end: all is quiet, and that is what it was to wait for.
    End,
}

impl Player {
    pub(super) fn new(worker: Worker, queue: Arc<dyn Queue>, settings: PlaySettings) -> Self {
        Player {
            worker,
            queue,
            settings,
            messages: 0,
            quarrel: Quarrel::default(),
            fault: None,
            set_aside: SetAside::default(),
        }
    }

    /// Plays until `shutdown`, or until all is quiet where the settings say so.
    pub(super) async fn run(&mut self, intake: &mut Intake, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        // So that what stands still now is known from the first poll on.
        tokio::select! {
            biased;
            () = &mut shutdown => return,
            () = self.worker.reconcile() => {}
        }
        loop {
            let received = tokio::select! {
                biased;
                () = &mut shutdown => return,
                received = intake.receive(self.wait()) => received,
            };
            let received = match received {
                Ok(received) => {
                    self.quarrel.over("the queue answers again");
                    received
                }
                Err(error) => {
                    // What is appended meanwhile comes from the store.
                    let pause = self.quarrel.again("cannot receive from the queue, trying again", &error);
                    tokio::select! {
                        biased;
                        () = &mut shutdown => return,
                        () = async { tokio::time::sleep(pause).await; self.worker.reconcile().await; } => continue,
                    }
                }
            };
            let receipts: Vec<Receipt> = received.iter().map(|message| message.receipt.clone()).collect();
            let grace = self.settings.grace;
            let is_last = AtomicBool::new(false);
            let ended = {
                let mut work = pin!(self.work(received, intake, &is_last));
                tokio::select! {
                    biased;
                    ended = &mut work => Some(ended),
                    () = &mut shutdown => {
                        info!("shutting down: finishing the batch in hand");
                        is_last.store(true, Ordering::Relaxed);
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
                        () = self.leave_to_the_owner() => {}
                    }
                }
                Some(Next::End) => return,
                None => {
                    warn!("the batch in hand took too long: it is rolled back, and its messages go back to the queue");
                    if let Err(error) = self.queue.hide(&receipts, Duration::ZERO).await {
                        debug!(%error, "messages were not returned, and come back by themselves");
                    }
                    return;
                }
            }
        }
    }

    /// How long to wait for a message. While somebody stands still below the mark, not beyond the moment at which the
    /// queue has to be taken for empty: a poll that another worker abandoned, when it was stopped, may have taken
    /// messages with it.
    fn wait(&self) -> Duration {
        let PlaySettings { receive_wait, reconcile_after, .. } = self.settings;
        match self.worker.reconcile.has_suspects() {
            true => receive_wait.min(reconcile_after),
            false => receive_wait,
        }
    }

    /// Deals with one receive, and begins the next unless it `is_last`.
    async fn work(&mut self, received: Vec<Received>, intake: &mut Intake, is_last: &AtomicBool) -> Next {
        if received.is_empty() {
            let has_aside = self.set_aside.received_nothing();
            self.worker.reconcile().await;
            let next = if has_aside { self.leave_foreign().await } else { Next::Receive };
            return self.next_if_idle(next).await;
        }
        let mut receipts = Vec::with_capacity(received.len());
        let (mut ids, mut bodies) = (Vec::with_capacity(received.len()), Vec::with_capacity(received.len()));
        for Received { receipt, id, body } in received {
            receipts.push(receipt);
            ids.push(id);
            bodies.push(body);
        }

        let (queue, visibility) = (Arc::clone(&self.queue), self.queue.visibility());
        // Not while it only takes messages that are not ours: what is received ahead is hidden from their owner.
        if !queue.is_ordered() && !self.set_aside.is_barren() {
            intake.receive_ahead(self.wait());
        }
        let verdicts = tokio::select! {
            biased;
            verdicts = self.worker.pass(&bodies) => verdicts,
            never = keep_hidden(queue.as_ref(), &receipts, visibility) => match never {},
        };
        self.worker.note_foreign(&verdicts, &ids, &bodies).await;
        let (ours, foreign) = self.set_aside.tell_apart(&verdicts, receipts, &ids, &bodies);
        if ours.is_empty() {
            if self.set_aside.received_only(foreign) && !is_last.load(Ordering::Relaxed) {
                return Next::Receive;
            }
            let next = self.leave_foreign().await;
            return self.next_if_idle(next).await;
        }
        self.set_aside.received_with_ours(foreign, visibility);
        // One that does not wait would find their group closed still.
        if queue.is_ordered() && !self.wait().is_zero() && !is_last.load(Ordering::Relaxed) {
            intake.receive_ahead(self.wait());
        }
        // Every live projector has committed past them, or is broken.
        match self.queue.delete(&ours).await {
            Ok(()) => self.messages += ours.len() as u64,
            Err(error) => warn!(%error, "could not delete messages: they come again, and are known by their positions"),
        }
        if self.worker.reconcile.is_due(Instant::now()) {
            self.worker.reconcile().await;
        }
        Next::Receive
    }

    /// Gives back what came without any of ours.
    async fn leave_foreign(&mut self) -> Next {
        self.set_aside.give_back_aside(self.queue.as_ref()).await;
        Next::Pause
    }

    /// Gives back what is hidden and not ours, and adds to the log's count what it does not have yet. Best effort.
    pub(super) async fn give_back_foreign(&mut self) {
        let give_back = async {
            self.set_aside.give_back(self.queue.as_ref()).await;
            self.worker.count_foreign().await;
        };
        let _ = timeout(self.settings.grace, give_back).await;
    }

    /// Receives nothing for a while, so that the owner of what is not ours can have it. Projectors are fed from the store.
    async fn leave_to_the_owner(&mut self) {
        let until = tokio::time::Instant::now() + self.set_aside.pause(self.settings.until_idle);
        let step = self.settings.reconcile_after.clamp(Duration::from_millis(100), FIRST_FOREIGN_PAUSE);
        while tokio::time::Instant::now() < until {
            self.worker.reconcile().await;
            tokio::time::sleep_until(until.min(tokio::time::Instant::now() + step)).await;
        }
    }

    /// [`Next::End`] where it is to end once all is quiet, and all is; else what is next.
    async fn next_if_idle(&mut self, next: Next) -> Next {
        if !self.settings.until_idle || !self.is_quiet().await {
            return next;
        }
        // Nobody can tell what a message is that another worker has, or that stands behind one that is hidden. All of its
        // events are applied.
        if self.fault.is_some() {
            return Next::End;
        }
        match self.set_aside.fills_the_queue()
            || next == Next::Receive && self.queue.depth().await.is_ok_and(|depth| depth == 0)
        {
            true => Next::End,
            false => next,
        }
    }

    /// Whether the log is quiet and every live projector is at the high-water mark; or the log has a fault, so that this
    /// never comes.
    async fn is_quiet(&mut self) -> bool {
        let store = &self.worker.engine.store;
        let quiet = async {
            let high_water = store.raise_high_water().await?;
            if high_water.fault.is_some() {
                return Ok((true, high_water.fault));
            }
            let all_seen = high_water.held.is_none() && store.last_visible().await? == high_water.mark;
            let published = store.marks().await?.published;
            let all_sent = self.settings.relay.is_none() || published >= high_water.mark;
            let mut live = self.worker.live().await?.into_iter();
            Ok::<_, sqlx::Error>((all_seen && all_sent && live.all(|(_, position)| position >= high_water.mark), None))
        };
        match quiet.await {
            Ok((_, Some(fault))) => {
                self.fault = Some(fault);
                true
            }
            Ok((quiet, None)) => quiet,
            Err(error) => {
                debug!(%error, "cannot tell whether all is quiet");
                false
            }
        }
    }
}

/// Keeps messages hidden from other receivers for as long as it is polled.
async fn keep_hidden(queue: &dyn Queue, receipts: &[Receipt], visibility: Duration) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(visibility / 3).await;
        if let Err(error) = queue.hide(receipts, visibility).await {
            debug!(%error, "could not keep messages hidden: another worker may receive them too, harmlessly");
        }
    }
}
