//! Sessions that are kept between two batches, or two statements of ours.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::mysql::MySqlTransactionManager;
use sqlx::pool::PoolConnection;
use sqlx::{MySql, MySqlConnection, Row, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::{Database, UNUSED_FOR};
use crate::error::is_transient;

/// To sqlx a session is in a transaction for as long as it lives, so that one that a handler begins is a savepoint in ours,
/// and so that we can commit ours in one packet with the position: sqlx would send its commit in a packet of its own. To the
/// server it is in one only between [`ledger::begin`](crate::ledger::begin) and the commit.
const NEST: &str = "start transaction";
const SESSION_ID: &str = "rollback; select connection_id()";

/// How often it is looked whether all connections are at rest.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A connection, with the number that the server has for it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connection: PoolConnection<MySql>,
    /// What `kill` takes.
    pub(crate) id: u64,
    /// Since when it has been out of the pool.
    since: Instant,
    used: Instant,
}

/// Sessions between two batches. The pool would ask each of them whether it still answers, three times, before it gave it
/// out again: as many round trips as a batch has.
#[derive(Debug, Clone)]
pub(super) struct Kept(Arc<Mutex<Sessions>>);

#[derive(Debug)]
struct Sessions {
    idle: Vec<Session>,
    most: usize,
    /// Those who wait for a connection: what is kept goes to them first, or they might wait in vain.
    waiting: usize,
}

impl Kept {
    pub(super) fn new(most: usize) -> Self {
        Kept(Arc::new(Mutex::new(Sessions { idle: Vec::new(), most, waiting: 0 })))
    }

    /// For as long as the answer is held, somebody waits for a connection. If there is none left, one that is kept is let go.
    pub(super) fn wait(&self, is_none_left: bool) -> Waiting {
        let mut sessions = self.lock();
        sessions.waiting += 1;
        let let_go = if is_none_left { sessions.idle.pop() } else { None };
        drop(sessions);
        drop(let_go);
        Waiting(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        // What is in it is in order after a panic, too.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who waits for a connection.
pub(super) struct Waiting(Kept);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

impl Drop for Sessions {
    /// A connection goes back to its pool by a task. Without a runtime there is none, and it is closed.
    fn drop(&mut self) {
        if Handle::try_current().is_err() {
            self.idle.drain(..).for_each(|session| drop(session.connection.detach()));
        }
    }
}

impl Database {
    /// A session for a batch: one that was kept, or another of the pool.
    pub(crate) async fn session(&self) -> Result<Session, sqlx::Error> {
        if let Some(session) = self.kept.lock().idle.pop().filter(|session| session.used.elapsed() < UNUSED_FOR) {
            return Ok(session);
        }
        let since = Instant::now();
        let mut connection = self.acquire().await?;
        let open = async {
            MySqlTransactionManager::begin(&mut connection, Some(NEST.into_sql_str())).await?;
            sqlx::raw_sql(SESSION_ID).fetch_one(&mut *connection).await?.try_get(0)
        };
        let id = self.answered(open).await?;
        Ok(Session { connection, id, since, used: since })
    }

    /// Keeps a session for the next batch. It must be in order, and in no transaction of the server.
    pub(crate) fn keep(&self, session: Session) {
        let is_older = self.distrusted.borrow().is_some_and(|distrusted| session.since <= distrusted);
        // A handler may have forgotten to end what it began.
        let is_nested_once = MySqlTransactionManager::get_transaction_depth(&session.connection) == 1;
        let mut kept = self.kept.lock();
        if !is_older && is_nested_once && kept.idle.len() < kept.most && (kept.waiting == 0 || self.has_room()) {
            kept.idle.push(Session { used: Instant::now(), ..session });
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

    /// Whether the pool has a connection to give, or may open another.
    pub(super) fn has_room(&self) -> bool {
        self.pool.num_idle() > 0 || self.pool.size() < self.connections()
    }

    /// Gives what is kept back to the pool, where every connection is asked whether it still answers.
    pub(crate) fn let_go(&self) {
        self.kept.lock().idle.clear();
    }

    /// Waits until no connection is in use, but not longer than this: what was cut off has been rolled back then, or its
    /// session was ended.
    pub(crate) async fn at_rest(&self, within: Duration) -> bool {
        let resting = async {
            while self.pool.num_idle() + self.kept.lock().idle.len() < self.pool.size() as usize {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        timeout(within, resting).await.is_ok()
    }

    /// Hangs up all connections that are not in use, without asking whether they still answer. For who was frozen: the other
    /// end may be gone without a word, and the clock may have stood still.
    pub(crate) fn close_idle(&self) {
        let idle: Vec<Session> = self.kept.lock().idle.drain(..).collect();
        idle.into_iter().for_each(|session| drop(session.connection.detach()));
        while let Some(connection) = self.pool.try_acquire() {
            drop(connection.detach());
        }
    }
}
