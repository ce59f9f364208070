//! The way to MySQL or MariaDB: connections with the session that the protocol needs, and the
//! checks of the server.

mod credentials;
mod inspect;
pub(crate) mod multi_row;
mod privileges;
mod session_cache;
mod settings;
mod transaction_outcome;

use std::borrow::Cow;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};
use sqlx::pool::PoolConnection;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Executor, MySql, MySqlConnection, MySqlPool, Row,
    SqlSafeStr,
};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::model::error::{Error, is_read_only, server_error_number};
use crate::model::signature::random_key;
use credentials::is_authentication_error;
pub(crate) use credentials::{CredentialSource, Credentials};
pub(crate) use inspect::{MigrationState, PrivilegeCheck, ServerReport};
pub(crate) use privileges::{COMMAND_PRIVILEGES, TABLES};
pub(crate) use session_cache::{HandlerSession, Session, SessionId};
use session_cache::{SessionCache, has_capacity};
use settings::SessionSettings;
pub(crate) use settings::SqlMode;
pub(crate) use transaction_outcome::TransactionOutcome;

/// A handler that may be silent for longer says so: see `apply`.
pub(crate) const SERVER_WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// One for our own statements, and one for a handler.
const MIN_CONNECTIONS: u32 = 2;

/// Half of the connections are for our own statements, but not more than these: the rest is for
/// handlers, of which each may need a session of its own.
const MAX_OWN_CONNECTIONS: u32 = 8;

/// Before the server ends it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that goes back to the pool must answer within this, or it is closed. The pool
/// itself would wait for ever, and be out of connections when enough of them have gone deaf, or
/// were left in the middle of an answer.
const SHORT_TIMEOUT: Duration = Duration::from_secs(5);

const SERVER_VARIABLES: &str =
    "select version(), @@global.auto_increment_increment, @@session.max_allowed_packet";

/// The longest error that the ledger keeps fills half of it, and a session cannot raise what it
/// has.
const MIN_PACKET_BYTES: u64 = 64 * 1024;

const SESSION_ID: &str = "select connection_id()";

/// A user sees its own without any grant. (`information_schema.processlist` would fail on MySQL
/// while any session binds bytes that are no UTF-8.)
const PROCESS_LIST: &str = "show processlist";

/// Read by the migrator only: its lock and its table need a name of their own, so that a team's own
/// sqlx migrations can live in the same database.
const MIGRATIONS_TABLE: &str = "projectionist_migrations";

const SET_INITIAL_KEY: &str = "update event_log set signing_key = ? where signing_key is null";

/// A pool of connections to one database, all in the session that the protocol needs. Cheap to
/// clone.
#[derive(Debug, Clone)]
pub struct Database {
    /// For our own statements. No handler and no setup ever has a connection of it.
    pool: MySqlPool,
    /// For handlers and setups. A connection is closed when it comes back: nobody knows what was
    /// done to its session.
    handler_pool: MySqlPool,
    pub(crate) flavor: Flavor,
    /// When a connection last turned out to lead to a server that is read-only.
    stale_before: watch::Sender<Option<Instant>>,
    statement_timeout: Duration,
    own_sessions: SessionCache<Session>,
    handler_sessions: SessionCache<HandlerSession>,
    settings: Arc<SessionSettings>,
    credentials: Arc<Credentials>,
}

/// What differs between the servers is decided by this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    MySql,
    MariaDb,
}

/// Above the 50 s that a server waits for a row's lock by default: what takes longer is not slow,
/// but cut off.
const DEFAULT_STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Whether a connection of ours may go back to the pool. A transaction that was left open in it is
/// rolled back.
async fn roll_back_on_release(connection: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
    timeout_after(SHORT_TIMEOUT, async {
        sqlx::raw_sql("rollback").execute(connection).await.map(|_| true)
    })
    .await
}

async fn timeout_after<T>(
    time: Duration,
    operation: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    match timeout(time, operation).await {
        Ok(answer) => answer,
        Err(_) => {
            Err(timeout_error(format!("the database did not answer within {} s", time.as_secs())))
        }
    }
}

/// What a connection is lost by where nobody says so; to whoever asks whether it may pass, an error
/// like any other of that kind.
fn timeout_error(what: String) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, what))
}

