//! Sessions that are cached between statements of this program, or between batches of a projector.
//!
//! There are two kinds, which never mix. This program's own statements (the mark, the relay, the
//! ledger, reading the log) run on sessions that no handler and no setup has used. A handler's
//! session is cached for its own projector, or for all projectors that leave no state in a session
//! ([`SessionUse::Shared`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::mysql::MySqlTransactionManager;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Connection as _, MySql, MySqlConnection, MySqlPool, Row, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;
use tokio::runtime::Handle;
use tokio::time::timeout;
use uuid::Uuid;

use super::own_connection::OwnConnection;
use super::transaction_outcome::CommandCounts;
use super::{Database, IDLE_TIMEOUT};
use crate::database::error::is_transient;
use crate::model::projector::{ProjectorId, SessionUse};

/// A handler's session with at least this many prepared statements is closed after its batch.
/// Closing statements one by one would be slower: each close costs 40 ms (see
/// `STATEMENT_CACHE_CAPACITY`), and a new connection costs a few milliseconds for all.
const MAX_PREPARED_STATEMENTS: usize = 256;

/// How often [`Database::wait_until_idle`] checks the connections.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A session for this program's own statements.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connection: OwnConnection,
    /// When the connection was taken from the pool.
    opened_at: Instant,
    last_used: Instant,
}

/// A session for a handler.
#[derive(Debug)]
pub(crate) struct HandlerSession {
    pub(crate) connection: PoolConnection<MySql>,
    /// Identifies the session for `kill`.
    pub(crate) id: SessionId,
    /// The savepoint that begins each batch. Its name is random, so that no handler replaces it by
    /// accident.
    pub(crate) savepoint: String,
    /// The commands that this program sent on the session. The server's counts minus these are the
    /// handler's commands.
    pub(super) commands: CommandCounts,
    owner: Owner,
    opened_at: Instant,
    last_used: Instant,
}

/// Identifies a session of a server. After a failover or a restart, the connection id may belong to
/// another session. Each handler's session therefore holds a user lock with a unique name, and the
/// server reports which session holds it.
#[derive(Debug, Clone)]
pub(crate) struct SessionId {
    pub(super) connection_id: u64,
    pub(super) lock_name: String,
}

impl HandlerSession {
    /// Whether the number of prepared statements requires that the session is closed.
    pub(crate) fn has_many_statements(&self) -> bool {
        self.connection.cached_statements_size() >= MAX_PREPARED_STATEMENTS
    }
}

impl SessionId {
    pub(crate) fn connection_id(&self) -> u64 {
        self.connection_id
    }
}

/// Which projectors may use a session.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    /// Every projector that leaves no state in a session.
    Shared,
    Projector(ProjectorId),
    /// No other batch.
    SingleUse,
}

impl Owner {
    fn new(id: &ProjectorId, session: SessionUse) -> Self {
        match session {
            SessionUse::Shared => Owner::Shared,
            SessionUse::Dedicated => Owner::Projector(id.clone()),
            SessionUse::PerEvent => Owner::SingleUse,
        }
    }
}

/// A session that can be cached.
pub(super) trait CachedSession {
    fn last_used(&mut self) -> &mut Instant;
    /// Whether the session is for more than one projector.
    fn serves_many(&self) -> bool;
    fn into_connection(self) -> PoolConnection<MySql>;
}

impl CachedSession for Session {
    fn last_used(&mut self) -> &mut Instant {
        &mut self.last_used
    }

    fn serves_many(&self) -> bool {
        true
    }

    fn into_connection(self) -> PoolConnection<MySql> {
        self.connection.into_pooled()
    }
}

impl CachedSession for HandlerSession {
    fn last_used(&mut self) -> &mut Instant {
        &mut self.last_used
    }

    fn serves_many(&self) -> bool {
        self.owner == Owner::Shared
    }

    fn into_connection(self) -> PoolConnection<MySql> {
        self.connection
    }
}

/// Sessions that are not in use. The pool would ping each connection three times before reuse, as
/// many round trips as a batch has.
#[derive(Debug)]
pub(super) struct SessionCache<S: CachedSession>(Arc<Mutex<CacheState<S>>>);

