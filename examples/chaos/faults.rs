//! The faults. Each kind strikes once early. Afterwards the faults are drawn from a shuffled deck,
//! which is shuffled again when it is empty. A kind without effect strikes again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use projectionist::sqlx;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

use crate::deck::Deck;
use crate::deploy::Deploys;
use crate::figures::Figures;
use crate::parts::Parts;
use crate::process::{Kind, Process, ProcessTable};
use crate::proxy::{Cut, Proxy};
use crate::queue_faults::QueueFaults;
use crate::supervisor::Supervisor;
use crate::writer;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Kill(Kind),
    KillAny,
    Terminate,
    Pause,
    KillServer,
    RestartServer,
    CutAll,
    CutSome,
    CutBeforeCommit,
    CutAfterCommit,
    Silence,
    Stall,
    CutQueue,
    StallQueue,
    StopLocalStack,
    Purge,
    Lose,
    Hold,
    Repeat,
    Foreign,
    Malformed,
    BadEvent,
    HarmfulEvent,
    DropTable,
    Deploy,
    DeployFromTwoHosts,
    RollBack,
    Retire,
    Widen,
    Audit,
}

/// The number of times that each fault is in the deck.
pub const DECK: &[(Fault, usize)] = &[
    (Fault::Kill(Kind::Play), 3),
    (Fault::Kill(Kind::Relay), 1),
    (Fault::Kill(Kind::Boot), 1),
    (Fault::Kill(Kind::Writer), 1),
    (Fault::Kill(Kind::Append), 1),
    (Fault::KillAny, 3),
    (Fault::Terminate, 2),
    (Fault::Pause, 2),
    (Fault::KillServer, 1),
    (Fault::RestartServer, 1),
    (Fault::CutAll, 2),
    (Fault::CutSome, 3),
    (Fault::CutBeforeCommit, 3),
    (Fault::CutAfterCommit, 3),
    (Fault::Silence, 1),
    (Fault::Stall, 2),
    (Fault::CutQueue, 2),
    (Fault::StallQueue, 1),
    (Fault::StopLocalStack, 1),
    (Fault::Purge, 1),
    (Fault::Lose, 3),
    (Fault::Hold, 2),
    (Fault::Repeat, 3),
    (Fault::Foreign, 1),
    (Fault::Malformed, 1),
    (Fault::BadEvent, 2),
    (Fault::HarmfulEvent, 3),
    (Fault::DropTable, 1),
    (Fault::Deploy, 1),
    (Fault::DeployFromTwoHosts, 1),
    (Fault::RollBack, 1),
    (Fault::Retire, 1),
    (Fault::Widen, 1),
    (Fault::Audit, 1),
];

/// The pause between two faults, in milliseconds. In a minute, each kind and most of the deck are
/// drawn.
const BETWEEN: std::ops::Range<u64> = 300..1_300;

/// The limit for kinds of faults that have had no effect at the end of the run.
const EXTENSION: Duration = Duration::from_secs(60);

/// The processes and servers that the faults strike.
pub struct Targets {
    pub parts: Arc<Parts>,
    pub database: Proxy,
    /// The proxy of the applications to the database.
    pub writers: Proxy,
    pub queue: Proxy,
    pub processes: Arc<ProcessTable>,
    pub queue_faults: QueueFaults,
    pub figures: Arc<Figures>,
    pub supervisor: Mutex<Supervisor>,
    pub deploys: Mutex<Deploys>,
    /// Limits the deploys that run or wait.
    pub deploying: Semaphore,
    /// Held during a restart of the server, so that restarts do not overlap.
    pub server: Mutex<()>,
}

/// Strikes for `duration`, or until each kind has had an effect, and then waits until each fault is
/// over.
pub async fn strike(targets: &Arc<Targets>, duration: Duration, dice: &mut fastrand::Rng) {
    let began = Instant::now();
    let mut deck = Deck::new(dice);
    let mut strikes = JoinSet::new();
    let has_happened = |fault| targets.has_happened(fault);
    loop {
        tokio::time::sleep(Duration::from_millis(dice.u64(BETWEEN))).await;
        while let Some(ended) = strikes.try_join_next() {
            deck.end(ended.expect("no strike panics"));
        }
        let fault = if began.elapsed() < duration {
            deck.draw(has_happened, dice)
        } else if deck.is_complete(has_happened) || began.elapsed() > duration + EXTENSION {
            break;
        } else {
            deck.draw_again(has_happened)
        };
        let Some(fault) = fault else { continue };
        let targets = Arc::clone(targets);
        strikes.spawn(async move {
            eprintln!("[{:>5.1} s] {fault:?}", began.elapsed().as_secs_f32());
            if let Err(error) = targets.strike(fault).await {
                // Some faults need a queue or a server that does not answer at the moment.
                eprintln!("[{:>5.1} s] {fault:?} failed: {error:#}", began.elapsed().as_secs_f32());
            }
            fault
        });
    }
    eprintln!("[{:>5.1} s] no more faults", began.elapsed().as_secs_f32());
    strikes.join_all().await;
}

