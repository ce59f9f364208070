//! Real processes, each with a log file of its own, and the signals that they receive.

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

/// The `--grace-period` of workers, in seconds.
pub const GRACE: &str = "5";

/// The limit from SIGTERM to the end: the grace periods of the batch and the relay, and a margin
/// for a busy machine.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// The most resident memory, in MiB, that a process of any kind may ever have, however long the log
/// is.
const MAX_MEMORY_MIB: u64 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Play,
    /// A worker that is never killed. It must recover from everything that happens around it.
    Survivor,
    Relay,
    Boot,
    Append,
    /// A process of this program, which appends in plain SQL.
    Writer,
    Audit,
    Retire,
    /// A command that must be refused. The caller checks its end.
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
    pub fn kill_figure(self) -> Option<&'static str> {
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

    /// Whether a process that was not killed may end with this code.
    fn may_end(self, code: Option<i32>, was_terminated: bool) -> bool {
        match (self, code) {
            (Kind::Play | Kind::Survivor | Kind::Relay | Kind::Writer, Some(0)) => was_terminated,
            (Kind::Boot, Some(0 | 1)) | (Kind::Append | Kind::Audit, Some(0)) => true,
            // An earlier retire may have committed before it was killed or lost its connection. The
            // next one then fails.
            (Kind::Retire, Some(0 | 2)) | (Kind::Refused, _) => true,
            // The database or the queue was unreachable when the process started.
            (
                Kind::Play | Kind::Relay | Kind::Boot | Kind::Append | Kind::Audit | Kind::Retire,
                Some(3),
            ) => true,
            // Boot exits with 143 if SIGTERM interrupted it.
            (Kind::Boot, Some(143)) => was_terminated,
            // SIGTERM itself ended the process. These commands do not handle it.
            (Kind::Boot | Kind::Append | Kind::Audit | Kind::Retire, None) => was_terminated,
            _ => false,
        }
    }
}

/// A process that is running or has ended.
pub struct Process {
    pub kind: Kind,
    pub pid: u32,
    pub log: PathBuf,
    signal_requests: mpsc::UnboundedSender<SignalRequest>,
    ended: watch::Receiver<Option<Ended>>,
}

/// The name of a signal, and a channel that is notified when the signal has been sent.
type SignalRequest = (&'static str, oneshot::Sender<()>);

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The exit code, or `None` if a signal ended the process.
    pub code: Option<i32>,
}

impl Process {
    /// Sends a signal, by the name that `kill` knows. The returned channel receives a value once
    /// the signal is sent. If the process has already ended, the channel is closed without a value.
    /// The caller may ignore the channel.
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

/// Starts processes, and knows all that are running.
pub struct ProcessTable {
    binary: PathBuf,
    chaos_binary: PathBuf,
    environment: Vec<(&'static str, String)>,
    /// The database URL of the applications, which have a proxy of their own.
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
        // The run uses copies, so that a build during a long run does not change it.
        let copy = |program: PathBuf, name| {
            let copy = folder.join(name);
            std::fs::copy(&program, &copy).with_context(|| program.display().to_string())?;
            anyhow::Ok(copy)
        };
        Ok(ProcessTable {
            binary: copy(binary.into(), "projectionist")?,
            chaos_binary: copy(std::env::current_exe()?, "chaos")?,
            environment,
            writers_url,
            folder,
            figures: Arc::clone(figures),
            started: AtomicU64::new(0),
            running: Mutex::default(),
            peaks: Mutex::default(),
        })
    }

