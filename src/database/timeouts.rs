//! How long this program waits for an answer of the server.
//!
//! A server that fails over may leave its connections open and silent. The longest wait of a
//! statement decides how long such an outage lasts. Two kinds of statements wait for a row lock:
//!
//! - The program's own sessions wait for a lock for less time than the statement timeout.
//! - A handler's session waits for as long as the server allows, because its lock is held for as
//!   long as another worker's handler runs. The program asks the server, on another connection,
//!   whether the session still works.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row};
use tokio::time::timeout;

use super::error::is_timeout;
use super::{Database, SessionId};

/// The default of the statement timeout. A loaded server or a slow disk answers within this time.
pub(crate) const DEFAULT_STATEMENT_TIMEOUT: Duration = Duration::from_secs(15);

/// The longest wait of our own sessions for a row lock.
const MAX_OWN_LOCK_WAIT: Duration = Duration::from_secs(10);

/// The longest wait of a handler's session for a row lock: more than the 50 s of its session.
const MAX_HANDLER_LOCK_WAIT: Duration = Duration::from_secs(60);

/// The least timeout of a statement that reads the whole log.
const SCAN_TIMEOUT: Duration = Duration::from_secs(60);

/// The limit for statements that should answer at once, such as the rollback of a connection that
/// returns to the pool. The pool itself would wait without limit, and unresponsive connections
/// would exhaust it.
pub(super) const SHORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A user sees its own sessions without any grant. `information_schema.processlist` is not used: on
/// MySQL it fails while any session binds bytes that are not UTF-8.
const PROCESS_LIST: &str = "show processlist";

/// How long our own sessions wait for a row lock: less than the statement timeout, so that the
/// server's error arrives first.
pub(super) fn own_lock_wait(statement_timeout: Duration) -> Duration {
    (statement_timeout * 2 / 3).clamp(Duration::from_secs(1), MAX_OWN_LOCK_WAIT)
}

impl Database {
    /// Sets how long one of this program's own statements may take before its connection counts as
    /// lost. The default is 15 s. The limit does not apply to handlers: they have
    /// [`crate::Limits::handler_timeout`]. With less than 15 s, a statement that waits for a row
    /// lock may count as lost, too; it is then tried again.
    pub fn with_statement_timeout(self, time: Duration) -> Self {
        Database { statement_timeout: time, ..self }
    }

    /// Waits for an answer, up to the statement timeout. Without the limit, a connection whose
    /// other end has vanished would block until the kernel gives it up, which may take hours. The
    /// timeout is a transient error, like other lost connections.
    pub(crate) async fn with_timeout<T>(
        &self,
        operation: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let answer = timeout_after(self.statement_timeout, operation).await;
        self.discard_if_failed_over(answer)
    }

    /// [`Database::with_timeout`] for a statement that reads the whole log.
    pub(crate) async fn with_scan_timeout<T>(
        &self,
        operation: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let answer = timeout_after(self.statement_timeout.max(SCAN_TIMEOUT), operation).await;
        self.discard_if_failed_over(answer)
    }

    /// [`Database::with_timeout`] with a short timeout, for statements that wait for no lock.
    pub(crate) async fn with_short_timeout<T>(
        &self,
        operation: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        timeout_after(SHORT_TIMEOUT, operation).await
    }

    /// [`Database::with_timeout`] for a statement of a handler's session that may wait for a row
    /// lock. After the statement timeout, it waits on as long as the server reports that the
    /// session works.
    pub(crate) async fn with_lock_timeout<T>(
        &self,
        session: &SessionId,
        operation: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let (began, mut operation) = (Instant::now(), pin!(operation));
        loop {
            let answer = timeout_after(self.statement_timeout, &mut operation).await;
            let may_wait =
                answer.as_ref().is_err_and(is_timeout) && began.elapsed() < MAX_HANDLER_LOCK_WAIT;
            // Boxed: the future of each batch would otherwise have room for opening a connection.
            if !may_wait || !Box::pin(self.is_working(session)).await.unwrap_or(false) {
                return self.discard_if_failed_over(answer);
            }
        }
    }

    /// Whether the server is running a statement of a handler's session. The connection is a new
    /// one: after a failover it leads to the new primary, which does not have the session.
    async fn is_working(&self, session: &SessionId) -> Result<bool, sqlx::Error> {
        let holder = format!("select cast(is_used_lock('{}') as unsigned)", session.lock_name);
        let mut connection = self.open_dedicated().await?;
        self.with_short_timeout(async {
            let holder: Option<u64> = sqlx::raw_sql(AssertSqlSafe(holder))
                .fetch_one(&mut connection)
                .await?
                .try_get(0)?;
            let sessions = list_sessions(&mut connection).await?;
            connection.close().await?;
            Ok(sessions.iter().any(|(id, command)| Some(*id) == holder && command != "Sleep"))
        })
        .await
    }

    /// Whether the server still has the session with this connection id.
    pub(super) async fn has_session(&self, session: u64) -> Result<bool, sqlx::Error> {
        let sessions = self.run_pooled(async |connection| list_sessions(connection).await).await?;
        Ok(sessions.iter().any(|(id, _)| *id == session))
    }

    /// Sets the lock wait of one of our own sessions again, after a statement with another one.
    pub(crate) async fn restore_lock_wait(
        &self,
        connection: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        let seconds = self.own_lock_wait.as_secs();
        let set = format!("set session innodb_lock_wait_timeout = {seconds}");
        sqlx::raw_sql(AssertSqlSafe(set)).execute(connection).await.map(|_| ())
    }

    fn discard_if_failed_over<T>(&self, answer: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        answer.inspect_err(|error| self.discard_if_outdated(error))
    }
}

/// The connection id and the command of each session that the user may see.
async fn list_sessions(
    connection: &mut MySqlConnection,
) -> Result<Vec<(u64, String)>, sqlx::Error> {
    let rows = sqlx::raw_sql(PROCESS_LIST).fetch_all(connection).await?;
    rows.iter()
        .map(|row| Ok((row.try_get_unchecked(0)?, row.try_get_unchecked("Command")?)))
        .collect()
}

pub(super) async fn timeout_after<T>(
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

/// The error of an operation that got no answer. It is transient, like other lost connections.
pub(super) fn timeout_error(what: String) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, what))
}