/// Starts the server again whenever it has ended by itself. Runs until it is dropped.
pub async fn revive_server(targets: Arc<Targets>) {
    loop {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let _restart = targets.server.lock().await;
        if let Err(error) = targets.revive_server().await {
            targets.figures.add_finding(format!("the server ended by itself: {error:#}"));
            return;
        }
    }
}

fn is_mortal(process: &Process) -> bool {
    !matches!(process.kind, Kind::Audit | Kind::Survivor)
}

impl Targets {
    async fn strike(&self, fault: Fault) -> anyhow::Result<()> {
        let seconds = |range| Duration::from_millis(fastrand::u64(range));
        match fault {
            Fault::Kill(Kind::Boot) => {
                // Starts a deploy, because at most times no boot is running.
                let is_boot = |process: &Process| process.kind == Kind::Boot;
                join(self.change(Fault::Deploy), self.signal("KILL", is_boot)).await.0?;
            }
            Fault::Kill(kind) => self.signal("KILL", |process| process.kind == kind).await,
            Fault::KillAny => self.signal("KILL", is_mortal).await,
            Fault::Terminate => self.signal("TERM", is_mortal).await,
            Fault::Pause => self.pause(seconds(2_000..7_000)).await,
            Fault::KillServer => self.restart("KILL", "server_kills").await?,
            Fault::RestartServer => self.restart("TERM", "server_restarts").await?,
            Fault::CutAll => self.cut(|| true),
            Fault::CutSome => self.cut(|| fastrand::u8(..4) == 0),
            Fault::CutBeforeCommit => self.pick_database_proxy().cut_at_commit(Cut::BeforeCommit),
            Fault::CutAfterCommit => self.pick_database_proxy().cut_at_commit(Cut::AfterCommit),
            // Writers are left out: their locks would remain until the server ends their
            // connections.
            Fault::Silence => self
                .figures
                .add("connections_silenced", self.database.silence(|| fastrand::u8(..3) == 0)),
            Fault::Stall => {
                self.figures.add("stalls", 1);
                let duration = seconds(500..6_000);
                join_all(self.database_proxies().iter().map(|proxy| proxy.stall(duration))).await;
            }
            Fault::CutQueue => self.figures.add("queue_connections_cut", self.queue.cut(|| true)),
            Fault::StallQueue => {
                self.figures.add("queue_stalls", 1);
                self.queue.stall(seconds(2_000..8_000)).await;
            }
            Fault::StopLocalStack => {
                self.figures.add("localstack_stops", 1);
                self.parts.stop_queue(seconds(2_000..6_000)).await?;
            }
            Fault::Purge => self.queue_faults.purge().await?,
            Fault::Lose => self.queue_faults.lose().await?,
            Fault::Hold => self.queue_faults.hold(seconds(2_000..8_000), fastrand::bool()).await?,
            Fault::Repeat => self.queue_faults.repeat().await?,
            Fault::Foreign => self.queue_faults.send_foreign().await?,
            Fault::Malformed => self.queue_faults.send_malformed().await?,
            Fault::BadEvent => {
                writer::append_bad_event(&mut self.parts.connect().await?).await?;
                self.figures.add("bad_events", 1);
            }
            Fault::HarmfulEvent => {
                writer::append_harmful_event(&mut self.parts.connect().await?).await?;
                self.figures.add("harmful_events", 1);
            }
            Fault::DropTable => {
                // Limits the wait for a handler that uses the table.
                let sql = "set session lock_wait_timeout = 10; drop table dropped";
                sqlx::raw_sql(sql).execute(&mut self.parts.connect().await?).await?;
                self.figures.add("tables_dropped", 1);
            }
            Fault::Widen => self.deploys.lock().await.widen().await?,
            Fault::Deploy | Fault::DeployFromTwoHosts | Fault::RollBack | Fault::Retire => {
                self.change(fault).await?
            }
            Fault::Audit => self.audit().await?,
        }
        Ok(())
    }

    /// Deploys another release, rolls back, or retires a projector.
    async fn change(&self, fault: Fault) -> anyhow::Result<()> {
        // At most one change is running and five are waiting, as many as the deck has. Boots are
        // slow when the log is long.
        let Ok(_permit) = self.deploying.try_acquire() else { return Ok(()) };
        let (mut deploys, supervisor) = (self.deploys.lock().await, self.supervisor.lock().await);
        match fault {
            Fault::RollBack => deploys.roll_back(&supervisor).await,
            Fault::Retire => deploys.retire(&supervisor).await,
            Fault::DeployFromTwoHosts => deploys.deploy(&supervisor, 2).await,
            _ => deploys.deploy(&supervisor, 1).await,
        }
    }

