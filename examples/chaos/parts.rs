//! The servers of this run: a database server and a LocalStack. The run may kill them, and restarts
//! them with the scripts of `localstack/`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use projectionist::sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};
use projectionist::sqlx::{self, ConnectOptions, MySqlConnection};
use tokio::process::Command;

pub const DATABASE: &str = "projectionist_chaos";

/// The limit for a server to end or to start.
const TIMEOUT: Duration = Duration::from_secs(60);

pub struct Parts {
    /// `mariadb` or `mysql`.
    pub server: String,
    pub state: PathBuf,
}

impl Parts {
    pub fn from_environment() -> anyhow::Result<Self> {
        let setting = |name| {
            std::env::var(name)
                .with_context(|| format!("{name} is not set: run chaos with localstack/chaos"))
        };
        Ok(Parts {
            server: setting("CHAOS_SERVER")?,
            state: setting("PROJECTIONIST_STATE")?.into(),
        })
    }

    pub fn server_port(&self) -> anyhow::Result<u16> {
        self.number(&self.server, "port")
    }

    pub fn queue_port(&self) -> anyhow::Result<u16> {
        self.number("sqs", "port")
    }

    fn number<T: std::str::FromStr>(&self, part: &str, thing: &str) -> anyhow::Result<T> {
        let file = self.state.join(part).join(thing);
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        text.trim().parse().ok().with_context(|| format!("{} is not a number", file.display()))
    }

    /// A connection directly to the server, not through a proxy. Waits for a server that is being
    /// started again.
    pub async fn connect(&self) -> anyhow::Result<MySqlConnection> {
        let began = Instant::now();
        loop {
            let options = self.options()?.database(DATABASE);
            let connected = tokio::time::timeout(Duration::from_secs(10), options.connect()).await;
            match connected.context("the server does not answer").and_then(|tried| Ok(tried?)) {
                Err(error) if began.elapsed() >= TIMEOUT => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                connected => return connected,
            }
        }
    }

    fn options(&self) -> anyhow::Result<MySqlConnectOptions> {
        let options =
            MySqlConnectOptions::new().host("127.0.0.1").port(self.server_port()?).username("root");
        Ok(options.ssl_mode(MySqlSslMode::Disabled))
    }

    pub async fn version(&self) -> anyhow::Result<String> {
        Ok(sqlx::query_scalar("select version()").fetch_one(&mut self.connect().await?).await?)
    }

    /// Creates the database again.
    pub async fn make_database(&self) -> anyhow::Result<()> {
        let mut server = self.options()?.connect().await?;
        for sql in
            ["drop database if exists projectionist_chaos", "create database projectionist_chaos"]
        {
            sqlx::raw_sql(sql).execute(&mut server).await?;
        }
        Ok(())
    }

    /// Ends the server with `signal` (`KILL`, or `TERM` for a clean stop), and starts it again.
    pub async fn restart_server(&self, signal: &str) -> anyhow::Result<()> {
        let pid: u32 = self.number(&self.server, "pid")?;
        ensure!(self.is_ours(pid), "process {pid} is not the {} of this run", self.server);
        self::signal(pid, signal).await?;
        let began = Instant::now();
        while self.is_ours(pid) {
            ensure!(began.elapsed() < TIMEOUT, "{} does not end", self.server);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.start_server().await
    }

    /// Starts the server again if it has ended by itself. Then returns what its log says about its
    /// end, and copies the log to `copy`.
    pub async fn revive_server(&self, copy: &Path) -> anyhow::Result<Option<String>> {
        let pid: u32 = self.number(&self.server, "pid")?;
        if self.is_ours(pid) {
            return Ok(None);
        }
        let log = self.state.join(&self.server).join("log");
        let text = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
        std::fs::copy(&log, copy)?;
        self.start_server().await?;
        let is_reason = |line: &&str| line.contains("got signal") || line.starts_with("Query (");
        let reasons: Vec<&str> = text.lines().filter(is_reason).map(str::trim).collect();
        Ok(Some(format!("{} (log: {})", reasons.join("; "), copy.display())))
    }

    async fn start_server(&self) -> anyhow::Result<()> {
        let up = concat!(env!("CARGO_MANIFEST_DIR"), "/localstack/up");
        let mut error = String::new();
        for _ in 0..3 {
            let ended = Command::new(up).arg(&self.server).kill_on_drop(true).output();
            let ended = tokio::time::timeout(TIMEOUT * 2, ended)
                .await
                .context("localstack/up does not end")??;
            if ended.status.success() {
                return Ok(());
            }
            error = String::from_utf8_lossy(&ended.stderr).into_owned();
        }
        bail!("{} does not start: {error}", self.server)
    }

    /// Stops LocalStack with SIGSTOP for `duration`. It accepts connections, but does not answer.
    pub async fn stop_queue(&self, duration: Duration) -> anyhow::Result<()> {
        let pid: u32 = self.number("sqs", "pid")?;
        signal(pid, "STOP").await?;
        tokio::time::sleep(duration).await;
        signal(pid, "CONT").await
    }

    /// Whether the process runs and is the server that `localstack/up` started. A process that has
    /// ended has no environment.
    fn is_ours(&self, pid: u32) -> bool {
        let part = format!("PROJECTIONIST_PART={}", self.state.join(&self.server).display());
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == part.as_bytes())
    }
}

/// Sends a signal to a process of this run that has not been reaped yet.
pub async fn signal(pid: u32, signal: &str) -> anyhow::Result<()> {
    let sent =
        Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).output().await?;
    ensure!(
        sent.status.success(),
        "kill -{signal} {pid}: {}",
        String::from_utf8_lossy(&sent.stderr).trim()
    );
    Ok(())
}
