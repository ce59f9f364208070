//! Sessions that are kept between two statements of ours, or between two batches of a projector.
//!
//! There are two kinds, and they never mix. Our own statements (the mark, the relay, the ledger,
//! reading the log) run on sessions that no handler and no setup has ever had. A handler's session
//! is kept for its own projector, or for every projector that leaves nothing behind in a session
//! ([`SessionUse::Shared`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::mysql::MySqlTransactionManager;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, MySql, MySqlConnection, MySqlPool, Row, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;
use tokio::runtime::Handle;
use tokio::time::timeout;
use uuid::Uuid;

use super::transaction_outcome::CommandCounts;
use super::{Database, IDLE_TIMEOUT};
use crate::model::error::is_transient;
use crate::model::projector::{ProjectorId, SessionUse};

/// How often it is looked whether all connections are at rest.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A session of ours.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connection: PoolConnection<MySql>,
    /// Since when it has been out of the pool.
    opened_at: Instant,
    last_used: Instant,
}

/// A session for a handler.
#[derive(Debug)]
pub(crate) struct HandlerSession {
    pub(crate) connection: PoolConnection<MySql>,
    /// What `kill` takes.
    pub(crate) id: SessionId,
    /// The savepoint that begins each batch. The name is random, so that no handler sets it anew by
    /// accident.
    pub(crate) savepoint: String,
    /// What was sent on it by us, so that what a handler sent can be told from it.
    pub(super) commands: CommandCounts,
    owner: Owner,
    opened_at: Instant,
    last_used: Instant,
}

/// Which session of which server: the number alone may belong to somebody else after a failover or
/// a restart. So each handler's session holds a user lock with a name of its own, and the server
/// says which of its sessions holds it.
#[derive(Debug, Clone)]
pub(crate) struct SessionId {
    pub(super) connection_id: u64,
    pub(super) lock_name: String,
}

impl SessionId {
    pub(crate) fn connection_id(&self) -> u64 {
        self.connection_id
    }
}

/// Whose handlers may use a session.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    /// Every projector that leaves nothing behind.
    Shared,
    Projector(ProjectorId),
    /// Nobody after this batch.
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

/// What can be kept.
pub(super) trait CachedSession {
    fn last_used(&mut self) -> &mut Instant;
    fn into_connection(self) -> PoolConnection<MySql>;
}

impl CachedSession for Session {
    fn last_used(&mut self) -> &mut Instant {
        &mut self.last_used
    }

    fn into_connection(self) -> PoolConnection<MySql> {
        self.connection
    }
}

impl CachedSession for HandlerSession {
    fn last_used(&mut self) -> &mut Instant {
        &mut self.last_used
    }

    fn into_connection(self) -> PoolConnection<MySql> {
        self.connection
    }
}

/// Sessions that are not in use. The pool would ask each of them whether it still answers, three
/// times, before it gave it out again: as many round trips as a batch has.
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
    /// How many callers wait for a connection: what is kept goes to them first, or they might wait
    /// in vain.
    waiters: usize,
}

impl<S: CachedSession> SessionCache<S> {
    pub(super) fn new(capacity: usize) -> Self {
        SessionCache(Arc::new(Mutex::new(CacheState { idle: Vec::new(), capacity, waiters: 0 })))
    }

    /// Registers a caller that waits for a connection, until the answer is dropped. If there is
    /// none left, the session that was used longest ago is given back.
    fn register_waiter(&self, is_exhausted: bool) -> WaiterGuard<S> {
        let mut sessions = self.lock();
        sessions.waiters += 1;
        let given_back =
            (is_exhausted && !sessions.idle.is_empty()).then(|| sessions.idle.remove(0));
        drop(sessions);
        drop(given_back);
        WaiterGuard(self.clone())
    }

    /// The session that was used last, of those that are `fit`.
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

    /// Gives back what is kept.
    pub(super) fn clear(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        drop(idle);
    }

    fn idle_count(&self) -> usize {
        self.lock().idle.len()
    }

    /// Hangs up what is kept, without a word.
    fn detach_all(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        idle.into_iter().for_each(|session| drop(session.into_connection().detach()));
    }

