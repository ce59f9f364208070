//! Play: receive, fan out, delete, until shutdown.

mod convoy;
mod cut_off;
pub(crate) mod fan_out;
pub(crate) mod foreign;
mod intake;
pub(crate) mod reconcile;
pub(crate) mod worker;

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
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
use crate::queue::{Foreign, Queue, Receipt, Received};
use crate::registry::Registry;
use crate::relay::{Relay, RelaySettings};
use crate::retry;
use crate::store::LogFault;
pub use convoy::ConvoyBudget;
pub(crate) use cut_off::Deadline;
pub(crate) use foreign::check_queue;
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
    /// Whether to end once queue and log are quiet and every live projector is at the high-water mark. A queue that holds
    /// only messages of others counts as quiet.
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
    /// Messages that are not of this log. They were neither applied nor deleted.
    pub foreign: u64,
}

/// After receives of nothing but messages that are not ours, the next one waits for so long; it doubles. Meanwhile their owner
/// can have them, and projectors are fed from the store.
const FIRST_FOREIGN_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_FOREIGN_PAUSE: Duration = Duration::from_secs(30);

/// A receive that brings so many messages may have left some of ours behind them.
const FULL_RECEIVE: usize = 10;

/// So many messages that are not ours are taken at most, and given back together, to see what stands behind them.
const MOST_SET_ASIDE: usize = 100;

/// After so many receives without a message of ours, a queue that still holds some that are not is taken to hold nothing else.
const BARREN_RECEIVES: u32 = 3;

/// Beyond, messages that are not ours are not told from each other, and not given back at the end: they come back by themselves.
const MOST_FOREIGN_KNOWN: usize = 10_000;

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
        worker = start(database, registry, &settings, queue.as_ref()) => worker?,
    };
    let mut player = Player::new(worker, queue, settings);

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
    // Stopped first, so that another relay need not wait for what is given back.
    let relay = relay.map(|(stop, task)| {
        let _ = stop.send(());
        task
    });
    intake.close().await;
    player.give_back_foreign().await;
    let broken = player.worker.broken_so_far();
    let outdated = player.worker.outdated().len() as u64;
    if let Some(task) = relay {
        let _ = timeout(player.settings.grace, task).await;
    }
    match player.fault {
        Some(fault) => Err(Error::Fault(fault.to_string())),
        None => Ok(Played { messages: player.messages, broken, outdated, foreign: player.foreign.len() as u64 }),
    }
}

