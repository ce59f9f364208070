//! The process of a handler, in a process group of its own.
//!
//! A guard leads the group: a shell that sends the group the signals that it reads from a pipe. If
//! this process is killed, the pipe closes, and the guard ends the group. So no handler survives
//! its worker, whatever it is doing.
//!
//! Why a shell: a signal to a process group, and one at the death of the parent, need system calls
//! for which the standard library has no safe function.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;
use tracing::{debug, info};

use super::protocol::{MAX_ANSWER_BYTES, Response};
use super::stderr::{CurrentProjector, log_lines};

/// The variables that a handler inherits. All others, such as our credentials, must be named in the
/// projector file.
const INHERITED: &[&str] = &["PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "HOSTNAME"];

/// The guard ignores the signal that ends the others. After the pipe is closed, the group has five
/// seconds to end.
const GUARD: &str = "trap '' TERM INT HUP
while read -r name; do kill -s \"$name\" 0; done
kill -s TERM 0
sleep 5
kill -s KILL 0";

/// How a process is started. Projectors with the same command share a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommandSpec {
    /// The program and its arguments; not empty.
    pub(crate) command: Vec<String>,
    /// The working directory. `None`: that of this process.
    pub(crate) directory: Option<PathBuf>,
    /// Variables with their values.
    pub(crate) environment: BTreeMap<String, String>,
    /// The names of variables of this process that are passed on.
    pub(crate) pass_environment: Vec<String>,
}

impl CommandSpec {
    /// The command for a person.
    pub(super) fn describe(&self) -> String {
        self.command.join(" ")
    }

    fn command(&self) -> anyhow::Result<Command> {
        let (program, arguments) = self.command.split_first().context("the command is empty")?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear();
        for name in INHERITED {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        for name in &self.pass_environment {
            let value = std::env::var_os(name).with_context(|| {
                format!("the variable {name} is not set, and `pass_environment` names it")
            })?;
            command.env(name, value);
        }
        command.envs(&self.environment);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        Ok(command)
    }
}

/// A running handler. When it is dropped, its whole group is killed.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    guard: Guard,
}

impl Process {
    /// Starts the guard and then the process in the guard's group.
    pub(super) fn start(spec: &CommandSpec, current: &CurrentProjector) -> anyhow::Result<Self> {
        let mut command = spec.command()?;
        let guard = Guard::start()?;
        command
            .process_group(guard.group)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .map_err(|error| anyhow!("cannot start the handler `{}`: {error}", spec.describe()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("no output")?);
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(log_lines(stderr, current.clone()));
        }
        info!(command = spec.describe(), pid = child.id(), "handler started");
        Ok(Process { child, stdin, stdout: BufReader::new(stdout), guard })
    }

    /// Whether the process has not ended.
    pub(super) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a message and waits for the answer. After an error, and if the future is dropped, the
    /// process must not be used again.
    pub(super) async fn exchange(&mut self, id: u64, line: &[u8]) -> anyhow::Result<Response> {
        // If the process has ended, reading says why. A process that answers without reading is
        // found out by its answer's id, or at the next message.
        let written = self.write(line).await;
        let answer = match self.read_line().await? {
            Some(answer) => answer,
            None => return Err(self.explain_end().await),
        };
        written?;
        let response = Response::parse(&answer)?;
        response.check_id(id)?;
        Ok(response)
    }

    /// Sends a message.
    pub(super) async fn write(&mut self, line: &[u8]) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("the handler is stopped")?;
        let written = async {
            stdin.write_all(line).await?;
            stdin.flush().await
        };
        written.await.context("it does not read its standard input")
    }

    /// Closes standard input. Returns whether the process then exits within `limit` by itself.
    pub(super) async fn close(&mut self, limit: Duration) -> bool {
        self.stdin = None;
        timeout(limit, self.child.wait()).await.is_ok()
    }

    /// A line of standard output. `None` at its end.
    async fn read_line(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let limit = MAX_ANSWER_BYTES as u64 + 1;
        (&mut self.stdout).take(limit).read_until(b'\n', &mut line).await?;
        if line.len() > MAX_ANSWER_BYTES {
            let shown = String::from_utf8_lossy(&line[..200]).into_owned();
            return Err(anyhow!(
                "it wrote a line of more than {MAX_ANSWER_BYTES} bytes to standard output, which \
                 is longer than any answer: {shown}…"
            ));
        }
        // A line without its end is what a dying process left.
        Ok(line.ends_with(b"\n").then_some(line))
    }

    /// Says how the process ended, after its standard output was closed.
    async fn explain_end(&mut self) -> anyhow::Error {
        match timeout(Duration::from_secs(1), self.child.wait()).await {
            Ok(Ok(status)) => anyhow!("the handler's process ended before it answered ({status})"),
            Ok(Err(error)) => anyhow!("the handler's process ended before it answered ({error})"),
            Err(_) => anyhow!("the handler closed its standard output before it answered"),
        }
    }

    /// Stops an idle process: closes its standard input, sends SIGTERM to its group, and kills the
    /// group after `grace`.
    pub(super) async fn stop(mut self, grace: Duration) {
        self.stdin = None;
        self.guard.send("TERM");
        match timeout(grace, self.child.wait()).await {
            Ok(_) => debug!("handler stopped"),
            Err(_) => info!(
                seconds = grace.as_secs_f64(),
                "the handler did not end after SIGTERM, and is killed"
            ),
        }
    }
}

impl Drop for Process {
    /// Also ends the processes that the handler has started.
    fn drop(&mut self) {
        self.guard.send("KILL");
    }
}

/// The leader of a process group.
#[derive(Debug)]
struct Guard {
    /// Tokio collects its exit status after the drop.
    _shell: Child,
    pipe: File,
    group: i32,
}

impl Guard {
    fn start() -> anyhow::Result<Self> {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", GUARD, "projectionist-guard"])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start /bin/sh, which every handler needs to be stopped by")?;
        let group = shell.id().and_then(|id| i32::try_from(id).ok());
        let pipe = shell.stdin.take().context("no standard input")?.into_owned_fd()?;
        let group = group.context("the guard has no process id")?;
        ensure!(group > 0, "the guard has no process id");
        Ok(Guard { _shell: shell, pipe: File::from(pipe), group })
    }

    /// Sends a signal to the group. If the guard is gone, so is the group's need for it.
    fn send(&mut self, signal: &str) {
        if let Err(error) = writeln!(self.pipe, "{signal}") {
            debug!(%error, signal, "the guard of a handler is gone");
        }
    }
}
