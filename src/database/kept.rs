//! Sessions that are kept between two statements of ours, or between two batches of a projector.
//!
//! There are two kinds, and they never mix. Our own statements (the mark, the relay, the ledger, reading the log) run
//! on sessions that no handler and no setup has ever had. A handler's session is kept for its own projector, or for
//! every projector that leaves nothing behind in a session ([`SessionUse::Shared`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::mysql::MySqlTransactionManager;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, MySql, MySqlConnection, MySqlPool, Row, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;
use tokio::runtime::Handle;
use tokio::time::timeout;
use uuid::Uuid;

use super::ended::Commands;
use super::{Database, UNUSED_FOR};
use crate::model::error::is_transient;
use crate::model::projector::{ProjectorId, SessionUse};

/// How often it is looked whether all connections are at rest.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A session of ours.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connection: PoolConnection<MySql>,
    /// Since when it has been out of the pool.
    since: Instant,
    used: Instant,
}

/// A session for a handler.
#[derive(Debug)]
pub(crate) struct HandlerSession {
    pub(crate) connection: PoolConnection<MySql>,
    /// What `kill` takes.
    pub(crate) id: SessionId,
    /// The savepoint that begins each batch. The name is random, so that no handler sets it anew by accident.
    pub(crate) savepoint: String,
    /// What was sent on it by us, so that what a handler sent can be told from it.
    pub(super) commands: Commands,
    owner: Owner,
    since: Instant,
    used: Instant,
}

/// Which session of which server: the number alone may belong to somebody else after a failover or a restart. So each
/// handler's session holds a user lock with a name of its own, and the server says which of its sessions holds it.
#[derive(Debug, Clone)]
pub(crate) struct SessionId {
    pub(super) number: u64,
    pub(super) lock: String,
}

impl SessionId {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

/// Whose handlers may use a session.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    /// Every projector that leaves nothing behind.
    Anyone,
    Projector(ProjectorId),
    /// Nobody after this batch.
    Nobody,
}

impl Owner {
    fn of(id: &ProjectorId, session: SessionUse) -> Self {
        match session {
            SessionUse::Shared => Owner::Anyone,
            SessionUse::Own => Owner::Projector(id.clone()),
            SessionUse::EachEvent => Owner::Nobody,
        }
    }
}

/// What can be kept.
pub(super) trait Keep {
    fn used(&mut self) -> &mut Instant;
    fn into_connection(self) -> PoolConnection<MySql>;
}

impl Keep for Session {
    fn used(&mut self) -> &mut Instant {
        &mut self.used
    }

    fn into_connection(self) -> PoolConnection<MySql> {
        self.connection
    }
}

impl Keep for HandlerSession {
    fn used(&mut self) -> &mut Instant {
        &mut self.used
    }

    fn into_connection(self) -> PoolConnection<MySql> {
        self.connection
    }
}

/// Sessions that are not in use. The pool would ask each of them whether it still answers, three times, before it gave
/// it out again: as many round trips as a batch has.
#[derive(Debug)]
pub(super) struct Kept<S: Keep>(Arc<Mutex<Sessions<S>>>);

