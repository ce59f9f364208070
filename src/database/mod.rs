//! Connections to MySQL or MariaDB, with the session settings that the protocol needs, and the
//! checks of the server.

mod credentials;
pub(crate) mod error;
mod inspect;
pub(crate) mod migrate;
pub(crate) mod multi_row;
mod own_connection;
mod privileges;
mod scratch;
mod server_error;
mod session_cache;
mod settings;
mod timeouts;
mod transaction_outcome;

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};
use sqlx::pool::PoolConnection;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Executor, MySql, MySqlConnection, MySqlPool, Row,
};
use tokio::sync::watch;
use tokio::time::timeout;

use credentials::is_authentication_error;
pub(crate) use credentials::{CredentialSource, Credentials};
pub use error::DatabaseError;
use error::{is_connection_outdated, server_error_number};
pub(crate) use inspect::{MigrationState, PrivilegeCheck, ServerReport};
use own_connection::CallerLimit;
pub(crate) use own_connection::OwnConnection;
pub(crate) use privileges::{COMMAND_PRIVILEGES, TABLES};
pub(crate) use session_cache::{HandlerSession, Session, SessionId};
use session_cache::{SessionCache, has_capacity};
use settings::SessionSettings;
pub(crate) use settings::SqlMode;
pub(crate) use timeouts::DEFAULT_STATEMENT_TIMEOUT;
use timeouts::{SHORT_TIMEOUT, timeout_after, timeout_error};
pub(crate) use transaction_outcome::TransactionOutcome;

/// `wait_timeout` of every session. `apply` raises it for a handler that may be idle for longer.
pub(crate) const SERVER_WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// One for this program's own statements, and one for a handler.
const MIN_CONNECTIONS: u32 = 2;

/// Half of the connections are for this program's own statements, but at most this many. The others
/// are for handlers, each of which may need its own session.
const MAX_OWN_CONNECTIONS: u32 = 8;

/// Idle connections are closed after this time, before the server closes them.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

const SERVER_VARIABLES: &str = "select version(), current_user(), @@global.auto_increment_increment, \
     @@session.max_allowed_packet";

/// The longest error that the ledger stores takes half of this, and a session cannot raise its own
/// `max_allowed_packet`.
const MIN_PACKET_BYTES: u64 = 64 * 1024;

const SESSION_ID: &str = "select connection_id()";

/// A pool of connections to one database. Every connection has the session settings that the
/// protocol needs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Database {
    /// For this program's own statements. No handler and no setup ever uses its connections.
    pool: MySqlPool,
    /// For handlers and setups. A connection is closed when it returns, because its session may
    /// have been changed.
    handler_pool: MySqlPool,
    pub(crate) flavor: Flavor,
    /// When a connection was last found to lead to a read-only server, or to lack a privilege.
    /// Older connections are not used again.
    stale_before: watch::Sender<Option<Instant>>,
    statement_timeout: Duration,
    /// How long our own sessions wait for a row lock.
    own_lock_wait: Duration,
    own_sessions: SessionCache<Session>,
    handler_sessions: SessionCache<HandlerSession>,
    settings: Arc<SessionSettings>,
    credentials: Arc<Credentials>,
    /// The account as the server knows it: `user@host`.
    account: Arc<str>,
    /// Limits the connections of this handle. `None`: the handle is the engine's.
    caller_limit: Option<CallerLimit>,
    /// Changes with each append through this handle and its clones.
    appended: watch::Sender<()>,
}

/// The kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    MySql,
    MariaDb,
}

impl Database {
    /// Connects and checks the server. Opens at most `connections` connections.
    ///
    /// # Errors
    /// [`DatabaseError::Settings`] if the URL is invalid or the server has an unsuitable setting.
    /// [`DatabaseError::Unreachable`] if the server does not answer or refuses the credentials. No
    /// error shows the password.
    pub async fn connect(
        url: &str,
        connections: u32,
        connect_timeout: Duration,
    ) -> Result<Self, DatabaseError> {
        Self::open(
            Credentials::new(Some(url), CredentialSource::Url, None)?,
            connections,
            connect_timeout,
            DEFAULT_STATEMENT_TIMEOUT,
            SqlMode::Strict,
        )
        .await
    }

