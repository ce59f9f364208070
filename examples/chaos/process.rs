//! Real processes, each with a log of its own, and the signals that they get.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot, watch};

use crate::figures::Figures;
use crate::parts;

/// What workers get as `--grace-period`.
pub const GRACE: &str = "5";

/// From SIGTERM to the end: the grace of the batch in hand, that of the relay, and a busy machine.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// The most memory that a process may ever have resident, of whatever kind and however long the log
/// is, in MiB.
const MAX_MEMORY_MIB: u64 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Play,
    /// A worker that is never killed, and must live through all that happens around it.
    Survivor,
    Relay,
    Boot,
    Append,
    /// Ours: it appends by plain SQL.
    Writer,
    Audit,
    Retire,
    /// Any that is to be refused: who starts it judges it.
    Refused,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Play => "play",
            Kind::Survivor => "survivor",
            Kind::Relay => "relay",
            Kind::Boot => "boot",
            Kind::Append => "append",
            Kind::Writer => "writer",
            Kind::Audit => "audit",
            Kind::Retire => "retire",
            Kind::Refused => "refused",
        }
    }

    /// The figure that counts its SIGKILLs.
    fn kills(self) -> Option<&'static str> {
        Some(match self {
            Kind::Play => "sigkills_of_play",
            Kind::Relay => "sigkills_of_relay",
            Kind::Boot => "sigkills_of_boot",
            Kind::Append => "sigkills_of_append",
            Kind::Writer => "sigkills_of_writer",
            Kind::Retire => "sigkills_of_retire",
            Kind::Audit | Kind::Survivor | Kind::Refused => return None,
        })
    }

    /// Whether it may end so, not having been killed.
    fn may_end(self, code: Option<i32>, was_terminated: bool) -> bool {
        match (self, code) {
            (Kind::Play | Kind::Survivor | Kind::Relay | Kind::Writer, Some(0)) => was_terminated,
            (Kind::Boot, Some(0 | 1)) | (Kind::Append | Kind::Audit, Some(0)) => true,
            // What one that was killed, or lost its connection, had done already is an error to the
            // next.
            (Kind::Retire, Some(0 | 2)) | (Kind::Refused, _) => true,
            // The database or the queue was away when it started.
            (
                Kind::Play | Kind::Relay | Kind::Boot | Kind::Append | Kind::Audit | Kind::Retire,
                Some(3),
            ) => true,
            // It says that it was interrupted, by the code of a process that the signal ended.
            (Kind::Boot, Some(143)) => was_terminated,
            // SIGTERM itself: these have nothing to bring to an end.
            (Kind::Boot | Kind::Append | Kind::Audit | Kind::Retire, None) => was_terminated,
            _ => false,
        }
    }
}

/// A process that runs, or has run.
pub struct Process {
    pub kind: Kind,
    pub pid: u32,
    pub log: PathBuf,
    signal_requests: mpsc::UnboundedSender<SignalRequest>,
    ended: watch::Receiver<Option<Ended>>,
}

/// A signal, and who wants to know that it was sent.
type SignalRequest = (&'static str, oneshot::Sender<()>);

/// `None`: a signal ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub code: Option<i32>,
}

impl Process {
    /// To `kill`, by the name of the signal. One that has ended gets none: what this returns says
    /// so, and need not be awaited.
    pub fn signal(&self, signal: &'static str) -> oneshot::Receiver<()> {
        let (sends, sent) = oneshot::channel();
        let _ = self.signal_requests.send((signal, sends));
        sent
    }

    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await;
        ended.ok().and_then(|ended| *ended).unwrap_or(Ended { code: None })
    }
}