impl<S: Keep> Clone for Kept<S> {
    fn clone(&self) -> Self {
        Kept(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Sessions<S: Keep> {
    idle: Vec<S>,
    most: usize,
    /// How many callers wait for a connection: what is kept goes to them first, or they might wait in vain.
    waiting: usize,
}

impl<S: Keep> Kept<S> {
    pub(super) fn new(most: usize) -> Self {
        Kept(Arc::new(Mutex::new(Sessions { idle: Vec::new(), most, waiting: 0 })))
    }

    /// Registers a caller that waits for a connection, until the answer is dropped. If there is none left, the session
    /// that was used longest ago is given back.
    fn wait(&self, is_none_left: bool) -> Waiting<S> {
        let mut sessions = self.lock();
        sessions.waiting += 1;
        let given_back = (is_none_left && !sessions.idle.is_empty()).then(|| sessions.idle.remove(0));
        drop(sessions);
        drop(given_back);
        Waiting(self.clone())
    }

    /// The session that was used last, of those that are `fit`.
    fn take(&self, fit: impl Fn(&S) -> bool) -> Option<S> {
        let mut sessions = self.lock();
        let last = sessions.idle.iter().rposition(fit)?;
        Some(sessions.idle.remove(last))
    }

    fn keep(&self, mut session: S, has_room: impl Fn() -> bool) {
        let mut kept = self.lock();
        if kept.idle.len() < kept.most && (kept.waiting == 0 || has_room()) {
            *session.used() = Instant::now();
            kept.idle.push(session);
        }
    }

    /// Gives back what is kept.
    pub(super) fn clear(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        drop(idle);
    }

    fn idle(&self) -> usize {
        self.lock().idle.len()
    }

    /// Hangs up what is kept, without a word.
    fn detach(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        idle.into_iter().for_each(|session| drop(session.into_connection().detach()));
    }

    fn lock(&self) -> MutexGuard<'_, Sessions<S>> {
        // What is in it is in order after a panic, too.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller that waits for a connection.
struct Waiting<S: Keep>(Kept<S>);

impl<S: Keep> Drop for Waiting<S> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

impl<S: Keep> Drop for Sessions<S> {
    /// A connection goes back to its pool by a task. Without a runtime there is none, and it is closed.
    fn drop(&mut self) {
        if Handle::try_current().is_err() {
            self.idle.drain(..).for_each(|session| drop(session.into_connection().detach()));
        }
    }
}

impl Database {
    /// A session of ours: one that was kept, or another of the pool.
    pub(crate) async fn session(&self) -> Result<Session, sqlx::Error> {
        if let Some(session) = self.kept.take(|_| true).filter(|session| session.used.elapsed() < UNUSED_FOR) {
            return Ok(session);
        }
        let since = Instant::now();
        let connection = self.acquire().await?;
        Ok(Session { connection, since, used: since })
    }

    /// Keeps a session of ours for the next statement. It must be in order, and in no transaction.
    pub(crate) fn keep(&self, session: Session) {
        if !self.is_distrusted(session.since) {
            self.kept.keep(session, || has_room(&self.pool));
        }
    }

    /// A session for a batch of this projector: one that was kept, or a new one.
    pub(crate) async fn handler_session(
        &self,
        id: &ProjectorId,
        session: SessionUse,
    ) -> Result<HandlerSession, sqlx::Error> {
        let owner = Owner::of(id, session);
        let fit = |session: &HandlerSession| session.owner == owner && session.used.elapsed() < UNUSED_FOR;
        if let Some(session) = self.handler_sessions.take(fit) {
            return Ok(session);
        }
        let since = Instant::now();
        let mut connection = self.acquire_for_handler().await?;
        // To sqlx a session is in a transaction for as long as it lives, so that one that a handler begins is a
        // savepoint in ours, and so that we can commit ours in one packet with the position: sqlx would send its
        // commit in a packet of its own. To the server it is in one only from the claim to the commit.
        let nest = format!("{}; start transaction", self.settings.handler);
        let random = Uuid::now_v7().simple().to_string();
        let (lock, savepoint) = (format!("projectionist-{random}"), format!("p_{random}"));
        let name = format!("rollback; select connection_id(), get_lock('{lock}', 0)");
        let open = async {
            MySqlTransactionManager::begin(&mut connection, Some(AssertSqlSafe(nest).into_sql_str())).await?;
            sqlx::raw_sql(AssertSqlSafe(name)).fetch_one(&mut *connection).await?.try_get(0)
        };
        let number = self.answered(open).await?;
        let (id, commands) = (SessionId { number, lock }, Commands::default());
        Ok(HandlerSession { connection, id, savepoint, commands, owner, since, used: since })
    }

    /// Keeps a handler's session for the next batch. It must be in order, unchanged, and in no transaction.
    pub(crate) fn keep_handler_session(&self, session: HandlerSession) {
        // A handler may have forgotten to end what it began.
        let is_nested_once = MySqlTransactionManager::get_transaction_depth(&session.connection) == 1;
        if session.owner != Owner::Nobody && !self.is_distrusted(session.since) && is_nested_once {
            self.handler_sessions.keep(session, || has_room(&self.handler_pool));
        }
    }

    /// Runs statements of ours on a session that is kept for the next. Nobody has asked such a session whether it still
    /// answers: if it was ended meanwhile, that is the statement's error, and the caller tries again.
    pub(crate) async fn ask<T>(
        &self,
        asking: impl AsyncFnOnce(&mut MySqlConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut session = self.session().await?;
        let answer = self.answered(asking(&mut session.connection)).await;
        match &answer {
            Ok(_) => self.keep(session),
            // What ended this connection may have ended those that are kept.
            Err(error) if is_transient(error) => self.let_go(),
            Err(_) => {}
        }
        answer
    }

    pub(super) fn wait_for_ours(&self) -> impl Drop + use<> {
        self.kept.wait(!has_room(&self.pool))
    }

    pub(super) fn wait_for_a_handlers(&self) -> impl Drop + use<> {
        self.handler_sessions.wait(!has_room(&self.handler_pool))
    }

    /// Gives what is kept back to the pools: ours, where every connection is asked whether it still answers, and the
    /// handlers', where it is closed.
    pub(crate) fn let_go(&self) {
        self.kept.clear();
        self.handler_sessions.clear();
    }

    /// Waits until no connection is in use, but not longer than this: what was cut off has been rolled back then, or its
    /// session was ended.
    pub(crate) async fn at_rest(&self, within: Duration) -> bool {
        let resting = async {
            while self.pool.num_idle() + self.kept.idle() < self.pool.size() as usize
                || self.handler_pool.num_idle() + self.handler_sessions.idle() < self.handler_pool.size() as usize
            {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        timeout(within, resting).await.is_ok()
    }

    /// Hangs up all connections that are not in use, without asking whether they still answer. For a process that was
    /// frozen: the other end may be gone without a word, and the clock may have stood still.
    pub(crate) fn close_idle(&self) {
        self.kept.detach();
        self.handler_sessions.detach();
        for pool in [&self.pool, &self.handler_pool] {
            while let Some(connection) = pool.try_acquire() {
                drop(connection.detach());
            }
        }
    }
}

/// Whether a pool has a connection to give, or may open another.
pub(super) fn has_room(pool: &MySqlPool) -> bool {
    pool.num_idle() > 0 || pool.size() < pool.options().get_max_connections()
}