    /// [`Database::connect`] with any credentials, the statement timeout, and the SQL mode for
    /// projectors' statements.
    pub(crate) async fn open(
        credentials: Credentials,
        connections: u32,
        connect_timeout: Duration,
        statement_timeout: Duration,
        sql_mode: SqlMode,
    ) -> Result<Self, DatabaseError> {
        if connections < MIN_CONNECTIONS {
            return Err(DatabaseError::Settings(format!(
                "{connections} connections are too few: at least {MIN_CONNECTIONS} are needed, \
                 one for our own statements and one for a handler"
            )));
        }
        let options = credentials.options().await?;
        let at = inspect::address(&options);
        // The first connection is made without the pool, because the pool would retry even
        // permanent errors.
        let own_lock_wait = timeouts::own_lock_wait(statement_timeout);
        let probing = probe_server(&options, &at, sql_mode, own_lock_wait);
        let (flavor, account, settings) = match timeout(connect_timeout, probing).await {
            Ok(Ok(probed)) => probed,
            Ok(Err(DatabaseError::Statement(error))) => {
                return Err(out_of_reach(&at, &error, &credentials));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(out_of_reach(&at, &sqlx::Error::PoolTimedOut, &credentials)),
        };
        let stale_before = watch::Sender::new(None);
        let stale_before_now = stale_before.subscribe();
        let max_for_handlers = handler_connections(connections);
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
        // The other half of the own connections is for operations that take a connection from the
        // pool.
        let (own_sessions, handler_sessions) = (
            SessionCache::new((connections - max_for_handlers) as usize / 2),
            SessionCache::new(max_for_handlers as usize),
        );
        let (settings, credentials) = (Arc::new(settings), Arc::new(credentials));
        let appended = watch::Sender::new(());
        Ok(Database {
            pool,
            handler_pool,
            flavor,
            stale_before,
            statement_timeout,
            own_lock_wait,
            own_sessions,
            handler_sessions,
            settings,
            credentials,
            account,
            caller_limit: Some(CallerLimit::half_of(connections - max_for_handlers)),
            appended,
        })
    }

    /// Reports an append of this process to [`Database::subscribe_to_appends`].
    pub(crate) fn notify_append(&self) {
        self.appended.send_replace(());
    }

    /// A receiver that changes with each append through this database's handles.
    pub(crate) fn subscribe_to_appends(&self) -> watch::Receiver<()> {
        self.appended.subscribe()
    }

    /// [`Database::with_timeout`] on a connection of the pool.
    pub(crate) async fn run_pooled<T>(
        &self,
        operation: impl AsyncFnOnce(&mut MySqlConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        self.with_timeout(async { operation(&mut *self.acquire().await?).await }).await
    }

    /// Runs a setup or a teardown on a session of its own, which is closed afterwards.
    ///
    /// `work` may take any time, as long as the server still has the session. The server ends a
    /// session whose client has vanished after [`SERVER_WAIT_TIMEOUT`].
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
                // If the check itself fails, go on waiting.
                Err(_) if self.has_session(id).await.unwrap_or(true) => {}
                // The result may already be on its way, so wait a little longer.
                Err(_) => match timeout(SHORT_TIMEOUT, &mut work).await {
                    Ok(done) => return Ok(done),
                    Err(_) => break,
                },
            }
        }
        Err(timeout_error(
            "the server has no such session any more: the connection was lost".into(),
        ))
    }

    /// Discards the connections that lead to a former primary or keep old privileges.
    ///
    /// After a failover, the former primary may go on as a read-only server with our connections.
    /// When one connection reports a read-only server, all connections of that age are discarded.
    /// New ones resolve the host name again. The same is done when a privilege is missing: the
    /// server may apply a new grant only to new sessions.
    pub(crate) fn discard_if_outdated(&self, error: &sqlx::Error) {
        if is_connection_outdated(error) {
            self.stale_before.send_replace(Some(Instant::now()));
            self.release_idle_sessions();
        }
    }

    fn is_stale(&self, since: Instant) -> bool {
        self.stale_before.borrow().is_some_and(|stale_before| since <= stale_before)
    }

    /// An SQL condition that is true in a handler's session as long as its settings are unchanged.
    pub(crate) fn session_unchanged_condition(&self) -> Arc<str> {
        self.settings.unchanged_condition()
    }

    /// Finds the settings that a handler has changed in its session. `None` if nothing has changed.
    ///
    /// # Errors
    /// If the connection is lost.
    pub(crate) async fn changed_settings(
        &self,
        session: &mut HandlerSession,
    ) -> Result<Option<String>, sqlx::Error> {
        self.with_short_timeout(self.settings.find_changes(&mut session.connection)).await
    }

    /// Ends the running statement of a handler's session, but not the session. Has no effect if no
    /// statement is running.
    pub(crate) async fn kill_query(&self, session: &SessionId) -> Result<(), sqlx::Error> {
        self.kill_by_lock(session, "kill query").await
    }

    /// Ends a handler's session, its running statement and its locks. The session is found by its
    /// user lock, because after a failover or a restart another session may have the same
    /// connection id.
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
        // All own connections may wait for locks that this session holds.
        let mut connection = self.open_dedicated().await?;
        timeout_after(SHORT_TIMEOUT, kill_lock_holder(&mut connection, &find, how)).await
    }

    /// Opens a connection outside the pool, for a caller that keeps it for long.
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

    /// Closes a dedicated connection. Returns whether it still answered.
    pub(crate) async fn ping_and_close(&self, mut connection: MySqlConnection) -> bool {
        timeout_after(SHORT_TIMEOUT, async {
            connection.ping().await?;
            connection.close().await
        })
        .await
        .is_ok()
    }

    /// The most connections that are open at once.
    pub(crate) fn max_connections(&self) -> u32 {
        self.max_own_connections() + self.max_handler_connections()
    }

    /// The most connections for this program's own statements.
    pub(crate) fn max_own_connections(&self) -> u32 {
        self.pool.options().get_max_connections()
    }

    /// The most connections for handlers.
    pub(crate) fn max_handler_connections(&self) -> u32 {
        self.handler_pool.options().get_max_connections()
    }

    /// How an operator finds and ends an open transaction, with the grant that this needs.
    pub(crate) fn open_transaction_hint(&self) -> String {
        let (user, host) = self.account.rsplit_once('@').unwrap_or((&self.account, "%"));
        format!(
            "Look for it in information_schema.innodb_trx, and end it (kill trx_mysql_thread_id). \
             A user without the PROCESS privilege cannot read that table: \
             grant process on *.* to '{user}'@'{host}'"
        )
    }

    fn pools(&self) -> [&MySqlPool; 2] {
        [&self.pool, &self.handler_pool]
    }

    /// Opens a connection for a handler or a setup.
    async fn acquire_for_handler(&self) -> Result<PoolConnection<MySql>, sqlx::Error> {
        let _waiting = self.register_handler_waiter();
        self.acquire_from(&self.handler_pool).await
    }

    /// Takes a connection of a pool. A new connection uses the current password.
    ///
    /// While a password is being changed, the server may already refuse the old one although the
    /// new one cannot be read yet. The error is therefore transient.
    async fn acquire_from(&self, pool: &MySqlPool) -> Result<PoolConnection<MySql>, sqlx::Error> {
        let began = SystemTime::now();
        // These futures have room for opening a connection or calling AWS. They are boxed, because
        // the future of every statement would have the same room.
        Box::pin(self.credentials.renew_if_due(&self.pools())).await;
        let mut acquired = Box::pin(pool.acquire()).await;
        if acquired.as_ref().is_err_and(is_authentication_error)
            && Box::pin(self.credentials.renew_after_refusal(&self.pools(), began)).await
        {
            acquired = Box::pin(pool.acquire()).await;
        }
        if matches!(acquired, Err(sqlx::Error::PoolTimedOut))
            && let Err(cause) = Box::pin(self.try_to_connect(pool)).await
        {
            acquired = Err(cause);
        }
        acquired.map_err(|error| {
            if is_authentication_error(&error) {
                sqlx::Error::Io(std::io::Error::new(
                    std::io::ErrorKind::PermissionDenied,
                    format!(
                        "database authentication failed: {error}; {}",
                        self.credentials.advice()
                    ),
                ))
            } else {
                error
            }
        })
    }

    /// Connects once, to find out why the pool had no connection in time. The pool itself drops the
    /// errors of its attempts.
    async fn try_to_connect(&self, pool: &MySqlPool) -> Result<(), sqlx::Error> {
        let options = pool.connect_options();
        timeout_after(SHORT_TIMEOUT, async { options.connect().await?.close().await }).await
    }
}