/// Where processes are started, and all that run.
pub struct ProcessTable {
    binary: PathBuf,
    ourselves: PathBuf,
    environment: Vec<(&'static str, String)>,
    /// Applications have a cable of their own.
    writers_url: String,
    folder: PathBuf,
    figures: Arc<Figures>,
    started: AtomicU64,
    running: Mutex<Vec<Arc<Process>>>,
    peaks: Mutex<BTreeMap<Kind, u64>>,
}

impl ProcessTable {
    pub fn new(
        folder: PathBuf,
        environment: Vec<(&'static str, String)>,
        writers_url: String,
        figures: &Arc<Figures>,
    ) -> anyhow::Result<Self> {
        let binary =
            std::env::var_os("PROJECTIONIST_BIN").context("PROJECTIONIST_BIN is not set")?;
        // Copies, so that a build in the middle of a long run changes nothing.
        let copy = |program: PathBuf, name| {
            let copy = folder.join(name);
            std::fs::copy(&program, &copy).with_context(|| program.display().to_string())?;
            anyhow::Ok(copy)
        };
        Ok(ProcessTable {
            binary: copy(binary.into(), "projectionist")?,
            ourselves: copy(std::env::current_exe()?, "chaos")?,
            environment,
            writers_url,
            folder,
            figures: Arc::clone(figures),
            started: AtomicU64::new(0),
            running: Mutex::default(),
            peaks: Mutex::default(),
        })
    }

    /// Starts a process, with its standard output and error in a log of its own. An `append` has a
    /// pipe for its input.
    pub fn start(
        self: &Arc<Self>,
        kind: Kind,
        name: &str,
        arguments: &[&str],
    ) -> anyhow::Result<(Arc<Process>, Option<ChildStdin>)> {
        let log = self
            .folder
            .join("logs")
            .join(format!("{:04}-{name}.log", self.started.fetch_add(1, Ordering::SeqCst)));
        let file = File::create(&log).with_context(|| log.display().to_string())?;
        let program = match kind {
            Kind::Writer => &self.ourselves,
            _ => &self.binary,
        };
        let mut command = Command::new(program);
        command.args(arguments).envs(self.environment.iter().cloned()).kill_on_drop(true);
        if matches!(kind, Kind::Writer | Kind::Append) {
            command.env("DATABASE_URL", &self.writers_url);
        }
        command.stdin(if kind == Kind::Append { Stdio::piped() } else { Stdio::null() });
        command.stdout(file.try_clone()?).stderr(file);
        // A signal from the terminal is for us alone: we end them in order.
        command.process_group(0);
        let mut child = command.spawn().context("it cannot be started")?;
        let stdin = child.stdin.take();
        let (signal_requests, ordered) = mpsc::unbounded_channel();
        let (ends, ended) = watch::channel(None);
        let pid = child.id().context("it has a number")?;
        let process = Arc::new(Process { kind, pid, log, signal_requests, ended });
        self.running.lock().expect("no panic in the yard").push(Arc::clone(&process));
        tokio::spawn(Arc::clone(self).attend(Arc::clone(&process), child, ordered, ends));
        self.figures.add("starts", 1);
        Ok((process, stdin))
    }

    /// All that run.
    pub fn running(&self) -> Vec<Arc<Process>> {
        self.running.lock().expect("no panic in the yard").clone()
    }

    /// Signals a process until it has ended, and judges how it did.
    async fn attend(
        self: Arc<Self>,
        process: Arc<Process>,
        mut child: Child,
        mut signal_requests: mpsc::UnboundedReceiver<SignalRequest>,
        ends: watch::Sender<Option<Ended>>,
    ) {
        let (mut was_killed, mut terminated) = (false, None);
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                Some((order, sent)) = signal_requests.recv() => {
                    // Not reaped before `wait` says so: until then the number is its own.
                    if parts::signal(process.pid, order).await.is_err() {
                        continue;
                    }
                    let _ = sent.send(());
                    match order {
                        "KILL" => {
                            was_killed = true;
                            self.figures.add("sigkills", 1);
                            process.kind.kills().into_iter().for_each(|kills| self.figures.add(kills, 1));
                        }
                        "TERM" => {
                            terminated.get_or_insert_with(Instant::now);
                            self.figures.add("sigterms", 1);
                        }
                        "STOP" => self.figures.add("sigstops", 1),
                        _ => {}
                    }
                }
            }
        };
        self.running.lock().expect("no panic in the yard").retain(|other| other.pid != process.pid);
        let ended = Ended { code: status.as_ref().ok().and_then(ExitStatus::code) };
        if !was_killed {
            self.judge(&process, ended, terminated);
        }
        ends.send_replace(Some(ended));
    }

    fn judge(&self, process: &Process, ended: Ended, terminated: Option<Instant>) {
        if ended.code == Some(3) {
            self.figures.add("starts_failed_unreachable", 1);
        }
        let (kind, log) = (process.kind.as_str(), process.log.display());
        // Asked before it listened for signals, in its first milliseconds.
        let had_not_begun = ended.code.is_none()
            && terminated.is_some()
            && std::fs::metadata(&process.log).is_ok_and(|log| log.len() == 0);
        if !had_not_begun && !process.kind.may_end(ended.code, terminated.is_some()) {
            self.figures.add_finding(format!(
                "{kind} ended with {:?}, which it must not: {log}",
                ended.code
            ));
        }
        if let Some(took) = terminated.map(|at| at.elapsed()).filter(|took| *took > END_TIMEOUT) {
            self.figures.add_finding(format!(
                "{kind} took {} s to end after SIGTERM: {log}",
                took.as_secs()
            ));
        }
    }

    /// Notes the most memory that each has ever had resident.
    pub fn sample_memory(&self) {
        for process in self.running() {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid))
                .unwrap_or_default();
            let peak = status
                .lines()
                .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
            let Some(kilobytes) = peak.and_then(|peak| peak.parse::<u64>().ok()) else { continue };
            let mut peaks = self.peaks.lock().expect("no panic in the yard");
            let before = peaks.entry(process.kind).or_default();
            *before = kilobytes.max(*before);
        }
    }

    /// Finds who had more memory than it may.
    pub fn judge_memory(&self) {
        for (kind, peak) in
            self.memory_peaks().into_iter().filter(|(_, peak)| *peak > MAX_MEMORY_MIB)
        {
            self.figures.add_finding(format!(
                "{kind} had {peak} MiB of memory resident, and may have {MAX_MEMORY_MIB}"
            ));
        }
    }

    /// The peaks of each kind, in MiB.
    pub fn memory_peaks(&self) -> Vec<(&'static str, u64)> {
        let peaks = self.peaks.lock().expect("no panic in the yard");
        peaks.iter().map(|(kind, kilobytes)| (kind.as_str(), kilobytes.div_ceil(1024))).collect()
    }
}
