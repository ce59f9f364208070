//! Connections for this program's own statements, and the part of them that is reserved for the
//! engine.
//!
//! A program may use one [`Database`] for play and for its own calls: it appends events, and polls
//! the ledger for each request. Its calls together take at most half of the connections, so that
//! play always has the other half.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{MySql, MySqlConnection};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::Database;

/// Limits how many connections callers of the library take at the same time. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct CallerLimit(Arc<Semaphore>);

impl CallerLimit {
    /// Half of `connections`, at least one.
    pub(super) fn half_of(connections: u32) -> Self {
        CallerLimit(Arc::new(Semaphore::new((connections as usize / 2).max(1))))
    }
}

/// A connection for this program's own statements.
#[derive(Debug)]
pub(crate) struct OwnConnection {
    connection: PoolConnection<MySql>,
    /// Held by a caller of the library. Dropped after the connection.
    _permit: Option<OwnedSemaphorePermit>,
}

impl OwnConnection {
    pub(super) fn new(
        connection: PoolConnection<MySql>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Self {
        OwnConnection { connection, _permit: permit }
    }

    /// Lets another caller take a connection, although this one stays open.
    pub(super) fn release_permit(&mut self) {
        self._permit = None;
    }

    pub(super) fn set_permit(&mut self, permit: Option<OwnedSemaphorePermit>) {
        self._permit = permit;
    }

    pub(super) fn into_pooled(self) -> PoolConnection<MySql> {
        self.connection
    }

    /// Closes the connection when it is dropped, instead of returning it to the pool.
    pub(crate) fn close_on_drop(&mut self) {
        self.connection.close_on_drop();
    }
}

impl Deref for OwnConnection {
    type Target = MySqlConnection;

    fn deref(&self) -> &MySqlConnection {
        &self.connection
    }
}

impl DerefMut for OwnConnection {
    fn deref_mut(&mut self) -> &mut MySqlConnection {
        &mut self.connection
    }
}

impl Database {
    /// This database for the engine, whose statements do not wait for those of other callers.
    pub(crate) fn for_engine(&self) -> Self {
        Database { caller_limit: None, ..self.clone() }
    }

    /// Takes a connection for this program's own statements.
    pub(crate) async fn acquire(&self) -> Result<OwnConnection, sqlx::Error> {
        let permit = self.wait_for_permit().await?;
        self.acquire_with(permit).await
    }

    pub(super) async fn acquire_with(
        &self,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<OwnConnection, sqlx::Error> {
        let _waiting = self.register_own_waiter();
        Ok(OwnConnection::new(self.acquire_from(&self.pool).await?, permit))
    }

    /// Waits until this caller may take a connection, as long as it would wait for the pool.
    pub(super) async fn wait_for_permit(
        &self,
    ) -> Result<Option<OwnedSemaphorePermit>, sqlx::Error> {
        let Some(CallerLimit(limit)) = &self.caller_limit else { return Ok(None) };
        let wait: Duration = self.pool.options().get_acquire_timeout();
        match timeout(wait, Arc::clone(limit).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Some(permit)),
            Ok(Err(_)) => Err(sqlx::Error::PoolClosed),
            Err(_) => Err(sqlx::Error::PoolTimedOut),
        }
    }
}