/// How many of a number of connections are for handlers.
pub(crate) fn handler_connections(connections: u32) -> u32 {
    connections - MAX_OWN_CONNECTIONS.min(connections / 2)
}

/// Rolls back a transaction that was left open in a connection. Returns whether the pool may keep
/// the connection.
async fn roll_back_on_release(connection: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
    let rolled_back =
        timeout_after(SHORT_TIMEOUT, async { sqlx::raw_sql("rollback").execute(connection).await });
    // The connection is often lost here, for instance after a failover. The caller has already had
    // the error, and the pool would log it once more.
    Ok(rolled_back.await.is_ok())
}

/// Ends the session that holds a user lock, or only its statement. `how` is the SQL command.
async fn kill_lock_holder(
    connection: &mut MySqlConnection,
    find: &str,
    how: &str,
) -> Result<(), sqlx::Error> {
    let holder: Option<u64> =
        sqlx::raw_sql(AssertSqlSafe(find)).fetch_one(&mut *connection).await?.try_get(0)?;
    // Without a holder, the session has ended already, or its server has.
    let Some(holder) = holder else { return Ok(()) };
    match sqlx::raw_sql(AssertSqlSafe(format!("{how} {holder}"))).execute(connection).await {
        // 1094: the session has ended since.
        Err(error) if server_error_number(&error) != Some(1094) => Err(error),
        _ => Ok(()),
    }
}

