//! The options of every command, from the command line or the environment. Only `command` uses
//! them.

use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};

use crate::aws::{self, AuthTokenGenerator, Secret};
use crate::database::{
    CredentialSource, Credentials, DEFAULT_STATEMENT_TIMEOUT, Database, SqlMode,
};
use crate::declared;
use crate::engine::error::Error;
use crate::engine::retry::Limits;
use crate::model::registry::Registry;
use crate::model::wait_log::log_wait;
use crate::queue::SqsQueue;
use crate::telemetry::{LogFormat, MetricsFormat, Reporter, parse_service_name};

/// The default of `--connections`, unless a command has another.
const DEFAULT_CONNECTIONS: u32 = 16;

/// The highest default of `--connections`: small servers accept about a hundred in all.
const MAX_DEFAULT_CONNECTIONS: u32 = 48;

/// The connections to a scratch database.
const SCRATCH_CONNECTIONS: u32 = 6;

/// How we authenticate to the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DatabaseAuth {
    Password,
    Iam,
}

/// The SQL mode in which projectors' statements run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SqlModeOption {
    Strict,
    Server,
}

impl From<SqlModeOption> for SqlMode {
    fn from(modes: SqlModeOption) -> Self {
        match modes {
            SqlModeOption::Strict => SqlMode::Strict,
            SqlModeOption::Server => SqlMode::Server,
        }
    }
}