async fn start(
    database: &Database,
    registry: &Registry,
    settings: &PlaySettings,
    queue: &dyn Queue,
) -> Result<Worker, Error> {
    let budget = settings.convoy;
    let mut worker = Worker::new(database, registry, settings.limits, budget, settings.reconcile_after).await?;
    // Not waited for: the log was just read, and this only tells of something.
    if let Err(error) = worker.check_queue(queue.identity()).await {
        debug!(%error, "cannot tell whether the queue has changed");
    }
    Ok(worker)
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
    /// The messages that are not ours, each once.
    foreign: HashSet<u64>,
    /// Those that came with messages of ours: hidden until their visibility expires, so that ours are not held up by them.
    hidden: VecDeque<(Instant, Receipt)>,
    /// Those that came without any of ours, and are given back once it is seen what stands behind them.
    aside: Vec<Receipt>,
    /// Pauses in a row because nothing came but messages that are not ours.
    foreign_pauses: u32,
    /// Receives in a row that brought no message of ours.
    barren_receives: u32,
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
    fn new(worker: Worker, queue: Arc<dyn Queue>, settings: PlaySettings) -> Self {
        Player {
            worker,
            queue,
            settings,
            messages: 0,
            quarrel: Quarrel::default(),
            foreign: HashSet::new(),
            hidden: VecDeque::new(),
            aside: Vec::new(),
            foreign_pauses: 0,
            barren_receives: 0,
            fault: None,
        }
    }

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
            self.barren_receives += 1;
            self.worker.reconcile().await;
            let next = if self.aside.is_empty() { Next::Receive } else { self.leave_foreign().await };
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
        if !queue.is_ordered() && self.barren_receives == 0 {
            intake.receive_ahead(self.wait());
        }
        let verdicts = tokio::select! {
            biased;
            verdicts = self.worker.pass(&bodies) => verdicts,
            never = keep_hidden(queue.as_ref(), &receipts, visibility) => match never {},
        };
        self.worker.note_foreign(&verdicts, &ids, &bodies).await;
        let (ours, foreign) = self.tell_apart(&verdicts, receipts, &ids, &bodies);
        if ours.is_empty() {
            self.barren_receives += 1;
            let is_full = foreign.len() >= FULL_RECEIVE;
            self.aside.extend(foreign);
            if is_full && self.aside.len() < MOST_SET_ASIDE && !is_last.load(Ordering::Relaxed) {
                return Next::Receive;
            }
            let next = self.leave_foreign().await;
            return self.next_if_idle(next).await;
        }
        (self.barren_receives, self.foreign_pauses) = (0, 0);
        let aside = std::mem::take(&mut self.aside);
        self.keep_for_the_end(aside.into_iter().chain(foreign));
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

    /// The receipts of our messages, and those of the others.
    fn tell_apart(
        &mut self,
        verdicts: &[Option<Foreign>],
        receipts: Vec<Receipt>,
        ids: &[String],
        bodies: &[String],
    ) -> (Vec<Receipt>, Vec<Receipt>) {
        let (mut ours, mut foreign) = (Vec::with_capacity(receipts.len()), Vec::new());
        for (at, receipt) in receipts.into_iter().enumerate() {
            if verdicts[at].is_none() {
                ours.push(receipt);
                continue;
            }
            foreign.push(receipt);
            if self.foreign.len() < MOST_FOREIGN_KNOWN {
                let mut hasher = DefaultHasher::new();
                if ids[at].is_empty() { &bodies[at] } else { &ids[at] }.hash(&mut hasher);
                self.foreign.insert(hasher.finish());
            }
        }
        (ours, foreign)
    }

    /// Remembers messages that are not ours and stay hidden.
    fn keep_for_the_end(&mut self, foreign: impl Iterator<Item = Receipt>) {
        let (now, visibility) = (Instant::now(), self.queue.visibility());
        while self.hidden.front().is_some_and(|(since, _)| now.duration_since(*since) > visibility)
            || self.hidden.len() > MOST_FOREIGN_KNOWN
        {
            self.hidden.pop_front();
        }
        self.hidden.extend(foreign.map(|receipt| (now, receipt)));
    }

    /// Gives back what came without any of ours.
    async fn leave_foreign(&mut self) -> Next {
        self.foreign_pauses += 1;
        let aside = std::mem::take(&mut self.aside);
        if let Err(error) = self.queue.hide(&aside, Duration::ZERO).await {
            debug!(%error, "messages that are not ours were not given back, and come back by themselves");
        }
        Next::Pause
    }

    /// Gives back what is hidden and not ours, and adds to the log's count what it does not have yet. Best effort.
    async fn give_back_foreign(&mut self) {
        let mut hidden: Vec<Receipt> = self.hidden.drain(..).map(|(_, receipt)| receipt).collect();
        hidden.append(&mut self.aside);
        let give_back = async {
            if let Err(error) = self.queue.hide(&hidden, Duration::ZERO).await {
                debug!(%error, "messages that are not ours were not given back, and come back by themselves");
            }
            self.worker.count_foreign().await;
        };
        let _ = timeout(self.settings.grace, give_back).await;
    }

    /// Receives nothing for a while, so that the owner of what is not ours can have it. Projectors are fed from the store.
    async fn leave_to_the_owner(&mut self) {
        let doubled = FIRST_FOREIGN_PAUSE * (1 << self.foreign_pauses.saturating_sub(1).min(5));
        let longest = if self.settings.until_idle { FIRST_FOREIGN_PAUSE } else { LONGEST_FOREIGN_PAUSE };
        let until = tokio::time::Instant::now() + doubled.min(longest);
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
        let has_only_foreign = !self.foreign.is_empty() && self.barren_receives >= BARREN_RECEIVES;
        match has_only_foreign || next == Next::Receive && self.queue.depth().await.is_ok_and(|depth| depth == 0) {
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