fn check_increment(at: &str, increment: u64) -> Result<(), DatabaseError> {
    if increment == 1 {
        return Ok(());
    }
    Err(DatabaseError::Settings(format!(
        "the server at {at} has auto_increment_increment = {increment}: every insert would leave \
         a gap in the log, which looks like an event in flight. Set it to 1"
    )))
}

fn check_packet(at: &str, bytes: u64) -> Result<(), DatabaseError> {
    if bytes >= MIN_PACKET_BYTES {
        return Ok(());
    }
    Err(DatabaseError::Settings(format!(
        "the server at {at} has max_allowed_packet = {bytes}: this program's own statements are \
         longer. Set it to at least {MIN_PACKET_BYTES}, or better to 64M, because an event must fit"
    )))
}

/// Checks the server's settings, and finds out its kind and the session settings that it supports.
async fn probe_server(
    options: &MySqlConnectOptions,
    at: &str,
    sql_mode: SqlMode,
    lock_wait: Duration,
) -> Result<(Flavor, Arc<str>, SessionSettings), DatabaseError> {
    let mut connection = options.connect().await?;
    for set in settings::DISABLE_TIME_LIMITS {
        match sqlx::raw_sql(set).execute(&mut connection).await {
            Err(error) if server_error_number(&error).is_none() => return Err(error.into()),
            _ => {}
        }
    }
    let (version, account, increment, packet): (String, String, u64, u64) =
        sqlx::query_as(SERVER_VARIABLES).fetch_one(&mut connection).await?;
    check_increment(at, increment)?;
    check_packet(at, packet)?;
    let flavor = if version.contains("MariaDB") { Flavor::MariaDb } else { Flavor::MySql };
    let settings = SessionSettings::probe(
        &mut connection,
        flavor,
        sql_mode,
        options.get_collation(),
        lock_wait,
    )
    .await?;
    connection.close().await?;
    Ok((flavor, account.into(), settings))
}

fn out_of_reach(at: &str, error: &sqlx::Error, credentials: &Credentials) -> DatabaseError {
    let what_to_do = match (server_error_number(error), error) {
        _ if is_authentication_error(error) => credentials.advice(),
        (Some(1049), _) => "create the database, or correct the URL",
        (Some(1044), _) => "grant the user access to this database",
        (_, sqlx::Error::PoolTimedOut) => {
            "check that the server runs, and that this host may reach it"
        }
        _ => "check host and port in the database URL, and that the server runs",
    };
    let why = match error {
        sqlx::Error::PoolTimedOut => "no connection in time".into(),
        error => error.to_string(),
    };
    DatabaseError::Unreachable(format!("the database {at} cannot be used: {why}; {what_to_do}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not tested on a real server, because the setting is global and the tests share the servers.
    #[test]
    fn a_server_with_an_auto_increment_step_is_refused_with_the_reason() {
        assert!(check_increment("root@db:3306/app", 1).is_ok());
        let Err(DatabaseError::Settings(reason)) = check_increment("root@db:3306/app", 2) else {
            panic!("the step of 2 is accepted")
        };
        assert!(
            reason.contains("auto_increment_increment = 2") && reason.contains("Set it to 1"),
            "{reason}"
        );
    }
}