    /// Starts a process. Its standard output and standard error go to a log file of its own. The
    /// standard input of an `append` is a pipe.
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
        let program = if kind == Kind::Writer { &self.chaos_binary } else { &self.binary };
        let mut command = Command::new(program);
        command.args(arguments).envs(self.environment.iter().cloned()).kill_on_drop(true);
        if matches!(kind, Kind::Writer | Kind::Append) {
            command.env("DATABASE_URL", &self.writers_url);
        }
        command.stdin(if kind == Kind::Append { Stdio::piped() } else { Stdio::null() });
        command.stdout(file.try_clone()?).stderr(file);
        // A signal from the terminal must reach only this program, which ends the others in order.
        command.process_group(0);
        let mut child = command.spawn().context("the process cannot be started")?;
        let stdin = child.stdin.take();
        let (signal_requests, requested) = mpsc::unbounded_channel();
        let (ends, ended) = watch::channel(None);
        let pid = child.id().context("the process has no id")?;
        let process = Arc::new(Process { kind, pid, log, signal_requests, ended });
        self.running.lock().expect("the lock is not poisoned").push(Arc::clone(&process));
        tokio::spawn(Arc::clone(self).attend(Arc::clone(&process), child, requested, ends));
        self.figures.add("starts", 1);
        Ok((process, stdin))
    }

    /// All running processes.
    pub fn running(&self) -> Vec<Arc<Process>> {
        self.running.lock().expect("the lock is not poisoned").clone()
    }

    /// Sends the requested signals to a process until it has ended, and then checks its end.
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
                Some((signal, sent)) = signal_requests.recv() => {
                    // The process is not reaped before `wait` returns, so its id is still its own.
                    if parts::signal(process.pid, signal).await.is_err() {
                        continue;
                    }
                    let _ = sent.send(());
                    match signal {
                        "KILL" => {
                            was_killed = true;
                            self.figures.add("sigkills", 1);
                            process
                                .kind
                                .kill_figure()
                                .into_iter()
                                .for_each(|figure| self.figures.add(figure, 1));
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
        self.running
            .lock()
            .expect("the lock is not poisoned")
            .retain(|other| other.pid != process.pid);
        let ended = Ended { code: status.as_ref().ok().and_then(ExitStatus::code) };
        if !was_killed {
            self.check_end(&process, ended, terminated);
        }
        ends.send_replace(Some(ended));
    }

    fn check_end(&self, process: &Process, ended: Ended, terminated: Option<Instant>) {
        if ended.code == Some(3) {
            self.figures.add("starts_failed_unreachable", 1);
        }
        let (kind, log) = (process.kind.as_str(), process.log.display());
        // SIGTERM arrived in the first milliseconds, before the process handled signals.
        let had_not_begun = ended.code.is_none()
            && terminated.is_some()
            && std::fs::metadata(&process.log).is_ok_and(|log| log.len() == 0);
        if !had_not_begun && !process.kind.may_end(ended.code, terminated.is_some()) {
            self.figures.add_finding(format!(
                "{kind} ended with {:?}, which is not allowed: {log}",
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

    /// Stores the memory peak of each kind of process.
    pub fn sample_memory(&self) {
        for process in self.running() {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid))
                .unwrap_or_default();
            let peak = status
                .lines()
                .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
            let Some(kilobytes) = peak.and_then(|peak| peak.parse::<u64>().ok()) else { continue };
            let mut peaks = self.peaks.lock().expect("the lock is not poisoned");
            let before = peaks.entry(process.kind).or_default();
            *before = kilobytes.max(*before);
        }
    }

    /// Adds a finding for each kind of process that had more memory than allowed.
    pub fn check_memory(&self) {
        for (kind, peak) in
            self.memory_peaks().into_iter().filter(|(_, peak)| *peak > MAX_MEMORY_MIB)
        {
            self.figures.add_finding(format!(
                "{kind} had {peak} MiB of resident memory; {MAX_MEMORY_MIB} MiB are allowed"
            ));
        }
    }

    /// The memory peak of each kind of process, in MiB.
    pub fn memory_peaks(&self) -> Vec<(&'static str, u64)> {
        let peaks = self.peaks.lock().expect("the lock is not poisoned");
        peaks.iter().map(|(kind, kilobytes)| (kind.as_str(), kilobytes.div_ceil(1024))).collect()
    }
}
