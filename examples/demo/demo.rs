//! The parts of the demo: a new database, a new queue, and real processes.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use projectionist::sqlx::{self, AssertSqlSafe, MySqlPool};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::shop::Shop;

const DATABASE: &str = "projectionist_demo";
const QUEUE: &str = "projectionist-demo.fifo";

/// The limit for each step.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs the steps of the demo, and prints them.
pub struct Demo {
    binary: String,
    database_url: String,
    queue_url: String,
    sqs: aws_sdk_sqs::Client,
    began: Instant,
    pub pool: MySqlPool,
}

/// The result of a process.
pub struct FinishedProcess {
    command: String,
    code: Option<i32>,
    pub stdout: String,
    stderr: String,
}

/// A running `projectionist play`.
pub struct Worker(Child);

/// The application: one `projectionist append` that receives one line at a time.
pub struct Writer {
    extra: mpsc::Sender<Value>,
    task: JoinHandle<anyhow::Result<usize>>,
}

impl Demo {
    pub async fn prepare() -> anyhow::Result<Self> {
        let setting = |name| {
            std::env::var(name)
                .with_context(|| format!("{name} is not set: run the demo with localstack/demo"))
        };
        let binary = setting("PROJECTIONIST_BIN")?;
        let (server, _) = setting("DATABASE_URL")?
            .rsplit_once('/')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .context("DATABASE_URL names no database")?;
        let database_url = format!("{server}/{DATABASE}");

        let admin = MySqlPool::connect(&setting("DATABASE_URL")?)
            .await
            .context("the database does not answer")?;
        for sql in
            [format!("drop database if exists {DATABASE}"), format!("create database {DATABASE}")]
        {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&admin).await?;
        }
        let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .load()
            .await;
        let sqs = aws_sdk_sqs::Client::new(&config);
        if let Ok(left) = sqs.get_queue_url().queue_name(QUEUE).send().await {
            sqs.delete_queue().set_queue_url(left.queue_url).send().await?;
        }
        let fifo = aws_sdk_sqs::types::QueueAttributeName::FifoQueue;
        let created = sqs
            .create_queue()
            .queue_name(QUEUE)
            .attributes(fifo, "true")
            .send()
            .await
            .context("LocalStack does not answer")?;
        let queue_url = created.queue_url.context("a queue has a URL")?;
        let pool = MySqlPool::connect(&database_url).await?;
        Ok(Demo { binary, database_url, queue_url, sqs, began: Instant::now(), pool })
    }

    /// Deletes the database and the queue.
    pub async fn clear(&self) -> anyhow::Result<()> {
        sqlx::raw_sql(AssertSqlSafe(format!("drop database {DATABASE}")))
            .execute(&self.pool)
            .await?;
        self.sqs.delete_queue().queue_url(&self.queue_url).send().await?;
        Ok(())
    }

    pub async fn server(&self) -> anyhow::Result<String> {
        let version: String = sqlx::query_scalar("select version()").fetch_one(&self.pool).await?;
        Ok(if version.contains("MariaDB") { version } else { format!("MySQL {version}") })
    }

    // — output —

    /// A step, after an empty line.
    pub fn print_chapter(&self, title: &str, text: &str) {
        println!();
        self.print_step(title, text);
    }

    pub fn print_step(&self, title: &str, text: &str) {
        let bold = anstyle::Style::new().bold();
        let seconds = self.began.elapsed().as_secs_f32();
        anstream::println!("{bold}[{seconds:>4.1} s] {title}{bold:#}\n{text}");
    }

    pub fn print_note(&self, text: &str) {
        println!("  · {text}");
    }

    pub fn print_output(&self, output: &str) {
        for line in output.lines() {
            println!("  │ {line}");
        }
    }

    pub async fn show_status(&self, release: &str) -> anyhow::Result<()> {
        let status = self
            .run(&["status", "--projectors", &projectors(release)])
            .await?
            .expect_exit_code(0)?;
        self.print_output(&status.stdout);
        Ok(())
    }

    // — processes —

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .env("DATABASE_URL", &self.database_url)
            .env("QUEUE_URL", &self.queue_url);
        command.env("PROJECTIONIST_LOG_FORMAT", "json").kill_on_drop(true);
        // The messages of a killed worker stay hidden for these 10 s. The default would delay the
        // demo.
        command.env("PROJECTIONIST_VISIBILITY_TIMEOUT", "10");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub async fn run(&self, arguments: &[&str]) -> anyhow::Result<FinishedProcess> {
        self.run_with(arguments, b"").await
    }

    pub async fn run_with(
        &self,
        arguments: &[&str],
        input: &[u8],
    ) -> anyhow::Result<FinishedProcess> {
        println!("  $ projectionist {}", arguments.join(" "));
        self.run_quietly(arguments, input).await
    }

    async fn run_quietly(
        &self,
        arguments: &[&str],
        input: &[u8],
    ) -> anyhow::Result<FinishedProcess> {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("piped")?;
        stdin.write_all(input).await?;
        drop(stdin);
        let output = tokio::time::timeout(TIMEOUT, child.wait_with_output())
            .await
            .with_context(|| format!("`projectionist {}` takes too long", arguments.join(" ")))??;
        Ok(FinishedProcess {
            command: arguments.join(" "),
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    pub fn start_worker(&self, release: &str) -> anyhow::Result<Worker> {
        println!("  $ projectionist play --projectors {} &", projectors(release));
        let mut command = self.command(&["play", "--projectors", &projectors(release)]);
        Ok(Worker(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
    }

    pub async fn start_writer(&self, mut shop: Shop) -> anyhow::Result<Writer> {
        println!("  $ application | projectionist append &");
        let mut child =
            self.command(&["append"]).stdin(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let mut stdin = child.stdin.take().context("piped")?;
        let (extra, mut extras) = mpsc::channel::<Value>(1);
        let task = tokio::spawn(async move {
            let mut written = 0;
            let mut pulse = tokio::time::interval(Duration::from_millis(10));
            loop {
                let mut lines = tokio::select! {
                    extra = extras.recv() => match extra {
                        Some(event) => format!("{event}\n").into_bytes(),
                        None => break,
                    },
                    _ = pulse.tick() => shop.lines(1),
                };
                written += lines.iter().filter(|&&byte| byte == b'\n').count();
                stdin.write_all(&std::mem::take(&mut lines)).await?;
            }
            drop(stdin);
            ensure!(child.wait().await?.success(), "the application failed");
            Ok(written)
        });
        Ok(Writer { extra, task })
    }

    // — status —

    async fn status(&self, release: &str) -> anyhow::Result<Value> {
        let status = self
            .run_quietly(&["status", "--json", "--projectors", &projectors(release)], b"")
            .await?
            .expect_exit_code(0)?;
        Ok(serde_json::from_str(&status.stdout)?)
    }

    pub async fn high_water(&self) -> anyhow::Result<u64> {
        self.status("release-1").await?["high_water"].as_u64().context("a number")
    }

    pub async fn position(&self, release: &str, projector: &str) -> anyhow::Result<u64> {
        let status = self.status(release).await?;
        let row = status["projectors"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|row| row["name"] == projector);
        row.and_then(|row| row["position"].as_u64())
            .with_context(|| format!("{projector} is not in the ledger"))
    }

    pub async fn wait_for_status(
        &self,
        release: &str,
        projector: &str,
        expected: &str,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        while began.elapsed() < TIMEOUT {
            let status = self.status(release).await?;
            let mut rows = status["projectors"].as_array().into_iter().flatten();
            if rows.any(|row| row["name"] == projector && row["status"] == expected) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("{projector} did not become {expected}")
    }

    /// Waits until every live projector has reached the present end of the log, which keeps
    /// growing.
    pub async fn wait_until_caught_up(&self, release: &str) -> anyhow::Result<()> {
        let target = self.high_water().await?;
        let began = Instant::now();
        while began.elapsed() < TIMEOUT {
            let status = self.status(release).await?;
            let mut live = status["projectors"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|row| row["status"] == "live");
            if live.all(|row| row["position"].as_u64() >= Some(target)) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("the worker does not reach position {target}")
    }
}

impl FinishedProcess {
    pub fn expect_exit_code(self, code: i32) -> anyhow::Result<Self> {
        ensure!(
            self.code == Some(code),
            "`{}` exited with {:?}:\n{}{}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// The JSON log lines with this message.
    pub fn log_lines(&self, message: &str) -> Vec<Value> {
        let lines = self.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["message"] == message).collect()
    }
}

impl Worker {
    /// Sends SIGTERM, and expects exit code 0.
    pub async fn terminate(mut self) -> anyhow::Result<()> {
        let id = self.0.id().context("the worker has ended")?.to_string();
        Command::new("kill").args(["-TERM", &id]).status().await?;
        let ended = tokio::time::timeout(TIMEOUT, self.0.wait())
            .await
            .context("the worker does not stop")??;
        ensure!(ended.success(), "the worker stopped with {ended}");
        Ok(())
    }

    /// Sends SIGKILL.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        Ok(self.0.kill().await?)
    }
}

impl Writer {
    /// Appends one event between those of the shop.
    pub async fn append(&self, event: Value) -> anyhow::Result<()> {
        self.extra.send(event).await.context("the application has stopped")
    }

    /// Stops the application, and returns the number of events that it appended.
    pub async fn stop(self) -> anyhow::Result<usize> {
        drop(self.extra);
        self.task.await?
    }
}

fn projectors(release: &str) -> String {
    format!("examples/demo/{release}")
}