impl Database {
    /// Connects and checks the server. The pool holds at most `connections`.
    ///
    /// # Errors
    /// [`Error::Input`] where the URL is not one or the server is set up in a way that cannot work,
    /// [`Error::Unreachable`] where the server does not answer or does not let us in. No error
    /// shows the password.
    pub async fn connect(
        url: &str,
        connections: u32,
        connect_timeout: Duration,
    ) -> Result<Self, Error> {
        Self::open(
            Credentials::new(Some(url), CredentialSource::Url, None)?,
            connections,
            connect_timeout,
            SqlMode::Strict,
        )
        .await
    }

    /// [`Database::connect`], by any way in, with the modes in which projectors' statements run.
    pub(crate) async fn open(
        credentials: Credentials,
        connections: u32,
        connect_timeout: Duration,
        sql_mode: SqlMode,
    ) -> Result<Self, Error> {
        if connections < MIN_CONNECTIONS {
            return Err(Error::Input(format!(
                "{connections} connections are too few: at least {MIN_CONNECTIONS} are needed, one for our own \
                 statements and one for a handler"
            )));
        }
        let options = credentials.options().await?;
        let at = inspect::address(&options);
        // Once without the pool, which would go on trying where there is nothing to hope for.
        let (flavor, settings) =
            match timeout(connect_timeout, probe_server(&options, &at, sql_mode)).await {
                Ok(Ok(probed)) => probed,
                Ok(Err(Error::Database(error))) => {
                    return Err(out_of_reach(&at, &error, &credentials));
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(out_of_reach(&at, &sqlx::Error::PoolTimedOut, &credentials)),
            };
        let stale_before = watch::Sender::new(None);
        let stale_before_now = stale_before.subscribe();
        let max_for_handlers = connections - MAX_OWN_CONNECTIONS.min(connections / 2);
        let set = Arc::clone(&settings.own);
        let pool = MySqlPoolOptions::new()
            .before_acquire(move |_, about| {
                let is_stale = stale_before_now
                    .borrow()
                    .is_some_and(|since: Instant| about.age > since.elapsed());
                Box::pin(async move { Ok(!is_stale) })
            })
            .max_connections(connections - max_for_handlers)
            .acquire_timeout(connect_timeout)
            .idle_timeout(IDLE_TIMEOUT)
            .after_connect(move |connection, _| {
                let set = Arc::clone(&set);
                Box::pin(async move { connection.execute(AssertSqlSafe(set)).await.map(|_| ()) })
            })
            .after_release(|connection, _| Box::pin(roll_back_on_release(connection)))
            .connect_lazy_with(options.clone());
        let handler_pool = MySqlPoolOptions::new()
            .max_connections(max_for_handlers)
            .acquire_timeout(connect_timeout)
            .after_release(|_, _| Box::pin(async { Ok(false) }))
            .connect_lazy_with(options);
        // The other half of ours is for what takes a connection for one statement.
        let (own_sessions, handler_sessions) = (
            SessionCache::new((connections - max_for_handlers) as usize / 2),
            SessionCache::new(max_for_handlers as usize),
        );
        let (settings, credentials) = (Arc::new(settings), Arc::new(credentials));
        let statement_timeout = DEFAULT_STATEMENT_TIMEOUT;
        Ok(Database {
            pool,
            handler_pool,
            flavor,
            stale_before,
            statement_timeout,
            own_sessions,
            handler_sessions,
            settings,
            credentials,
        })
    }

    /// How long a statement of ours may take before its connection counts as lost: 60 s unless this
    /// says otherwise, which is above the 50 s that a server waits for a row's lock. A handler has
    /// [`crate::Limits::handler_timeout`].
    pub fn with_statement_timeout(self, time: Duration) -> Self {
        Database { statement_timeout: time, ..self }
    }

    /// Waits for an answer, but not for ever: a connection whose other end has gone without a word
    /// would be waited on until the kernel gives it up, which may be hours. It is an error like any
    /// other lost connection.
    pub(crate) async fn with_timeout<T>(
        &self,
        operation: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let answer = timeout_after(self.statement_timeout, operation).await;
        if let Err(error) = &answer {
            self.discard_if_read_only(error);
        }
        answer
    }

    /// [`Database::with_timeout`], on a connection of the pool.
    pub(crate) async fn run_pooled<T>(
        &self,
        operation: impl AsyncFnOnce(&mut MySqlConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        self.with_timeout(async { operation(&mut *self.acquire().await?).await }).await
    }

    /// Runs a setup or a teardown, on a session of its own that is closed afterwards. It may take
    /// as long as it likes, but not longer than the server knows its session. One that is not heard
    /// any more ends there, by [`SERVER_WAIT_TIMEOUT`].
    pub(crate) async fn run_in_setup_session<T>(
        &self,
        work: impl AsyncFnOnce(&mut MySqlConnection) -> T,
    ) -> Result<T, sqlx::Error> {
        let mut connection = self.acquire_for_handler().await?;
        let open = async {
            connection.execute(AssertSqlSafe(Arc::clone(&self.settings.setup))).await?;
            sqlx::query_scalar(SESSION_ID).fetch_one(&mut *connection).await
        };
        let id: u64 = self.with_timeout(open).await?;
        let mut work = pin!(work(&mut connection));
        loop {
            match timeout(self.statement_timeout, &mut work).await {
                Ok(done) => return Ok(done),
                // Where nobody can tell, the next look will.
                Err(_) if self.has_session(id).await.unwrap_or(true) => {}
                // The end may be on its way to us.
                Err(_) => match timeout(SHORT_TIMEOUT, &mut work).await {
                    Ok(done) => return Ok(done),
                    Err(_) => break,
                },
            }
        }
        Err(timeout_error(
            "the server does not know the session any more: its connection was lost without a word"
                .into(),
        ))
    }

    /// Whether the server has that session of ours.
    async fn has_session(&self, session: u64) -> Result<bool, sqlx::Error> {
        let sessions = self
            .run_pooled(async |connection| sqlx::raw_sql(PROCESS_LIST).fetch_all(connection).await)
            .await?;
        Ok(sessions.iter().any(|row| row.get_unchecked::<u64, _>(0) == session))
    }

    /// After a failover the former primary lives on, read-only, and our connections with it. Once
    /// one of them says so, none that is as old is used again: new ones lead to where the name
    /// leads now.
    pub(crate) fn discard_if_read_only(&self, error: &sqlx::Error) {
        if is_read_only(error) {
            self.stale_before.send_replace(Some(Instant::now()));
            self.release_idle_sessions();
        }
    }

    fn is_stale(&self, since: Instant) -> bool {
        self.stale_before.borrow().is_some_and(|stale_before| since <= stale_before)
    }

    /// A condition in SQL that holds in a handler's session as long as nothing has changed it.
    pub(crate) fn session_unchanged_condition(&self) -> Arc<str> {
        self.settings.unchanged_condition()
    }

    /// What a handler has changed in its session, if anything.
    ///
    /// # Errors
    /// If the connection is lost.
    pub(crate) async fn changed_settings(
        &self,
        session: &mut HandlerSession,
    ) -> Result<Option<String>, sqlx::Error> {
        self.with_short_timeout(self.settings.find_changes(&mut session.connection)).await
    }

    /// [`Database::with_timeout`], of what takes no time and waits for no lock.
    pub(crate) async fn with_short_timeout<T>(
        &self,
        operation: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        timeout_after(SHORT_TIMEOUT, operation).await
    }

    /// Creates or upgrades the tables. Harmless to repeat, and safe from several hosts at once.
    ///
    /// # Errors
    /// If a statement fails, or if the database was migrated by a newer release than this one.
    pub async fn migrate(&self) -> Result<(), Error> {
        let mut connection = self.acquire().await?;
        self.run_migrations(&mut connection).await?;
        let key = random_key()?;
        sqlx::query(SET_INITIAL_KEY).bind(key.as_slice()).execute(&mut *connection).await?;
        Ok(())
    }

    async fn run_migrations(&self, connection: &mut MySqlConnection) -> Result<(), Error> {
        Self::migrator().run(connection).await.map_err(|error| match error {
            sqlx::migrate::MigrateError::Execute(error) | sqlx::migrate::MigrateError::ExecuteMigration(error, _) => {
                match server_error_number(&error) {
                    Some(1709) => Error::Input(format!(
                        "the tables cannot be migrated: set innodb_default_row_format to dynamic, its default, for our \
                         indexes are too long for another: {error}"
                    )),
                    _ => Error::Database(error),
                }
            }
            sqlx::migrate::MigrateError::Dirty(version) => Error::Input(format!(
                "migration {version} was begun and did not come to its end: a table of its may have been there already, or it \
                 was interrupted. Look what there is of events, event_log and projectors, drop what it has made, \
                 `delete from {MIGRATIONS_TABLE} where not success`, and run `projectionist migrate` again"
            )),
            error => Error::Input(format!("the tables cannot be migrated: {error}")),
        })
    }

    fn migrator() -> Migrator {
        let migration = |version, name: &'static str, sql: &'static str| {
            Migration::new(
                version,
                Cow::Borrowed(name),
                MigrationType::Simple,
                sql.into_sql_str(),
                false,
            )
        };
        let mut migrator = Migrator::with_migrations(vec![
            migration(1, "tables", include_str!("../../migrations/0001_tables.sql")),
            migration(2, "guarantees", include_str!("../../migrations/0002_guarantees.sql")),
        ]);
        migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
        migrator
    }

    /// Ends the statement that a handler's session is in, and not the session. Harmless where it is
    /// in none.
    pub(crate) async fn kill_query(&self, session: &SessionId) -> Result<(), sqlx::Error> {
        self.kill_by_lock(session, "kill query").await
    }

    /// Ends a handler's session, and with it the statement that it is in and the locks that it
    /// holds. The server says which session that is: one of this number may be another's after a
    /// failover or a restart.
    pub(crate) async fn kill_session(&self, session: &SessionId) -> Result<(), sqlx::Error> {
        self.kill_by_lock(session, "kill").await
    }

    async fn kill_by_lock(&self, session: &SessionId, how: &str) -> Result<(), sqlx::Error> {
        let find = format!("select cast(is_used_lock('{}') as unsigned)", session.lock_name);
        if has_capacity(&self.pool) {
            let mut connection = self.acquire().await?;
            return timeout_after(SHORT_TIMEOUT, kill_lock_holder(&mut connection, &find, how))
                .await;
        }
        // All of ours may wait for what this session holds.
        let mut connection = self.open_dedicated().await?;
        timeout_after(SHORT_TIMEOUT, kill_lock_holder(&mut connection, &find, how)).await
    }

    /// A connection beside the pool, so that whoever keeps it for long takes none from those who
    /// work.
    pub(crate) async fn open_dedicated(&self) -> Result<MySqlConnection, sqlx::Error> {
        self.credentials.renew_if_due(&self.pools()).await;
        let options = self.pool.connect_options();
        let open = async {
            let mut connection = options.connect().await?;
            connection.execute(AssertSqlSafe(Arc::clone(&self.settings.own))).await?;
            Ok(connection)
        };
        timeout_after(SHORT_TIMEOUT, open).await
    }

    /// Whether such a connection answers still. It is closed.
    pub(crate) async fn ping_and_close(&self, mut connection: MySqlConnection) -> bool {
        timeout_after(SHORT_TIMEOUT, async {
            connection.ping().await?;
            connection.close().await
        })
        .await
        .is_ok()
    }

    /// How many connections there may be at once.
    pub(crate) fn max_connections(&self) -> u32 {
        self.max_own_connections() + self.max_handler_connections()
    }

    /// How many connections our own statements may have at once.
    pub(crate) fn max_own_connections(&self) -> u32 {
        self.pool.options().get_max_connections()
    }

    /// How many handlers may have a connection at once.
    pub(crate) fn max_handler_connections(&self) -> u32 {
        self.handler_pool.options().get_max_connections()
    }

    fn pools(&self) -> [&MySqlPool; 2] {
        [&self.pool, &self.handler_pool]
    }

    /// A connection for statements of ours.
    pub(crate) async fn acquire(&self) -> Result<PoolConnection<MySql>, sqlx::Error> {
        let _waiting = self.register_own_waiter();
        self.acquire_from(&self.pool).await
    }

    /// A new connection for a handler or a setup.
    async fn acquire_for_handler(&self) -> Result<PoolConnection<MySql>, sqlx::Error> {
        let _waiting = self.register_handler_waiter();
        self.acquire_from(&self.handler_pool).await
    }

    /// A connection of a pool. If it is a new one, with the password as it is now: while it is
    /// being changed, the server may refuse the old one and the new one not be known yet, which is
    /// a matter of time like any lost connection.
    async fn acquire_from(&self, pool: &MySqlPool) -> Result<PoolConnection<MySql>, sqlx::Error> {
        let began = SystemTime::now();
        self.credentials.renew_if_due(&self.pools()).await;
        let mut acquired = pool.acquire().await;
        if acquired.as_ref().is_err_and(is_authentication_error)
            && self.credentials.renew_after_refusal(&self.pools(), began).await
        {
            acquired = pool.acquire().await;
        }
        acquired.map_err(|error| match is_authentication_error(&error) {
            true => sqlx::Error::Io(std::io::Error::new(
                std::io::ErrorKind::PermissionDenied,
                format!("the database lets nobody in: {error}; {}", self.credentials.advice()),
            )),
            false => error,
        })
    }
}

/// Ends the session that holds a user lock, if one does, or its statement.
async fn kill_lock_holder(
    connection: &mut MySqlConnection,
    find: &str,
    how: &str,
) -> Result<(), sqlx::Error> {
    let holder: Option<u64> =
        sqlx::raw_sql(AssertSqlSafe(find)).fetch_one(&mut *connection).await?.try_get(0)?;
    // It has ended by itself, or its server has.
    let Some(holder) = holder else { return Ok(()) };
    match sqlx::raw_sql(AssertSqlSafe(format!("{how} {holder}"))).execute(connection).await {
        // 1094: it has ended in between.
        Err(error) if server_error_number(&error) != Some(1094) => Err(error),
        _ => Ok(()),
    }
}

fn check_increment(at: &str, increment: u64) -> Result<(), Error> {
    match increment {
        1 => Ok(()),
        _ => Err(Error::Input(format!(
            "the server at {at} has auto_increment_increment = {increment}: it would leave holes in the log \
             by design, and no hole could be told from an event in flight. Set it to 1"
        ))),
    }
}

fn check_packet(at: &str, bytes: u64) -> Result<(), Error> {
    if bytes >= MIN_PACKET_BYTES {
        return Ok(());
    }
    Err(Error::Input(format!(
        "the server at {at} has max_allowed_packet = {bytes}: our own statements would be too long for it. Set it to \
         {MIN_PACKET_BYTES} at least, or better to 64M, for an event must fit in, too"
    )))
}

/// Looks at the server: which one it is, by how much its auto-increment steps, and what its
/// sessions must be told.
async fn probe_server(
    options: &MySqlConnectOptions,
    at: &str,
    sql_mode: SqlMode,
) -> Result<(Flavor, SessionSettings), Error> {
    let mut connection = options.connect().await?;
    for set in settings::DISABLE_TIME_LIMITS {
        match sqlx::raw_sql(set).execute(&mut connection).await {
            Err(error) if server_error_number(&error).is_none() => return Err(error.into()),
            _ => {}
        }
    }
    let (version, increment, packet): (String, u64, u64) =
        sqlx::query_as(SERVER_VARIABLES).fetch_one(&mut connection).await?;
    check_increment(at, increment)?;
    check_packet(at, packet)?;
    let flavor = if version.contains("MariaDB") { Flavor::MariaDb } else { Flavor::MySql };
    let settings =
        SessionSettings::probe(&mut connection, flavor, sql_mode, options.get_collation()).await?;
    connection.close().await?;
    Ok((flavor, settings))
}

fn out_of_reach(at: &str, error: &sqlx::Error, credentials: &Credentials) -> Error {
    let (why, what_to_do) = match (server_error_number(error), error) {
        (Some(1045 | 1698), _) => (error.to_string(), credentials.advice()),
        (Some(1049), _) => (error.to_string(), "create the database, or name another in the URL"),
        (Some(1044), _) => (error.to_string(), "grant the user access to this database"),
        (_, sqlx::Error::PoolTimedOut) => (
            "no connection in time".into(),
            "check that the server runs, and that this host may reach it",
        ),
        _ => {
            (error.to_string(), "check host and port in the database URL, and that the server runs")
        }
    };
    Error::Unreachable(format!("the database {at} cannot be used: {why}; {what_to_do}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Here and not on a real server: the setting is global, and the servers are shared.
    #[test]
    fn a_server_with_an_auto_increment_step_is_refused_with_the_reason() {
        assert!(check_increment("root@db:3306/app", 1).is_ok());
        let Err(Error::Input(reason)) = check_increment("root@db:3306/app", 2) else {
            panic!("it was accepted")
        };
        assert!(
            reason.contains("auto_increment_increment = 2") && reason.contains("Set it to 1"),
            "{reason}"
        );
    }
}