impl<S: CachedSession> Clone for SessionCache<S> {
    fn clone(&self) -> Self {
        SessionCache(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct CacheState<S: CachedSession> {
    idle: Vec<S>,
    capacity: usize,
    /// How many callers wait for a connection. While there are any, a session is only cached if the
    /// pool has connections left.
    waiters: usize,
}

impl<S: CachedSession> SessionCache<S> {
    pub(super) fn new(capacity: usize) -> Self {
        SessionCache(Arc::new(Mutex::new(CacheState { idle: Vec::new(), capacity, waiters: 0 })))
    }

    /// Registers a waiter until the returned guard is dropped. If the pool is exhausted, a session
    /// is returned to the pool.
    fn register_waiter(&self, is_exhausted: bool) -> WaiterGuard<S> {
        let mut sessions = self.lock();
        sessions.waiters += 1;
        let returned = if is_exhausted { sessions.take_least_useful() } else { None };
        drop(sessions);
        drop(returned);
        WaiterGuard(self.clone())
    }

    /// Takes the most recently used session for which `fit` is true.
    fn take(&self, fit: impl Fn(&S) -> bool) -> Option<S> {
        let mut sessions = self.lock();
        let last = sessions.idle.iter().rposition(fit)?;
        Some(sessions.idle.remove(last))
    }

    fn put(&self, mut session: S, has_capacity: impl Fn() -> bool) {
        let mut state = self.lock();
        if state.idle.len() < state.capacity && (state.waiters == 0 || has_capacity()) {
            *session.last_used() = Instant::now();
            state.idle.push(session);
        }
    }

    /// Returns all cached sessions to the pool.
    pub(super) fn clear(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        drop(idle);
    }

    fn idle_count(&self) -> usize {
        self.lock().idle.len()
    }

    /// Closes all cached connections without notifying the server.
    fn detach_all(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        idle.into_iter().for_each(|session| drop(session.into_connection().detach()));
    }

    fn lock(&self) -> MutexGuard<'_, CacheState<S>> {
        // The state stays consistent after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: CachedSession> CacheState<S> {
    /// Takes a session that was not used for long, or else the most recently used one.
    ///
    /// Projectors take turns. If there are more of them than sessions, the least recently used
    /// session is the one that is needed next: if it were taken, each projector would open a new
    /// session in each turn. This way, only the projectors that exceed the number of sessions do.
    fn take_least_useful(&mut self) -> Option<S> {
        let is_old = |session: &mut S| session.last_used().elapsed() >= IDLE_TIMEOUT;
        if self.idle.first_mut().is_some_and(is_old) {
            return Some(self.idle.remove(0));
        }
        let last = self.idle.iter().rposition(|session| !session.serves_many());
        let last = last.or_else(|| self.idle.len().checked_sub(1))?;
        Some(self.idle.remove(last))
    }
}

/// Registers a waiter until it is dropped.
struct WaiterGuard<S: CachedSession>(SessionCache<S>);

impl<S: CachedSession> Drop for WaiterGuard<S> {
    fn drop(&mut self) {
        self.0.lock().waiters -= 1;
    }
}

impl<S: CachedSession> Drop for CacheState<S> {
    /// A task returns a connection to its pool. Without a runtime there can be no task, so the
    /// connection is closed.
    fn drop(&mut self) {
        if Handle::try_current().is_err() {
            self.idle.drain(..).for_each(|session| drop(session.into_connection().detach()));
        }
    }
}

impl Database {
    /// Takes a cached session for this program's own statements, or a connection from the pool.
    pub(crate) async fn acquire_session(&self) -> Result<Session, sqlx::Error> {
        let permit = self.wait_for_permit().await?;
        if let Some(mut session) = self
            .own_sessions
            .take(|_| true)
            .filter(|session| session.last_used.elapsed() < IDLE_TIMEOUT)
        {
            session.connection.set_permit(permit);
            return Ok(session);
        }
        let opened_at = Instant::now();
        let connection = self.acquire_with(permit).await?;
        Ok(Session { connection, opened_at, last_used: opened_at })
    }

    /// Caches a session for the next statement. It must be usable, and not in a transaction.
    pub(crate) fn release_session(&self, mut session: Session) {
        session.connection.release_permit();
        if !self.is_stale(session.opened_at) {
            self.own_sessions.put(session, || has_capacity(&self.pool));
        }
    }

    /// Takes a cached session for a batch of this projector, or opens a new one.
    pub(crate) async fn acquire_handler_session(
        &self,
        id: &ProjectorId,
        session: SessionUse,
    ) -> Result<HandlerSession, sqlx::Error> {
        let owner = Owner::new(id, session);
        let fit = |session: &HandlerSession| {
            session.owner == owner && session.last_used.elapsed() < IDLE_TIMEOUT
        };
        if let Some(session) = self.handler_sessions.take(fit) {
            return Ok(session);
        }
        let opened_at = Instant::now();
        let mut connection = self.acquire_for_handler().await?;
        // In sqlx's view, the session is in a transaction for its whole life. A transaction that a
        // handler begins is therefore a savepoint in ours. And we can send our commit in one packet
        // with the position, whereas sqlx would send its commit in a separate packet. In the
        // server's view, the session is in a transaction only from the claim to the commit.
        let nest = format!("{}; start transaction", self.settings.handler);
        let random = Uuid::now_v7().simple().to_string();
        let (lock_name, savepoint) = (format!("projectionist-{random}"), format!("p_{random}"));
        let name = format!("rollback; select connection_id(), get_lock('{lock_name}', 0)");
        let open = async {
            MySqlTransactionManager::begin(
                &mut connection,
                Some(AssertSqlSafe(nest).into_sql_str()),
            )
            .await?;
            sqlx::raw_sql(AssertSqlSafe(name)).fetch_one(&mut *connection).await?.try_get(0)
        };
        let connection_id = self.with_timeout(open).await?;
        let (id, commands) = (SessionId { connection_id, lock_name }, CommandCounts::default());
        Ok(HandlerSession {
            connection,
            id,
            savepoint,
            commands,
            owner,
            opened_at,
            last_used: opened_at,
        })
    }

    /// Caches a handler's session for the next batch. It must be usable, unchanged, and not in a
    /// transaction.
    pub(crate) fn release_handler_session(&self, session: HandlerSession) {
        // A handler may have left a transaction open that it began.
        let is_nested_once =
            MySqlTransactionManager::get_transaction_depth(&session.connection) == 1;
        if session.owner != Owner::SingleUse
            && !self.is_stale(session.opened_at)
            && is_nested_once
            && !session.has_many_statements()
        {
            self.handler_sessions.put(session, || has_capacity(&self.handler_pool));
        }
    }

    /// Runs statements on a cached session. A cached session is not pinged before use. If it was
    /// closed meanwhile, the statement fails with a transient error, and the caller retries.
    pub(crate) async fn run_cached<T>(
        &self,
        operation: impl AsyncFnOnce(&mut MySqlConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut session = self.acquire_session().await?;
        let answer = self.with_timeout(operation(&mut session.connection)).await;
        match &answer {
            Ok(_) => self.release_session(session),
            // The cause of this failure may have closed the cached sessions, too.
            Err(error) if is_transient(error) => self.release_idle_sessions(),
            Err(_) => {}
        }
        answer
    }

    pub(super) fn register_own_waiter(&self) -> impl Drop + use<> {
        self.own_sessions.register_waiter(!has_capacity(&self.pool))
    }

    pub(super) fn register_handler_waiter(&self) -> impl Drop + use<> {
        self.handler_sessions.register_waiter(!has_capacity(&self.handler_pool))
    }

    /// Returns all cached sessions to their pools. The pool pings our own ones before reuse, and
    /// closes the handlers' ones.
    pub(crate) fn release_idle_sessions(&self) {
        self.own_sessions.clear();
        self.handler_sessions.clear();
    }

    /// Waits until no connection is in use, for at most `within`. Returns whether all are idle. The
    /// transactions of cancelled operations have then been rolled back, or their sessions ended.
    pub(crate) async fn wait_until_idle(&self, within: Duration) -> bool {
        let idle = async {
            while self.pool.num_idle() + self.own_sessions.idle_count() < self.pool.size() as usize
                || self.handler_pool.num_idle() + self.handler_sessions.idle_count()
                    < self.handler_pool.size() as usize
            {
                tokio::time::sleep(IDLE_POLL_INTERVAL).await;
            }
        };
        timeout(within, idle).await.is_ok()
    }

    /// Closes all idle connections without pinging them. Used after the process was frozen: the
    /// other end may have vanished, and the clock may have stopped meanwhile.
    pub(crate) fn close_idle(&self) {
        self.own_sessions.detach_all();
        self.handler_sessions.detach_all();
        for pool in [&self.pool, &self.handler_pool] {
            while let Some(connection) = pool.try_acquire() {
                drop(connection.detach());
            }
        }
    }
}

/// Whether a pool has an idle connection or may open another one.
pub(super) fn has_capacity(pool: &MySqlPool) -> bool {
    pool.num_idle() > 0 || pool.size() < pool.options().get_max_connections()
}