/// The options of every command. `-h` shows only those that most commands need.
#[derive(Debug, Args)]
pub(crate) struct Config {
    /// A folder with projector files (*.toml). Their projectors are added, in order of file name,
    /// to those of the program.
    #[arg(
        long,
        help_heading = "Projectors",
        value_name = "DIR",
        env = "PROJECTORS",
        global = true
    )]
    pub(crate) projectors: Option<PathBuf>,

    /// The name of this release, which failures are recorded with: a version, a commit or an image
    /// tag.
    #[arg(
        long,
        help_heading = "Projectors",
        hide_short_help = true,
        value_name = "NAME",
        env = "PROJECTIONIST_RELEASE",
        global = true
    )]
    pub(crate) release: Option<String>,

    /// The most events that are applied in one transaction.
    #[arg(long, help_heading = "Projectors", hide_short_help = true, value_name = "EVENTS", env = "PROJECTIONIST_BATCH", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(1..=100_000), global = true)]
    batch: u64,

    /// How long one call of a handler may take before it counts as failed, in seconds.
    #[arg(long, help_heading = "Projectors", hide_short_help = true, value_name = "SECONDS", env = "PROJECTIONIST_HANDLER_TIMEOUT", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=3600), global = true)]
    pub(crate) handler_timeout: u64,

    /// For how long a handler may ask for later retries of one event (RetryLater) before its
    /// projector breaks, in seconds.
    #[arg(long, help_heading = "Projectors", hide_short_help = true, value_name = "SECONDS", env = "PROJECTIONIST_RETRY_LATER_LIMIT",
          default_value_t = 86_400,
          value_parser = clap::value_parser!(u64).range(1..=31_536_000), global = true)]
    retry_later_limit: u64,

    /// How long a projector may retry one event before an alert is sent, in seconds.
    #[arg(long, help_heading = "Projectors", hide_short_help = true, value_name = "SECONDS", env = "PROJECTIONIST_RETRY_ALERT_AFTER",
          default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400),
          global = true)]
    retry_alert_after: u64,

    /// The SQL mode in which projectors' statements run. strict: as on a new server, a value that
    /// does not fit its column is an error. server: the server's own mode.
    #[arg(
        long,
        help_heading = "Projectors",
        hide_short_help = true,
        value_name = "MODES",
        env = "PROJECTIONIST_SQL_MODE",
        default_value = "strict",
        global = true
    )]
    sql_mode: SqlModeOption,

    /// The MySQL or MariaDB database: mysql://USER:PASSWORD@HOST:PORT/DATABASE. For TLS with
    /// certificate checks add ?ssl-mode=VERIFY_IDENTITY&ssl-ca=FILE.
    #[arg(
        long,
        help_heading = "Database",
        value_name = "URL",
        env = "DATABASE_URL",
        hide_env_values = true,
        global = true
    )]
    database_url: Option<String>,

    /// The ARN or name of a secret in Secrets Manager that has the database URL, or JSON as RDS
    /// writes it. If the secret has only user and password, also give the URL without them:
    /// mysql://HOST:PORT/DATABASE. The secret is read again whenever the database refuses the
    /// password.
    #[arg(
        long,
        help_heading = "Database",
        hide_short_help = true,
        value_name = "ARN",
        env = "PROJECTIONIST_DATABASE_SECRET",
        global = true
    )]
    database_secret: Option<String>,

    /// How to authenticate to the database: by password, or by IAM (an RDS token for each new
    /// connection, made with the AWS credentials, for the user that the URL or the secret names).
    /// IAM requires that the server's certificate is checked.
    #[arg(
        long,
        help_heading = "Database",
        hide_short_help = true,
        value_name = "HOW",
        env = "PROJECTIONIST_DATABASE_AUTH",
        default_value = "password",
        global = true
    )]
    database_auth: DatabaseAuth,

    /// A file with one or more CA certificates, such as the RDS bundle, to check the server's
    /// certificate with. Same as ?ssl-mode=VERIFY_IDENTITY&ssl-ca=FILE in the URL, but also applies
    /// to a secret.
    #[arg(
        long,
        help_heading = "Database",
        hide_short_help = true,
        value_name = "FILE",
        env = "PROJECTIONIST_DATABASE_CA",
        global = true
    )]
    database_ca: Option<PathBuf>,

    /// The most database connections that are open at once. [default: 16; boot and play: 8 and one
    /// for each projector in Rust, at least 16, at most 48; lambda: 4]
    #[arg(long, help_heading = "Database", hide_short_help = true, value_name = "N", env = "PROJECTIONIST_CONNECTIONS",
          value_parser = clap::value_parser!(u32).range(4..=1000), global = true)]
    connections: Option<u32>,

    /// How long to wait for a database connection, in seconds.
    #[arg(long, help_heading = "Database", hide_short_help = true, value_name = "SECONDS", env = "PROJECTIONIST_CONNECT_TIMEOUT", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600), global = true)]
    connect_timeout: u64,

    /// How long to wait for the answer to one of the program's own statements, in seconds. Then its
    /// connection counts as lost, and the statement is tried again on another one. Handlers have
    /// --handler-timeout.
    #[arg(long, help_heading = "Database", hide_short_help = true, value_name = "SECONDS",
          env = "PROJECTIONIST_STATEMENT_TIMEOUT",
          default_value_t = DEFAULT_STATEMENT_TIMEOUT.as_secs(),
          value_parser = clap::value_parser!(u64).range(2..=3600), global = true)]
    statement_timeout: u64,

    /// The URL of the SQS queue, FIFO or standard. Credentials, region and endpoint are configured
    /// as for every AWS tool: AWS_REGION, AWS_PROFILE, AWS_ENDPOINT_URL and so on.
    #[arg(
        long,
        help_heading = "Queue",
        hide_env_values = true,
        value_name = "URL",
        env = "QUEUE_URL",
        global = true
    )]
    queue_url: Option<String>,

    /// How long a received message is hidden from other workers, in seconds. Extended while the
    /// message is in progress.
    #[arg(long, help_heading = "Queue", hide_short_help = true, value_name = "SECONDS", env = "PROJECTIONIST_VISIBILITY_TIMEOUT",
          default_value_t = 30, value_parser = clap::value_parser!(u64).range(3..=43_200),
          global = true)]
    pub(crate) visibility_timeout: u64,

    /// Which log lines are shown: error, warn, info, debug, or a filter such as
    /// projectionist=debug. Alerts are always shown.
    #[arg(
        long,
        help_heading = "Logs, metrics and alerts",
        hide_short_help = true,
        value_name = "FILTER",
        env = "PROJECTIONIST_LOG",
        default_value = "info",
        global = true
    )]
    pub(crate) log: String,

    /// The format of log lines on standard error.
    #[arg(
        long,
        help_heading = "Logs, metrics and alerts",
        hide_short_help = true,
        value_name = "FORMAT",
        env = "PROJECTIONIST_LOG_FORMAT",
        default_value = "auto",
        global = true
    )]
    pub(crate) log_format: LogFormat,

    /// Whether boot, play, lambda and relay write metrics to standard error, among the log lines.
    /// emf is CloudWatch's embedded metric format.
    #[arg(
        long,
        help_heading = "Logs, metrics and alerts",
        hide_short_help = true,
        value_name = "FORMAT",
        env = "PROJECTIONIST_METRICS",
        default_value = "none",
        global = true
    )]
    metrics: MetricsFormat,

    /// The name of this installation: the dimension Service of its metrics, and the beginning of
    /// its alerts.
    #[arg(long, help_heading = "Logs, metrics and alerts", hide_short_help = true, value_name = "NAME", env = "PROJECTIONIST_SERVICE", default_value = "projectionist",
          value_parser = parse_service_name, global = true)]
    pub(crate) service: String,

    /// The URL to which alerts are posted as JSON, in addition to the log: a webhook of your chat
    /// or issue tracker.
    #[arg(
        long,
        help_heading = "Logs, metrics and alerts",
        hide_short_help = true,
        value_name = "URL",
        env = "PROJECTIONIST_ALERT_URL",
        hide_env_values = true,
        global = true
    )]
    pub(crate) alert_url: Option<String>,

    /// Reduce database errors to their numbers, in the ledger, the log and alerts. A server's
    /// message can contain values of rows, such as an e-mail address in "Duplicate entry".
    #[arg(long, help_heading = "Logs, metrics and alerts", hide_short_help = true, env = "PROJECTIONIST_REDACT_ERRORS", value_parser = FalseyValueParser::new(),
          global = true)]
    pub(crate) redact_errors: bool,
}

