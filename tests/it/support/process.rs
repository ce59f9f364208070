//! The shipped binary as a real process, which can really be killed.

use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::{PATIENCE, World, setting};

/// What a process left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Asserts that it ended with this exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Standard output, as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

/// A process that runs. Killed, with SIGKILL, when dropped.
pub struct Running {
    child: Child,
}

impl World {
    /// The shipped binary, set up for this world.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_projectionist"));
        command
            .args(arguments)
            .env("DATABASE_URL", &self.database_url)
            .env("QUEUE_URL", &self.queue_url)
            .env("AWS_ENDPOINT_URL", setting("AWS_ENDPOINT_URL").expect("the parts are up"))
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

    /// Runs it to its end.
    pub async fn run(&self, arguments: &[&str]) -> Finished {
        self.run_with(arguments, b"").await
    }

    /// Runs it to its end, with this on its standard input.
    pub async fn run_with(&self, arguments: &[&str], input: &[u8]) -> Finished {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn().expect("the binary starts");
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        // It may well stop reading before the end.
        tokio::spawn(async move {
            let _ = stdin.write_all(&input).await;
        });
        Running { child }.finish().await
    }

    /// Starts it.
    pub fn start(&self, arguments: &[&str]) -> Running {
        Running { child: self.command(arguments).spawn().expect("the binary starts") }
    }
}

impl Running {
    /// SIGKILL: it has no time for anything.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("it was running");
    }

    /// SIGTERM, and what it left.
    pub async fn terminate(self) -> Finished {
        let id = self.child.id().expect("it is running").to_string();
        let sent = Command::new("kill").args(["-TERM", &id]).status().await.expect("kill is there");
        assert!(sent.success(), "the signal was sent");
        self.finish().await
    }

    /// Waits for its end.
    pub async fn finish(mut self) -> Finished {
        let (mut out, mut err) = (self.child.stdout.take().expect("piped"), self.child.stderr.take().expect("piped"));
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let end = async { tokio::join!(out.read_to_end(&mut stdout), err.read_to_end(&mut stderr), self.child.wait()) };
        let (_, _, status) = timeout(PATIENCE * 2, end).await.expect("the process ends");
        Finished {
            code: status.expect("it ended").code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }
}
