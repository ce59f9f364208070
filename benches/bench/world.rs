//! A database with a log, for this bench alone.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use projectionist::sqlx::mysql::MySqlConnectOptions;
use projectionist::sqlx::{self, AssertSqlSafe, ConnectOptions, MySqlConnection};
use projectionist::{Database, EventStore, Limits, Registry, boot};

use crate::machine::Parts;

/// The name is fixed: a killed bench leaves its database, and the next run drops it.
const DATABASE: &str = "projectionist_bench";

/// The default of the commands for ten projectors with a session of their own: eight connections
/// for the engine, and one for each projector.
const CONNECTIONS: u32 = 18;

const TIMEOUT: Duration = Duration::from_secs(60);

/// The isolation level of the engine's sessions.
const SESSION: &str = "set session transaction isolation level read committed";

pub struct World {
    pub url: String,
    pub database: Database,
    pub store: EventStore,
}

impl World {
    /// Makes the database, with an empty log.
    pub async fn new(parts: &Parts) -> anyhow::Result<Self> {
        let mut server = connect(&parts.server_url).await?;
        execute(&mut server, &format!("drop database if exists {DATABASE}")).await?;
        execute(&mut server, &format!("create database {DATABASE}")).await?;
        let url = format!("{}/{DATABASE}", parts.server_url);
        let database = Database::connect(&url, CONNECTIONS, TIMEOUT).await?;
        database.migrate().await?;
        Ok(World { url, store: EventStore::new(&database), database })
    }

    /// Opens a connection with the engine's isolation level.
    pub async fn connection(&self) -> anyhow::Result<MySqlConnection> {
        let mut connection = connect(&self.url).await?;
        execute(&mut connection, SESSION).await?;
        Ok(connection)
    }

    pub async fn execute(&self, sql: &str) -> anyhow::Result<()> {
        execute(&mut self.connection().await?, sql).await
    }

    /// Runs a query that returns one number.
    pub async fn number(&self, sql: &str) -> anyhow::Result<u64> {
        Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut self.connection().await?).await?)
    }

    /// Boots a registry as if for the first time, and returns the time that the boot took.
    pub async fn boot(&self, registry: &Registry) -> anyhow::Result<Duration> {
        self.execute("delete from projectors").await?;
        let began = Instant::now();
        let report = boot(&self.database, registry, Limits::default(), |_| {}).await?;
        let took = began.elapsed();
        ensure!(report.is_released(), "boot failed: {report:?}");
        Ok(took)
    }

    /// Resets every projector to position 0, as if no event had been applied.
    pub async fn rewind(&self) -> anyhow::Result<()> {
        self.execute("update projectors set position = 0").await
    }

    /// Resets the relay's state, as if nothing had been published and no relay had a lease.
    pub async fn rewind_relay(&self) -> anyhow::Result<()> {
        self.execute(
            "update event_log set published = 0, relay_lease_holder = null, \
             relay_lease_expires_at = null",
        )
        .await
    }
}

/// Drops the database of the bench.
pub async fn clear(parts: &Parts) -> anyhow::Result<()> {
    execute(&mut connect(&parts.server_url).await?, &format!("drop database if exists {DATABASE}"))
        .await
}

/// The server's version, and the settings that decide how fast it can be.
pub async fn describe_server(parts: &Parts) -> anyhow::Result<(String, Vec<(String, String)>)> {
    let mut server = connect(&parts.server_url).await?;
    let version = sqlx::query_scalar("select version()").fetch_one(&mut server).await?;
    let settings = sqlx::query_as(
        "show global variables where variable_name in \
         ('innodb_flush_log_at_trx_commit', 'innodb_buffer_pool_size', 'sync_binlog', 'log_bin')",
    );
    Ok((version, settings.fetch_all(&mut server).await?))
}

async fn connect(url: &str) -> anyhow::Result<MySqlConnection> {
    let options: MySqlConnectOptions = url.parse().context("parsing the URL of the server")?;
    Ok(options.disable_statement_logging().connect().await?)
}

pub async fn execute(connection: &mut MySqlConnection, sql: &str) -> anyhow::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.with_context(|| sql.to_owned())?;
    Ok(())
}