impl Config {
    /// Returns the program's own projectors, followed by those of the files.
    pub(crate) fn registry(&self, mut registry: Registry) -> Result<Registry, Error> {
        if let Some(dir) = &self.projectors {
            declared::load(dir, &mut registry)?;
        }
        if let Some(release) = &self.release {
            registry.set_release(release);
        }
        Ok(registry)
    }

    /// Returns what [`Config::registry`] does, but an empty registry is an error.
    pub(crate) fn nonempty_registry(&self, registry: Registry) -> Result<Registry, Error> {
        let registry = self.registry(registry)?;
        if registry.is_empty() {
            return Err(Error::Input(
                "there are no projectors: name a folder of projector files with --projectors DIR \
                (or PROJECTORS)"
                    .into(),
            ));
        }
        Ok(registry)
    }

    pub(crate) async fn database(&self) -> Result<Database, Error> {
        self.database_with(DEFAULT_CONNECTIONS).await
    }

    /// Opens the database. Without `--connections`, it has a connection for each projector that
    /// keeps a session of its own.
    pub(crate) async fn database_for(&self, registry: &Registry) -> Result<Database, Error> {
        self.database_with(self.connections_for(registry)).await
    }

    /// How many connections boot and play open at most.
    pub(crate) fn connections_for(&self, registry: &Registry) -> u32 {
        let with_sessions = DEFAULT_CONNECTIONS / 2 + registry.dedicated_session_count();
        let default = with_sessions.clamp(DEFAULT_CONNECTIONS, MAX_DEFAULT_CONNECTIONS);
        self.connections.unwrap_or(default)
    }

