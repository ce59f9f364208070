//! Play: receive, fan out, delete, until shutdown.

mod convoy;
mod cut_off;
pub(crate) mod fan_out;
mod intake;
pub(crate) mod reconcile;
pub(crate) mod worker;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::database::Database;
use crate::deliver::Limits;
use crate::error::Error;
use crate::queue::{Queue, Receipt, Received};
use crate::registry::Registry;
use crate::relay::{Relay, RelaySettings};
use crate::retry;
use crate::store::LogFault;
pub use convoy::ConvoyBudget;
pub(crate) use cut_off::Deadline;
use intake::Intake;
pub(crate) use worker::Worker;

/// How play works.
#[derive(Debug, Clone)]
pub struct PlaySettings {
    /// The bounds of the engine.
    pub limits: Limits,
    /// How the relay works in this process; `None`: it runs elsewhere.
    pub relay: Option<RelaySettings>,
    /// How long one receive waits for a message (at most 20 s).
    pub receive_wait: Duration,
    /// A projector that stands still below the high-water mark for so long, while the queue is silent, is
    /// caught up from the store: the queue has lost what it waits for.
    pub reconcile_after: Duration,
    /// How long one projector may hold up the others.
    pub convoy: ConvoyBudget,
    /// Whether to end once queue and log are quiet and every live projector is at the high-water mark.
    pub until_idle: bool,
    /// How long the batch in hand may take to end after the shutdown; then it is rolled back.
    pub grace: Duration,
}

impl Default for PlaySettings {
    fn default() -> Self {
        PlaySettings {
            limits: Limits::default(),
            relay: Some(RelaySettings::default()),
            receive_wait: Duration::from_secs(5),
            reconcile_after: Duration::from_secs(2),
            convoy: ConvoyBudget::default(),
            until_idle: false,
            grace: Duration::from_secs(10),
        }
    }
}

/// What play did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Played {
    /// Messages that were taken from the queue and deleted.
    pub messages: u64,
    /// Projectors that broke meanwhile.
    pub broken: u64,
    /// Live projectors that were not played at the end: they were booted with another definition than this worker has.
    pub outdated: u64,
}

/// Plays every live projector of a set, until `shutdown`. Projectors that are booted, broken or retired
/// meanwhile join or leave without a restart; one that was not booted is never played.
///
/// While database or queue are away it waits, and goes on by itself.
///
/// # Errors
/// If the log cannot be read at the start; or, where it is to end when all is quiet, if the log has lost its end.
pub async fn play(
    database: &Database,
    queue: Arc<dyn Queue>,
    registry: &Registry,
    settings: PlaySettings,
    shutdown: impl Future<Output = ()>,
) -> Result<Played, Error> {
    let mut shutdown = pin!(shutdown);
    let worker = tokio::select! {
        biased;
        // The database may be away, and is waited for.
        () = &mut shutdown => return Ok(Played::default()),
        worker = Worker::new(database, registry, settings.limits, settings.convoy, settings.reconcile_after) => worker?,
    };
    let mut player = Player { worker, queue, settings, messages: 0, quarrel: Quarrel::default(), fault: None };

    let relay = player.settings.relay.map(|settings| {
        let (store, watch) = (player.worker.engine.store.clone(), player.worker.watch.clone());
        let mut relay = Relay::new(store, Arc::clone(&player.queue), settings, watch);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = relay.run() => {}
                _ = stopped => relay.release().await,
            }
        });
        (stop, task)
    });
    let mut intake = Intake::new(&player.queue);
    player.run(&mut intake, shutdown).await;
    intake.close().await;
    let broken = player.worker.broken_so_far();
    let outdated = player.worker.outdated().len() as u64;
    if let Some((stop, task)) = relay {
        let _ = stop.send(());
        let _ = timeout(player.settings.grace, task).await;
    }
    match player.fault {
        Some(fault) => Err(Error::Fault(fault.to_string())),
        None => Ok(Played { messages: player.messages, broken, outdated }),
    }
}

/// A worker that the queue feeds.
struct Player {
    worker: Worker,
    queue: Arc<dyn Queue>,
    settings: PlaySettings,
    /// How many were taken from the queue and deleted.
    messages: u64,
    quarrel: Quarrel,
    /// Why it can never be idle: the log has lost its end.
    fault: Option<LogFault>,
}

impl Player {
    async fn run(&mut self, intake: &mut Intake, shutdown: impl Future<Output = ()>) {
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
                Some(false) => {}
                Some(true) => return,
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

    /// Deals with one receive, and begins the next unless it `is_last`. `true`: all is quiet, and that is what it was to
    /// wait for.
    async fn work(&mut self, received: Vec<Received>, intake: &mut Intake, is_last: &AtomicBool) -> bool {
        if received.is_empty() {
            self.worker.reconcile().await;
            return self.settings.until_idle && self.is_idle().await;
        }
        let receipts: Vec<Receipt> = received.iter().map(|message| message.receipt.clone()).collect();
        let bodies: Vec<String> = received.into_iter().map(|message| message.body).collect();

        let (queue, visibility) = (Arc::clone(&self.queue), self.queue.visibility());
        if !queue.is_ordered() {
            intake.receive_ahead(self.wait());
        }
        tokio::select! {
            biased;
            () = self.worker.pass(&bodies) => {}
            never = keep_hidden(queue.as_ref(), &receipts, visibility) => match never {},
        }
        // One that does not wait would find their group closed still.
        if queue.is_ordered() && !self.wait().is_zero() && !is_last.load(Ordering::Relaxed) {
            intake.receive_ahead(self.wait());
        }
        // Every live projector has committed past them, or is broken.
        match self.queue.delete(&receipts).await {
            Ok(()) => self.messages += receipts.len() as u64,
            Err(error) => warn!(%error, "could not delete messages: they come again, and are known by their positions"),
        }
        if self.worker.reconcile.is_due(Instant::now()) {
            self.worker.reconcile().await;
        }
        false
    }

    /// Whether queue and log are quiet and every live projector is at the high-water mark; or the log has a fault, so that
    /// this never comes.
    async fn is_idle(&mut self) -> bool {
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
            Ok((quiet, None)) => quiet && self.queue.depth().await.is_ok_and(|depth| depth == 0),
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

/// Something that is away: told once and then at intervals, not with every attempt.
#[derive(Debug, Default)]
pub(crate) struct Quarrel {
    attempts: u32,
}

impl Quarrel {
    /// Notes another failure, and says how long to wait.
    pub(crate) fn again(&mut self, what: &str, error: &dyn std::fmt::Display) -> Duration {
        self.attempts += 1;
        if retry::worth_telling(self.attempts) {
            warn!(attempt = self.attempts, %error, "{what}");
        }
        retry::delay(self.attempts + 4)
    }

    pub(crate) fn over(&mut self, what: &str) {
        if std::mem::take(&mut self.attempts) > 0 {
            info!("{what}");
        }
    }
}
