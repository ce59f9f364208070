//! The shipped binary as a real process, which a test can kill.

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{TIMEOUT, World, eventually, setting};

/// The exit code and the output of a process that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FinishedProcess {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl FinishedProcess {
    /// Asserts that the process ended with this exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Asserts that the last error message contains each of these texts.
    #[track_caller]
    pub fn prints(self, words: &[&str]) -> Self {
        let error = self.error();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
        self
    }

    /// The message of the last log line, or all of standard error if that line is not JSON.
    pub fn error(&self) -> String {
        let last = self.stderr.lines().last().unwrap_or_default();
        let message = serde_json::from_str::<serde_json::Value>(last).ok();
        message
            .and_then(|line| Some(line["message"].as_str()?.to_owned()))
            .unwrap_or_else(|| self.stderr.clone())
    }

    /// The log. Asserts that every line is JSON.
    #[track_caller]
    pub fn log(&self) -> Vec<serde_json::Value> {
        let read =
            |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.stderr.lines().map(read).collect()
    }

    /// Standard output, as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

/// A running process. It is killed with SIGKILL when dropped.
pub struct RunningProcess {
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// The output of a process so far. A task reads it continuously, so that the process never blocks.
struct Output {
    text: Arc<Mutex<Vec<u8>>>,
    reading: JoinHandle<()>,
}

/// A running process whose standard input the test writes.
pub struct PipedProcess {
    running: RunningProcess,
    stdin: ChildStdin,
}

impl World {
    /// A command for the shipped binary, with the settings of this world.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_projectionist"));
        command
            .args(arguments)
            .env("DATABASE_URL", &self.database_url)
            .env("QUEUE_URL", &self.queue_url)
            .env(
                "AWS_ENDPOINT_URL",
                setting("AWS_ENDPOINT_URL").expect("AWS_ENDPOINT_URL is set: run localstack/test"),
            )
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "test")
            .env_remove("PROJECTORS")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs the binary to its end.
    pub async fn run(&self, arguments: &[&str]) -> FinishedProcess {
        self.run_with(arguments, b"").await
    }

    /// Runs the binary to its end, with `input` on its standard input.
    pub async fn run_with(&self, arguments: &[&str], input: &[u8]) -> FinishedProcess {
        RunningProcess::spawn_with(self.command(arguments), input).finish().await
    }

    /// Starts the binary.
    pub fn start(&self, arguments: &[&str]) -> RunningProcess {
        RunningProcess::spawn(self.command(arguments))
    }

    /// Starts the binary with an open standard input.
    pub fn start_piped(&self, arguments: &[&str]) -> PipedProcess {
        let mut child =
            self.command(arguments).stdin(Stdio::piped()).spawn().expect("the binary starts");
        let stdin = child.stdin.take().expect("standard input is piped");
        PipedProcess { running: RunningProcess::of(child), stdin }
    }
}

impl PipedProcess {
    /// Writes lines to standard input.
    pub async fn write(&mut self, lines: &[String]) {
        let mut text = lines.join("\n");
        text.push('\n');
        self.stdin.write_all(text.as_bytes()).await.expect("the process reads");
        self.stdin.flush().await.expect("the process reads");
    }

    /// Closes standard input and waits for the end of the process.
    pub async fn finish(self) -> FinishedProcess {
        drop(self.stdin);
        self.running.finish().await
    }
}

impl RunningProcess {
    /// Starts any command.
    pub fn spawn(mut command: Command) -> Self {
        RunningProcess::of(command.kill_on_drop(true).spawn().expect("the command starts"))
    }

    /// Starts a command with `input` on its standard input.
    pub fn spawn_with(mut command: Command, input: &[u8]) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).kill_on_drop(true).spawn().expect("the command starts");
        let mut stdin = child.stdin.take().expect("standard input is piped");
        let input = input.to_vec();
        // A process may end before it has read all of its input, so a failed write is ignored.
        tokio::spawn(async move {
            let _ = stdin.write_all(&input).await;
        });
        RunningProcess::of(child)
    }

    fn of(mut child: Child) -> Self {
        let (stdout, stderr) = (
            child.stdout.take().expect("the output is piped"),
            child.stderr.take().expect("the output is piped"),
        );
        RunningProcess { child, stdout: Output::read(stdout), stderr: Output::read(stderr) }
    }

    /// Whether the log contains this text so far.
    pub fn has_logged(&self, words: &str) -> bool {
        self.stderr.so_far().contains(words)
    }

    /// The log so far.
    pub fn logged(&self) -> String {
        self.stderr.so_far()
    }

    /// Waits until the log contains this text.
    pub async fn wait_for_log(&self, words: &str) {
        eventually(&format!("{words:?} in the log"), async || self.has_logged(words)).await;
    }

    /// Whether the process has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends SIGKILL and waits. Returns whether the signal ended the process: it may have ended
    /// just before.
    pub async fn kill(mut self) -> bool {
        let _ = self.child.start_kill();
        self.child.wait().await.expect("the process ended").signal() == Some(9)
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id().expect("the process is running")
    }

    /// Sends the process a signal, such as TERM.
    pub async fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.id().to_string()])
            .status()
            .await
            .expect("`kill` is installed");
        assert!(sent.success(), "the signal was sent");
    }

    /// Sends SIGTERM and waits for the end of the process.
    pub async fn terminate(self) -> FinishedProcess {
        self.signal("TERM").await;
        self.finish().await
    }

    /// Waits for the end of the process.
    pub async fn finish(mut self) -> FinishedProcess {
        let end = async { tokio::join!(self.stdout.all(), self.stderr.all(), self.child.wait()) };
        let (stdout, stderr, status) = timeout(TIMEOUT * 2, end).await.expect("the process ends");
        FinishedProcess { code: status.expect("the process ended").code(), stdout, stderr }
    }
}

impl Output {
    fn read(mut from: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&text);
        let reading = tokio::spawn(async move {
            let mut piece = vec![0; 8192];
            while let Ok(length @ 1..) = from.read(&mut piece).await {
                written
                    .lock()
                    .expect("the lock is not poisoned")
                    .extend_from_slice(&piece[..length]);
            }
        });
        Output { text, reading }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().expect("the lock is not poisoned")).into_owned()
    }

    async fn all(&mut self) -> String {
        (&mut self.reading).await.expect("the task reads to the end");
        self.so_far()
    }
}