    /// Audits the log during the faults. Retries if the server is unreachable.
    async fn audit(&self) -> anyhow::Result<()> {
        for _ in 0..5 {
            let (audit, _) = self.processes.start(Kind::Audit, "audit", &["audit"])?;
            if audit.wait().await.code == Some(0) {
                self.figures.add("audits", 1);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }

    /// Signals one running process for which `wanted` is true. Waits up to 10 s for such a process.
    /// Picks another one if it has ended before the signal.
    async fn signal(&self, signal: &'static str, wanted: impl Fn(&Process) -> bool) {
        for _ in 0..100 {
            if let Some(process) = self.pick_process(&wanted) {
                // A random delay, so that processes are not only struck during their start.
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..1_000))).await;
                if process.signal(signal).await.is_ok() {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn pick_process(&self, wanted: impl Fn(&Process) -> bool) -> Option<Arc<Process>> {
        let mut running = self.processes.running();
        running.retain(|process| wanted(process));
        fastrand::choice(running)
    }

    /// Stops a process for longer than the visibility timeout. When it continues, it still assumes
    /// that its messages are hidden from others.
    async fn pause(&self, duration: Duration) {
        let Some(process) = self
            .pick_process(|process| matches!(process.kind, Kind::Play | Kind::Relay | Kind::Boot))
        else {
            return;
        };
        process.signal("STOP");
        tokio::time::sleep(duration).await;
        process.signal("CONT");
    }

    /// The proxies to the database.
    pub fn database_proxies(&self) -> [&Proxy; 2] {
        [&self.database, &self.writers]
    }

    fn pick_database_proxy(&self) -> &Proxy {
        self.database_proxies()[fastrand::usize(..2)]
    }

    fn cut(&self, mut chosen: impl FnMut() -> bool) {
        for proxy in self.database_proxies() {
            self.figures.add("connections_cut", proxy.cut(&mut chosen));
        }
    }

    async fn restart(&self, signal: &str, figure: &'static str) -> anyhow::Result<()> {
        let _restart = self.server.lock().await;
        self.revive_server().await?;
        if let Err(error) = self.parts.restart_server(signal).await {
            self.figures.add_finding(format!("the server: {error:#}"));
        }
        self.figures.add(figure, 1);
        self.follow_server()
    }

    /// Starts the server again if it has ended by itself. The caller holds `server`.
    async fn revive_server(&self) -> anyhow::Result<()> {
        let number = self.figures.get("server_deaths") + 1;
        let copy = self.parts.state.join(format!("run/server-death-{number}.log"));
        if let Some(reason) = self.parts.revive_server(&copy).await? {
            self.figures.add_server_death(reason);
        }
        self.follow_server()
    }

    /// Points the proxies at the server, whose port may have changed.
    fn follow_server(&self) -> anyhow::Result<()> {
        for proxy in self.database_proxies() {
            proxy.set_target(self.parts.server_port()?);
        }
        Ok(())
    }

    /// Whether a kind of fault has had an effect in this run.
    fn has_happened(&self, fault: Fault) -> bool {
        let commits_cut = || self.database_proxies().map(Proxy::commits_cut);
        let figure = match fault {
            Fault::CutBeforeCommit => return commits_cut().iter().any(|(before, _)| *before > 0),
            Fault::CutAfterCommit => return commits_cut().iter().any(|(_, after)| *after > 0),
            Fault::Kill(kind) => kind.kill_figure().unwrap_or("sigkills"),
            Fault::KillAny => "sigkills",
            Fault::Terminate => "sigterms",
            Fault::Pause => "sigstops",
            Fault::KillServer => "server_kills",
            Fault::RestartServer => "server_restarts",
            Fault::CutAll | Fault::CutSome => "connections_cut",
            Fault::Silence => "connections_silenced",
            Fault::Stall => "stalls",
            Fault::CutQueue => "queue_connections_cut",
            Fault::StallQueue => "queue_stalls",
            Fault::StopLocalStack => "localstack_stops",
            Fault::Purge => "purges",
            Fault::Lose => "messages_lost",
            Fault::Hold => "messages_delayed",
            Fault::Repeat => "messages_repeated",
            Fault::Foreign => "messages_forged",
            Fault::Malformed => "messages_malformed",
            Fault::BadEvent => "bad_events",
            Fault::HarmfulEvent => "harmful_events",
            Fault::DropTable => "tables_dropped",
            Fault::Deploy => "deploys",
            Fault::DeployFromTwoHosts => "boots_at_once",
            Fault::RollBack => "deploys_rolled_back",
            Fault::Retire => "retired",
            Fault::Widen => "widenings_refused",
            Fault::Audit => "audits",
        };
        self.figures.get(figure) > 0
    }
}