    /// Opens the database with at most `connections` connections, unless `--connections` is given.
    pub(crate) async fn database_with(&self, connections: u32) -> Result<Database, Error> {
        let credentials = self.credentials().await?;
        let connect_timeout = Duration::from_secs(self.connect_timeout);
        let connections = self.connections.unwrap_or(connections);
        let opening = pin!(Database::open(
            credentials,
            connections,
            connect_timeout,
            Duration::from_secs(self.statement_timeout),
            self.sql_mode.into(),
        ));
        Ok(log_wait("the database to answer", opening).await?)
    }

    /// Opens another database on the server of `--database-url`. Returns it with its URL.
    pub(crate) async fn scratch_database(&self, name: &str) -> Result<(Database, String), Error> {
        let has_password = matches!(self.database_auth, DatabaseAuth::Password);
        let url = self.database_url.as_deref();
        let url = url.filter(|_| has_password && self.database_secret.is_none());
        let server = url.and_then(|url| {
            let (base, options) = url.split_once('?').unwrap_or((url, ""));
            let host = base.find("://")? + 3;
            let end = base[host..].find('/').map_or(base.len(), |slash| host + slash);
            Some((&base[..end], options))
        });
        let (server, options) = server.ok_or_else(|| {
            Error::Input(
                "a scratch database needs --database-url with user and password: \
                 mysql://USER:PASSWORD@HOST:PORT/DATABASE"
                    .into(),
            )
        })?;
        let url = format!("{server}/{name}");
        let with_options = format!("{url}?{options}");
        let credentials =
            Credentials::new(Some(&with_options), CredentialSource::Url, self.database_ca.clone())?;
        let connect_timeout = Duration::from_secs(self.connect_timeout);
        let database = Database::open(
            credentials,
            SCRATCH_CONNECTIONS,
            connect_timeout,
            Duration::from_secs(self.statement_timeout),
            self.sql_mode.into(),
        )
        .await?;
        Ok((database, url))
    }

    async fn credentials(&self) -> Result<Credentials, Error> {
        if let Some(ca) = self.database_ca.as_ref().filter(|ca| !ca.is_file()) {
            return Err(Error::Input(format!("--database-ca: there is no file {}", ca.display())));
        }
        let source = match (&self.database_secret, self.database_auth) {
            (None, DatabaseAuth::Password) => CredentialSource::Url,
            (Some(secret), DatabaseAuth::Password) => CredentialSource::Secret(Secret::new(
                &aws::load_config(aws::arn_region(secret)).await?,
                secret,
            )),
            (secret, DatabaseAuth::Iam) => {
                let config = aws::load_config(None).await?;
                CredentialSource::Iam(
                    AuthTokenGenerator::new(&config)?,
                    secret.as_ref().map(|secret| Secret::new(&config, secret)),
                )
            }
        };
        Ok(Credentials::new(self.database_url.as_deref(), source, self.database_ca.clone())?)
    }

    pub(crate) async fn queue(&self) -> Result<SqsQueue, Error> {
        let url = self.queue_url.as_deref().ok_or_else(|| {
            Error::Input("no queue is named: give --queue-url or set QUEUE_URL".into())
        })?;
        Ok(SqsQueue::connect(url, Duration::from_secs(self.visibility_timeout)).await?)
    }

    /// Returns the reporter of metrics. It starts the counters, so it must exist before the work
    /// begins.
    pub(crate) fn reporter(&self) -> Reporter {
        Reporter::new(self.metrics, &self.service, self.release.as_deref())
    }

    /// The limits of boot. Unlike a worker, boot retries transient errors for at most
    /// `retry_timeout`.
    pub(crate) fn boot_limits(&self, retry_timeout: Duration) -> Limits {
        Limits { retry_timeout: Some(retry_timeout), ..self.play_limits() }
    }

    /// The limits of play, which retries transient errors without a time limit.
    pub(crate) fn play_limits(&self) -> Limits {
        let handler_timeout = Duration::from_secs(self.handler_timeout);
        Limits {
            batch: self.batch,
            handler_timeout,
            retry_timeout: None,
            retry_later_limit: Duration::from_secs(self.retry_later_limit),
            retry_alert_after: Duration::from_secs(self.retry_alert_after),
        }
    }
}
