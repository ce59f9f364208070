//! One batch, one projector, one transaction.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use anyhow::anyhow;
use futures_util::FutureExt;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Connection, MySql};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tracing::debug;

use crate::database::{Database, SESSION_SILENT_FOR};
use crate::error::{database_error, is_hang_up, is_transient, server_error};
use crate::event::{Event, Position};
use crate::ledger::{self, Entry, Locked};
use crate::lifecycle::Stage;
use crate::registry::Registered;

/// A handler that commits, or runs a statement that does (DDL), takes this savepoint away: releasing it
/// then fails with error 1305.
const SAVEPOINT: &str = "savepoint projectionist";
const RELEASE: &str = "release savepoint projectionist";

/// Events that move a projector from one position to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// Where the projector stands.
    pub(crate) after: Position,
    /// Where it will stand.
    pub(crate) through: Position,
    /// All events in between; those that it does not want are passed over.
    pub(crate) events: &'a [Event],
}

/// Why a batch was not applied. Nothing of it was.
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// The ledger no longer has the projector where this worker thought it was; `None`: not at all.
    Claim(Option<Entry>),
    /// The projector's own: an error, a panic, a commit of its own.
    Projector(anyhow::Error),
    /// The handler did not end in time: its own fault, or that of a connection that was cut off without a word.
    TimedOut(anyhow::Error),
    /// The moment's: a deadlock, a lock wait, a lost connection.
    Transient(anyhow::Error),
    /// The connection was lost while the handler sent something: the moment's fault too, unless it happens again and again.
    HungUp(anyhow::Error),
    /// Ours: a statement on the ledger that cannot succeed, for want of a grant perhaps.
    Ledger(sqlx::Error),
}

impl From<sqlx::Error> for ApplyError {
    /// Whatever our own statements run into is no fault of the projector's.
    fn from(error: sqlx::Error) -> Self {
        match is_transient(&error) {
            true => ApplyError::Transient(error.into()),
            false => ApplyError::Ledger(error),
        }
    }
}

/// The fence: the projector is still this stage's, and stands where the batch begins (design, section 3, step 7).
pub(crate) fn claim_holds(entry: &Entry, stage: Stage, after: Position) -> bool {
    stage.plays(&entry.status) && entry.position == after
}

/// Applies a batch: lock the ledger row, check the claim, run the handler, move the position, commit.
pub(crate) async fn apply(
    database: &Database,
    projector: &Registered,
    stage: Stage,
    batch: Batch<'_>,
    handler_timeout: Duration,
) -> Result<(), ApplyError> {
    let wanted: Vec<&Event> = batch.events.iter().filter(|event| projector.wants(event)).collect();

    let mut claim = Claim { connection: database.acquire().await?, database, handling: None };
    let connection = &mut claim.connection;
    let begin = async {
        let mut transaction = connection.begin().await?;
        let locked = ledger::lock(&mut transaction, &projector.id).await?;
        sqlx::raw_sql(SAVEPOINT).execute(&mut *transaction).await?;
        if handler_timeout >= SESSION_SILENT_FOR {
            let silent_for = handler_timeout + SESSION_SILENT_FOR;
            let allow = format!("set session wait_timeout = {}", silent_for.as_secs());
            sqlx::raw_sql(AssertSqlSafe(allow)).execute(&mut *transaction).await?;
        }
        Ok((transaction, locked))
    };
    let (mut transaction, Some(Locked { entry, session })) = database.answered(begin).await? else {
        return Err(ApplyError::Claim(None));
    };
    if !claim_holds(&entry, stage, batch.after) {
        return Err(ApplyError::Claim(Some(entry)));
    }
    if !wanted.is_empty() {
        claim.handling = Some(session);
        let handling = projector.projector.handle_batch(&wanted, &mut transaction);
        let handled = match timeout(handler_timeout, AssertUnwindSafe(handling).catch_unwind()).await {
            Ok(Ok(handled)) => handled,
            cut_off => {
                drop(transaction);
                claim.end().await?;
                return Err(match cut_off {
                    Ok(Err(panic)) => {
                        ApplyError::Projector(anyhow!("the handler panicked: {}", panic_message(panic.as_ref())))
                    }
                    _ => ApplyError::TimedOut(anyhow!(
                        "the handler took longer than {} s",
                        handler_timeout.as_secs_f32()
                    )),
                });
            }
        };
        claim.handling = None;
        if let Err(error) = handled {
            if let Some(error) = database_error(&error) {
                database.distrust(error);
            }
            return Err(match database_error(&error) {
                Some(lost) if is_hang_up(lost) => ApplyError::HungUp(error),
                Some(passing) if is_transient(passing) => ApplyError::Transient(error),
                _ => ApplyError::Projector(error),
            });
        }
        if let Err(error) = database.answered(sqlx::raw_sql(RELEASE).execute(&mut *transaction)).await {
            return Err(match server_error(&error) {
                Some(1305) => ApplyError::Projector(anyhow!(
                    "the handler committed the transaction, by itself or by a statement that does so (such as DDL): \
                     what it wrote is stored, but its position is not"
                )),
                _ => error.into(),
            });
        }
    }
    let commit = async {
        let has_moved = ledger::advance(&mut transaction, &projector.id, batch.after, batch.through).await?;
        match has_moved {
            true => transaction.commit().await?,
            false => transaction.rollback().await?,
        }
        Ok(has_moved)
    };
    match database.answered(commit).await? {
        true => Ok(()),
        false => Err(ApplyError::Claim(Some(entry))),
    }
}

/// The session that holds a projector's row. A handler that is cut off may be in the middle of a statement: its
/// connection is of no more use then, and the row would stay locked until the server has finished with the statement.
struct Claim<'a> {
    connection: PoolConnection<MySql>,
    database: &'a Database,
    /// The session, while a handler runs in it.
    handling: Option<u64>,
}

impl Claim<'_> {
    /// Ends the session in which a handler was cut off, and with it the lock.
    async fn end(mut self) -> Result<(), sqlx::Error> {
        if let Some(session) = self.handling {
            self.database.kill(session).await?;
            self.connection.close_on_drop();
            self.handling = None;
        }
        Ok(())
    }
}

impl Drop for Claim<'_> {
    /// The same, where nobody waits for it: the whole work was dropped, by a shutdown or for want of time.
    fn drop(&mut self) {
        let (Some(session), Ok(runtime)) = (self.handling, Handle::try_current()) else { return };
        self.connection.close_on_drop();
        let database = self.database.clone();
        runtime.spawn(async move {
            if let Err(error) = database.kill(session).await {
                debug!(session, %error, "a handler's session was not ended, and ends with its statement");
            }
        });
    }
}

/// Runs a projector's setup, outside any transaction: it creates tables.
pub(crate) async fn set_up(database: &Database, projector: &Registered) -> anyhow::Result<()> {
    let mut connection = database.acquire().await?;
    AssertUnwindSafe(projector.projector.setup(&mut connection))
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| Err(anyhow!("setup panicked: {}", panic_message(panic.as_ref()))))
}

/// Runs a projector's teardown, likewise.
pub(crate) async fn tear_down(database: &Database, projector: &Registered) -> anyhow::Result<()> {
    let mut connection = database.acquire().await?;
    AssertUnwindSafe(projector.projector.teardown(&mut connection))
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| Err(anyhow!("teardown panicked: {}", panic_message(panic.as_ref()))))
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let message = panic.downcast_ref::<&str>().copied();
    message.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)")
}