    fn lock(&self) -> MutexGuard<'_, CacheState<S>> {
        // What is in it is in order after a panic, too.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller that waits for a connection.
struct WaiterGuard<S: CachedSession>(SessionCache<S>);

impl<S: CachedSession> Drop for WaiterGuard<S> {
    fn drop(&mut self) {
        self.0.lock().waiters -= 1;
    }
}

impl<S: CachedSession> Drop for CacheState<S> {
    /// A connection goes back to its pool by a task. Without a runtime there is none, and it is
    /// closed.
    fn drop(&mut self) {
        if Handle::try_current().is_err() {
            self.idle.drain(..).for_each(|session| drop(session.into_connection().detach()));
        }
    }
}

impl Database {
    /// A session of ours: one that was kept, or another of the pool.
    pub(crate) async fn acquire_session(&self) -> Result<Session, sqlx::Error> {
        if let Some(session) = self
            .own_sessions
            .take(|_| true)
            .filter(|session| session.last_used.elapsed() < IDLE_TIMEOUT)
        {
            return Ok(session);
        }
        let opened_at = Instant::now();
        let connection = self.acquire().await?;
        Ok(Session { connection, opened_at, last_used: opened_at })
    }

    /// Keeps a session of ours for the next statement. It must be in order, and in no transaction.
    pub(crate) fn release_session(&self, session: Session) {
        if !self.is_stale(session.opened_at) {
            self.own_sessions.put(session, || has_capacity(&self.pool));
        }
    }

    /// A session for a batch of this projector: one that was kept, or a new one.
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
        // To sqlx a session is in a transaction for as long as it lives, so that one that a handler
        // begins is a savepoint in ours, and so that we can commit ours in one packet with the
        // position: sqlx would send its commit in a packet of its own. To the server it is in one
        // only from the claim to the commit.
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

    /// Keeps a handler's session for the next batch. It must be in order, unchanged, and in no
    /// transaction.
    pub(crate) fn release_handler_session(&self, session: HandlerSession) {
        // A handler may have forgotten to end what it began.
        let is_nested_once =
            MySqlTransactionManager::get_transaction_depth(&session.connection) == 1;
        if session.owner != Owner::SingleUse && !self.is_stale(session.opened_at) && is_nested_once
        {
            self.handler_sessions.put(session, || has_capacity(&self.handler_pool));
        }
    }

    /// Runs statements of ours on a session that is kept for the next. Nobody has asked such a
    /// session whether it still answers: if it was ended meanwhile, that is the statement's error,
    /// and the caller tries again.
    pub(crate) async fn run_cached<T>(
        &self,
        operation: impl AsyncFnOnce(&mut MySqlConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut session = self.acquire_session().await?;
        let answer = self.with_timeout(operation(&mut session.connection)).await;
        match &answer {
            Ok(_) => self.release_session(session),
            // What ended this connection may have ended those that are kept.
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

    /// Gives what is kept back to the pools: ours, where every connection is asked whether it still
    /// answers, and the handlers', where it is closed.
    pub(crate) fn release_idle_sessions(&self) {
        self.own_sessions.clear();
        self.handler_sessions.clear();
    }

    /// Waits until no connection is in use, but not longer than this: what was cut off has been
    /// rolled back then, or its session was ended.
    pub(crate) async fn wait_until_idle(&self, within: Duration) -> bool {
        let resting = async {
            while self.pool.num_idle() + self.own_sessions.idle_count() < self.pool.size() as usize
                || self.handler_pool.num_idle() + self.handler_sessions.idle_count()
                    < self.handler_pool.size() as usize
            {
                tokio::time::sleep(IDLE_POLL_INTERVAL).await;
            }
        };
        timeout(within, resting).await.is_ok()
    }

    /// Hangs up all connections that are not in use, without asking whether they still answer. For
    /// a process that was frozen: the other end may be gone without a word, and the clock may have
    /// stood still.
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

/// Whether a pool has a connection to give, or may open another.
pub(super) fn has_capacity(pool: &MySqlPool) -> bool {
    pool.num_idle() > 0 || pool.size() < pool.options().get_max_connections()
}
